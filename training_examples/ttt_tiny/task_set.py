"""The task set of ttt-tiny: its held-out lists, for the model and its autoregressive twin. Its report is the card's.

    python training_examples/evaluate_model.py --task_set training_examples/ttt_tiny/task_set.py \
        --model model_cards/ttt-tiny --data_dir data/ttt_tiny/eval --split development

Needs the lists of build_speech.py and human_lists.py. Choices are made with `--split development`, and what was chosen
is then measured once on the evaluation lists. Every part is kept in --output_dir as it comes, so a killed run goes on
where it stopped. Run it on an idle machine: it measures time too. The tables are made in task_report.py, the plot
in task_plot.py.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch
from tqdm.auto import tqdm

from modeling_ttt.generation_config_ttt import SURE_RULES
from training_examples.command_line import check_least
from training_examples.evaluation.backends import Answer, Backend, Sample, TttBackend, Turn
from training_examples.evaluation.figures import normalized, remember
from training_examples.evaluation.measuring import Measured, of_median, of_ratio, of_scorer, share_of
from training_examples.evaluation.options import EvaluationArguments
from training_examples.evaluation.reports import Section, write_report
from training_examples.evaluation.rows import Listener, Row, Run, name_unusable, recording_problem
from training_examples.evaluation.text_forms import has_words
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.held_out import HeldOutLists
from training_examples.ttt_tiny.judge import domain_recognizer
from training_examples.ttt_tiny.speech import read_audio
from training_examples.ttt_tiny.task_plot import plot_sweep
from training_examples.ttt_tiny.task_report import body

SPHINX = "pocketsphinx"
QUESTIONS = ("spoken_qa_seen", "spoken_qa_unheard", "spoken_qa_unheard_natural")
DICTATIONS = ("asr_seen", "asr_unheard", "asr_unheard_natural")
PEOPLE = ("human_digits", "control_digits", "human_words")  # taken down, in both splits: there are no others
UNKNOWN = ("other_seen", "other_unheard", "human_other")
SPLITS = {
    "evaluation": [*QUESTIONS, *DICTATIONS, *PEOPLE, *UNKNOWN, "not_heard", "text_qa", "tts", "two_turns"],
    "development": ["spoken_qa_seen", "asr_seen", "other_seen", "not_heard", "tts", "two_turns"],
}
SPOKEN = ("spoken_qa_seen", "tts")  # whose answers are listened to
ORIGINALS = (*SPOKEN, "codec_answers")  # whose reference speech is listened to, as it is and through the codec
TEST_SAMPLE_SECONDS = 3.0  # about as long is the question of the cold command


@dataclass
class Arguments(EvaluationArguments):
    """Options of ttt-tiny's task set."""

    output_dir: Path = field(default=Path("runs/evaluate_ttt_tiny"), metadata={"help": "Where rows and reports go."})
    recogniser: list[str] = field(
        default_factory=lambda: ["whisper:base", "whisper:tiny.en", SPHINX],
        metadata={"help": "Who listens, the one of the sweep first; pocketsphinx is the one of the domain."},
    )
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    split: Literal["evaluation", "development"] = field(
        default="evaluation", metadata={"help": "Which held-out lists: choose on development, report evaluation."}
    )
    twin: str | None = field(default=None, metadata={"help": "Folder of the autoregressive twin, measured beside it."})
    lists: list[str] = field(default_factory=list, metadata={"help": "Only these lists (without development_)."})
    listen_limit: int | None = field(
        default=None, metadata={"help": "Rows a list that are listened to; all that are answered by default."}
    )
    sphinx_voice: Literal["slt", "none"] = field(
        default="none", metadata={"help": "The voice that PocketSphinx is tuned to: slt is the first edition's."}
    )
    sweep: bool = field(default=True, metadata={"help": "Measure speech at other blocks, steps and thresholds too."})
    sweep_limit: int = field(default=60, metadata={"help": "Rows a list of the sweep."})
    blocks: list[int] = field(default_factory=lambda: [4, 8, 13, 26], metadata={"help": "Codes a block."})
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 13, 26], metadata={"help": "Steps a block."})
    thresholds: list[float] = field(default_factory=lambda: [0.7, 0.9], metadata={"help": "Confidence thresholds."})
    threshold_blocks: list[int] = field(
        default_factory=lambda: [26], metadata={"help": "Codes a block with thresholds and prefix probabilities."}
    )
    prefixes: list[float] = field(default_factory=lambda: [0.3, 0.6], metadata={"help": "Prefix probabilities."})
    order_biases: list[float] = field(
        default_factory=lambda: [0.0, 0.05], metadata={"help": "audio_order_bias of every setting of the sweep."}
    )
    timed: int = field(default=20, metadata={"help": "Answers timed one at a time, whole and streamed; 0: none."})
    cold_runs: int = field(default=3, metadata={"help": "Starts of ttt-talk; 0: none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, listen_limit=1, sweep_limit=1, timed=0, cold_runs=0)

    def sweep_settings(self) -> list[dict[str, Any]]:
        """Return the options of `generate` that the sweep compares."""
        off = dict.fromkeys(SURE_RULES)
        found: list[dict[str, Any]] = [
            {"audio_block_size": block, "audio_steps_per_block": steps, **off}
            for block in self.blocks
            for steps in self.steps
            if steps <= block
        ]
        found += [
            {"audio_block_size": block, "audio_confidence_threshold": threshold}
            for block in self.threshold_blocks
            for threshold in self.thresholds
        ]
        found = [{**options, "audio_order_bias": bias} for bias in self.order_biases for options in found]
        last = {"audio_order_bias": self.order_biases[-1]}  # without effect on a prefix
        return found + [
            {"audio_block_size": block, "audio_prefix_probability": prefix, **last}
            for block in self.threshold_blocks
            for prefix in self.prefixes
        ]


class Recordings:
    """Answers that were recorded: the lists' own speech as it is or, with `codec`, through its audio tokenizer."""

    def __init__(self, lists: HeldOutLists, codec: TttBackend | None = None):
        self.lists, self.codec = lists, codec
        self.name = "codec" if codec else "original"
        self.settings: Mapping[str, Any] = {"codec": codec.settings["model"] if codec else None}

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], task: str) -> list[Answer]:
        """Return the recorded answers."""
        texts = [sample.references[0] for sample in samples]
        read = [soundfile.read(self.lists.folder / s.details["answer_audio"], dtype="float32") for s in samples]
        waves, rate = [wave for wave, _ in read], read[0][1]
        if self.codec is None:
            return [Answer(text, wave, rate) for text, wave in zip(texts, waves, strict=True)]
        processor = self.codec.processor
        codes = processor.encode_audio(waves, sampling_rate=rate)
        decoded = processor.decode_audio(codes)
        return [
            Answer(text, wave, processor.sampling_rate, codes=len(row))
            for text, wave, row in zip(texts, decoded, codes, strict=True)
        ]


