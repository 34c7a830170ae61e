"""Runs the backbone for the decoding loop: where keys and values go, which logits are computed. Who sees whom is in
attention_ttt.py."""

from typing import Any

import torch
from torch import nn

from .attention_ttt import create_generation_mask, open_span_ids
from .cache_ttt import TttCache


class TttRunner:
    """
    The forwards of one call of `generate`.

    Rows come as lists of token ids, without padding: row i's queries stand behind the `starts[i]` tokens that the cache
    holds of it. Shorter rows are filled at the end; nobody sees the filling. Hidden states are (rows, longest row,
    hidden_size).
    """

    def __init__(self, model: Any, cache: TttCache, filling: int, expected_length: int):
        self.backbone, self.lm_head, self.cache = model.model.language_model, model.get_output_embeddings(), cache
        self.device, self.filling, self.expected_length = model.device, filling, expected_length
        self.num_forwards = self.num_token_positions = 0

    def prompt(self, queries: list[list[int]], starts: list[int], span_ids: torch.Tensor) -> torch.Tensor:
        """Run all rows' prompts; spans by their ids, (rows, longest prompt) and -1 outside, cached part included."""
        visible = max(starts) + max(map(len, queries))
        span_ids = nn.functional.pad(span_ids, (0, visible - span_ids.shape[1]), value=-1)  # one for each key
        return self._cached_forward(list(range(len(queries))), queries, starts, span_ids)

    def step(
        self, rows: list[int], queries: list[list[int]], starts: list[int], span_starts: list[int | None]
    ) -> torch.Tensor:
        """Run text tokens and open spans of some `rows`: from `span_starts` on, a row's queries all see each other."""
        ends = [start + len(of_row) for start, of_row in zip(starts, queries, strict=True)]
        firsts = [end if first is None else first for end, first in zip(ends, span_starts, strict=True)]
        span_ids = open_span_ids(firsts, ends, max(starts) + max(map(len, queries)), self.device)
        return self._cached_forward(rows, queries, starts, span_ids)

    def bidirectional(self, sequences: list[list[int]]) -> torch.Tensor:
        """Run whole sequences, each one bidirectional span, without the cache."""
        ids, nothing = self._rectangle(sequences), [0] * len(sequences)
        span_ids = open_span_ids(nothing, list(map(len, sequences)), ids.shape[1], self.device)
        return self._forward(ids, nothing, span_ids, use_cache=False)

    def project(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits of the vocabulary rows start to stop, in float32. hidden: (..., hidden_size)."""
        head = self.lm_head
        if type(head) is nn.Linear and not hasattr(head, "_hf_hook") and not head._forward_hooks:
            bias = None if head.bias is None else head.bias[start:stop]
            logits = nn.functional.linear(hidden.to(head.weight.device), head.weight[start:stop], bias)
        else:  # quantised, offloaded, adapted: only the module itself knows its weight
            logits = head(hidden)[..., start:stop]
        return logits.to(device=self.device, dtype=torch.float32)

    def _cached_forward(
        self, rows: list[int], queries: list[list[int]], starts: list[int], span_ids: torch.Tensor
    ) -> torch.Tensor:
        ids = self._rectangle(queries)
        reserve = min(self.expected_length, span_ids.shape[1] + 512)
        self.cache.write_at(rows, starts, ids.shape[1], self.device, reserve)
        return self._forward(ids, starts, span_ids, past_key_values=self.cache, use_cache=True)

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
