"""Tables and plots of the study from what run_study.py measured so far.

    python training_examples/study/report_study.py --output_dir runs/study --readme training_examples/study/README.md

Writes study.md, study.json, quality.png (speech against codes a forward) and curves.png (losses of held-out examples)
beside the runs. With `--readme` the tables replace what stands between the two marks of that file, and the plots are
copied beside it.
"""

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training_examples.command_line import ScriptParser
from training_examples.evaluation.figures import markdown_table
from training_examples.evaluation.intervals import bootstrap_interval, ratio
from training_examples.files import read_json, write_json, write_text
from training_examples.study.arms import ARMS, FROM_THE_LEFT, REFERENCE, setting_name
from training_examples.study.lists import SPLITS
from training_examples.user_errors import run_command

DRAWS, SEED = 2_000, 0
BEGIN, END = "<!-- results: written by report_study.py -->", "<!-- end of results -->"
# What the tables show: list, count (`*`: of the judge), heading.
COLUMNS = (
    ("spoken_qa_seen", "exact", "spoken QA, text exact"),
    ("spoken_qa_unheard", "exact", "the same, voices never heard"),
    ("asr_seen", "wer", "ASR, WER"),
    ("spoken_qa_seen", "speech_exact *", "spoken QA, speech heard right"),
    ("spoken_qa_seen", "speech_wer *", "its speech, WER"),
    ("tts", "speech_wer *", "texts read aloud, WER"),
    ("tts", "speech_exact *", "the same, heard right"),
    ("tts", "codes_per_step", "codes a forward of speech"),
)
COLORS = {
    "ar": "black", "nar": "0.55", "ttt": "tab:blue", "ttt_without_banom": "tab:cyan", "ttt_without_ppm": "tab:purple",
    "ttt_without_sst": "tab:pink", "block_aligned": "tab:orange", "block_causal": "tab:green", "distilled": "tab:red",
}  # fmt: skip
# The paper's models of 3 billion parameters: accuracy of text on LLaMA Questions, word errors on AISHELL-2.
PAPER = {
    "ar": ("10.00 %", "54.94 %"),
    "nar": ("0.67 %", "212.27 %"),
    "ttt": ("34.68 %", "12.53 %"),
    "ttt_without_banom": ("19.87 %", "18.58 %"),
    "ttt_without_ppm": ("22.79 %", "15.63 %"),
    "ttt_without_sst": ("10.20 %", "25.43 %"),
}
Content = Mapping[str, Any]  # what a figures file holds, with its `seed`
Interval = tuple[float, float, float]  # value, low, high


@dataclass
class ReportArguments:
    output_dir: Path = field(default=Path("runs/study"), metadata={"help": "Output of run_study.py."})
    split: str = field(default="evaluation", metadata={"help": "Which lists' figures.", "choices": SPLITS})
    judge: str | None = field(default=None, metadata={"help": "Whose ears; by default those of the first."})
    readme: Path | None = field(default=None, metadata={"help": "File that the tables are written into, too."})


def read_runs(folder: Path, split: str = "evaluation") -> dict[str, list[Content]]:
    """
    Return the figures of every measured run, by arm in the order of arms.py, seed after seed.

    Raises:
        FileNotFoundError: If no run has been measured.
        ValueError: If runs were measured on other rows or by other judges, or a folder is none of a run.
    """
    found: dict[str, list[Content]] = defaultdict(list)
    for path in folder.glob(f"*/figures-{split}.json"):
        name, _, seed = path.parent.name.rpartition("-")
        if not seed.isdecimal():
            raise ValueError(
                f"{path.parent} is no folder ARM-SEED, as runs have: move it out of `--output_dir` {folder}"
            )
        found[name].append({**read_json(path), "seed": int(seed)})
    if not found:
        raise FileNotFoundError(f"no run in {folder} has been measured on {split} lists: start run_study.py first")
    contents = [content for runs in found.values() for content in runs]
    for name in ("lists", "judges"):
        if any(content[name] != contents[0][name] for content in contents):
            raise ValueError(f"runs in {folder} differ in their {name}: run run_study.py again, it measures them anew")
    return {name: sorted(found[name], key=lambda content: content["seed"]) for name in ARMS if name in found}