def listeners(args: Arguments) -> list[Listener]:
    """Return the recognisers of an evaluation; PocketSphinx without a file is the domain's."""
    others = replace(args, recogniser=[spec for spec in args.recogniser if spec != SPHINX]).listeners()
    of_slt = args.sphinx_voice == "slt"
    sphinx = Listener(SPHINX, lambda: domain_recognizer(1, of_slt), {"domain": True, "voice": args.sphinx_voice})
    found = iter(others)
    return [sphinx if spec == SPHINX else next(found) for spec in args.recogniser]


def is_exact(row: Row) -> bool:
    """Return whether an answer's text is the reference."""
    return normalized(row["text"]) in row["references"]


class Evaluation:
    """What is measured of the model, its twin, and the recordings; every part is kept on disk."""

    def __init__(self, args: Arguments):
        self.args, self.lists, self.listeners = args, HeldOutLists(args.data_dir, args.split), listeners(args)
        wanted = args.lists or [*SPLITS[args.split], *([ORIGINALS[-1]] if args.split == "evaluation" else [])]
        self.unusable: dict[str, tuple[int, str]] = {}  # by list: of how many rows some cannot be asked, what is said
        self.missing = [name for name in wanted if not self.lists.has(name)]
        self.present = [name for name in wanted if name not in self.missing]
        if not self.present:
            raise FileNotFoundError(
                f"`--data_dir` {args.data_dir} has none of the lists {', '.join(wanted)} of the split {args.split!r}: "
                "make them with training_examples/ttt_tiny/build_speech.py and human_lists.py"
            )
        place = (args.device, args.dtype)
        trust: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
        self.model = TttBackend(args.model, *place, args.generation_options(), **trust)
        self.twin = TttBackend(args.twin, *place, processor_of=self.model, **trust) if args.twin else None
        for options in args.sweep_settings() if args.sweep else ():  # refused before anything is answered
            self.model.with_generation(**{**self.model.generation, **options})

    @property
    def listened(self) -> int | None:
        """How many rows of a list are listened to; None: all."""
        limits = [limit for limit in (self.args.limit, self.args.listen_limit) if limit is not None]
        return min(limits, default=None)

    def run_of(self, backend: Backend, part: str, name: str, limit: int | None, keep_audio: bool = True) -> Run:
        """Return the answers of a backend to a list; those that are spoken are kept until they are listened to."""
        samples = self.lists.samples(name, limit)
        settings = {**backend.settings, "list": self.lists.fingerprint(name)}
        run = Run(self.args.output_dir / part, self.lists.name(name), self.lists.task(name), samples, settings)
        run.answer(backend, self.args.batch_size, keep_audio)
        if unusable := run.unusable:
            said = len(samples), name_unusable(unusable, len(samples))
            self.unusable[name] = max(said, self.unusable.get(name, said))  # of most rows, if fewer are listened to
        return run

    def answers(self, backend: Backend, part: str) -> list[Measured]:
        """Return the figures of all lists at the backend's own settings."""
        found: list[Measured] = []
        rows: dict[str, list[Row]] = {}
        for name in self.present:
            if name == "codec_answers":
                continue
            run = self.run_of(backend, part, name, self.args.limit, keep_audio=name in SPOKEN)
            rows[name] = run.usable
            if name in SPOKEN:
                found += self.speech(self.run_of(backend, part, name, self.listened), name)
        return [*figures_of(rows), *found]

    def speech(self, run: Run, name: str, only_first: bool = False) -> list[Measured]:
        """Return the word errors that recognisers hear in the speech of answers, against the answers' own text."""
        found = []
        for listener in self.listeners[:1] if only_first else self.listeners:
            heard, rows = run.listen(listener), run.usable
            ids, own = [row["id"] for row in rows], [normalized(row["text"]) for row in rows]
            if has_words(own, "spoken"):
                title = f"{listener.name} WER"
                said = [heard[name] for name in ids]
                options = {"normalizer": "spoken"}
                found.append(of_scorer(f"{name}/speech/{listener.name}", title, "error_rate", ids, said, own, options))
        return found

    def recordings(self, codec: TttBackend | None) -> list[Measured]:
        """Return the same of the lists' own speech, or of what the audio tokenizer makes of it."""
        backend, found = Recordings(self.lists, codec), []
        for name in ORIGINALS:
            if name in self.present and self.lists.read(name, 1)[0]["answer_audio"]:
                run = self.run_of(backend, backend.name, name, self.listened)
                found += self.speech(run, name)
        return found

    def sweep(self, backend: TttBackend, part: str, options: Mapping[str, Any] | None) -> list[Measured]:
        """Return speech, exact texts, ends and codes a forward of a backend at other options of `generate`."""
        backend = backend if options is None else backend.with_generation(**{**backend.generation, **options})
        found: list[Measured] = []
        for name in SPOKEN:
            if name in self.present:
                limit = min(self.args.sweep_limit, self.args.limit or self.args.sweep_limit)
                run = self.run_of(backend, part, name, limit)
                found += self.speech(run, name, only_first=True)
                if options is not None:
                    run.drop_audio()
                found += figures_of({name: run.usable})
        return found

    def speed(self, backend: TttBackend, part: str) -> list[Measured]:
        """Return the time of whole and of streamed answers, one at a time; the first of each is not counted."""
        args, found = self.args, []
        name = next((name for name in QUESTIONS if name in self.present), None)
        if name is None or not args.timed:
            return []
        samples = self.lists.samples(name, args.timed + 1)
        samples = [sample for sample in samples if not recording_problem(sample)]
        if len(samples) < 2:  # the first one is not counted
            return []
        settings = {**backend.settings, "list": self.lists.fingerprint(name), "threads": torch.get_num_threads()}

        def kept(what: str, compute: Any) -> Any:
            path = args.output_dir / part / f"{what}-{Path(backend.name).name}.json"
            return remember(path, {**settings, "count": len(samples)}, compute)

        whole = kept("whole", lambda: time_answers(backend, samples, self.lists.task(name)))[1:]
        times = [(str(index), seconds, duration) for index, (seconds, duration) in enumerate(whole)]
        title = "whole answer, time / duration, one at a time"
        found.append(of_ratio("speed/time_by_duration", title, times, lower_is_better=True))
        found.append(of_median("speed/seconds", "whole answer, one at a time, median", [s for _, s, _ in times]))
        first = kept("streamed", lambda: time_first_sound(backend, samples))[1:]
        found.append(of_median("speed/first_sound", "first sound after the question, streaming", first))
        return found

    def cold_command(self) -> list[Measured]:
        """Return how long ttt-talk takes from its start to its end, in processes of their own."""
        args = self.args
        name = next((name for name in QUESTIONS if name in self.present), None)
        if name is None or not args.cold_runs:
            return []
        samples = self.lists.samples(name, args.limit)
        paths = [sample.turns[0].audio for sample in samples if not recording_problem(sample)]
        if not paths:
            return []
        question = min(paths, key=lambda path: abs(soundfile.info(path).duration - TEST_SAMPLE_SECONDS))
        settings = {"model": self.model.settings, "question": Path(question).name, "runs": args.cold_runs}
        path = args.output_dir / "model" / "cold.json"
        trust = ["--trust_remote_code"] if args.trust_remote_code else []
        seconds = remember(path, settings, lambda: time_command(args.model, question, args.cold_runs, trust))
        return [of_median("speed/cold_command", "ttt-talk, from its start to the reply", seconds)]


