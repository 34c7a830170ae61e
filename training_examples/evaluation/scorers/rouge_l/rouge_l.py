"""ROUGE-L of captions: the longest common subsequence of words, best over the references."""

from collections.abc import Sequence

import numpy as np

from training_examples.evaluation import scoring


class RougeL(scoring.RowScorer):
    """The mean over rows of F (β = 1.2) of the longest common subsequence's best precision and best recall."""

    figure = "rouge_l"
    columns = ("score", "captions")
    unit = ""

    def row_counts(self, predictions: Sequence[str], references: Sequence[scoring.References]) -> np.ndarray:
        """Return the score of each row, and 1: of shape `(rows, 2)`."""
        return scoring.rouge_l(predictions, references)
