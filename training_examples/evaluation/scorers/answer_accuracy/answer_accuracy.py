"""Accuracy of short answers: whether any reference stands, word after word, in what was answered."""

from collections.abc import Sequence

import numpy as np

from training_examples.evaluation import scoring


class AnswerAccuracy(scoring.RowScorer):
    """
    The share of rows in whose answer a reference stands as words in a row; accents, case, articles and punctuation
    apart. `references` are a text or a list of texts a row. Deterministic, and no judge of reasoning: "not paris"
    counts as Paris.
    """

    figure = "accuracy"
    columns = ("right", "answers")

    def row_counts(self, predictions: Sequence[str], references: Sequence[scoring.References]) -> np.ndarray:
        """Return of each row whether it is right, and 1: of shape `(rows, 2)`."""
        return scoring.answer_hits(predictions, references)
