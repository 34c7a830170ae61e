"""Table and plots of the study from what run_study.py measured so far.

    python training_examples/study/report_study.py --output_dir runs/study

Writes study.md, study.json, quality.png (speech against codes a forward) and curves.png (training loss with the band of
its seeds). Intervals hold 95 % of bootstrap draws over seeds and, within a seed, over rows.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training_examples.command_line import ScriptParser
from training_examples.evaluation.figures import markdown_table
from training_examples.files import read_json, write_json, write_text
from training_examples.study.arms import ARMS
from training_examples.user_errors import run_command

DRAWS = 1_000
# What the table shows: list, count (`*`: of the first judge), heading.
COLUMNS = (
    ("spoken_qa_seen", "exact", "spoken QA exact"),
    ("spoken_qa_unheard", "exact", "the same, voices never heard"),
    ("asr_seen", "wer", "ASR WER"),
    ("spoken_qa_seen", "speech_wer *", "speech WER, QA"),
    ("tts", "speech_wer *", "speech WER, TTS"),
    ("tts", "codes_per_step", "codes a forward of speech, TTS"),
)
PLAIN = {"codes_per_step", "codes_per_forward", "forwards", "time"}
Counts = list[np.ndarray]  # one array of shape (rows, 2) a seed


@dataclass
class ReportArguments:
    output_dir: Path = field(default=Path("runs/study"), metadata={"help": "Output of run_study.py."})


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """
    Return the figures of every finished run, by arm, in the order of arms.py.

    Raises:
        FileNotFoundError: If no run has been measured.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*/figures.json")):
        content = read_json(path)
        found[content["arm"]].append(content)
    if not found:
        raise FileNotFoundError(f"no run in {folder} has been measured: start run_study.py first")
    return {name: found[name] for name in ARMS if name in found}


def counts_of(runs: Sequence[Mapping[str, Any]], setting: str, name: str, key: str) -> Counts:
    """Return what each seed counts of a list at a setting; empty where it was not measured."""
    counts: Counts = []
    for run in runs:
        lists = run["settings"].get(setting, {}).get(name, {})
        chosen = next((k for k in lists if k == key or (key.endswith("*") and k.startswith(key[:-1]))), None)
        if chosen is not None:
            counts.append(np.array(lists[chosen], float).reshape(-1, 2))
    return counts


def total(counts: np.ndarray) -> float:
    """Return the first sum by the second, NaN of nothing."""
    top, bottom = counts.sum(0)
    return float(top / bottom) if bottom else float("nan")


def with_interval(counts: Counts, draws: int = DRAWS, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean over seeds, and the bounds of 95 % of draws of seeds and of rows within each."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        chosen = [counts[index] for index in rng.integers(len(counts), size=len(counts))]
        means.append(np.mean([total(rows[rng.integers(len(rows), size=len(rows))]) for rows in chosen]))
    low, high = np.nanquantile(means, (0.025, 0.975))
    return float(np.mean([total(rows) for rows in counts])), float(low), float(high)


def show(value: tuple[float, float, float], key: str) -> str:
    """Return a figure and its interval as a cell of the table."""
    middle, low, high = value
    if key in PLAIN:
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return f"{100 * middle:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, dict[str, Any]]:
    """Return the table of all arms at their first setting, and its figures."""
    lines, figures = [], {}
    for name, seeds in runs.items():
        setting = next(iter(seeds[0]["settings"]))
        cells: list[object] = [ARMS[name].title, len(seeds)]
        for list_name, key, title in COLUMNS:
            counts = counts_of(seeds, setting, list_name, key)
            cells.append(show(value := with_interval(counts), key) if counts else "")
            if counts:
                figures[f"{name}/{title}"] = dict(zip(("value", "low", "high"), value, strict=True))
        lines.append(cells)
    return markdown_table(["", "seeds", *(title for _, _, title in COLUMNS)], lines), figures


def settings_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return speech and cost of every arm at every setting."""
    lines = []
    for name, seeds in runs.items():
        for setting in seeds[0]["settings"]:
            cells: list[object] = [ARMS[name].title, setting]
            for list_name, key in (("spoken_qa_seen", "speech_wer *"), ("tts", "speech_wer *")):
                counts = counts_of(seeds, setting, list_name, key)
                cells.append(show(with_interval(counts), key) if counts else "")
            for key in ("codes_per_step", "codes_per_forward", "forwards", "time"):
                counts = counts_of(seeds, setting, "tts", key)
                cells.append(show(with_interval(counts), key) if counts else "")
            lines.append(cells)
    header = ["", "codes : steps a block", "speech WER, QA", "speech WER, TTS"]
    header += [
        "codes a forward of speech",
        "codes a forward of all",
        "forwards an answer",
        "time / duration, in batches",
    ]
    return markdown_table(header, lines)


@contextmanager
def plot(path: Path) -> Iterator[tuple[Any, Any]]:
    """Give axes to draw on and colors, and write the picture at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    yield axes, plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_quality(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the speech's word errors against codes a forward, a line an arm, a bar for each interval."""
    with plot(path) as (axes, colors):
        for color, (name, seeds) in zip(colors, runs.items(), strict=False):
            points = []
            for setting in seeds[0]["settings"]:
                speech = counts_of(seeds, setting, "tts", "speech_wer *")
                cost = counts_of(seeds, setting, "tts", "codes_per_step")
                if speech and cost:
                    points.append((float(np.mean([total(rows) for rows in cost])), *with_interval(speech)))
            points.sort()
            if points:
                x, middle, low, high = (np.array(column) for column in zip(*points, strict=True))
                axes.errorbar(
                    x, 100 * middle, 100 * np.stack([middle - low, high - middle]).clip(min=0), fmt="o-", ms=4, lw=1.2,
                    elinewidth=0.8, color=color, label=ARMS[name].title,
                )  # fmt: skip
        axes.set(
            xscale="log", xlabel="codes a forward of speech", ylabel="word errors of the speech, %", ylim=(0, None)
        )
        axes.set_title("Random sequences read aloud: quality against cost", fontsize=10)


def read_curve(path: Path) -> dict[int, float]:
    """Return the training loss by step of a run's log."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def plot_curves(folder: Path, names: Sequence[str], path: Path) -> None:
    """Draw each arm's training loss, the mean of its seeds with the band between the least and the most."""
    with plot(path) as (axes, colors):
        for color, name in zip(colors, names, strict=False):
            curves = [read_curve(log) for log in sorted(folder.glob(f"{name}-*/train/log_history.jsonl"))]
            if not curves:
                continue
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = np.array([[curve[step] for step in steps] for curve in curves])
            axes.plot(steps, values.mean(0), color=color, lw=1.2, label=ARMS[name].title)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        axes.set(xlabel="step", ylabel="training loss, each arm's own")


def main() -> None:
    (args,) = ScriptParser(ReportArguments, __doc__).parse_args_into_dataclasses()
    runs = read_runs(args.output_dir)
    text, figures = table(runs)
    text = f"{text}\n\n{settings_table(runs)}\n"
    write_text(args.output_dir / "study.md", text)
    write_json(args.output_dir / "study.json", figures)
    plot_quality(runs, args.output_dir / "quality.png")
    plot_curves(args.output_dir, list(runs), args.output_dir / "curves.png")
    print(text)


if __name__ == "__main__":
    run_command(main)
