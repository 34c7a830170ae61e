"""The share of answers that are, once normalised, one of their references."""

from collections.abc import Sequence

import numpy as np

from training_examples.evaluation import scoring


class ExactAnswers(scoring.RowScorer):
    """The share of rows whose answer is a reference, both normalised ("plain" by default, or as in error_rate)."""

    figure = "exact"
    columns = ("right", "answers")

    def row_counts(
        self, predictions: Sequence[str], references: Sequence[scoring.References], normalizer: str = "plain"
    ) -> np.ndarray:
        """Return of each row whether it is right, and 1: of shape `(rows, 2)`."""
        return scoring.exact_hits(predictions, references, normalizer)