def figures_of(rows: Mapping[str, Sequence[Row]]) -> list[Measured]:
    """Return what is counted of the texts, ends and forwards of the lists' answers."""
    found: list[Measured] = []

    def exact(key: str, title: str, of: Iterable[Row]) -> None:
        if chosen := list(of):
            found.append(share_of(key, title, [(row["id"], is_exact(row)) for row in chosen]))

    def errors(key: str, title: str, of: Iterable[Row]) -> None:
        if chosen := list(of):
            ids, said = [row["id"] for row in chosen], [normalized(row["text"]) for row in chosen]
            right = [row["references"][0] for row in chosen]
            found.append(of_scorer(key, title, "error_rate", ids, said, right, {"normalizer": "none"}))

    for name in (*QUESTIONS, "text_qa", *UNKNOWN, "not_heard", "two_turns", "tts"):
        exact(f"{name}/exact", f"{name}: exact text", rows.get(name, ()))
        if name != "tts":
            for kind in sorted({row["kind"] for row in rows.get(name, ())}):
                group = [row for row in rows[name] if row["kind"] == kind]
                exact(f"{name}/{kind}/exact", f"{name}, {kind}: exact text", group)
    if turns := rows.get("two_turns"):
        flags = [(row["id"], normalized((row["earlier"] or [""])[0]) == row["first_reference"]) for row in turns]
        found.append(share_of("two_turns/first/exact", "two_turns: first turn exact", flags))
        after_spoken = [row for row in turns if row["kind"].startswith("spoken then")]
        exact("two_turns/after_spoken/exact", "two_turns, after a spoken one: exact text", after_spoken)
    for name in (*DICTATIONS, *PEOPLE):
        errors(f"{name}/wer", f"{name}: WER", rows.get(name, ()))
        for kind in sorted({row["kind"] for row in rows.get(name, ())}):
            errors(f"{name}/{kind}/wer", f"{name}, {kind}: WER", [r for r in rows[name] if r["kind"] == kind])
    alarms = [row for name in QUESTIONS for row in rows.get(name, ())]
    if alarms:
        known = (domain.NOT_HEARD, domain.NOT_KNOWN)
        flags = [(row["id"], normalized(row["text"]) in known) for row in alarms]
        found.append(share_of("false_alarms", "domain questions refused", flags, lower_is_better=True))
    spoken = [row for name in SPOKEN for row in rows.get(name, ())]
    if spoken:
        flags = [(row["id"], bool(row.get("ended") and row.get("codes"))) for row in spoken]
        found.append(share_of("end_of_audio", "end of audio found", flags))
    for name in SPOKEN:
        for key, taken, title in (
            ("codes_per_step", "speech_steps", "codes a forward of speech"),
            ("codes_per_forward", "forwards", "codes a forward, of prompt and text too"),
        ):
            counted = [(r["id"], r["codes"], r[taken]) for r in rows.get(name, ()) if r.get("codes") and r.get(taken)]
            if counted:
                found.append(of_ratio(f"{name}/{key}", f"{name}: {title}", counted))
    return found


