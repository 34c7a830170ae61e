"""What each row of an evaluation counts, as pure functions, and `RowScorer`, of which the modules in scorers/ are made.

A figure is computed of sums over rows (errors by reference words, right answers by questions), never as a mean of rows'
rates, so that its interval follows from resampling rows. How texts are normalised is in text_forms.py.
"""

import importlib
import inspect
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from rapidfuzz.distance import Levenshtein

from training_examples.evaluation.intervals import bootstrap_interval, ratio
from training_examples.evaluation.text_forms import NORMALIZERS, answer_text, normalize_pair, plain_text, units_of

SCORERS = Path(__file__).parent / "scorers"
LONGEST_GRAM, CIDER_SIGMA, ROUGE_BETA = 4, 6.0, 1.2

References = str | Sequence[str]


def as_list(references: References, row: int) -> list[str]:
    """
    Return the references of one row.

    Raises:
        ValueError: If there is none that says anything: an empty one would be found in every answer.
    """
    listed = [references] if isinstance(references, str) else list(references)
    listed = [text for text in listed if text.strip()]
    if not listed:
        raise ValueError(f"`references` of row {row} say nothing; leave the row out or give its answer.")
    return listed


def check_lengths(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """
    Refuse lists of different lengths, and empty ones.

    Raises:
        ValueError: With both lengths.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"need as many predictions as references, at least one; got {len(predictions)} and {len(references)}"
        )


def edit_counts(
    predictions: Sequence[str], references: Sequence[str], normalizer: str = "english", unit: str = "word"
) -> np.ndarray:
    """
    Return substitutions, deletions, insertions and reference units of each row. Of an empty reference, whatever was
    written is inserted.

    Args:
        predictions, references (`Sequence[str]`): what was written and what is right, row by row.
        normalizer (`str`, *optional*, defaults to `"english"`): one of `NORMALIZERS`, or `"spoken"`.
        unit (`str`, *optional*, defaults to `"word"`): `"word"` or `"character"`. Words of Chinese are its characters.

    Returns:
        `np.ndarray` of shape `(rows, 4)`

    Raises:
        ValueError: If the lists differ in length, are empty or hold no reference unit at all.
    """
    check_lengths(predictions, references)
    rows = []
    for reference, hypothesis in zip(references, predictions, strict=True):
        right, written = (units_of(text, unit) for text in normalize_pair(reference, hypothesis, normalizer))
        tags = Counter(edit.tag for edit in Levenshtein.editops(right, written))
        rows.append([tags["replace"], tags["delete"], tags["insert"], len(right)])
    counts = np.array(rows, dtype=np.float64)
    if not counts[:, 3].any():
        raise ValueError(f"`references` hold no {unit} at all once they are normalised as {normalizer!r}")
    return counts


def contains_answer(text: str, answer: str) -> bool:
    """Return whether the words of `answer` stand in a row in `text`, both normalised as answers are. An answer of
    articles or signs alone is compared as it is written."""
    words, said = answer_text(answer).split(), answer_text(text).split()
    if not words:
        return bool(answer.split()) and plain_text(answer) == plain_text(text) and text.strip() != ""
    return any(said[start : start + len(words)] == words for start in range(len(said) - len(words) + 1))


def answer_hits(predictions: Sequence[str], references: Sequence[References]) -> np.ndarray:
    """
    Return of each row whether any of its references stands in the answer, and 1.

    Returns:
        `np.ndarray` of shape `(rows, 2)`

    Raises:
        ValueError: If the lists differ in length or a row has no reference.
    """
    check_lengths(predictions, references)
    rows = enumerate(zip(predictions, references, strict=True))
    return np.array([[any(contains_answer(said, r) for r in as_list(right, i)), 1] for i, (said, right) in rows], float)


def exact_hits(predictions: Sequence[str], references: Sequence[References], normalizer: str = "plain") -> np.ndarray:
    """
    Return of each row whether the answer is one of its references, both normalised, and 1.

    Returns:
        `np.ndarray` of shape `(rows, 2)`

    Raises:
        ValueError: If the lists differ in length, a row has no reference or there is no such normaliser.
    """
    check_lengths(predictions, references)
    hits = []
    for row, (said, right) in enumerate(zip(predictions, references, strict=True)):
        pairs = (normalize_pair(reference, said, normalizer) for reference in as_list(right, row))
        hits.append([any(reference == answer for reference, answer in pairs), 1])
    return np.array(hits, float)


def _grams(words: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """Return how often every sequence of 1 to LONGEST_GRAM words occurs, by its length."""
    return [
        Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1)) for size in range(1, LONGEST_GRAM + 1)
    ]


def cider_d(predictions: Sequence[str], references: Sequence[References]) -> np.ndarray:
    """
    Return the CIDEr-D of each row (Vedantam et al., 2015, arXiv 1411.5726): 10 times the mean over 1- to 4-grams and
    references of the clipped cosine of tf-idf vectors, damped by exp(-Δ²/72) of the difference Δ in length.

    Document frequencies are those of the references given, so that a single row scores 0. Words are what is left of the
    text in lower case without punctuation (the Java tokenizer of the original differs in details such as "don't").

    Returns:
        `np.ndarray` of shape `(rows, 2)`: the score and 1.

    Raises:
        ValueError: If the lists differ in length or a row has no reference.
    """
    check_lengths(predictions, references)
    described = [
        [plain_text(text).split() for text in as_list(row, index)] for index, row in enumerate(references)
    ]  # rows of references of words
    frequency: Counter[tuple[str, ...]] = Counter()
    for row in described:
        frequency.update({gram for words in row for grams in _grams(words) for gram in grams})
    documents = math.log(len(described))

    def vectors(words: Sequence[str]) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (documents - math.log(max(frequency[gram], 1))) for gram, count in grams.items()}
            for grams in _grams(words)
        ]

    def norm(vector: dict[tuple[str, ...], float]) -> float:
        return math.sqrt(sum(value**2 for value in vector.values()))

    scores = []
    for text, row in zip(predictions, described, strict=True):
        words = plain_text(text).split()
        said, total = vectors(words), 0.0
        for reference in row:
            damping = math.exp(-((max(len(words) - 1, 0) - max(len(reference) - 1, 0)) ** 2) / (2 * CIDER_SIGMA**2))
            for ours, theirs in zip(said, vectors(reference), strict=True):
                product = sum(min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, value in ours.items())
                length = norm(ours) * norm(theirs)
                total += damping * (product / length if length else product)
        scores.append([10 * total / (LONGEST_GRAM * len(row)), 1])
    return np.array(scores, float)


def rouge_l(predictions: Sequence[str], references: Sequence[References]) -> np.ndarray:
    """
    Return the ROUGE-L of each row as captioning counts it: F of the best precision and the best recall of the longest
    common subsequence of words over the references, with β = 1.2.

    Returns:
        `np.ndarray` of shape `(rows, 2)`: the score and 1.

    Raises:
        ValueError: If the lists differ in length or a row has no reference.
    """
    check_lengths(predictions, references)
    scores = []
    for index, (text, row) in enumerate(zip(predictions, references, strict=True)):
        words = plain_text(text).split()
        precision, recall = 0.0, 0.0
        for reference in as_list(row, index):
            right = plain_text(reference).split()
            common = _longest_common(words, right)
            precision = max(precision, common / len(words) if words else 0.0)
            recall = max(recall, common / len(right) if right else 0.0)
        both = precision and recall
        score = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision) if both else 0.0
        scores.append([score, 1])
    return np.array(scores, float)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            diagonal, lengths[place] = (
                lengths[place],
                diagonal + 1 if word == other else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]


def repeat_counts(
    predictions: Sequence[str], references: Sequence[str], normalizer: str = "english", highest_rate: float = 0.5
) -> np.ndarray:
    """
    Return of each row whether it was repeated well enough, its errors and its words where it was, and 1: of them comes
    URO-Bench's score for repeating, the share of such rows times one less their error rate.

    Args:
        predictions, references (`Sequence[str]`): what was heard and what was to be repeated.
        normalizer (`str`, *optional*, defaults to `"english"`): one of `NORMALIZERS`.
        highest_rate (`float`, *optional*, defaults to 0.5): the error rate from which on a row counts as not repeated.

    Returns:
        `np.ndarray` of shape `(rows, 4)`
    """
    edits = edit_counts(predictions, references, normalizer)
    errors, words = edits[:, :3].sum(1), edits[:, 3]
    well = (words > 0) & (errors < highest_rate * words)
    return np.stack([well, errors * well, words * well, np.ones(len(well))], axis=1)


class RowScorer(evaluate.Metric):
    """
    A module of `evaluate` whose figure is computed of what rows count.

    A subclass names its figure (`figure`), says which direction is better (`lower_is_better`), gives `row_counts`, and
    may give `total`. `compute(predictions=..., references=...)` returns the figure, its 95 % interval as `low` and
    `high` (unless `interval=False`), `rows`, and the sums of the columns in `columns`.
    """

    figure = "score"
    lower_is_better = False
    columns: tuple[str, ...] = ()
    scale = 1.0
    unit = "%"

    @abstractmethod
    def row_counts(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Return what each row of `predictions` and `references` counts: an array of shape `(rows, columns)`."""

    def total(self, sums: np.ndarray) -> np.ndarray:
        """Return the figure of sums over rows, of shape `(..., columns)`."""
        return ratio(sums)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        forms = [text, datasets.Sequence(text)]
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description=str(self.row_counts.__doc__),
            features=[datasets.Features({"predictions": text, "references": form}) for form in forms],
        )

    def _compute(  # type: ignore[override]
        self, predictions: Sequence[Any], references: Sequence[Any], interval: bool = True, **options: Any
    ) -> dict[str, float]:
        counts = self.row_counts(predictions, references, **options)
        sums = counts.sum(0)
        result = {self.figure: float(self.total(sums)), "rows": len(counts)}
        if interval:
            is_share = self.unit == "%"
            result["low"], result["high"] = bootstrap_interval(counts, self.total_function, is_share)
        return result | dict(zip(self.columns, sums.tolist(), strict=False))

    @property
    def total_function(self) -> Any:
        """The function of `total`, by which intervals know a plain ratio."""
        return ratio if type(self).total is RowScorer.total else self.total


