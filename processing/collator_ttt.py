"""Batches of training examples for TtT: padding on the right, and packing of several examples into a row. Works on
token ids alone; what training hides from the model is drawn by the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .vocabulary_ttt import to_list

IGNORE_INDEX = -100


class TttDataCollator:
    """
    Pad examples on the right, whether they are trained or evaluated on, for any `Trainer`.

    An example is a mapping with `input_ids` and either `labels` (same length, -100 where not scored) or `prompt_length`
    (everything from there on is scored). The first token of an example never is. A packed row of `pack_examples` has
    `position_ids` too; its filling counts positions of its own, so that it sees itself only. Other keys are ignored.

    Args:
        tokenizer (`PreTrainedTokenizerBase` or `TttProcessor`, *optional*): whose padding token is written.
        pad_token_id (`int`, *optional*): written where a row is padded, instead; the model never sees it.
        pad_to_multiple_of (`int`, *optional*, defaults to 8): row lengths are rounded up to a multiple of this.
        max_length (`int`, *optional*): longer examples lose their end.

    Raises:
        ValueError: if there is neither `tokenizer` nor `pad_token_id`, or a length is below 1.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
        pad_to_multiple_of: int = 8,
        max_length: int | None = None,
    ):
        if pad_token_id is None:
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
            ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
            pad_token_id = next((token for token in ids if token is not None), None)
        if pad_token_id is None:
            raise ValueError("Give a `tokenizer` (or processor) that has a padding token, or `pad_token_id`.")
        if pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` must be at least 1, got {pad_to_multiple_of}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `labels`, and `attention_mask` or, of packed rows, `position_ids`,
            each of shape `(rows, length)`. Row i is example i.

        Raises:
            ValueError: if the list is empty, an example has no labels or labels of another length, or some examples are
                packed and others are not.
        """
        if len(features) == 0:
            raise ValueError("Cannot collate an empty list of examples.")
        packed = [feature.get("position_ids") is not None for feature in features]
        if any(packed) != all(packed):
            raise ValueError("Some examples have `position_ids` and others do not: pack all of a batch, or none.")
        rows = [_labelled(index, feature, self.max_length) for index, feature in enumerate(features)]
        longest = max(len(ids) for ids, _ in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        batch["position_ids" if packed[0] else "attention_mask"] = []
        for feature, (ids, labels) in zip(features, rows, strict=True):
            filling = length - len(ids)
            batch["input_ids"].append(ids + [self.pad_token_id] * filling)
            batch["labels"].append(labels + [IGNORE_INDEX] * filling)
            if packed[0]:
                batch["position_ids"].append(to_list(feature["position_ids"])[: len(ids)] + list(range(filling)))
            else:
                batch["attention_mask"].append([1] * len(ids) + [0] * filling)
        return {name: torch.tensor(values, dtype=torch.long) for name, values in batch.items()}


def pack_examples(examples: Mapping[str, Sequence[Any]], max_length: int) -> dict[str, list[list[int]]]:
    """
    Lay examples into few rows of at most `max_length` tokens, first-fit-decreasing, each example whole.

    `position_ids` start again at each example, which is how the model, and the masks of Transformers, tell them apart:
    attention never crosses examples, and the loss is that of the same examples padded. Meant for the training data
    alone, before it is given to a `Trainer`:

    ```python
    dataset.map(
        pack_examples, fn_kwargs={"max_length": 2048}, batched=True, remove_columns=dataset.column_names
    )
    ```

    Args:
        examples (`Mapping[str, Sequence]`): columns as [`TttDataCollator`] takes them, `input_ids` and `labels` or
            `prompt_length`.
        max_length (`int`): length of a full row; longer examples lose their end.

    Returns:
        `dict[str, list[list[int]]]`: columns `input_ids`, `labels` and `position_ids` of the rows, which are in the
        order of the first example in each.

    Raises:
        ValueError: if `max_length` is below 1, or as [`TttDataCollator`] does.
    """
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
    features = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
    pieces = [_labelled(index, feature, max_length) for index, feature in enumerate(features)]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(pieces)), key=lambda index: -len(pieces[index][0])):
        length = len(pieces[index][0])
        fitting = next((row for row, free in enumerate(room) if free >= length), len(rows))
        if fitting == len(rows):
            rows.append([])
            room.append(max_length)
        rows[fitting].append(index)
        room[fitting] -= length
    members = sorted(sorted(row) for row in rows)
    return {
        "input_ids": [[token for index in row for token in pieces[index][0]] for row in members],
        "labels": [[label for index in row for label in pieces[index][1]] for row in members],
        "position_ids": [[place for index in row for place in range(len(pieces[index][0]))] for row in members],
    }


def _labelled(index: int, feature: Mapping[str, Any], max_length: int | None) -> tuple[list[int], list[int]]:
    """Ids and labels of an example, at most `max_length` of them."""
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
    return ids[:max_length], ([IGNORE_INDEX] * len(labels[:1]) + labels[1:])[:max_length]
