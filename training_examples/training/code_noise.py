"""Codes that a model hears, disturbed in every epoch anew, so that recordings are not learnt by heart."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

NEAR = 2 / 3  # of what is replaced, where it is known which codes are near


class CodeNoise(TrainerCallback):
    """
    Replace some of the audio codes of a batch of examples that are not scored: what is heard, not what is to be said.

    Each example draws a share between 0 and `most`, and each of its codes is replaced with this probability: by any
    other code, or in 2 of 3 cases by a near one, if `levels` says which are near. That is one whose grid differs by one
    level in one dimension, as it does after a little noise.

    The noise depends on the seed, the epoch and the example alone, so that a resumed run, or one of more processes,
    meets the same. As a callback of the Trainer it learns which epoch it is.

    Args:
        first_id (`int`): token id of audio code 0.
        num_codes (`int`): how many codes there are.
        most (`float`): the largest share of codes that is replaced, above 0 and at most 1.
        levels (`Sequence[int]`, *optional*): of the finite scalar quantiser, the first dimension changing fastest.
        seed (`int`, *optional*, defaults to 0): other seeds give other noise.

    Raises:
        ValueError: If `most` is no such share, or `levels` make another number of codes.
    """

    def __init__(self, first_id: int, num_codes: int, most: float, levels: Sequence[int] | None = None, seed: int = 0):
        if not 0 < most <= 1:
            raise ValueError(f"`most` must be above 0 and at most 1, got {most}.")
        if levels is not None and int(np.prod(levels)) != num_codes:
            raise ValueError(f"`levels` {list(levels)} make {int(np.prod(levels))} codes, not {num_codes}.")
        self.first_id, self.num_codes, self.most, self.seed = first_id, num_codes, most, seed
        self.levels = None if levels is None else np.asarray(levels)
        self.epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # a loader's workers read it, too

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch.fill_(int(state.epoch or 0))

    def __call__(self, examples: dict[str, list[Any]], indices: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """
        Return the columns of `examples`, with other codes in `input_ids` if that is among them.

        Args:
            examples (`dict[str, list]`): columns of a batch; `labels` or `prompt_length` say what is scored.
            indices (`Sequence[int]`, *optional*): places in an endless stream, whose epoch is not known.
        """
        if "input_ids" not in examples:
            return examples
        rows = []
        for row, ids in enumerate(examples["input_ids"]):
            ids = np.array(ids)
            place = 0 if indices is None else indices[row]
            rng = np.random.default_rng([self.seed, int(self.epoch), place, zlib.crc32(ids.tobytes())])
            if "labels" in examples:
                scored = np.asarray(examples["labels"][row]) != -100
            else:
                scored = np.arange(len(ids)) >= examples["prompt_length"][row]
            heard = np.flatnonzero((ids >= self.first_id) & (ids < self.first_id + self.num_codes) & ~scored)
            chosen = heard[rng.random(len(heard)) < rng.uniform(0, self.most)]
            ids[chosen] = self.first_id + self.replace(ids[chosen] - self.first_id, rng)
            rows.append(ids.tolist())
        return {**examples, "input_ids": rows}

    def replace(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return another code for each of `codes`, of shape `(count,)`."""
        other = (codes + rng.integers(1, self.num_codes, len(codes))) % self.num_codes
        if self.levels is None:
            return other
        bases = np.cumprod([1, *self.levels[:-1]])
        dimension = rng.integers(len(self.levels), size=len(codes))
        levels, base = self.levels[dimension], bases[dimension]
        digit = codes // base % levels
        # Up or down; at an end, the only way there is.
        step = np.where(digit == 0, 1, np.where(digit == levels - 1, -1, rng.choice((-1, 1), len(codes))))
        return np.where(rng.random(len(codes)) < NEAR, codes + step * base, other)
