"""Batches by a budget of tokens: examples of like length together, as many as the budget holds. How a batch becomes
tensors is the collator's business."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

ROUNDING = 8  # rows are padded to a multiple of this, as TttDataCollator does


def bucket_by_length(lengths: Sequence[int] | np.ndarray, tokens: int, seed: int = 0) -> list[np.ndarray]:
    """
    Divide examples into batches of like length, each of at most `tokens` tokens with its padding.

    Args:
        lengths (`Sequence[int]`): of the examples, in tokens.
        tokens (`int`): rows of a batch times the length of its longest, rounded up to a multiple of 8.
        seed (`int`, *optional*, defaults to 0): draws which of the examples of one length share a batch.

    Returns:
        `list[np.ndarray]`: the indices of each batch. Every example is in one.

    Raises:
        ValueError: If an example alone is more than the budget.
    """
    lengths = np.asarray(lengths)
    rounded = -(-lengths // ROUNDING) * ROUNDING
    if len(lengths) and rounded.max() > tokens:
        raise ValueError(
            f"--tokens_per_batch is {tokens}, but the longest example has {lengths.max()} tokens, {rounded.max()} with "
            "padding: allow at least that, or set --max_length to cut it."
        )
    order = np.lexsort((np.random.default_rng(seed).random(len(lengths)), lengths))
    batches, first = [], 0
    for last in range(len(order)):  # lengths rise, so the newest is the longest
        if (last - first + 1) * rounded[order[last]] > tokens:
            batches.append(order[first:last])
            first = last
    return [*batches, order[first:]] if len(order) else []


def read_lengths(dataset: Any) -> list[int]:
    """Return the column `length` of a `datasets.Dataset`, read at once and without the transform of the examples."""
    return dataset.with_format(None)["length"][:]


class TokenBatches(torch.utils.data.Dataset):
    """
    A dataset whose items are batches of `bucket_by_length`: lists of examples, for a loader of batch size 1. The
    batches are the same in every epoch; their order is the sampler's.

    Args:
        dataset (`datasets.Dataset`): with the columns `input_ids`, `labels` and `length`.
        tokens (`int`): the budget.
        seed (`int`): see `bucket_by_length`.
        max_length (`int`, *optional*): what longer examples will be cut to.
    """

    def __init__(self, dataset: Any, tokens: int, seed: int = 0, max_length: int | None = None):
        self.dataset = dataset
        lengths = np.asarray(read_lengths(dataset))
        self.batches = bucket_by_length(
            lengths if max_length is None else np.minimum(lengths, max_length), tokens, seed
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        columns = self.dataset[self.batches[index].tolist()]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class BatchCollator:
    """Hands the examples of batches, and single examples, to another collator."""

    def __init__(self, collator: Callable[[list[Any]], Any]):
        self.collator = collator

    def __call__(self, items: Sequence[Any]) -> Any:
        """Return what the other collator makes of all examples; `items` are batches or, in evaluation, examples."""
        examples = [example for item in items for example in (item if isinstance(item, list) else [item])]
        return self.collator(examples)
