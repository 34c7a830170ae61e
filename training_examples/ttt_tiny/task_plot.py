"""The plot of ttt-tiny's card: how well its speech is understood by how many codes a forward writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_examples.evaluation.reports import Section
from training_examples.ttt_tiny.task_report import ASKED, figures_by_key

LISTS = {"spoken_qa_seen": "answers to spoken questions", "tts": "random words read aloud"}
HIGHEST = 105.0  # %, of the word errors shown
FEWEST, TICKS = 0.6, (1, 2, 4, 8, 13, 26)  # codes a forward
RULES = {
    "audio_confidence_threshold": ("D", "confidence thresholds"),
    "audio_prefix_probability": ("^", "prefix probabilities"),
}
LEAST = {asked.key: asked.least for asked in ASKED}


def plot_sweep(sections: Sequence[Section], recogniser: str, path: Path) -> None:
    """
    Draw the word errors of speech by codes a forward: a line a block size, from many steps to few; the largest order
    bias strong, others faint; thresholds as diamonds, prefix probabilities as triangles; the default setting, the twin,
    and the recordings themselves. What was asked at least is shaded.
    """
    swept = [section for section in sections if section.name.startswith("sweep/")]
    if not swept:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes = sorted({section.settings["audio_block_size"] for section in swept})
    biases = sorted({section.settings["audio_order_bias"] for section in swept})
    scale = plt.get_cmap("viridis")
    colours = {size: scale(0.9 * place / max(1, len(sizes) - 1)) for place, size in enumerate(sizes)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharex=True)
    for axis, (name, title) in zip(axes, LISTS.items(), strict=True):
        wer, codes = f"{name}/speech/{recogniser}", f"{name}/codes_per_step"
        for size in sizes:
            for bias in biases:
                options = {"audio_block_size": size, "audio_order_bias": bias}
                chosen = [section for section in swept if options.items() <= section.settings.items()]
                style: dict[str, Any] = {"color": colours[size], "alpha": 1.0 if bias == biases[-1] else 0.3}
                if stepped := points_of([s for s in chosen if not any(map(s.settings.get, RULES))], wer, codes):
                    label = f"blocks of {size}" if bias == biases[-1] else None
                    axis.plot(*zip(*stepped, strict=True), "o-", ms=4.5, lw=1.8, label=label, **style)
                for rule, (marker, _) in RULES.items():
                    if points := points_of([s for s in chosen if s.settings.get(rule)], wer, codes):
                        axis.plot(*zip(*points, strict=True), marker, ms=7, mec="white", mew=0.6, **style)
        mark(axis, sections, "sweep_twin", wer, codes, marker="*", ms=17, color="crimson", label="autoregressive twin")
        style = {"marker": "o", "ms": 10, "mfc": "none", "mew": 2, "color": "black"}
        mark(axis, sections, "model", wer, codes, label="the default (95 %)", **style)
        for section, line, label in (
            ("codec", "--", "the recordings through the codec"),
            ("original", ":", "the recordings"),
        ):
            if (own := figures_by_key(sections, section).get(wer)) is not None:
                axis.axhline(100 * own.figure.value, color="0.35", ls=line, lw=1.4, label=label)
        through_codec = figures_by_key(sections, "codec").get(wer)
        if through_codec is not None:
            highest = 100 * (through_codec.figure.value + LEAST[f"{name}/speech/{{}}"])
            axis.fill_between(
                (LEAST["spoken_qa_seen/codes_per_step"], 2 * TICKS[-1]), highest, color="tab:green", alpha=0.1, lw=0,
                label="asked at least",
            )  # fmt: skip
        axis.set(title=title, xlabel="codes a forward of speech", xlim=(FEWEST, 1.15 * TICKS[-1]), ylim=0)
        axis.set_ylim(top=min(HIGHEST, axis.get_ylim()[1]))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"word errors that {recogniser} hears, %")
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_locator(FixedLocator(TICKS))
    axes[0].xaxis.set_minor_locator(NullLocator())
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda codes, _: f"{codes:g}"))
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    for rule, (marker, label) in RULES.items():
        if any(section.settings.get(rule) for section in swept):
            entries[label] = plt.Line2D([], [], color="0.4", ls="none", marker=marker, ms=7)
    if len(biases) > 1:
        weaker = "without order bias" if biases[:-1] == [0] else "smaller order biases"
        entries[f"faint: {weaker}"] = plt.Line2D([], [], color="0.4", alpha=0.3, marker="o", ms=4.5, lw=1.8)
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def points_of(sections: Sequence[Section], wer: str, codes: str) -> list[tuple[float, float]]:
    """Return codes a forward and word errors in % of the sections that have both, in this order."""
    found = [figures_by_key([section], section.name) for section in sections]
    return sorted((f[codes].figure.value, 100 * f[wer].figure.value) for f in found if wer in f and codes in f)


def mark(axis: Any, sections: Sequence[Section], name: str, wer: str, codes: str, **style: Any) -> None:
    """Draw the point of one section, if it was measured; that of all rows with the interval of its word errors."""
    found = figures_by_key(sections, name)
    if wer not in found or codes not in found:
        return
    figure = found[wer].figure
    error = None
    if name == "model" and figure.low is not None and figure.high is not None:
        error = [[100 * (figure.value - figure.low)], [100 * (figure.high - figure.value)]]
    place = (found[codes].figure.value, 100 * figure.value)
    axis.errorbar(*place, yerr=error, ls="none", zorder=5, capsize=3, elinewidth=1.2, **style)