class Figures:
    """
    Figures of the arms with their intervals.

    Every arm answers the same rows with every seed, so a draw takes rows once, for all seeds, and seeds beside them;
    arms are compared draw by draw, with the same rows and seeds in both.

    Args:
        runs (`Mapping`): from `read_runs`.
        judge (`str`, *optional*): whose ears count; those of the first by default.
    """

    def __init__(self, runs: Mapping[str, Sequence[Content]], judge: str | None = None):
        self.runs = runs
        judges = list(next(iter(runs.values()))[0]["judges"])
        if judge is not None and judge not in judges:
            raise ValueError(f"`--judge` {judge}: the runs were heard by {judges}")
        self.judge = judge or (judges[0] if judges else None)

    def counts(self, arm: str, setting: str, name: str, key: str, seeds: Sequence[int] | None = None) -> Any:
        """Return what an arm counts, `np.ndarray` of shape `(seeds, rows, 2)`; `None` where it was not measured."""
        key = key.replace("*", self.judge or "*")
        found = [
            run["settings"].get(setting, {}).get(name, {}).get(key)
            for run in self.runs[arm]
            if seeds is None or run["seed"] in seeds
        ]
        if not (found and all(found)):
            return None
        counts = np.array(found, float)
        return capped(counts) if key.startswith("speech_wer") else counts

    def seeds(self, arm: str) -> list[int]:
        """Return the seeds that were measured of an arm."""
        return [run["seed"] for run in self.runs[arm]]

    def figure(self, arm: str, setting: str, name: str, key: str) -> Interval | None:
        """Return the mean over seeds with its interval, or `None`."""
        counts = self.counts(arm, setting, name, key)
        return None if counts is None else with_interval(counts)

    def difference(self, arm: str, other: str, settings: tuple[str, str], name: str, key: str) -> Interval | None:
        """Return the figure of an arm less that of another, over the seeds of both, or `None`."""
        seeds = sorted(set(self.seeds(arm)) & set(self.seeds(other)))
        first, second = (
            self.counts(run, setting, name, key, seeds) for run, setting in zip((arm, other), settings, strict=True)
        )
        if first is None or second is None:
            return None
        low, high = np.nanquantile(draw(first) - draw(second), (0.025, 0.975))
        return mean(first) - mean(second), float(low), float(high)


def capped(errors: np.ndarray) -> np.ndarray:
    """
    Return word errors, of shape `(..., 2)`, of which no row has more than it has words: a recogniser that repeats a
    word over and over in speech that says nothing would count more in one row than all others do.
    """
    return np.stack([errors.min(-1), errors[..., 1]], -1)


def mean(counts: np.ndarray) -> float:
    """Return the mean over seeds of the first sum by the second; `counts` is of shape `(seeds, rows, 2)`."""
    return float(ratio(counts.sum(1)).mean())


def draw(counts: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """
    Return the mean over seeds of rows and seeds drawn with replacement, of shape `(draws,)`.

    The rows of a draw are the same for all of its seeds, since they are the same sentences. Equal shapes draw alike.
    """
    rng, (num_seeds, num_rows, _) = np.random.default_rng(seed), counts.shape
    rows = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=draws)  # (draws, rows)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)  # (draws, seeds)
    ratios = ratio(np.einsum("dr,src->dsc", rows, counts))
    return (np.where(seeds > 0, ratios, 0.0) * seeds).sum(1) / num_seeds


def with_interval(counts: np.ndarray) -> Interval:
    """Return the mean over seeds and the bounds of 95 % of the draws, of shape `(seeds, rows, 2)`."""
    value = mean(counts)
    if math.isnan(value):
        return value, value, value
    if (counts[..., 1] == 1).all() and counts[..., 0].min() == counts[..., 0].max():
        low, high = bootstrap_interval(counts[0])  # all right, or all wrong: drawing would give no width
    else:
        low, high = np.nanquantile(draw(counts), (0.025, 0.975))
    return value, float(low), float(high)


def show(value: Interval | None, key: str = "", signed: bool = False) -> str:
    """Return a figure and its interval as a cell of a table; a difference without 0 in its interval is bold."""
    if value is None:
        return ""
    if math.isnan(value[0]):
        return "none"
    plain = key in ("codes_per_step", "codes_per_forward", "forwards")
    scale, digits, unit = (1, 2, "") if plain else (100, 1, "" if signed else " %")
    middle, low, high = (f"{scale * number:{'+' if signed else ''}.{digits}f}" for number in value)
    text = f"{middle}{unit} ({low} to {high})"
    return f"**{text}**" if signed and (value[1] > 0 or value[2] < 0) else text


