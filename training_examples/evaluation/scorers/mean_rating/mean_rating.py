"""The mean of a judge's ratings, on the scale of 0 to 100."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from training_examples.evaluation import scoring


class MeanRating(scoring.RowScorer):
    """
    The mean of ratings, of which `highest` (10) becomes 100 points. `predictions` are the ratings; `references` are not
    looked at.
    """

    figure = "rating"
    columns = ("points", "ratings")
    unit = "points"

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        info.features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        )
        return info

    def row_counts(
        self, predictions: Sequence[float], references: Sequence[object], highest: float = 10.0
    ) -> np.ndarray:
        """Return the points of each row, 100 for the highest rating, and 1: of shape `(rows, 2)`."""
        ratings = np.array([float(rating) for rating in predictions])
        if not ((ratings >= 0) & (ratings <= highest)).all():
            raise ValueError(
                f"`predictions` must be ratings from 0 to {highest}, got {ratings.min()} to {ratings.max()}"
            )
        return np.stack([100 * ratings / highest, np.ones(len(ratings))], axis=1)