def time_answers(backend: TttBackend, samples: Sequence[Sample], task: str) -> list[tuple[float, float]]:
    """Return the seconds that each answer takes and the seconds that it lasts, from a waveform to a waveform."""
    found = []
    for sample in tqdm(samples, desc=f"{Path(backend.name).name}, one at a time"):
        (answer,) = backend.answer([_loaded(sample, backend)], task)
        found.append((answer.seconds, len(answer.audio) / answer.sampling_rate))
    return found


def time_first_sound(backend: TttBackend, samples: Sequence[Sample]) -> list[float]:
    """Return the seconds from each question to the first piece of speech of its streamed answer."""
    found = []
    options = {name: value for name, value in backend.generation.items() if value is not None}
    with backend.options_unset():  # as of whole answers, whose settings the report names
        for sample in tqdm(samples, desc=f"{Path(backend.name).name}, streaming"):
            audio = _loaded(sample, backend).turns[0].audio
            begin = time.perf_counter()
            pieces = backend.pipe(audio, task="spoken_qa", stream=True, generate_kwargs=options)
            sounds = (time.perf_counter() for piece in pieces if len(piece.get("audio", ())))
            moment = next(sounds, None)
            if moment is not None:
                found.append(moment - begin)
            for _ in sounds:  # to the end, so that the next one has the machine to itself
                pass
    return found