def main_table(figures: Figures, place: int, content: dict[str, Any]) -> str:
    """Return the table of all arms at their first (0) or last (1) setting, and add its figures to `content`."""
    lines = []
    for arm in figures.runs:
        setting = ARMS[arm].ends[place]
        cells: list[object] = [ARMS[arm].title, setting, len(figures.seeds(arm))]
        for name, key, title in COLUMNS:
            value = figures.figure(arm, setting, name, key)
            cells.append(show(value, key))
            if value is not None:
                content[f"{arm}/{setting}/{title}"] = dict(
                    zip(("value", "low", "high"), map(finite, value), strict=True)
                )
        lines.append(cells)
    return markdown_table(["", "codes : steps a block", "seeds", *(title for _, _, title in COLUMNS)], lines)


def paper_table(figures: Figures) -> str:
    """Return text of the arms that the paper has too, at its two steps a block, beside what it says."""
    lines = []
    for arm, (questions, dictation) in PAPER.items():
        if arm in figures.runs:
            ours = [show(figures.figure(arm, ARMS[arm].ends[0], *column)) for *column, _ in COLUMNS[:3]]
            lines.append([ARMS[arm].title, questions, *ours[:2], dictation, ours[2]])
    header = ["", "paper: LLaMA Questions", "here: spoken QA", "here: voices never heard"]
    return markdown_table([*header, "paper: AISHELL-2, WER", "here: ASR, WER"], lines)


def finite(value: float) -> float | None:
    """Return a number as JSON has it."""
    return value if math.isfinite(value) else None


def difference_table(figures: Figures, place: int) -> str:
    """Return how far each arm is from TtT as published, both at their first (0) or last (1) setting."""
    lines = []
    for arm in figures.runs:
        if arm == REFERENCE:
            continue
        settings = ARMS[arm].ends[place], ARMS[REFERENCE].ends[place]
        cells = [
            show(figures.difference(arm, REFERENCE, settings, *column), signed=True) for *column, _ in COLUMNS[:-1]
        ]
        lines.append([ARMS[arm].title, *cells])
    return markdown_table([f"less {ARMS[REFERENCE].title}", *(title for *_, title in COLUMNS[:-1])], lines)


def order_table(figures: Figures) -> str:
    """Return what the speech gains where codes are fixed from left to right, against one code a forward; "" if none."""
    left, lines = setting_name(FROM_THE_LEFT), []
    for arm in figures.runs:
        cells: list[object] = [ARMS[arm].title]
        for name in ("spoken_qa_seen", "tts"):
            key, settings = "speech_wer *", (left, ARMS[arm].ends[1])
            cells += [show(figures.figure(arm, setting, name, key), key) for setting in settings]
            cells.append(show(figures.difference(arm, arm, settings, name, key), signed=True))
            cells.append(show(figures.figure(arm, left, name, "codes_per_step"), "codes_per_step"))
        if figures.counts(arm, left, "tts", "codes_per_step") is not None:
            lines.append(cells)
    columns = ("WER from left to right", "at one code a forward", "points", "codes a forward of speech, left to right")
    titles = [f"{what}: {title}" for what in ("answers", "texts read aloud") for title in columns]
    return markdown_table(["", *titles], lines) if lines else ""


def settings_table(figures: Figures) -> str:
    """Return the speech of texts read aloud at every setting."""
    lines = []
    for arm, runs in figures.runs.items():
        for setting in runs[0]["settings"]:
            cells = [
                show(figures.figure(arm, setting, "tts", key), key)
                for key in ("speech_wer *", "codes_per_step", "codes_per_forward", "forwards")
            ]
            lines.append([ARMS[arm].title, setting, *cells])
    header = ["", "codes : steps a block", "WER", "codes a forward of speech", "codes a forward of all"]
    return markdown_table([*header, "forwards an answer"], lines)


def cost_table(folder: Path, once: Mapping[str, Any]) -> str:
    """Return what answers cost, alone on the machine, and how long the arms were trained."""
    lines = []
    for arm, by_setting in once["cost"].items():
        runs = [run for run in sorted(folder.glob(f"{arm}-*")) if (run / "train.json").exists()]
        training = [minutes_of_training(run) for run in runs if read_json(run / "train.json")["finished"]]
        for setting, rows in by_setting.items():
            total = {key: sum(row[key] for row in rows) for key in rows[0]}
            cells = [f"{total[key] / len(rows):.1f}" for key in ("codes", "forwards", "positions")]
            cells += [f"{total['seconds'] / total['duration']:.3f}" if total["duration"] else "none"]
            lines.append([ARMS[arm].title, setting, *cells, f"{np.mean(training):.1f}" if training else ""])
            training = []
    header = ["", "codes : steps a block", "codes an answer", "forwards", "token positions", "time / duration"]
    return markdown_table([*header, "minutes of training a run"], lines)