def load_scorer(name: str | Path) -> Any:
    """
    Return a scorer: one of those in scorers/ by name, or any module of `evaluate` by the path of its folder or file. No
    network is asked.

    Raises:
        ValueError: If there is none; the message lists ours.
    """
    folder = SCORERS / str(name)
    if not (folder.is_dir() and str(name)):
        folder = Path(name)
    if not folder.exists():
        ours = ", ".join(sorted(path.name for path in SCORERS.iterdir() if (path / f"{path.name}.py").exists()))
        raise ValueError(f"There is no scorer {str(name)!r}; use {ours}, or the path of a module of `evaluate`.")
    try:
        return evaluate.load(str(folder))
    except ModuleNotFoundError:  # written a moment ago, here or by a process beside this one, and not seen yet
        importlib.invalidate_caches()
        return evaluate.load(str(folder))


def takes_option(scorer: Any, name: str) -> bool:
    """Return whether a scorer, ours or any module of `evaluate`, takes an option."""
    function = scorer.row_counts if isinstance(scorer, RowScorer) else scorer._compute
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_any or (name in parameters and name not in ("predictions", "references"))


__all__ = [
    "NORMALIZERS", "RowScorer", "answer_hits", "cider_d", "contains_answer", "edit_counts", "exact_hits", "load_scorer",
    "repeat_counts", "rouge_l", "takes_option",
]  # fmt: skip
