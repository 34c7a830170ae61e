"""Runs the backbone for the decoding loop: where keys and values go, which logits are computed. Who sees whom is in
attention_ttt.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .attention_ttt import create_generation_mask, open_span_ids
from .cache_ttt import TttCache


class TttRunner:
    """
    The forwards of a decoding loop.

    Rows come as lists of token ids, without padding: row i's queries stand behind the `starts[i]` tokens that the cache
    holds of it. Shorter rows are filled at the end; nobody sees the filling.

    Args:
        model ([`TttForConditionalGeneration`]): the model.
        cache ([`TttCache`]): of the rows that are being written.
        filling (`int`): token that fills up shorter rows.
        expected_length (`int`): most tokens of a row.
    """

    fills_up = True  # shorter rows, so that a forward costs as much as its longest row for each

    def __init__(self, model: Any, cache: TttCache, filling: int, expected_length: int):
        self.backbone, self.lm_head, self.cache = model.model.language_model, model.get_output_embeddings(), cache
        self.device, self.filling, self.expected_length = model.device, filling, expected_length
        self.num_forwards = self.num_token_positions = 0
        self.masks = TttCache(len(cache.layers), 0)  # of `behind_masks`, and how many there are in each row
        self.num_masks: dict[int, int] = {}

    def prompt(
        self, cache: TttCache, queries: list[list[int]], starts: list[int], span_ids: torch.Tensor
    ) -> torch.Tensor:
        """
        Run the prompts of all rows of a cache; spans by their ids, (rows, longest prompt) and -1 outside, cached part
        included. Returns (rows, longest row, hidden_size).
        """
        visible = max(starts) + max(map(len, queries))
        span_ids = nn.functional.pad(span_ids, (0, visible - span_ids.shape[1]), value=-1)  # one for each key
        return self._cached_forward(cache, list(range(len(queries))), queries, starts, span_ids)

    def step(
        self,
        rows: list[int],
        queries: list[list[int]],
        starts: list[int],
        span_starts: list[int | None],
        block_lengths: list[int | None],
    ) -> Sequence[torch.Tensor]:
        """
        Run text tokens and open spans of some `rows`: from `span_starts` on, a row's queries all see each other; with
        block-causal spans (`block_lengths`), those of their block. Returns each row's (queries, hidden_size).
        """
        ends = [start + len(of_row) for start, of_row in zip(starts, queries, strict=True)]
        firsts = [end if first is None else first for end, first in zip(ends, span_starts, strict=True)]
        length = max(starts) + max(map(len, queries))
        span_ids = open_span_ids(firsts, ends, length, self.device, block_lengths)
        hidden = self._cached_forward(self.cache, rows, queries, starts, span_ids)
        return [states[: len(of_row)] for states, of_row in zip(hidden, queries, strict=True)]

    def behind_masks(self, rows: list[int], blocks: list[list[int]], num_masks: list[int]) -> list[torch.Tensor]:
        """
        Run the blocks of some `rows` behind as many mask tokens as are told, which see each other and not the block: so
        their keys and values are computed once for a length, in a cache of their own. Returns each row's (block,
        hidden_size).
        """
        new = [i for i, row in enumerate(rows) if self.num_masks.get(row) != num_masks[i]]
        if new:
            for i in new:
                if rows[i] not in self.num_masks:
                    self.masks.add_row(rows[i])
            lengths, nothing = [num_masks[i] for i in new], [0] * len(new)
            self._cached_forward(
                self.masks,
                [rows[i] for i in new],
                [[self.filling] * length for length in lengths],
                nothing,
                open_span_ids(nothing, lengths, max(lengths), self.device),
            )
            self.num_masks |= {rows[i]: num_masks[i] for i in new}
        ends = [start + len(block) for start, block in zip(num_masks, blocks, strict=True)]
        span_ids = open_span_ids(num_masks, ends, max(num_masks) + max(map(len, blocks)), self.device)
        hidden = self._cached_forward(self.masks, rows, blocks, num_masks, span_ids)
        return [states[: len(block)] for states, block in zip(hidden, blocks, strict=True)]

    def forget(self, row: int) -> None:
        """Drop what is kept for a row that has left."""
        if self.num_masks.pop(row, None) is not None:
            self.masks.drop_row(row, None)

    def bidirectional(self, sequences: list[list[int]]) -> torch.Tensor:
        """
        Run whole sequences, each one bidirectional span, without the cache: (rows, longest sequence, hidden_size).
        """
        ids, nothing = self._rectangle(sequences), [0] * len(sequences)
        span_ids = open_span_ids(nothing, list(map(len, sequences)), ids.shape[1], self.device)
        return self._forward(ids, nothing, span_ids, use_cache=False)

    def project(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits of the vocabulary rows start to stop, in float32. hidden: (..., hidden_size)."""
        head = self.lm_head
        hooks = hasattr(head, "_hf_hook") or head._forward_hooks or head._forward_pre_hooks
        if type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hooks:
            bias = None if head.bias is None else head.bias[start:stop]
            logits = nn.functional.linear(hidden.to(head.weight.device), head.weight[start:stop], bias)
        else:  # quantised, offloaded, sharded, adapted: only the module itself knows its weight
            logits = head(hidden)[..., start:stop]
        return logits.to(device=self.device, dtype=torch.float32)

    def _cached_forward(
        self, cache: TttCache, rows: list[int], queries: list[list[int]], starts: list[int], span_ids: torch.Tensor
    ) -> torch.Tensor:
        ids = self._rectangle(queries)
        reserve = self._reserve(span_ids.shape[1]) if cache is self.cache else 0  # others do not grow on
        cache.write_at(rows, starts, ids.shape[1], self.device, reserve)
        return self._forward(ids, starts, span_ids, past_key_values=cache, use_cache=True)

    def _reserve(self, length: int) -> int:
        """For how many tokens of a row a cache makes room that is too small for `length`."""
        return min(self.expected_length, length + 512)

    def _forward(self, ids: torch.Tensor, starts: list[int], span_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        queries, config = ids.shape[1], self.backbone.config
        self.num_forwards += 1
        self.num_token_positions += ids.numel()
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(queries, device=self.device)
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=create_generation_mask(config, span_ids, starts, queries, self.backbone.dtype),
            position_ids=positions,
            **kwargs,
        ).last_hidden_state
        return hidden.to(self.device)

    def _rectangle(self, sequences: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, sequences))
        filled = [sequence + [self.filling] * (longest - len(sequence)) for sequence in sequences]
        return torch.tensor(filled, device=self.device)


__all__ = ["TttRunner"]
