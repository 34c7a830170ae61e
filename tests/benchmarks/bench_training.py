"""Cost of training: packed rows with our loss against the published way (every row padded to 2,048 tokens, dense mask,
logits of all positions in float32), on a model of Qwen2-0.5B's shape with a vocabulary of 168,072.

    python tests/benchmarks/bench_training.py --parts speed --rows 1   # minutes a step on one core
    python tests/benchmarks/bench_training.py --parts memory
    python tests/benchmarks/bench_training.py --parts memory --activation_checkpointing
    python tests/benchmarks/bench_training.py --device cuda

Both ways are first checked to have the same loss. A step is forward, backward and AdamW, all in bfloat16. Timed steps
of both ways take turns, and seconds depend on the machine: read the ratios. The peak of memory includes weights,
gradients and AdamW's state. On a GPU it is the allocator's; without one it is counted, tensor by tensor, on the meta
device.

The lengths of the published samples were not published. The samples here have the published tasks (the same number of
each), form, code rate and system prompts, and durations as corpora of these tasks have them (`TASKS`); `--scale` makes
all of them longer.
"""

import math
import random
import sys
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import HfArgumentParser
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))

from modeling_ttt import TttConfig, TttForConditionalGeneration  # noqa: E402
from modeling_ttt.attention_ttt import compute_span_ids  # noqa: E402
from modeling_ttt.objective_ttt import (  # noqa: E402
    diffusion_targets,
    draw_noise_levels,
    mask_tokens,
    next_token_targets,
    preserve_prefixes,
    sample_weights,
)
from modeling_ttt.samples_ttt import IGNORE_INDEX, Samples, find_sample_starts  # noqa: E402
from processing import TttDataCollator, TttTokenIds, interleave, pack_examples  # noqa: E402

CODES_PER_SECOND = 12.5
TEXT_PER_SECOND = 3.3  # tokens of the words spoken
SYSTEM_TOKENS = 75  # a published system prompt with ChatML around it
PAD_TOKEN, TURN_END = 151643, 151645
# Seconds heard, tokens of written instruction, seconds spoken in answer, tokens of an answer without speech.
TASKS = {
    "recognition": ((2, 10), 0, None, 0),  # answers with the heard codes
    "synthesis": (None, 0, (2, 10), 0),
    "spoken chat": ((2, 6), 0, (6, 24), 0),
    "text chat": (None, 60, None, 200),
    "captioning": ((8, 20), 12, None, 16),
    "emotion": ((2, 8), 12, None, 2),
    "scene": ((10, 10), 12, None, 2),
    "continuation": (None, 0, (20, 60), 0),
}


