"""Generation for the purely diffused baseline (`text_objective="diffusion"`): the whole response, text and audio alike,
is one span that block diffusion writes. TtT's own generation is in generation_ttt.py."""

from typing import Any

import torch
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .cache_ttt import TttCache
from .denoising_ttt import denoise, make_generators
from .generation_config_ttt import TttGenerationConfig
from .generation_ttt import refuse_overflow
from .runner_ttt import TttRunner


@torch.no_grad()
def diffuse_response(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: TttGenerationConfig,
    **model_kwargs: Any,
) -> torch.Tensor:
    """
    A decoding loop for `model.generate(..., custom_generate=diffuse_response)`.

    1. Prompts: one forward stores their keys and values, which the response never changes.
    2. Append a block of `audio_block_size` mask tokens to the response.
    3. One forward over the response alone, behind the cache, gives the block's logits over the whole vocabulary.
    4. Fix the most confident undecided positions, as inside an audio span of TtT; back to 3 until the block is decided.
    5. The response ends at the first end-of-sequence token; what stands after it is dropped. Without one, back to 2.

    The options that act inside TtT's audio spans (`audio_steps_per_block`, `audio_remasking`, `audio_temperature`, ...)
    act on the whole response here; guidance does not exist, and processors and stopping criteria other than length and
    end of sequence are not asked.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): prompts, padded where the `attention_mask` among
            `model_kwargs` is 0.

    Returns:
        `torch.LongTensor` of shape `(batch, length + new)`: prompts, responses, then the padding token.

    Raises:
        ValueError: if `audio_guidance_scale` is not 0, `seed` lists another number of rows, or prompt and response do
            not fit the model's context.
    """
    options, device, mask_token = generation_config, input_ids.device, model.config.mask_token_id
    if options.audio_guidance_scale:
        raise ValueError(
            f"`audio_guidance_scale` is {options.audio_guidance_scale}; a diffused response has none, use 0."
        )
    kept = model_kwargs.get("attention_mask")
    kept = torch.ones_like(input_ids) if kept is None else kept
    prompts = [ids[is_kept.bool()].tolist() for ids, is_kept in zip(input_ids, kept, strict=True)]
    ends = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    max_new_tokens = options.max_length - input_ids.shape[1]

    # 1. Prompts.
    backbone, longest = model.config.get_text_config(), max(map(len, prompts))
    refuse_overflow(longest, max_new_tokens, getattr(backbone, "max_position_embeddings", None))
    cache = TttCache(backbone.num_hidden_layers, len(prompts))
    runner = TttRunner(model, cache, mask_token, longest + max_new_tokens)
    filled = torch.tensor([prompt + [mask_token] * (longest - len(prompt)) for prompt in prompts], device=device)
    is_prompt = torch.arange(longest, device=device) < torch.tensor([[len(ids)] for ids in prompts], device=device)
    runner.prompt(prompts, [0] * len(prompts), model.model.get_span_ids(filled, is_prompt))

    responses: list[list[int]] = [[] for _ in prompts]  # decided, but for the block at the end
    live = list(range(len(prompts)))
    generators = make_generators(options, len(prompts), device)
    while live:
        # 2. A block of mask tokens, never past the limit; rows share their steps, and each its own number of tokens.
        sizes = {row: min(options.audio_block_size, max_new_tokens - len(responses[row])) for row in live}
        width = max(sizes.values())
        block = torch.full((len(live), width), mask_token, device=device)
        is_open = torch.arange(width, device=device) < torch.tensor([[sizes[row]] for row in live], device=device)
        undecided = is_open.clone()
        step = 0
        while undecided.any():
            # 3. Logits of the blocks that are not decided yet.
            active = undecided.any(-1).nonzero().squeeze(-1)
            rows = [live[i] for i in active.tolist()]
            queries = [
                responses[row] + ids[: sizes[row]].tolist() for row, ids in zip(rows, block[active], strict=True)
            ]
            starts = [len(prompts[row]) for row in rows]
            hidden = runner.step(rows, queries, starts, list(starts))
            states = hidden.new_zeros(len(rows), width, hidden.shape[-1])
            for i, row in enumerate(rows):
                states[i, : sizes[row]] = hidden[i, len(responses[row]) : len(queries[i])]
            logits = runner.project(states, 0, model.config.vocab_size)  # (rows, block, vocab)

            # 4. Tokens, and which of them stay.
            tokens, fixed = denoise(
                logits,
                undecided[active],
                [sizes[row] for row in rows],
                [step] * len(rows),
                options,
                [generators[row] for row in rows],
                forbidden=[mask_token],
            )
            block[active] = torch.where(fixed, tokens, block[active])
            undecided[active] &= ~fixed
            # What stands after a decided end token is dropped anyway.
            for i, row in enumerate(live):
                end = _first_end(block[i, : sizes[row]].tolist(), ends)
                if end is not None:
                    undecided[i, end:] = False
            step += 1

        # 5. The end of the response, or another block.
        still_live = []
        for i, row in enumerate(live):
            decided = block[i, : sizes[row]].tolist()
            end = _first_end(decided, ends)
            responses[row] += decided if end is None else decided[: end + 1]
            if end is None and len(responses[row]) < max_new_tokens:
                still_live.append(row)
        live = still_live

    width = max(map(len, responses))
    padding = options.pad_token_id if options.pad_token_id is not None else ends[0] or 0
    answers = torch.tensor([ids + [padding] * (width - len(ids)) for ids in responses], device=device)
    return torch.cat([input_ids, answers], dim=1)


def _first_end(tokens: list[int], ends: list[int]) -> int | None:
    """Position of the first end-of-sequence token."""
    return next((position for position, token in enumerate(tokens) if token in ends), None)


__all__ = ["diffuse_response"]
