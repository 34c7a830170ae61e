"""Batches of training examples for TtT: stochastic span truncation, then padding on the right or packing. Works on
token ids alone, so that a training loop needs neither tokenizer nor audio tokenizer."""

from __future__ import annotations

import copy
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .interleaving_ttt import last_span_bounds, truncated_span_range
from .vocabulary_ttt import TttTokenIds, to_list

IGNORE_INDEX = -100


class TttDataCollator:
    """Pads examples on the right, or packs several into a row, and in training cuts some answers short (SST).

    An example is a mapping with `input_ids` and either `labels` (same length, -100 where not scored) or
    `prompt_length` (everything from there on is scored; the first token of an example never is). Two optional keys
    exempt an example, whatever batch it comes in: `span_truncation: False` from SST, `training: False` from SST and
    packing. The `Trainer` has one collator for training and evaluation, so its evaluation examples carry the second.
    Other keys are ignored.

    Stochastic span truncation (SST, paper's p_trunc): with this probability the last `<|begin_of_quad|>` span of the
    scored part keeps only a random number of its codes, uniform from max(30 %, 5) to 90 %, and loses its end token and
    everything after, so that the end of speech is learned from content, not from position. Spans of 10 codes or fewer
    stay whole. What is drawn depends on `seed`, the epoch and the examples of the batch alone: a resumed run, or one
    with other data loader workers, cuts the same answers. Shuffling makes batches differ from epoch to epoch; with one
    example a batch only `set_epoch` does.

    Packing: the batch's examples are laid into few rows of at most `max_length` tokens, first-fit-decreasing.
    `position_ids` start again at each example, which is how the model, and the masks of Transformers, tell them apart;
    the loss is that of the same examples padded. Choose a batch size of about rows wanted x `max_length` / mean length.

    Args:
        token_ids: `TttTokenIds`, or a tokenizer to look them up from.
        pad_token_id: written where a row is padded; never seen by the model.
        span_truncation_probability: the paper's p_trunc.
        pad_to_multiple_of: row lengths are rounded up to a multiple of this.
        max_length: longer examples lose their end; with packing also the length of a full row.
        packing: whether to lay several examples into a row.
        training: False switches SST and packing off; see also `eval()`.
        seed: of SST's randomness.
    """

    def __init__(
        self,
        token_ids: TttTokenIds | Any,
        pad_token_id: int | None = None,
        span_truncation_probability: float = 0.5,
        pad_to_multiple_of: int = 8,
        max_length: int | None = None,
        packing: bool = False,
        training: bool = True,
        seed: int = 0,
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
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        if packing and max_length is None:
            raise ValueError("`packing` needs `max_length`, the length of a row; for example 2048.")
        self.token_ids = token_ids
        self.pad_token_id = pad_token_id
        self.span_truncation_probability = span_truncation_probability
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length
        self.packing = packing
        self.training = training
        self.seed = seed
        self.epoch = 0

    def eval(self) -> TttDataCollator:
        """A copy without SST and packing, for evaluation data."""
        collator = copy.copy(self)
        collator.training = False
        return collator

    def set_epoch(self, epoch: int) -> None:
        """Gives SST other draws for the same batches; for a training callback, as samplers have it."""
        self.epoch = epoch

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `labels` and, padded, `attention_mask` or, with packing, `position_ids`; each (rows, length)
            long. Without packing, and for evaluation, row i is example i.

        Raises:
            ValueError: an empty list, or an example without labels or with labels of another length.
        """
        if len(features) == 0:
            raise ValueError("Cannot collate an empty list of examples.")
        examples = [self._labelled(index, feature) for index, feature in enumerate(features)]
        trained = [self.training and bool(feature.get("training", True)) for feature in features]
        rng = self._rng(examples)
        for index, feature in enumerate(features):
            ids, labels = examples[index]
            if trained[index] and feature.get("span_truncation", True):
                length = self._truncated_length(ids, labels, rng)
                ids, labels = ids[:length], labels[:length]
            examples[index] = ids[: self.max_length], labels[: self.max_length]
        return self._lay_out([[examples[index] for index in row] for row in self._rows(examples, trained)])

    @staticmethod
    def _labelled(index: int, feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of an example."""
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
        return ids, [IGNORE_INDEX] * len(labels[:1]) + labels[1:]

    def _rng(self, examples: list[tuple[list[int], list[int]]]) -> random.Random:
        contents = array("q", [self.seed, self.epoch])
        for ids, _ in examples:
            contents.extend(ids)
        return random.Random(contents.tobytes())

    def _truncated_length(self, ids: list[int], labels: list[int], rng: random.Random) -> int:
        """Length of the example after SST."""
        if rng.random() >= self.span_truncation_probability:
            return len(ids)
        span = last_span_bounds(ids, self.token_ids)
        if span is None or labels[span[0] - 1] == IGNORE_INDEX:
            return len(ids)
        bounds = truncated_span_range(span[1] - span[0])
        return len(ids) if bounds is None else span[0] + rng.randint(*bounds)

    def _rows(self, examples: list[tuple[list[int], list[int]]], trained: list[bool]) -> list[list[int]]:
        """Which examples share a row: packed first-fit-decreasing for training; otherwise one a row, in order."""
        if not self.packing:
            return [[index] for index in range(len(examples))]
        assert self.max_length is not None
        rows: list[list[int]] = []
        room: list[int] = []
        by_length = sorted(range(len(examples)), key=lambda index: -len(examples[index][0]))
        for index in (index for index in by_length if trained[index]):
            length = len(examples[index][0])
            fitting = next((row for row, free in enumerate(room) if free >= length), len(rows))
            if fitting == len(rows):
                rows.append([])
                room.append(self.max_length)
            rows[fitting].append(index)
            room[fitting] -= length
        return rows + [[index] for index in range(len(examples)) if not trained[index]]

    def _lay_out(self, rows: list[list[tuple[list[int], list[int]]]]) -> dict[str, torch.Tensor]:
        """Rows of examples as tensors. The filling of a packed row counts its own positions: it sees itself only."""
        longest = max(sum(len(ids) for ids, _ in row) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
        for row in rows:
            filling = length - sum(len(ids) for ids, _ in row)
            batch["attention_mask"].append([1] * (length - filling) + [0] * filling)
            row = [*row, ([self.pad_token_id] * filling, [IGNORE_INDEX] * filling)]
            batch["input_ids"].append([token for ids, _ in row for token in ids])
            batch["labels"].append([label for _, labels in row for label in labels])
            batch["position_ids"].append([position for ids, _ in row for position in range(len(ids))])
        del batch["attention_mask" if self.packing else "position_ids"]
        return {name: torch.tensor(values, dtype=torch.long) for name, values in batch.items()}