@dataclass
class Arguments:
    """What to measure."""

    parts: list[str] = field(default_factory=lambda: ["speed", "memory"], metadata={"help": "speed, memory or both."})
    rows: int = field(default=4, metadata={"help": "Rows of a training step, 4 as published; 1 will do for speed."})
    row_length: int = field(default=2048, metadata={"help": "Tokens of a row, padding included."})
    scale: list[float] = field(
        default_factory=lambda: [1.0, 1.5], metadata={"help": "For speed: factors of all durations."}
    )
    layers: int = field(default=24, metadata={"help": "Layers of the model."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "For memory: recompute activations."})
    repeats: int = field(default=2, metadata={"help": "Timed steps of each way."})
    device: str = field(default="cpu", metadata={"help": "Where the steps run."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


def build_model(arguments: Arguments, **options) -> TttForConditionalGeneration:
    """A random model in training mode: Qwen2-0.5B's shape, and TttConfig's own vocabulary, the published one."""
    backbone = {
        "vocab_size": 168_072,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32_768,
    }
    torch.manual_seed(0)
    strategies = {"clean_batch_probability": 0.0, "span_truncation_probability": 0.0}
    config = TttConfig(text_config=backbone | options, **strategies)
    return TttForConditionalGeneration(config).train()


def draw_example(rng: random.Random, task: str, scale: float, ids: TttTokenIds) -> dict[str, list[int]]:
    """Token ids of one sample of a task, in the published form; what they say is random."""
    heard, instruction, spoken, written = TASKS[task]

    def codes(seconds) -> list[int]:
        return [rng.randrange(ids.num_audio_codes) for _ in range(round(CODES_PER_SECOND * seconds * scale))]

    def text(number) -> list[int]:
        return [rng.randrange(1_000, 150_000) for _ in range(max(1, round(number)))]

    audio = codes(rng.uniform(*heard)) if heard else []
    speech = audio if task == "recognition" else codes(rng.uniform(*spoken)) if spoken else []
    words = text(TEXT_PER_SECOND * len(speech) / CODES_PER_SECOND) if speech else text(written * scale)
    prompt = text(SYSTEM_TOKENS) if task != "continuation" else text(1)
    if audio:
        prompt += [ids.begin_of_audio_token_id, *ids.codes_to_ids(audio), ids.end_of_prompt_audio_token_id]
    prompt += text(instruction) if instruction else []
    prompt += words if task == "synthesis" else []
    answer = interleave(words, speech, ids, end_of_turn=True)
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


class Examples:
    """Samples without end, every task in turn."""

    def __init__(self, config: TttConfig, scale: float):
        names = [name for name in vars(config) if name in TttTokenIds.__dataclass_fields__]
        self.ids = TttTokenIds(**{name: getattr(config, name) for name in names}, end_of_turn_token_id=TURN_END)
        self.scale, self.rng, self.queue = scale, random.Random(0), []

    def rows(self, number: int) -> list[dict[str, list[int]]]:
        """So many samples."""
        while len(self.queue) < number:
            self.queue += [draw_example(self.rng, task, self.scale, self.ids) for task in TASKS]
        taken, self.queue = self.queue[:number], self.queue[number:]
        return taken

    def filling(self, rows: int, length: int) -> list[dict[str, list[int]]]:
        """As many of the next samples as fit into packed rows, from the longest to the shortest."""
        taken = self.rows(1)
        while len(self.packed(taken, length)["input_ids"]) <= rows:
            taken += self.rows(1)
        self.queue.insert(0, taken.pop())
        return sorted(taken, key=lambda example: -len(example["input_ids"]))

    def packed(self, examples: list[dict[str, list[int]]], length: int) -> dict[str, torch.Tensor]:
        """Packed as in this repository."""
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        rows = pack_examples(columns, length)
        features = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        return TttDataCollator(pad_token_id=PAD_TOKEN)(features)

    def padded(self, examples: list[dict[str, list[int]]], length: int) -> dict[str, torch.Tensor]:
        """One a row, every row filled up to `length`."""
        return TttDataCollator(pad_token_id=PAD_TOKEN, pad_to_multiple_of=length, max_length=length)(examples)


def our_loss(model: TttForConditionalGeneration, batch: dict, generator: torch.Generator | None = None):
    return model(**batch, generator=generator).loss


def published_loss(model: TttForConditionalGeneration, batch: dict, generator: torch.Generator | None = None):
    """The same objective with a dense mask and all logits in float32. One log-softmax serves both losses, which is the
    least that full logits can cost."""
    config, ids, labels = model.config, batch["input_ids"], batch["labels"]
    padding, positions = batch.get("attention_mask"), batch.get("position_ids")
    starts = find_sample_starts(labels, positions)
    labels = labels.masked_fill(starts, IGNORE_INDEX)
    samples = Samples.from_starts(starts, labels)

    is_audio = labels >= config.audio_token_id_start
    generator = torch.default_generator if generator is None else generator
    torch.rand(1, generator=generator)  # the draw of p_mix, which is 0
    maskable = preserve_prefixes(is_audio, samples, config.prefix_preservation_probability, generator)
    levels = draw_noise_levels(samples.count, config.noise_epsilon, False, generator, ids.device)
    levels = levels[samples.ids]
    noisy_ids, masked = mask_tokens(ids, maskable, levels, config.mask_token_id, generator)

    spans = compute_span_ids(ids, config.audio_token_id_start, config.audio_token_id_end, padding, positions)
    piece = starts.cumsum(-1)
    order = torch.arange(ids.shape[1], device=ids.device)
    allowed = order <= order[:, None]  # (query, key)
    allowed = allowed | ((spans[:, None] == spans[..., None]) & (spans[:, None] >= 0))  # (rows, query, key)
    allowed &= piece[:, None] == piece[..., None]
    if padding is not None:
        allowed &= padding[:, None].bool() | (order == order[:, None])
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=ids.device)
    mask = mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]

    logits = model(input_ids=noisy_ids, attention_mask=mask, position_ids=positions).logits.float()
    log_probabilities = logits.log_softmax(-1)  # (rows, length, vocab)
    del logits
    weight = sample_weights(labels, samples)
    sides = (
        next_token_targets(labels, (labels != IGNORE_INDEX) & ~is_audio, samples, weight),
        diffusion_targets(labels, masked, samples, levels, samples.total(maskable), weight),
    )
    targets = torch.stack([targets for targets, _ in sides], -1)  # (rows, length, 2)
    weights = torch.stack([weights for _, weights in sides], -1)
    losses = -log_probabilities.gather(-1, targets.clamp(min=0)) * weights
    return losses.masked_fill(targets == IGNORE_INDEX, 0.0).sum()


