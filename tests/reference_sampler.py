"""The uncached sampler, written from the published rules: every text token and every denoising step runs the whole
sequence through `forward`. Slow and plain on purpose; the generation of the package must give the same tokens."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_ttt import TttForConditionalGeneration
from modeling_ttt.published_ttt import convert_config
from pipelines.convert_ttt_to_hf import read_token_ids

PUBLISHED = Path(__file__).parent / "fixtures" / "ttt_published"


def load_published(name: str, **config_changes) -> TttForConditionalGeneration:
    """The golden model "a", "b" or "c", in eval mode, stopping at its `<|im_end|>`."""
    folder = PUBLISHED / name
    published = json.loads((folder / "config.json").read_text()) | config_changes
    ids = read_token_ids(folder / "generation.json")
    model = TttForConditionalGeneration(convert_config(published, ids.config_arguments()))
    weights = load_file(folder / "model.safetensors")
    renamed = {key.replace("model.", "model.language_model.", 1): value for key, value in weights.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 104, 105
    return model.eval()


def golden_cases(name: str) -> list[dict]:
    return json.loads((PUBLISHED / name / "generation.json").read_text())["cases"]


def golden_prompts(name: str) -> list[list[int]]:
    """The different prompts of a golden set, in order."""
    return list(dict.fromkeys(tuple(case["prompt"]) for case in golden_cases(name)))


@dataclass
class Trace:
    """What the reference computed: its forwards and their token positions."""

    forwards: int = 0
    positions: int = 0


@torch.no_grad()
def reference_generate(
    model: TttForConditionalGeneration,
    prompt: list[int],
    max_new_tokens: int,
    block_size: int = 26,
    steps: int = 2,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    prefix: float | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 0.0,
    order_bias: float = 0.0,
    do_sample: bool = False,
    process_text: Callable[[list[int], torch.Tensor], torch.Tensor] | None = None,
    seed: int | None = None,
    eos: int = 104,
    trace: Trace | None = None,
) -> list[int]:
    """
    The whole sequence, prompt included (a prompt may end with a begin token). Blocks are always written whole, so
    compare the common prefix where a span meets the limit. Noise, where there is any: per text token one Exp(1) draw
    over the text side; per denoising step one over (block, codes and end tokens), then one uniform draw over the block.
    """
    config, trace = model.config, trace if trace is not None else Trace()
    ids, generator = list(prompt), None if seed is None else torch.Generator().manual_seed(seed)
    ends = (config.end_of_audio_token_id, config.end_of_last_audio_token_id)
    codes = range(config.audio_code_id_start, config.audio_code_id_start + config.num_audio_codes)
    last = max(codes.stop - 1, *ends)
    candidates = torch.full((config.vocab_size,), -torch.inf)
    candidates[[*codes, *ends]] = 0.0

    def forward(sequence: list[int], span_ids: torch.Tensor | None = None) -> torch.Tensor:
        trace.forwards += 1
        trace.positions += len(sequence)
        ids = torch.tensor([sequence])
        if span_ids is None and config.is_block_causal:
            span_ids = model.model.get_span_ids(ids, block_length=block_size)
        return model(ids, span_ids=span_ids, use_cache=False).logits[0].float()

    def pick(logits: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(logits.shape).exponential_(generator=generator)
        return (logits.softmax(-1) / noise).argmax(-1)

    def still_denoised(block: list[int]) -> list[int]:
        """With a preference for earlier positions, what stands behind a decided end is left alone."""
        decided = [i for i, token in enumerate(block) if token in ends]
        return block[: decided[0]] if order_bias and decided else block

    begins = (config.begin_of_audio_token_id, config.begin_of_last_audio_token_id)
    while len(ids) - len(prompt) < max_new_tokens:
        if len(ids) > len(prompt) or ids[-1] not in begins:
            logits = forward(ids)[-1, : config.audio_token_id_start]
            if process_text is not None:
                logits = process_text(ids, logits)
            ids.append(int(pick(logits) if do_sample else logits.argmax()))
        if ids[-1] == eos:
            break
        if ids[-1] not in begins:
            continue
        closed = False
        while not closed and len(ids) - len(prompt) < max_new_tokens:
            start, block = len(ids), [config.mask_token_id] * block_size
            share, rest = divmod(block_size, steps)
            kept_state, step = None, 0
            while config.mask_token_id in still_denoised(block):
                logits = forward(ids + block)[start:]
                if guidance:
                    masks = [config.mask_token_id] * start
                    # With block-causal spans what is masked before the block does not see it.
                    apart = torch.tensor([[0] * start + [1] * len(block)]) if config.is_block_causal else None
                    unconditional = forward(masks + block, apart)[start:]
                    logits = unconditional + (guidance + 1) * (logits - unconditional)
                logits = logits + candidates
                if temperature > 0:
                    narrow = (logits / temperature)[:, codes.start : last + 1]
                    if top_k is not None:
                        narrow = narrow.masked_fill(narrow < narrow.topk(top_k).values[:, -1:], -torch.inf)
                    if top_p is not None:
                        for position in narrow:
                            order = position.argsort(descending=True)
                            total = 0.0
                            for candidate in order.tolist():
                                drop = total >= top_p
                                total += float(position.softmax(-1)[candidate]) if not drop else 0.0
                                if drop:
                                    position[candidate] = -torch.inf
                    chosen = pick(narrow) + codes.start
                else:
                    chosen = logits.argmax(-1)
                probabilities = logits.double().softmax(-1)
                if remasking == "low_confidence":
                    confidence = [float(p[token]) for p, token in zip(probabilities, chosen, strict=True)]
                elif remasking == "entropy":
                    entropy = torch.special.entr(probabilities).sum(-1)
                    confidence = (-entropy).exp().tolist()
                else:
                    confidence = torch.rand(block_size, generator=generator).tolist()
                undecided = [i for i, token in enumerate(still_denoised(block)) if token == config.mask_token_id]
                undecided.sort(key=lambda i: order_bias * i - confidence[i])
                count = share + (step < rest)
                if threshold is not None:
                    count = max(1, sum(confidence[i] >= threshold for i in undecided))
                if prefix is not None:
                    undecided.sort()
                    joint, count = confidence[undecided[0]], 1
                    while count < len(undecided) and joint * confidence[undecided[count]] >= prefix:
                        joint *= confidence[undecided[count]]
                        count += 1
                for i in undecided[:count]:
                    block[i] = int(chosen[i])
                step += 1
                decided = next((t for t in block if t in (config.mask_token_id, *ends)), None)
                if kept_state is None and decided in ends and generator is not None:
                    kept_state = generator.get_state()  # the published loop goes on; no draw of ours depends on it
            if kept_state is not None:
                generator.set_state(kept_state)
            end = next((i for i, token in enumerate(block) if token in ends), None)
            closed = end is not None
            ids += block[: end + 1] if closed else block
    return ids
