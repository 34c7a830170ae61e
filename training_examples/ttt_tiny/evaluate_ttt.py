"""Measure a TtT model on held-out speech and text: answers, transcripts, the speech it says, and its speed.

    python training_examples/ttt_tiny/evaluate_ttt.py --model model_cards/ttt-tiny
    python training_examples/ttt_tiny/evaluate_ttt.py --model model_cards/ttt-tiny --twin runs/autoregressive_twin

Needs the held-out lists of build_speech.py: choices are made with `--split development`, and what was chosen is then
measured once on the evaluation lists. Speech is judged by an independent recogniser (judge.py). Each part is kept
in --output_dir as soon as it is measured, so a killed run goes on where it stopped; evaluation.json, evaluation.md and
steps.png are the report (development.json, development.md and development_steps.png that of the other split). Run it on
an idle machine: it measures time too. The main figures, the twin's too, rest on all rows of the lists, the comparison
of steps, thresholds and twin on the first --comparison_limit rows of each.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch
from tqdm.auto import tqdm

from training_examples.command_line import ScriptParser
from training_examples.evaluation.figures import (
    Figure,
    markdown_table,
    normalized,
    remember,
    share,
    write_figures,
)
from training_examples.evaluation.recognisers import SAMPLING_RATE, Recognizer, word_error_rate
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny.judge import domain_recognizer
from training_examples.ttt_tiny.speech import read_audio
from training_examples.ttt_tiny.talker import HeldOutLists, Talker, figures_of_list, measure_list
from training_examples.user_errors import run_command

VOICES = ("seen", "unheard", "unheard_natural")
SPLITS = {
    "evaluation": [
        *(f"spoken_qa_{voice}" for voice in VOICES),
        *(f"asr_{voice}" for voice in VOICES),
        "text_qa",
        "tts",
    ],
    "development": ["spoken_qa_seen", "asr_seen", "tts"],
}
SPEECH_LISTS = {"spoken_qa_seen": "QA answers", "tts": "random word sequences"}
# Rows of the report: key, title, at least, aim (None: no goal).
GOALS: list[tuple[str, str, str, str]] = [
    ("spoken_qa_seen/exact", "spoken QA, trained voices: exact text answers", "80 %", "92 %"),
    ("spoken_qa_unheard/exact", "the same, synthetic voices never heard", "65 %", "85 %"),
    ("spoken_qa_unheard_natural/exact", "the same, a recorded-speech voice never heard", "", ""),
    ("text_qa/exact", "QA in text: exact text answers", "", ""),
    ("asr_seen/wer", "ASR WER, trained voices", "10 %", "5 %"),
    ("asr_unheard/wer", "ASR WER, synthetic voices never heard", "20 %", "10 %"),
    ("asr_unheard_natural/wer", "ASR WER, a recorded-speech voice never heard", "", ""),
    ("spoken_qa_seen/speech_wer", "reply speech against its own text, QA answers: recogniser WER", "20 %", "10 %"),
    ("tts/speech_wer", "the same for TTS of random word sequences", "35 %", "18 %"),
    ("tts/exact", "TTS: exact text", "", ""),
    ("end_of_audio", "end of audio found", "99 %", "all"),
    ("speed/time_by_duration", "whole answer, time / reply duration, batch size 1", "0.5", "0.2"),
    ("cold_command", "command start to written reply, cold", "20 s", "10 s"),
    ("originals/spoken_qa_seen", "recogniser WER on the original answers' speech", "", ""),
    ("originals/tts", "recogniser WER on the original random sequences", "", ""),
]
# Columns of the comparison of steps, thresholds and twin.
COMPARED = {
    "spoken_qa_seen/speech_wer": "QA speech WER",
    "tts/speech_wer": "TTS speech WER",
    "end_of_audio": "end found",
    "speed/time_by_duration": "time / duration",
    "speed/median_seconds": "median answer",
}


@dataclass
class EvaluationArguments:
    model: str = field(default="model_cards/ttt-tiny", metadata={"help": "Folder of the model."})
    twin: str | None = field(default=None, metadata={"help": "Folder of the autoregressive twin, measured beside it."})
    split: Literal["evaluation", "development"] = field(
        default="evaluation", metadata={"help": "Which held-out lists: choose on development, report evaluation."}
    )
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    output_dir: Path = field(default=Path("runs/evaluate_ttt"), metadata={"help": "Where parts and report go."})
    steps: list[int] = field(default_factory=lambda: [2, 4, 8, 13, 26], metadata={"help": "Steps a block to compare."})
    steps_block_size: int = field(default=26, metadata={"help": "Codes a block in that comparison, as published."})
    default_steps: int = field(default=8, metadata={"help": "Steps a block of every other figure."})
    block_sizes: list[int] = field(
        default_factory=lambda: [4, 8, 13], metadata={"help": "Codes a block to compare at the default steps."}
    )
    thresholds: list[float] = field(
        default_factory=lambda: [0.5, 0.7, 0.9], metadata={"help": "Confidence thresholds to compare."}
    )
    limit: int | None = field(default=None, metadata={"help": "Rows per list; all by default."})
    comparison_limit: int = field(
        default=100, metadata={"help": "Rows per list for the comparison of steps and thresholds."}
    )
    batch_size: int = field(default=32, metadata={"help": "Requests answered at once, where time is not measured."})
    timed: int = field(default=20, metadata={"help": "Answers per speed figure, one at a time; 0 leaves speed out."})
    cold_runs: int = field(default=3, metadata={"help": "Starts of the command; 0 leaves them out."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Limit of an answer; the model's by default."})
    device: str = field(default="cpu", metadata={"help": "Device of the model."})
    threads: int = threads_field()
    num_workers: int = field(default=2, metadata={"help": "Processes of the recogniser."})

    @property
    def lists(self) -> HeldOutLists:
        """The lists of the chosen split."""
        return HeldOutLists(self.data_dir, self.split)

    def talker(self, folder: str, other: Talker | None = None) -> Talker:
        """Return the model of a folder, with the processor of `other` if given."""
        return Talker(folder, self.lists, other, self.device, self.max_new_tokens)


def measure_speed(talker: Talker, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Answer `count` questions one at a time, from the question's waveform to the reply's; the first is not counted."""
    rows = talker.lists.read("spoken_qa_seen", count + 1)
    timed = []
    for row in tqdm(rows, desc=f"{Path(talker.folder).name} one at a time {options}"):
        begin = time.perf_counter()
        (answer,) = talker.answer([row], **options)
        timed.append((time.perf_counter() - begin, len(answer["audio"]) / SAMPLING_RATE))
    return {"seconds": [seconds for seconds, _ in timed[1:]], "durations": [duration for _, duration in timed[1:]]}


