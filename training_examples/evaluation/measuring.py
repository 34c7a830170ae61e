"""From rows to figures, each with what its rows counted, so that intervals and differences can be computed.

Tables and files are made in reports.py.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from training_examples.evaluation.figures import Figure
from training_examples.evaluation.intervals import bootstrap_interval, ratio, resampled_sums
from training_examples.evaluation.rows import Row
from training_examples.evaluation.scoring import RowScorer, load_scorer

RATIO = "ratio"


@dataclass(frozen=True)
class Measured:
    """
    A figure of a report.

    Args:
        key (`str`): what it is called in files, and found by in another report.
        title (`str`): what it is called in tables.
        figure ([`Figure`]): value, number of rows, interval.
        lower_is_better (`bool`): which way is better.
        ids (`tuple` of `str`), counts (`np.ndarray` of shape `(rows, columns)`): the rows, and what each counts.
        scorer (`str`): of which scorer's sums it is; `"ratio"` is the first sum by the second.
        note (`str`, *optional*): what a reader must know beside it.
    """

    key: str
    title: str
    figure: Figure
    lower_is_better: bool = False
    ids: tuple[str, ...] = ()
    counts: np.ndarray | None = None
    scorer: str = RATIO
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as it is written into report.json."""
        figure = self.figure
        values = {"value": figure.value, "low": figure.low, "high": figure.high}
        return {
            "key": self.key,
            "title": self.title,
            **{name: value if value is None or math.isfinite(value) else None for name, value in values.items()},
            "rows": figure.count,
            "unit": figure.unit,
            "lower_is_better": self.lower_is_better,
            "scorer": self.scorer,
            "note": self.note,
            "ids": list(self.ids),
            "counts": None if self.counts is None else self.counts.tolist(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Measured":
        """Return what `as_json` wrote."""
        value = math.nan if content["value"] is None else content["value"]
        figure = Figure(value, content["rows"], content["unit"], content["low"], content["high"])
        counts = None if content["counts"] is None else np.array(content["counts"], float)
        return cls(
            content["key"], content["title"], figure, content["lower_is_better"], tuple(content["ids"]), counts,
            content["scorer"], content["note"],
        )  # fmt: skip

    def draws(self, seed: int = 0) -> np.ndarray:
        """Return the figure of rows drawn with replacement, again and again, of shape `(resamples,)`."""
        assert self.counts is not None
        return total_of(self.scorer)(resampled_sums(self.counts, seed=seed))


@cache
def scorer_of(name: str) -> Any:
    """Return a scorer, loaded once."""
    return load_scorer(name)


def total_of(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function of sums that a scorer's figure is."""
    return ratio if name == RATIO else scorer_of(name).total_function


def of_counts(
    key: str,
    title: str,
    ids: Sequence[str],
    counts: np.ndarray,
    scorer: str = RATIO,
    unit: str = "%",
    lower_is_better: bool = False,
    note: str = "",
) -> Measured:
    """Return a figure of what rows count, with its interval."""
    total = total_of(scorer)
    counts = np.asarray(counts, float)
    value = float(total(counts.sum(0))) if len(counts) else math.nan
    low, high = bootstrap_interval(counts, total, is_share=unit == "%")
    return Measured(
        key, title, Figure(value, len(counts), unit, low, high), lower_is_better, tuple(ids), counts, scorer, note
    )


def of_ratio(
    key: str,
    title: str,
    rows: Sequence[tuple[str, float, float]],
    unit: str = "",
    lower_is_better: bool = False,
    note: str = "",
) -> Measured:
    """Return the sum of the second by the sum of the third of each row's `(id, numerator, denominator)`."""
    counts = np.array([[top, bottom] for _, top, bottom in rows], float).reshape(-1, 2)
    return of_counts(key, title, [name for name, _, _ in rows], counts, RATIO, unit, lower_is_better, note)


def share_of(key: str, title: str, flags: Iterable[tuple[str, bool]], lower_is_better: bool = False) -> Measured:
    """Return how many of `(id, flag)` are true."""
    return of_ratio(key, title, [(name, float(flag), 1.0) for name, flag in flags], "%", lower_is_better)


def of_scorer(
    key: str,
    title: str,
    scorer: str,
    ids: Sequence[str],
    predictions: Sequence[Any],
    references: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    note: str = "",
) -> Measured:
    """
    Return the figure of a scorer, ours by name or any module of `evaluate` by path. A module that does not say what its
    rows count gives its first number, without an interval.
    """
    module = scorer_of(scorer)
    if isinstance(module, RowScorer):
        counts = module.row_counts(predictions, references, **(options or {}))
        return of_counts(key, title, ids, counts, scorer, module.unit, module.lower_is_better, note)
    result = module.compute(predictions=list(predictions), references=list(references), **(options or {}))
    name, value = next(
        ((name, value) for name, value in result.items() if isinstance(value, int | float)), ("", math.nan)
    )
    return Measured(
        key, f"{title} ({name})", Figure(float(value), len(ids), ""), scorer=scorer, ids=tuple(ids), note=note
    )


def of_median(key: str, title: str, values: Sequence[float], unit: str = "s") -> Measured:
    """Return the median of some values with the interval of the median, lower being better."""
    if not len(values):
        return Measured(key, title, Figure(math.nan, 0, unit), True)
    array = np.asarray(values, float)
    draws = np.random.default_rng(0).choice(array, (1000, len(array)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return Measured(key, title, Figure(float(np.median(array)), len(array), unit, float(low), float(high)), True)


def speed_of(rows: Sequence[Row], prefix: str = "") -> list[Measured]:
    """Return codes a step and a forward, forwards an answer and time by the duration, as far as rows know them."""
    spoken = [row for row in rows if row.get("codes") and row.get("forwards")]
    timed = [row for row in rows if row.get("seconds") is not None and row.get("audio_seconds")]
    counted = [row for row in rows if row.get("forwards")]
    found = []
    if spoken:
        values = [(row["id"], row["codes"], row["forwards"]) for row in spoken]
        found.append(of_ratio(f"{prefix}codes_per_forward", "codes a forward, of prompt and text too", values))
    if stepped := [row for row in spoken if row.get("speech_steps")]:
        values = [(row["id"], row["codes"], row["speech_steps"]) for row in stepped]
        found.append(of_ratio(f"{prefix}codes_per_step", "codes a step of speech", values))
    if counted:
        forwards = [(row["id"], row["forwards"], 1.0) for row in counted]
        found.append(of_ratio(f"{prefix}forwards", "forwards an answer", forwards, lower_is_better=True))
    if timed:
        times = [(row["id"], row["seconds"], row["audio_seconds"]) for row in timed]
        found.append(
            of_ratio(f"{prefix}real_time_factor", "time / duration of the speech", times, lower_is_better=True)
        )
    return found
