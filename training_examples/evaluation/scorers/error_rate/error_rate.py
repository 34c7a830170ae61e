"""Word, character or mixed error rate over a corpus: the edits of all rows by the reference units of all rows."""

from collections.abc import Sequence

import numpy as np

from training_examples.evaluation import scoring


class ErrorRate(scoring.RowScorer):
    """
    Substitutions, deletions and insertions over all rows, divided by the reference words (or characters) of all rows.

    `normalizer` is "english" (Whisper's; the default), "chinese" (a character is a word; English words stay whole),
    "plain" (lower case, no punctuation), "spoken" (numerals are read as what was said) or "none"; `unit` is "word" or
    "character".
    """

    figure = "error_rate"
    lower_is_better = True
    columns = ("substitutions", "deletions", "insertions", "units")

    def row_counts(
        self, predictions: Sequence[str], references: Sequence[str], normalizer: str = "english", unit: str = "word"
    ) -> np.ndarray:
        """Return substitutions, deletions, insertions and reference units of each row, of shape `(rows, 4)`."""
        return scoring.edit_counts(predictions, references, normalizer, unit)

    def total(self, sums: np.ndarray) -> np.ndarray:
        """Return the error rate of sums of shape `(..., 4)`."""
        errors = sums[..., :3].sum(-1)
        return np.divide(errors, sums[..., 3], out=np.full(errors.shape, np.nan), where=sums[..., 3] > 0)