def measure_cold_command(talker: Talker, count: int) -> dict[str, Any]:
    """Measure `count` times how many seconds `ttt-talk` takes from its start to its exit, with a question of about 3 s,
    in processes of their own."""
    rows = talker.lists.read("spoken_qa_seen")
    questions = [read_audio(talker.lists.folder, row["audio"], SAMPLING_RATE) for row in rows]
    question = min(questions, key=lambda samples: abs(len(samples) - 3 * SAMPLING_RATE))
    command = str(Path(sys.executable).with_name("ttt-talk"))
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        source, reply = str(Path(folder, "question.wav")), str(Path(folder, "reply.wav"))
        soundfile.write(source, question, SAMPLING_RATE)
        for _ in range(count):
            begin = time.perf_counter()
            subprocess.run([command, source, reply, "--model", talker.folder], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "question_seconds": len(question) / SAMPLING_RATE}


def measure_originals(args: EvaluationArguments, name: str, recognizer: Recognizer) -> dict[str, Any]:
    """Return what the recogniser hears in the reference answers' own speech."""
    rows = args.lists.read(name, args.limit)
    spoken = [read_audio(args.data_dir, row["answer_audio"], SAMPLING_RATE) for row in rows]
    heard = recognizer.transcribe(spoken, progress=True)
    return {"expected": [normalized(row["answer"]) for row in rows], "heard": heard}


def figures_of_speed(result: dict[str, Any]) -> dict[str, Figure]:
    """Return time by reply duration over all answers, and the median seconds an answer takes."""
    count, duration = len(result["seconds"]), sum(result["durations"])
    return {
        "time_by_duration": Figure(sum(result["seconds"]) / duration if duration else math.nan, count, ""),
        "median_seconds": Figure(statistics.median(result["seconds"]), count, "s"),
    }


