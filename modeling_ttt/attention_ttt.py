"""Who sees whom in TtT: span ids and the modality-aware mask, one rule for training, prompts, denoising steps and
guidance. What is masked for the sake of the loss is in objective_ttt.py.

A token sees every token up to its own place and, inside a span, all of its span. So the numbers of the spans say
everything: what is given one number is read as a whole, and what has been given none (-1) is causal. With block-causal
spans (after block diffusion, arXiv 2503.09573) every block of a response's span has a number of its own, so that a code
sees the blocks before its own and its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, blockwise_overlay, causal_mask_function, or_masks

NO_SPAN = -1


def compute_span_ids(
    input_ids: torch.Tensor,
    audio_token_id_start: int,
    audio_token_id_end: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    end_of_prompt_audio_token_id: int | None = None,
    causal_prompt_audio: bool = False,
    block_length: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Number the audio spans of each row: a span is a maximal run of audio-side tokens (the published code's rule).

    Must be given the clean ids, before any noise. The result is what `create_causal_mask` calls `block_sequence_ids`.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): clean token ids.
        audio_token_id_start, audio_token_id_end (`int`): first id of the audio side, and the one after its last.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 marks padding, which is in no span.
        position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*):
            A break in the positions (packed sequences) also ends a span.
        end_of_prompt_audio_token_id (`int`, *optional*):
            What closes a user's audio. It is complete in every prompt and a response never writes this token, so that
            training and generation agree without knowing where the prompt ends. Needed for the next two.
        causal_prompt_audio (`bool`, *optional*, defaults to `False`):
            Leave a user's audio without a number, hence causal (the paper's rule for prompts).
        block_length (`int` or `torch.LongTensor` of shape `(batch, length)`, *optional*):
            Number blocks of this many tokens, counted from the start of each span, instead of whole spans; a user's
            audio stays whole. In a tensor, the tokens of a span have one length.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: 0, 1, ... inside the spans of a row, -1 outside.
    """
    is_audio = (input_ids >= audio_token_id_start) & (input_ids < audio_token_id_end)
    if attention_mask is not None:
        is_audio = is_audio & attention_mask.bool()

    starts = is_audio.clone()
    starts[:, 1:] &= ~is_audio[:, :-1]
    if position_ids is not None:
        starts[:, 1:] |= is_audio[:, 1:] & (position_ids[:, 1:] - position_ids[:, :-1] != 1)
    run = starts.long().cumsum(-1) - 1  # (batch, length)
    span_ids = run.masked_fill(~is_audio, NO_SPAN)

    if not causal_prompt_audio and block_length is None:
        return span_ids
    # Mark, per run, whether its last token is followed by the closing token; column 0 takes what is in no run.
    closes = torch.zeros_like(is_audio)
    closes[:, :-1] = is_audio[:, :-1] & (input_ids[:, 1:] == end_of_prompt_audio_token_id)
    if attention_mask is not None:
        closes[:, :-1] &= attention_mask[:, 1:].bool()
    if position_ids is not None:  # what stands at the start of the next packed sequence closes nothing
        closes[:, :-1] &= position_ids[:, 1:] - position_ids[:, :-1] == 1
    is_prompt_run = torch.zeros(input_ids.shape[0], input_ids.shape[1] + 1, dtype=torch.long, device=input_ids.device)
    is_prompt_run.scatter_add_(1, span_ids + 1, closes.long())
    in_prompt_run = is_prompt_run.gather(1, span_ids + 1) > 0
    if block_length is not None:
        index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        place = index - (index * starts).cummax(-1).values  # in the span
        starts = starts | (is_audio & ~in_prompt_run & (place % block_length == 0))
        span_ids = (starts.long().cumsum(-1) - 1).masked_fill(~is_audio, NO_SPAN)
    return span_ids.masked_fill(in_prompt_run, NO_SPAN) if causal_prompt_audio else span_ids


def overlay_response_spans(span_ids: torch.Tensor, scored: torch.Tensor, sample_starts: torch.Tensor) -> torch.Tensor:
    """
    Make each maximal run of scored tokens one span, text and audio alike (the purely diffused model, which predicts a
    response as a whole). Other tokens keep their span.

    Args:
        span_ids (`torch.LongTensor` of shape `(batch, length)`): from `compute_span_ids`.
        scored, sample_starts (`torch.BoolTensor` of shape `(batch, length)`): labels, and first tokens of samples.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`.
    """
    starts = scored.clone()
    starts[:, 1:] &= ~scored[:, :-1] | sample_starts[:, 1:]
    first_free = span_ids.amax(-1, keepdim=True) + 1
    return torch.where(scored, first_free + starts.long().cumsum(-1) - 1, span_ids)


