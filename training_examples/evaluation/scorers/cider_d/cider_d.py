"""CIDEr-D of captions, without Java: document frequencies are those of the references that are scored."""

from collections.abc import Sequence

import numpy as np

from training_examples.evaluation import scoring


class CiderD(scoring.RowScorer):
    """
    The mean CIDEr-D over rows (arXiv 1411.5726), in the scale of captioning papers that report 0.5, times 100 in those
    that report 50. Score all rows in one call: the weights of words come from all references.
    """

    figure = "cider_d"
    columns = ("score", "captions")
    unit = ""

    def row_counts(self, predictions: Sequence[str], references: Sequence[scoring.References]) -> np.ndarray:
        """Return the score of each row, and 1: of shape `(rows, 2)`."""
        return scoring.cider_d(predictions, references)
