"""Runs the backbone for the decoding loop: who may see whom, where keys and values go, which logits are computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

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
        """All rows' prompts; spans by their ids, (rows, longest prompt) and -1 outside, cached part included."""
        start = torch.tensor(starts, device=self.device)
        visible = max(starts) + max(map(len, queries))
        spans = nn.functional.pad(span_ids, (0, visible), value=-1)  # covers the filling

        def allowed(batch_idx, head_idx, q_idx, kv_idx):
            query = start[batch_idx] + q_idx
            same_span = (spans[batch_idx, query] == spans[batch_idx, kv_idx]) & (spans[batch_idx, query] >= 0)
            return (kv_idx <= query) | same_span

        return self._cached_forward(list(range(len(queries))), queries, starts, allowed)

    def step(
        self, rows: list[int], queries: list[list[int]], starts: list[int], span_starts: list[int | None]
    ) -> torch.Tensor:
        """Text tokens and open spans of some `rows`: from `span_starts` on, a row's queries all see each other."""
        ends = [start + len(of_row) for start, of_row in zip(starts, queries, strict=True)]
        firsts = [end if first is None else first for end, first in zip(ends, span_starts, strict=True)]
        start, end, span = (torch.tensor(numbers, device=self.device) for numbers in (starts, ends, firsts))

        def allowed(batch_idx, head_idx, q_idx, kv_idx):
            query = start[batch_idx] + q_idx
            return (kv_idx <= query) | ((query >= span[batch_idx]) & (kv_idx < end[batch_idx]))

        return self._cached_forward(rows, queries, starts, allowed)

    def bidirectional(self, sequences: list[list[int]]) -> torch.Tensor:
        """Whole sequences, each one bidirectional span, without the cache."""
        ids = self._rectangle(sequences)
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)

        def allowed(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx < lengths[batch_idx]

        return self._forward(ids, torch.zeros_like(lengths), allowed, ids.shape[1], use_cache=False)

    def project(self, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The logits of the vocabulary rows start to stop, in float32. hidden: (..., hidden_size)."""
        head = self.lm_head
        if type(head) is nn.Linear and not hasattr(head, "_hf_hook") and not head._forward_hooks:
            bias = None if head.bias is None else head.bias[start:stop]
            logits = nn.functional.linear(hidden.to(head.weight.device), head.weight[start:stop], bias)
        else:  # quantised, offloaded, adapted: only the module itself knows its weight
            logits = head(hidden)[..., start:stop]
        return logits.to(device=self.device, dtype=torch.float32)

    def _cached_forward(
        self, rows: list[int], queries: list[list[int]], starts: list[int], allowed: Callable
    ) -> torch.Tensor:
        ids = self._rectangle(queries)
        visible = max(starts) + ids.shape[1]
        reserve = min(self.expected_length, visible + 512)
        self.cache.write_at(rows, starts, ids.shape[1], self.device, reserve)
        start = torch.tensor(starts, device=self.device)
        return self._forward(ids, start, allowed, visible, past_key_values=self.cache, use_cache=True)

    def _forward(
        self, ids: torch.Tensor, start: torch.Tensor, allowed: Callable, keys: int, **kwargs: Any
    ) -> torch.Tensor:
        rows, queries = ids.shape
        self.num_forwards += 1
        self.num_token_positions += ids.numel()
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=self._mask(allowed, rows, queries, keys),
            position_ids=start[:, None] + torch.arange(queries, device=self.device),
            **kwargs,
        ).last_hidden_state
        return hidden.to(self.device)

    def _rectangle(self, sequences: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, sequences))
        filled = [sequence + [self.filling] * (longest - len(sequence)) for sequence in sequences]
        return torch.tensor(filled, device=self.device)

    def _mask(self, allowed: Callable, rows: int, queries: int, keys: int) -> Any:
        """The attention mask of a rule allowed(batch, head, query, key), in the form the backbone's attention takes."""
        config, dtype = self.backbone.config, self.backbone.dtype
        implementation = config._attn_implementation
        if implementation in ("eager", "sdpa"):
            batch = torch.arange(rows, device=self.device)[:, None, None]
            query = torch.arange(queries, device=self.device)[:, None]
            mask = allowed(batch, 0, query, torch.arange(keys, device=self.device))
            mask = mask.expand(rows, queries, keys)[:, None]  # (rows, 1, queries, keys)
            if implementation == "eager":
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            return mask
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=rows,
            q_length=queries,
            kv_length=keys,
            mask_function=allowed,
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=dtype,
            config=config,
            device=self.device,
        )


__all__ = ["TttRunner"]