def open_span_ids(
    starts: Sequence[int],
    ends: Sequence[int],
    length: int,
    device: torch.device | str | None = None,
    block_lengths: Sequence[int | None] | None = None,
) -> torch.Tensor:
    """
    Number the one span that each row is writing, which reaches from `starts` to `ends` (excluded; equal for no span).

    Args:
        block_lengths (`list[int]`, *optional*): number its blocks of this many tokens (block-causal spans), of each
            row; a row with `None` has a whole span.

    Returns:
        `torch.LongTensor` of shape `(rows, length)`: 0 inside, or 0, 1, ... in its blocks; -1 outside.
    """
    place = torch.arange(length, device=device)
    start, end = (torch.tensor(bounds, device=device)[:, None] for bounds in (starts, ends))
    sizes = [size or length for size in block_lengths or [length]]
    numbers = (place - start) // torch.tensor(sizes, device=device)[:, None]
    return torch.where((place >= start) & (place < end), numbers, NO_SPAN)


def extend_span_ids(span_ids: torch.Tensor, num_new: int, num_cached: int) -> torch.Tensor:
    """
    Extend span ids of the new tokens to the cached ones before them, which stand in no span that is still open.

    Args:
        span_ids (`torch.LongTensor` of shape `(batch, num_new)` or `(batch, num_cached + num_new)`).

    Returns:
        `torch.LongTensor` of shape `(batch, num_cached + num_new)`.

    Raises:
        ValueError: if `span_ids` has any other length.
    """
    if span_ids.shape[1] not in (num_new, num_cached + num_new):
        raise ValueError(
            f"`span_ids` has {span_ids.shape[1]} positions; expected {num_new} (the tokens given) or "
            f"{num_cached + num_new} (with those in the cache)."
        )
    return F.pad(span_ids, (num_cached + num_new - span_ids.shape[1], 0), value=NO_SPAN)


def span_mask_function(span_ids: torch.Tensor, query_starts: torch.Tensor) -> Callable:
    """
    Return the rule as a mask function of `transformers.masking_utils`: query `q` of row `b` is token
    `query_starts[b] + q` of that row, and key `k` is its token `k`.

    Args:
        span_ids (`torch.LongTensor` of shape `(batch, keys)`): of every token, cached or new.
        query_starts (`torch.LongTensor` of shape `(batch,)`): how many tokens stand before a row's queries.
    """
    allowed = or_masks(causal_mask_function, blockwise_overlay(span_ids))

    def of_row(batch_idx, head_idx, q_idx, kv_idx):
        return allowed(batch_idx, head_idx, query_starts[batch_idx] + q_idx, kv_idx)

    return of_row


def create_generation_mask(
    config: PreTrainedConfig, span_ids: torch.Tensor, query_starts: Sequence[int], num_queries: int, dtype: torch.dtype
) -> Any:
    """
    Return the mask of a forward over rows that are cached to different lengths, in the form that the attention backend
    of `config` takes.

    Args:
        config (`PreTrainedConfig`): the backbone's.
        span_ids (`torch.LongTensor` of shape `(batch, keys)`), query_starts: see `span_mask_function`.
        num_queries (`int`): tokens of each row; those that fill up shorter rows are seen by nobody.
        dtype (`torch.dtype`): of the hidden states.
    """
    rule = span_mask_function(span_ids, torch.tensor(query_starts, device=span_ids.device))
    return _create_mask(config, rule, len(span_ids), num_queries, span_ids.shape[1], dtype, span_ids.device)


def create_copies_mask(
    config: PreTrainedConfig, limits: torch.Tensor, numbers: torch.Tensor, pieces: torch.Tensor, dtype: torch.dtype
) -> Any:
    """
    Return the mask of rows that hold clean tokens and, behind them, noisy copies of blocks. A token sees what stands
    before its limit and what has its number, in its own piece of the row.

    Args:
        config (`PreTrainedConfig`): the backbone's.
        limits (`torch.LongTensor` of shape `(batch, length)`): column up to which (excluded) a token sees everything:
            the one after its own for clean tokens, the clean start of its block for copies.
        numbers (`torch.LongTensor` of shape `(batch, length)`): of blocks, clean and noisy ones apart; -1 outside.
        pieces (`torch.LongTensor` of shape `(batch, length)`): packed sequences, and padding as one of its own.
        dtype (`torch.dtype`): of the hidden states.
    """

    def allowed(batch_idx, head_idx, q_idx, kv_idx):
        number = numbers[batch_idx, q_idx]
        same_number = (number == numbers[batch_idx, kv_idx]) & (number >= 0)
        same_piece = pieces[batch_idx, q_idx] == pieces[batch_idx, kv_idx]
        return same_piece & ((kv_idx < limits[batch_idx, q_idx]) | same_number)

    rows, length = limits.shape
    return _create_mask(config, allowed, rows, length, length, dtype, limits.device)


def _create_mask(
    config: PreTrainedConfig,
    rule: Callable,
    batch_size: int,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A mask function as the mask of the attention backend of `config`."""
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch_size,
        q_length=num_queries,
        kv_length=num_keys,
        mask_function=rule,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        config=config,
        device=device,
    )


__all__ = [
    "compute_span_ids",
    "create_copies_mask",
    "create_generation_mask",
    "extend_span_ids",
    "open_span_ids",
    "overlay_response_spans",
    "span_mask_function",
]