def minutes_of_training(run: Path) -> float:
    """Return how long the training stages of a run took, with what it answered itself to learn from."""
    stages = [run / f"{name}.json" for name in ("half", "answering", "train")]
    return sum(read_json(stage)["seconds"] for stage in stages if stage.exists()) / 60


def recordings_table(once: Mapping[str, Any], judge: str | None) -> str:
    """Return how the judge hears the recorded answers."""
    lines = []
    for title, lists in once["recordings"].items():
        values = [lists.get(name, {}).get(f"speech_wer {judge}") for name in ("spoken_qa_seen", "tts")]
        cells = [show(with_interval(capped(np.array([value], float)))) if value else "" for value in values]
        lines.append([title, *cells])
    return markdown_table(["", "spoken QA, WER", "texts read aloud, WER"], lines)


def describe(folder: Path, runs: Mapping[str, Sequence[Content]], split: str) -> str:
    """Return in a sentence or two what the figures rest on."""
    arm, contents = next(iter(runs.items()))
    sizes = {
        name: len(next(iter(counts.values()))) for name, counts in next(iter(contents[0]["settings"].values())).items()
    }
    rows = ", ".join(f"{name} {size}" for name, size in sizes.items())
    judges = ", ".join(contents[0]["judges"]) or "none"
    told = f"Lists of the {split} split, rows: {rows}. Judges: {judges}; a row counts at most as many errors as words."
    if (stage := folder / f"{arm}-{contents[0]['seed']}" / "train.json").exists():
        options = read_json(stage)["asked"]["options"]
        steps, tokens, rate = (
            options[options.index(f"--{name}") + 1] for name in ("max_steps", "tokens_per_batch", "learning_rate")
        )
        told = f"{steps} steps of at most {tokens} tokens, padding included, at a peak rate of {rate}. {told}"
    return told