def check_losses() -> None:
    """Raises unless both ways, and both layouts, have the same loss under the same noise."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = build_model(Arguments(layers=2), **small)
    source = Examples(model.config, 0.3)
    examples = source.filling(2, 512)
    batches = source.packed(examples, 512), source.padded(examples, 512)
    with torch.no_grad():
        losses = [
            loss(model, batch, torch.Generator().manual_seed(1)).item()
            for loss in (our_loss, published_loss)
            for batch in batches
        ]
    if max(losses) - min(losses) > 1e-4 * max(losses):
        raise SystemExit(f"The losses differ: {losses}")


class Steps:
    """Training steps of one model."""

    def __init__(self, arguments: Arguments, activation_checkpointing: bool = False):
        self.device = arguments.device
        self.model = build_model(arguments).to(self.device, torch.bfloat16)
        if activation_checkpointing:
            self.model.activation_checkpointing_enable()
        is_real = self.device != "meta"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=is_real, foreach=False)

    def __call__(self, loss, batch: dict[str, torch.Tensor]) -> float:
        """Takes a step; returns its seconds."""
        if self.device != "meta":  # there, ids stay real
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        start = time.perf_counter()
        loss(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure_speed(arguments: Arguments) -> None:
    steps = Steps(arguments)
    print("\nTokens per second, padding not counted; rows of", arguments.row_length)
    print(f"{'mean tokens a sample':>22}{'packed':>10}{'published way':>16}{'ratio':>8}")
    for scale in arguments.scale:
        source = Examples(steps.model.config, scale)
        # A padded row costs the same whatever it holds, which on average is a sample of mean length.
        mean = sum(len(example["input_ids"]) for example in source.rows(800)) / 800
        steps(our_loss, source.packed(source.rows(1), 128))  # warm up
        ours, theirs = [0.0, 0.0], [0.0, 0.0]  # tokens, seconds
        for _ in range(arguments.repeats):
            examples = source.filling(arguments.rows, arguments.row_length)
            ours[0] += sum(len(example["input_ids"]) for example in examples)
            ours[1] += steps(our_loss, source.packed(examples, arguments.row_length))
            theirs[0] += mean * arguments.rows
            theirs[1] += steps(published_loss, source.padded(examples[: arguments.rows], arguments.row_length))
        speeds = [tokens / seconds for tokens, seconds in (ours, theirs)]
        print(f"{mean:22.0f}{speeds[0]:10.1f}{speeds[1]:16.1f}{speeds[0] / speeds[1]:8.2f}", flush=True)


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of all live tensors on the meta device, now and at the peak. Nothing is computed there, so a step
    of any size takes seconds and no memory. Token ids, masks and noise are real, for they decide what is scored; where
    they meet a meta tensor they become one.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}

    def count(self, tensors) -> None:
        for tensor in tensors:
            if not (torch.is_tensor(tensor) and tensor.is_meta):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.storages:
                self.storages[key] = weakref.ref(storage, lambda _, key=key, size=size: self.release(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def release(self, key: int, size: int) -> None:
        del self.storages[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(torch.is_tensor(leaf) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(lambda leaf: leaf.to("meta") if torch.is_tensor(leaf) else leaf, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("meta")
        result = func(*args, **kwargs)
        self.count(tree_leaves(result))
        return result


def memory_efficient_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """What `scaled_dot_product_attention` runs on a GPU where there is a mask; on the meta device it would not."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) if groups > 1 else states for states in (key, value))
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def count_peak(arguments: Arguments, loss, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Bytes before a step and at its peak: of the second step, for AdamW's state is made in the first."""
    with torch.device("meta"):
        steps = Steps(replace(arguments, device="meta"), arguments.activation_checkpointing)
    with LiveBytes() as live, patch.object(functional, "scaled_dot_product_attention", memory_efficient_attention):
        live.count([*steps.model.parameters(), *steps.model.buffers()])
        steps(loss, batch)
        live.peak = before = live.now
        steps(loss, batch)
    return before, live.peak


def measure_peak(arguments: Arguments, loss, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """The same of a real step, as a GPU's allocator sees it."""
    steps = Steps(arguments, arguments.activation_checkpointing)
    steps(loss, batch)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps(loss, batch)
    return before, torch.cuda.max_memory_allocated()


def measure_memory(arguments: Arguments) -> None:
    rows, length = arguments.rows, arguments.row_length
    with torch.device("meta"):
        source = Examples(build_model(replace(arguments, layers=1)).config, 1.0)
    some, many = source.rows(rows), source.filling(rows, length)
    packed = source.packed(many, length)
    cases = {
        f"{rows} samples, {rows} padded rows for full logits": (
            source.packed(some, length),
            source.padded(some, length),
        ),
        f"{len(many)} samples, {rows} packed rows for both": (packed, packed),
    }
    peak_of = count_peak if arguments.device == "cpu" else measure_peak
    how = "recomputed" if arguments.activation_checkpointing else "kept"
    print(f"\nPeak memory of a step, GB; rows of {length}, activations {how}")
    print(f"{'':>48}{'before':>8}{'ours':>8}{'full logits':>13}{'ratio':>8}")
    for name, batches in cases.items():
        (before, ours), (_, theirs) = (
            peak_of(arguments, loss, batch) for loss, batch in zip((our_loss, published_loss), batches, strict=True)
        )
        sizes = f"{before / 1e9:8.2f}{ours / 1e9:8.2f}{theirs / 1e9:13.2f}"
        print(f"{name:>48}{sizes}{ours / theirs:8.2f}", flush=True)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if unknown := set(arguments.parts) - {"speed", "memory"}:
        raise SystemExit(f"--parts {' '.join(unknown)}: choose speed, memory or both.")
    check_losses()
    print(f"{arguments.layers} layers, {arguments.device}, {arguments.threads} thread(s)")
    for part in arguments.parts:
        {"speed": measure_speed, "memory": measure_memory}[part](arguments)


if __name__ == "__main__":
    main()
