"""Batches of training examples for TtT: stochastic span truncation, then padding on the right. Works on token ids
alone, so that a training loop needs neither tokenizer nor audio tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .interleaving_ttt import TttTokenIds, last_span_bounds, to_list, truncated_span_range

IGNORE_INDEX = -100


class TttDataCollator:
    """Pads examples on the right and, in training, cuts some answers short (SST).

    An example is a mapping with `input_ids` and either `labels` (same length, -100 where not scored) or
    `prompt_length` (everything from there on is scored). An optional `span_truncation: False` exempts it from SST;
    other keys are ignored.

    Stochastic span truncation (SST, paper's p_trunc): with this probability the last `<|begin_of_quad|>` span of the
    scored part keeps only a random number of its codes, uniform from max(30 %, 5) to 90 %, and loses its end token and
    everything after, so that the end of speech is learned from content, not from position. Spans of 10 codes or fewer
    stay whole.

    Args:
        token_ids: `TttTokenIds`, or a tokenizer to look them up from.
        pad_token_id: written where a row is padded; never seen by the model.
        span_truncation_probability: the paper's p_trunc.
        pad_to_multiple_of: row lengths are rounded up to a multiple of this.
        max_length: longer examples lose their end.
        training: False switches SST off; see also `eval()`.
        generator: source of SST's randomness; PyTorch's global one by default, which `set_seed`, data loader workers
            and the Trainer's checkpoints all manage.
    """

    def __init__(
        self,
        token_ids: TttTokenIds | Any,
        pad_token_id: int | None = None,
        span_truncation_probability: float = 0.5,
        pad_to_multiple_of: int = 8,
        max_length: int | None = None,
        training: bool = True,
        generator: torch.Generator | None = None,
    ):
        if not isinstance(token_ids, TttTokenIds):
            if pad_token_id is None:
                pad_token_id = token_ids.pad_token_id
            token_ids = TttTokenIds.from_tokenizer(token_ids)
        if pad_token_id is None:
            pad_token_id = token_ids.end_of_turn_token_id
        if not 0.0 <= span_truncation_probability <= 1.0:
            raise ValueError(f"`span_truncation_probability` must lie in [0, 1], got {span_truncation_probability}.")
        if pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` must be at least 1, got {pad_to_multiple_of}.")
        self.token_ids = token_ids
        self.pad_token_id = pad_token_id
        self.span_truncation_probability = span_truncation_probability
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length
        self.training = training
        self.generator = generator

    def eval(self) -> TttDataCollator:
        """A copy without SST, for evaluation data."""
        collator = copy.copy(self)
        collator.training = False
        return collator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels`, each (batch, length) long.

        Raises:
            ValueError: an empty list, or an example without labels or with labels of another length.
        """
        if len(features) == 0:
            raise ValueError("Cannot collate an empty list of examples.")
        return self._pad([self._prepare(index, feature) for index, feature in enumerate(features)])

    def _prepare(self, index: int, feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        ids = to_list(feature["input_ids"])
        if feature.get("labels") is not None:
            labels = to_list(feature["labels"])
        elif feature.get("prompt_length") is not None:
            prompt_length = int(feature["prompt_length"])
            labels = [IGNORE_INDEX] * prompt_length + ids[prompt_length:]
        else:
            raise ValueError(f"Example {index} has neither `labels` nor `prompt_length`; give one of them.")
        if len(labels) != len(ids):
            raise ValueError(f"Example {index} has {len(ids)} `input_ids` but {len(labels)} `labels`.")
        if self.training and feature.get("span_truncation", True):
            length = self._truncated_length(ids, labels)
            ids, labels = ids[:length], labels[:length]
        return ids[: self.max_length], labels[: self.max_length]

    def _truncated_length(self, ids: list[int], labels: list[int]) -> int:
        """Length of the example after SST."""
        if self.span_truncation_probability == 0.0:
            return len(ids)
        if torch.rand((), generator=self.generator).item() >= self.span_truncation_probability:
            return len(ids)
        span = last_span_bounds(ids, self.token_ids)
        if span is None or labels[span[0] - 1] == IGNORE_INDEX:
            return len(ids)
        bounds = truncated_span_range(span[1] - span[0])
        if bounds is None:
            return len(ids)
        kept = torch.randint(bounds[0], bounds[1] + 1, (), generator=self.generator).item()
        return span[0] + int(kept)

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        multiple = self.pad_to_multiple_of
        length = -(-max(len(ids) for ids, _ in rows) // multiple) * multiple
        input_ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        padded_labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
        for row, (ids, labels) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            attention_mask[row, : len(ids)] = 1
            padded_labels[row, : len(ids)] = torch.tensor(labels, dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": padded_labels}