def _loaded(sample: Sample, backend: TttBackend) -> Sample:
    """Return a sample whose recording is in memory, so that reading it is not timed."""
    path, rate = sample.turns[0].audio, backend.processor.sampling_rate
    audio = {"array": read_audio("", path, rate), "sampling_rate": rate}
    return replace(sample, turns=(Turn(audio=audio),))


def time_command(model: str, question: str, count: int, options: Sequence[str] = ()) -> list[float]:
    """Return how many seconds each start of ttt-talk, with further options, took."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            command = [sys.executable, "-m", "pipelines.ttt_talk", question, str(Path(folder, "reply.wav"))]
            begin = time.perf_counter()
            subprocess.run([*command, "--model", model, *options], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
    return seconds


def settings_title(options: Mapping[str, Any]) -> str:
    """Return the options of a row of the sweep in words."""
    block = f"blocks of {options['audio_block_size']}"
    if options.get("audio_prefix_probability"):
        return f"{block}, prefix {options['audio_prefix_probability']}"
    threshold = options.get("audio_confidence_threshold")
    steps = options.get("audio_steps_per_block")
    how = f"threshold {threshold}" if threshold else f"{steps} step{'s' if steps != 1 else ''}"
    bias = f", order {options['audio_order_bias']}" if options["audio_order_bias"] else ""
    return f"{block}, {how}{bias}"


def run(args: Arguments) -> str:
    """Measure everything, write report.md, report.json and sweep.png, and return the report."""
    evaluation = Evaluation(args)
    model, twin = evaluation.model, evaluation.twin
    sections = []

    def add(name: str, title: str, figures: list[Measured], settings: Mapping[str, Any] | None = None) -> None:
        sections.append(Section(name, title, figures, settings=settings or {}))
        write(sections, args, evaluation)  # what is there can be read before the rest is

    common: dict[str, Any] = {"folder": args.model, "decoding": settings_title(model.decoding())}
    common |= {**model.settings, "lists": evaluation.lists.fingerprint(*evaluation.present)}
    common |= {"device": args.device, "threads": torch.get_num_threads()}
    add("original", "The lists' own speech", evaluation.recordings(None))
    add("codec", "Their speech through the audio tokenizer", evaluation.recordings(model))
    add("model", "The model", evaluation.answers(model, "model"), common)
    if twin:
        add("twin", "The autoregressive twin", evaluation.answers(twin, "twin"), {"folder": args.twin, **twin.settings})
    add("model_speed", "Speed of the model", [*evaluation.speed(model, "model"), *evaluation.cold_command()])
    if twin:
        add("twin_speed", "Speed of the twin", evaluation.speed(twin, "twin"))
    if args.sweep:
        if twin:
            add("sweep_twin", "autoregressive twin", evaluation.sweep(twin, "twin", None))
        for options in args.sweep_settings():
            title = settings_title(options)
            add(f"sweep/{title}", title, evaluation.sweep(model, "sweep", options), options)
        if evaluation.listeners:
            plot_sweep(sections, evaluation.listeners[0].name, args.output_dir / "sweep.png")
    return write(sections, args, evaluation)


def write(sections: Sequence[Section], args: Arguments, evaluation: Evaluation) -> str:
    """Write the report of what is measured so far."""
    names = [listener.name for listener in evaluation.listeners]
    text = body(sections, names)
    if evaluation.missing:
        text += f"\n\nNot measured, for the lists are not there: {', '.join(evaluation.missing)}."
    for name, (_, said) in evaluation.unusable.items():
        text += f"\n\n{name}: {said}"
    title = f"ttt-tiny on the {args.split} lists"
    if args.limit:
        title += f", the first {args.limit} rows of each"
    return write_report(args.output_dir, title, sections, text)


__all__ = ["Arguments", "run"]