class Evaluation:
    """The parts of an evaluation, run in order; each is remembered."""

    def __init__(self, args: EvaluationArguments, recognizer: Recognizer):
        self.args, self.recognizer = args, recognizer
        self.names = SPLITS[args.split]
        self.lists_fingerprint = args.lists.fingerprint(*self.names)
        self.figures: dict[str, Figure] = {}
        self.kinds: dict[str, Figure] = {}

    def part(
        self, talker: Talker | None, name: str, count: int | None, compute: Callable[[], Any], options: Any
    ) -> Any:
        """Return the result of `compute` on `count` samples, measured or remembered."""
        settings = {
            "model": talker.fingerprint if talker else None,
            "lists": self.lists_fingerprint,
            "count": count,
            "max_new_tokens": self.args.max_new_tokens,
            "options": options,
        }
        folder = Path(talker.folder).name if talker else "originals"
        suffix = "".join(f"-{key.removeprefix('audio_')}-{value}" for key, value in options.items())
        path = self.args.output_dir / "parts" / folder / f"{self.args.lists.name(name)}{suffix}.json"
        return remember(path, settings, compute)

    def lists(
        self, talker: Talker, names: Sequence[str], limit: int | None, options: dict[str, Any]
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the answers to the first `limit` rows of each list; those that are to be spoken are listened to."""
        answers = {}
        for name in names:
            recognizer = self.recognizer if name in SPEECH_LISTS else None
            compute = partial(measure_list, talker, name, limit, self.args.batch_size, recognizer, options)
            answers[name] = self.part(talker, name, limit, compute, options)["rows"]
        return answers

    def file(self, prefix: str, answers: dict[str, list[dict[str, Any]]]) -> None:
        """Keep the figures of `answers` under `prefix`."""
        for name, rows in answers.items():
            for key, figure in figures_of_list(rows).items():
                self.figures[f"{prefix}{name}/{key}"] = figure
        ended = [row["ended"] for name in SPEECH_LISTS for row in answers[name]]
        self.figures[f"{prefix}end_of_audio"] = share(ended)

    def speed(self, talker: Talker, prefix: str, options: dict[str, Any]) -> None:
        """Keep the figures of answers one at a time under `prefix`."""
        if self.args.timed:
            count = self.args.timed
            result = self.part(talker, "speed", count, partial(measure_speed, talker, count, options), options)
            for key, figure in figures_of_speed(result).items():
                self.figures[f"{prefix}speed/{key}"] = figure

    def run(self) -> None:
        """Run every part, in order. What is measured at the default steps serves both tables."""
        args = self.args
        limit = args.comparison_limit if args.limit is None else min(args.limit, args.comparison_limit)
        for name in SPEECH_LISTS:
            compute = partial(measure_originals, args, name, self.recognizer)
            result = self.part(None, name, args.limit, compute, {})
            for key, said, heard in (
                (f"originals/{name}", result["expected"], result["heard"]),
                (f"original speech/{name}/speech_wer", result["expected"][:limit], result["heard"][:limit]),
            ):
                self.figures[key] = Figure(word_error_rate(said, heard), len(heard))

        talker = args.talker(args.model)
        default = {
            "audio_block_size": talker.model.generation_config.audio_block_size or args.steps_block_size,
            "audio_steps_per_block": args.default_steps,
        }
        answers = self.lists(talker, self.names, args.limit, default)
        self.file("", answers)
        self.speed(talker, "", default)
        questions = answers["spoken_qa_seen"]
        for kind in sorted({row["kind"] for row in questions}):
            self.kinds[kind] = share(row["text"] == row["expected"] for row in questions if row["kind"] == kind)
        if args.cold_runs:
            compute = partial(measure_cold_command, talker, args.cold_runs)
            result = self.part(talker, "cold", args.cold_runs, compute, {})
            self.figures["cold_command"] = Figure(statistics.median(result["seconds"]), len(result["seconds"]), "s")

        for prefix, options in comparison_settings(args):
            if options == default:
                self.file(prefix, {name: answers[name][:limit] for name in SPEECH_LISTS})
            else:
                self.file(prefix, self.lists(talker, list(SPEECH_LISTS), limit, options))
            self.speed(talker, prefix, options)
        if args.twin:
            # The twin speaks with the model's audio tokenizer, so that only the language models are compared.
            twin = args.talker(args.twin, talker)
            answers = self.lists(twin, self.names, args.limit, {})
            self.file("twin/", answers)
            self.file("compared twin/", {name: answers[name][:limit] for name in SPEECH_LISTS})
            for prefix in ("twin/", "compared twin/"):
                self.speed(twin, prefix, {})


def comparison_settings(args: EvaluationArguments) -> list[tuple[str, dict[str, Any]]]:
    """Return prefix and generation options of each row of the comparison."""
    settings: list[tuple[str, dict[str, Any]]] = []
    block = {"audio_block_size": args.steps_block_size}
    settings += [(f"{steps} steps/", {**block, "audio_steps_per_block": steps}) for steps in args.steps]
    settings += [
        (
            f"{args.default_steps} steps, blocks of {size}/",
            {"audio_block_size": size, "audio_steps_per_block": args.default_steps},
        )
        for size in args.block_sizes
    ]
    settings += [(f"threshold {value}/", {**block, "audio_confidence_threshold": value}) for value in args.thresholds]
    return settings


def report(args: EvaluationArguments, figures: dict[str, Figure], kinds: dict[str, Figure]) -> str:
    """Return the report in Markdown."""
    header = ["", "at least", "aim", "measured", "samples", *(["autoregressive twin", "samples"] if args.twin else [])]
    main_rows = []
    for key, title, least, aim in GOALS:
        if key in figures:
            row: list[object] = [title, least, aim, figures[key], figures[key].count]
            if args.twin:
                twin = figures.get(f"twin/{key}")
                row += [twin, twin.count] if twin else ["", ""]
            main_rows.append(row)
    prefixes = [prefix for prefix, _ in comparison_settings(args)]
    prefixes += [*(["compared twin/"] if args.twin else []), "original speech/"]
    titles = {"compared twin/": "autoregressive twin", "original speech/": "the references' own speech"}
    # Every row rests on the same samples, so their number stands in the header.
    counts = {key: next((figures[p + key].count for p in prefixes if p + key in figures), 0) for key in COMPARED}
    compared_header = ["decoding", *(f"{title} (n = {counts[key]})" for key, title in COMPARED.items())]
    compared_rows = [
        [titles.get(prefix, prefix.rstrip("/")), *(figures.get(prefix + key, "") for key in COMPARED)]
        for prefix in prefixes
    ]
    return "\n\n".join(
        [
            f"## Figures on the {args.split} lists (at {args.default_steps} steps a block, in the model's own blocks)",
            markdown_table(header, main_rows),
            f"## Quality and speed by denoising steps, in blocks of {args.steps_block_size} codes",
            markdown_table(compared_header, compared_rows),
            "## Exact spoken answers by kind of question (trained voices)",
            markdown_table(
                ["kind", "exact", "samples"], [[kind, figure, figure.count] for kind, figure in kinds.items()]
            ),
        ]
    )


def plot(args: EvaluationArguments, figures: dict[str, Figure], path: Path) -> None:
    """Draw the recogniser's WER by denoising steps a block, with the originals and the twin as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for (name, title), color in zip(SPEECH_LISTS.items(), ("#1f6f8b", "#c8553d"), strict=True):
        chosen = [figures[f"{steps} steps/{name}/speech_wer"] for steps in args.steps]
        values = [100 * figure.value for figure in chosen]
        axes.plot(args.steps, values, "o-", color=color, label=f"{title} (n = {chosen[0].count})", clip_on=False)
        own = 100 * figures[f"original speech/{name}/speech_wer"].value
        axes.axhline(own, color=color, lw=1.2, ls=":", label="the references' own speech", clip_on=False)
        if (twin := figures.get(f"compared twin/{name}/speech_wer")) is not None:
            axes.axhline(100 * twin.value, color=color, lw=1.2, ls="--", label="autoregressive twin")
    axes.set(
        xscale="log",
        xlabel=f"denoising steps a block of {args.steps_block_size} codes",
        ylabel="recogniser WER of the reply, %",
        ylim=0,
    )
    axes.set_xticks(args.steps, [str(steps) for steps in args.steps])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    (args,) = ScriptParser(EvaluationArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    torch.set_grad_enabled(False)
    with domain_recognizer(args.num_workers) as recognizer:
        evaluation = Evaluation(args, recognizer)
        evaluation.run()
    text = report(args, evaluation.figures, evaluation.kinds)
    write_figures(
        args.output_dir / f"{args.split}.json", {"figures": evaluation.figures, "exact_by_kind": evaluation.kinds}
    )
    (args.output_dir / f"{args.split}.md").write_text(text + "\n", encoding="utf-8")
    plot(args, evaluation.figures, args.output_dir / f"{args.lists.name('steps')}.png")
    print(text)


if __name__ == "__main__":
    run_command(main)
