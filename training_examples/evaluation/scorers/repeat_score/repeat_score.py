"""How well sentences were repeated: the share repeated well enough, times one less the error rate of those."""

from collections.abc import Sequence

import numpy as np

from training_examples.evaluation import scoring


class RepeatScore(scoring.RowScorer):
    """
    URO-Bench's score for repeating, from 0 to 100: the share of rows with an error rate below `highest_rate` (0.5),
    times one less the error rate over those rows.
    """

    figure = "repeat_score"
    columns = ("repeated", "errors", "words", "rows")
    unit = "points"

    def row_counts(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        normalizer: str = "english",
        highest_rate: float = 0.5,
    ) -> np.ndarray:
        """Return whether each row was repeated, its errors and words where it was, and 1: of shape `(rows, 4)`."""
        return scoring.repeat_counts(predictions, references, normalizer, highest_rate)

    def total(self, sums: np.ndarray) -> np.ndarray:
        """Return the score of sums of shape `(..., 4)`; 0 where no row was repeated."""
        rate = np.divide(sums[..., 1], sums[..., 2], out=np.zeros(sums[..., 0].shape), where=sums[..., 2] > 0)
        return 100 * sums[..., 0] / sums[..., 3] * (1 - rate)
