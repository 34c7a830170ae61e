"""Forwards over rows of different lengths without filling. For CPUs, where every position of a forward costs; the ones
over rectangles, for everyone else, are in runner_ttt.py."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention_ttt import create_generation_mask, open_span_ids
from .cache_ttt import TttCache
from .runner_ttt import TttRunner

RAGGED_ATTENTION = "ttt_ragged_sdpa"


@dataclass
class RaggedRow:
    """Queries `first` to `last` of a forward are a row's; it is in `slot` of the cache, with `end` tokens by then."""

    first: int
    last: int
    slot: int
    end: int
    mask: torch.Tensor | None  # (1, 1, queries, end); None where every query sees every token


def ragged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    ragged_rows: Sequence[RaggedRow] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attend row by row, as an attention function of Transformers; without `ragged_rows`, do as "sdpa".

    Args:
        query (`torch.Tensor` of shape `(1, heads, tokens of all rows, head_dim)`).
        key, value (`torch.Tensor` of shape `(slots, key_value_heads, capacity, head_dim)`): the whole cache.
        ragged_rows (`list[RaggedRow]`, *optional*): where the rows are.

    Returns:
        `tuple`: `(1, tokens, heads, head_dim)`, and no weights.
    """
    if ragged_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for row in ragged_rows:
        keys, values = (states[row.slot : row.slot + 1, :, : row.end] for states in (key, value))
        states = query[:, :, row.first : row.last]
        outputs.append(sdpa_attention_forward(module, states, keys, values, row.mask, is_causal=False, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(RAGGED_ATTENTION, ragged_attention)
AttentionMaskInterface.register(RAGGED_ATTENTION, sdpa_mask)


class RaggedRunner(TttRunner):
    """
    As [`TttRunner`], but a step runs the tokens of all its rows as one sequence, and attention row by row.

    It works on the backbone's weights through modules of its own, whose configuration names the attention above, so
    that nobody else who uses the model meets it.
    """

    fills_up = False

    def __init__(self, model: Any, cache: TttCache, filling: int, expected_length: int):
        super().__init__(model, cache, filling, expected_length)
        states = [*self.backbone.parameters(), *self.backbone.buffers()]
        self.backbone = copy.deepcopy(self.backbone, {id(state): state for state in states})
        self.backbone.config._attn_implementation = RAGGED_ATTENTION

    @classmethod
    def serves(cls, model: Any) -> bool:
        """Whether a model runs on the CPU, with "sdpa", and hands its attention what this needs."""
        backbone = model.model.language_model
        is_plain = model.device.type == "cpu" and backbone.config._attn_implementation == "sdpa"
        if not is_plain or any(hasattr(module, "_hf_hook") for module in backbone.modules()):
            return False
        cache = TttCache(model.config.get_text_config().num_hidden_layers, 2)
        runner = cls(model, cache, 0, 2)
        try:
            runner.step([0, 1], [[0], [0, 0]], [0, 0], [None, 0], [None, None])
        except (TypeError, RuntimeError):
            return False
        return True

    @torch.no_grad()
    def step(
        self,
        rows: list[int],
        queries: list[list[int]],
        starts: list[int],
        span_starts: list[int | None],
        block_lengths: list[int | None],
    ) -> Sequence[torch.Tensor]:
        """See [`TttRunner.step`]."""
        lengths, ragged, first = list(map(len, queries)), [], 0
        for i, row in enumerate(rows):
            end = starts[i] + lengths[i]
            mask = self._mask(starts[i], end, span_starts[i], block_lengths[i])
            ragged.append(RaggedRow(first, first + lengths[i], self.cache.slot(row), end, mask))
            first += lengths[i]
        positions = torch.cat([torch.arange(row.end - row.last + row.first, row.end) for row in ragged])
        longest = max(row.end for row in ragged)
        slots = torch.tensor([row.slot for row in ragged]).repeat_interleave(torch.tensor(lengths))
        self.cache.write_ragged(slots, positions, longest, self._reserve(longest))
        self.num_forwards += 1
        self.num_token_positions += first
        hidden = self.backbone(
            input_ids=torch.tensor([[token for of_row in queries for token in of_row]]),
            attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool),  # keeps the model from making one
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            ragged_rows=ragged,
        ).last_hidden_state
        return hidden[0].split(lengths)

    def _mask(self, start: int, end: int, span_start: int | None, block_length: int | None) -> torch.Tensor | None:
        """Of queries from `start` to `end`; None where each sees all: one token, or all in one span or block."""
        if end - start == 1:
            return None
        if span_start is not None and start >= span_start:
            size = block_length or end
            if (start - span_start) // size == (end - 1 - span_start) // size:
                return None
        first = end if span_start is None else span_start
        span_ids = open_span_ids([first], [end], end, self.device, [block_length])
        return create_generation_mask(self.backbone.config, span_ids, [start], end - start, self.backbone.dtype)


__all__ = ["RaggedRunner"]