@contextmanager
def plot(path: Path, panels: int = 1) -> Iterator[list[Any]]:
    """Give axes to draw on, and write the picture at the end, with one legend below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(8.5, 5.6), layout="constrained", squeeze=False)
    yield list(axes[0])
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    entries = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_quality(figures: Figures, once: Mapping[str, Any] | None, path: Path) -> None:
    """
    Draw word errors of the speech against codes a forward: a line an arm over its steps in blocks of 26, open marks
    for blocks of 8 and for codes from left to right, a star for the autoregressive arm, with the intervals as bars.
    """
    with plot(path) as (axes,):
        highest = 0.0
        for place, (arm, runs) in enumerate(figures.runs.items()):
            aside = 1.012 ** (place - len(figures.runs) / 2)  # so that bars at one cost stand side by side
            points: dict[str, tuple[float, ...]] = {}
            for setting in runs[0]["settings"]:
                speech = figures.figure(arm, setting, "tts", "speech_wer *")
                cost = figures.counts(arm, setting, "tts", "codes_per_step")
                if speech is not None and cost is not None and math.isfinite(speech[0]) and mean(cost) > 0:
                    points[setting] = (aside * mean(cost), *(100 * value for value in speech))
            if not points:
                continue
            highest = max(highest, *(point[1] for point in points.values()))
            apart = {"8:8": "D", setting_name(FROM_THE_LEFT): "^"}
            line = sorted(point for setting, point in points.items() if setting not in apart)
            single = arm == "ar"
            style = {"color": COLORS[arm], "elinewidth": 0.8, "lw": 2 if arm in ("ttt", "distilled") else 1.3}
            axes.errorbar(
                *bars(line), fmt="*" if single else "o-", ms=15 if single else 5, label=ARMS[arm].title, **style
            )
            if single:
                axes.axhline(line[0][1], color="black", lw=0.8, ls="--", alpha=0.5)
            for setting, marker in apart.items():
                if setting in points:
                    axes.errorbar(*bars([points[setting]]), fmt=marker, ms=6, mfc="white", **style)
        if once is not None and figures.judge is not None:
            for title, lists in once["recordings"].items():
                if value := lists.get("tts", {}).get(f"speech_wer {figures.judge}"):
                    height = 100 * mean(capped(np.array([value], float)))
                    highest = max(highest, height)
                    axes.axhline(height, color="0.5", lw=0.8, ls=":")
                    axes.annotate(
                        title, (1, height), xycoords=("axes fraction", "data"), fontsize=8, color="0.4",
                        ha="right", va="bottom",
                    ).set_in_layout(False)  # fmt: skip
        axes.set(xscale="log", ylabel="word errors of the speech, %")
        axes.set_xlabel(
            "codes a forward of speech (open marks: diamonds blocks of 8 in 8 steps, triangles from left to right)"
        )
        axes.set_ylim(0, min(103, 1.15 * highest) if highest else 1)
        ticks = [0.5, 1, 2, 4, 8, 16]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title("Texts read aloud: better is lower, cheaper is further right", fontsize=11)


def bars(points: Sequence[Sequence[float]]) -> tuple[Any, Any, Any]:
    """Return points of (x, value, low, high) as x, value and lengths of the bars, as Matplotlib takes them."""
    x, middle, low, high = np.array(points, float).T
    return x, middle, np.stack([middle - low, high - middle]).clip(min=0)


def read_curve(run: Path, key: str) -> dict[int, float]:
    """Return a value by step from the logs of a run; where it has two halves, the second goes on after the first."""
    curve: dict[int, float] = {}
    for folder in ("half", "train"):
        path, offset = run / folder / "log_history.jsonl", max(curve, default=0)
        if path.exists():
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
            curve |= {offset + entry["step"]: entry[key] for entry in entries if key in entry}
    return curve


def plot_curves(folder: Path, names: Sequence[str], path: Path) -> None:
    """Draw the losses of held-out examples, text's and audio's, the mean of the seeds with the band of all of them."""
    with plot(path, panels=2) as panels:
        for axes, side in zip(panels, ("text", "audio"), strict=True):
            for name in names:
                curves = [read_curve(run, f"eval_{side}_loss") for run in sorted(folder.glob(f"{name}-*"))]
                curves = [curve for curve in curves if curve]
                steps = sorted(set.intersection(*map(set, curves))) if curves else []
                if not steps:
                    continue
                values = np.array([[curve[step] for step in steps] for curve in curves])
                axes.plot(steps, values.mean(0), "-o", ms=3, color=COLORS[name], lw=1.5, label=ARMS[name].title)
                axes.fill_between(steps, values.min(0), values.max(0), color=COLORS[name], alpha=0.15, lw=0)
            unit = "token of text" if side == "text" else "code"
            axes.set(xlabel="step", ylabel=f"held-out loss, nats a {unit}", yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=8)
            axes.set_title("Text" if side == "text" else "Speech (a bound on it, but for autoregression)", fontsize=11)


def write_results(path: Path, text: str, pictures: Sequence[Path]) -> None:
    """
    Put the tables between the marks of a README, and the plots beside it.

    Raises:
        ValueError: If it has no marks.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"`--readme` {path} lacks the lines {BEGIN} and {END}, between which the results go")
    for picture in pictures:
        shutil.copyfile(picture, path.parent / picture.name)
    write_text(path, f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    (args,) = ScriptParser(ReportArguments, __doc__).parse_args_into_dataclasses()
    runs = read_runs(args.output_dir, args.split)
    figures = Figures(runs, args.judge)
    once_file = args.output_dir / "once" / f"once-{args.split}.json"
    once = read_json(once_file) if once_file.exists() else None
    content: dict[str, Any] = {}
    parts = [
        describe(args.output_dir, runs, args.split),
        "One code a forward, as the autoregressive arm writes (intervals: 95 % of draws of rows and seeds):",
        main_table(figures, 1, content),
        "The paper's two steps a block of 26:",
        main_table(figures, 0, content),
    ]
    if set(PAPER) & set(runs):
        parts += ["Answers' text beside the paper's, which are of other models, data and sizes:", paper_table(figures)]
    if REFERENCE in runs and len(runs) > 1:
        for place, title in ((1, "At one code a forward"), (0, "In two steps a block of 26")):
            parts += [f"{title}, differences in points; bold where the interval leaves out 0:"]
            parts += [difference_table(figures, place)]
    if from_the_left := order_table(figures):
        parts += ["Codes from left to right, differences in points as above:", from_the_left]
    parts += ["Texts read aloud at every setting:", settings_table(figures)]
    parts += ["![word errors against codes a forward](quality.png)", "![losses of held-out examples](curves.png)"]
    if once is not None:
        device = "one thread" if once.get("device", "cpu") == "cpu" else "a GPU"
        parts += [f"What a text read aloud costs, one at a time on {device}:", cost_table(args.output_dir, once)]
        parts += ["How the judge hears the recorded answers:", recordings_table(once, figures.judge)]
    text = "\n\n".join(parts) + "\n"
    pictures = [args.output_dir / name for name in ("quality.png", "curves.png")]
    write_text(args.output_dir / "study.md", text)
    write_json(args.output_dir / "study.json", content)
    plot_quality(figures, once, pictures[0])
    plot_curves(args.output_dir, list(runs), pictures[1])
    if args.readme is not None:
        write_results(args.readme, text, pictures)
    print(text)


if __name__ == "__main__":
    run_command(main)
