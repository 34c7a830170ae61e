"""95 % intervals of figures computed of sums over rows, by resampling the rows. What rows count is in scoring.py."""

from collections.abc import Callable

import numpy as np

RESAMPLES, SEED, TAIL = 1000, 0, 0.025
MOST_CELLS = 5_000_000  # of a table of resamples, so that many rows take no more memory

Total = Callable[[np.ndarray], np.ndarray]


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first of two sums by the second, NaN where that is 0; `sums` is of shape `(..., 2)`."""
    numerator, denominator = sums[..., 0], sums[..., 1]
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def resampled_sums(counts: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """
    Return the sums of as many rows as there are, drawn with replacement.

    Args:
        counts (`np.ndarray` of shape `(rows, columns)`): what each row counts.
        resamples (`int`, *optional*, defaults to 1000): how often to draw.
        seed (`int`, *optional*, defaults to 0): of the draws.

    Returns:
        `np.ndarray` of shape `(resamples, columns)`
    """
    rng, rows = np.random.default_rng(seed), len(counts)
    step = max(1, MOST_CELLS // max(rows, 1))
    parts = [
        rng.multinomial(rows, np.full(rows, 1 / rows), size=min(step, resamples - start)) @ counts
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def bootstrap_interval(counts: np.ndarray, total: Total = ratio, is_share: bool = True) -> tuple[float, float]:
    """
    Return the 95 % percentile interval of `total` over rows drawn with replacement.

    Where every row of a share says the same, resampling would give an interval of no width; then the exact binomial
    bound is taken (of n rows all right, at least 0.025 ** (1 / n) are). Of one row of anything else nothing can be
    told.

    Args:
        counts (`np.ndarray` of shape `(rows, columns)`): what each row counts.
        total (`Callable`, *optional*, defaults to the ratio of two columns): the figure of sums of shape
            `(..., columns)`.
        is_share (`bool`, *optional*, defaults to `True`): whether a ratio of rows of 0 or 1 is a share of the rows. A
            mean of counts, such as forwards an answer, is none: each row may well count 1.

    Returns:
        `tuple[float, float]`: NaN, NaN where it cannot be told.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if not len(counts):
        return np.nan, np.nan
    if is_share and total is ratio and _are_flags(counts):
        if (counts[:, 0] == 1).all():
            return float(TAIL ** (1 / len(counts))), 1.0
        if (counts[:, 0] == 0).all():
            return 0.0, float(1 - TAIL ** (1 / len(counts)))
    if len(counts) == 1:
        return np.nan, np.nan
    return _quantiles(total(resampled_sums(counts)))


def _are_flags(counts: np.ndarray) -> bool:
    """Return whether every row says yes or no, so that the figure is a share of the rows."""
    return bool((counts[:, 1] == 1).all() and np.isin(counts[:, 0], (0, 1)).all())


def difference_interval(
    first: np.ndarray, second: np.ndarray, paired: bool, total: Total = ratio, is_share: bool = True
) -> tuple[float, float]:
    """
    Return the 95 % percentile interval of the second figure less the first.

    As in `bootstrap_interval`, shares in which all rows say the same have exact bounds: of n pairs of which all got
    worse, at least p = 0.025 ** (1 / n) do, so that the difference is at most 1 - 2 p (which tells something from 6
    pairs on, as the sign test does).

    Args:
        first, second (`np.ndarray` of shape `(rows, columns)`): what each row counts.
        paired (`bool`): whether row r of both is the same question, so that both are drawn together.
        total (`Callable`, *optional*, defaults to the ratio of two columns): the figure of sums.
        is_share (`bool`, *optional*, defaults to `True`): as in `bootstrap_interval`.

    Raises:
        ValueError: If paired rows are not as many.
    """
    if paired and len(first) != len(second):
        raise ValueError(f"paired rows must be as many in both, got {len(first)} and {len(second)}")
    if is_share and total is ratio and _are_flags(first) and _are_flags(second):
        if paired and abs(change := _only_value(second[:, 0] - first[:, 0])) == 1:
            bound = 1 - 2 * TAIL ** (1 / len(first))
            return (-1.0, bound) if change < 0 else (-bound, 1.0)
        if not paired and not np.isnan(_only_value(first[:, 0])) and not np.isnan(_only_value(second[:, 0])):
            (low, high), (other_low, other_high) = bootstrap_interval(first), bootstrap_interval(second)
            return other_low - high, other_high - low
    elif min(len(first), len(second)) == 1:
        return np.nan, np.nan
    if paired:
        sums = resampled_sums(np.hstack([first, second]))
        differences = total(sums[:, first.shape[1] :]) - total(sums[:, : first.shape[1]])
    else:
        differences = total(resampled_sums(second, seed=SEED + 1)) - total(resampled_sums(first))
    return _quantiles(differences)


def _only_value(values: np.ndarray) -> float:
    """Return the value that all of an array have, NaN if they differ."""
    return float(values[0]) if len(values) and (values == values[0]).all() else np.nan


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds of 95 % of the values that are numbers, NaN if none is."""
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.quantile(values, (TAIL, 1 - TAIL))
    return float(low), float(high)
