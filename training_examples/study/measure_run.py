"""Measure one trained run of the study on the held-out lists, at each setting of its arm; run_study.py calls it.

    python training_examples/study/measure_run.py --run runs/study/ttt-0 --arm ttt --recogniser whisper:base

Answers and what was heard in them are kept as they come; figures.json in the run's folder has, for every list and
setting, what each row counts, so that report_study.py can draw rows and seeds anew for its intervals.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_examples.command_line import ScriptParser
from training_examples.evaluation.backends import Sample, TttBackend, Turn
from training_examples.evaluation.figures import normalized
from training_examples.evaluation.listening import open_listener
from training_examples.evaluation.rows import Listener, Row, Run
from training_examples.evaluation.whisper_judge import count_word_errors
from training_examples.files import write_json
from training_examples.study.arms import ARMS
from training_examples.threads import threads_field, use_threads
from training_examples.user_errors import run_command

# List, what the model is asked for, whether its speech is listened to.
LISTS = (
    ("spoken_qa_seen", "spoken_qa", True),
    ("spoken_qa_unheard", "spoken_qa", False),
    ("asr_seen", "asr", False),
    ("tts", "tts", True),
)


@dataclass
class MeasureArguments:
    run: Path = field(metadata={"help": "Folder of the run; its model is in train/."})
    arm: str = field(metadata={"help": "Which arm it is of.", "choices": list(ARMS)})
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    split: str = field(
        default="evaluation",
        metadata={"help": "Which lists: choose on development.", "choices": ["evaluation", "development"]},
    )
    recogniser: list[str] = field(default_factory=list, metadata={"help": "Who listens, see evaluate_model.py."})
    limit: int = field(default=100, metadata={"help": "Rows of each list."})
    batch_size: int = field(default=32, metadata={"help": "Answers written side by side."})
    threads: int = threads_field()


def read_samples(folder: Path, name: str, limit: int) -> list[Sample]:
    """
    Return the first rows of a held-out list of ttt-tiny as samples.

    Raises:
        FileNotFoundError: If there is no such list.
    """
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: `--data_dir` must hold the lists of ttt_tiny/build_speech.py")
    samples = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()[:limit]):
        typed = row["audio"] is None
        turn = Turn(text=row["question"] or row["answer"]) if typed else Turn(audio=str(folder / row["audio"]))
        samples.append(Sample(row["id"], (turn,), (row["answer"],), row["kind"]))
    return samples


def setting_name(setting: Mapping[str, Any]) -> str:
    """Return what a setting of `generate` is called in files: `26:4` for blocks of 26 codes in 4 steps."""
    if not setting:
        return "default"
    return f"{setting['audio_block_size']}:{setting['audio_steps_per_block']}"


def count(rows: Sequence[Row], heard: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """
    Return what each row counts, as pairs of a numerator and a denominator: `exact` answers, word errors of the text
    (`wer`), word errors of the speech against the answer's own text (`speech_wer JUDGE`), codes by forwards.
    """
    said = [normalized(row["text"]) for row in rows]
    right = [normalized(row["references"][0]) for row in rows]
    counts: dict[str, Any] = {
        "exact": [[int(text == reference), 1] for text, reference in zip(said, right, strict=True)],
        "wer": count_word_errors(right, said),
        "codes_per_step": [[row["codes"] or 0, row["speech_steps"] or 0] for row in rows],
        "codes_per_forward": [[row["codes"] or 0, row["forwards"] or 0] for row in rows],
        "forwards": [[row["forwards"] or 0, 1] for row in rows],
        "time": [[row["seconds"], row["audio_seconds"]] for row in rows],
    }
    for judge, transcripts in heard.items():
        counts[f"speech_wer {judge}"] = count_word_errors(said, [transcripts[row["id"]] for row in rows])
    return counts


def measure(args: MeasureArguments, listeners: Sequence[Listener]) -> dict[str, Any]:
    """Return counts by setting and list; lists that are not spoken are answered at the first setting only."""
    backend = TttBackend(str(args.run / "train"))
    prefix = "" if args.split == "evaluation" else f"{args.split}_"
    found: dict[str, Any] = {}
    for place, setting in enumerate(ARMS[args.arm].settings):
        speaker = backend.with_generation(**setting)
        for name, task, spoken in LISTS:
            if place and not spoken:
                continue
            samples = read_samples(args.data_dir, prefix + name, args.limit)
            run = Run(args.run / "answers", f"{name}-{setting_name(setting)}", task, samples, speaker.settings)
            rows = run.answer(speaker, args.batch_size, keep_audio=spoken)
            heard = {listener.name: run.listen(listener) for listener in listeners} if spoken else {}
            found.setdefault(setting_name(setting), {})[name] = count(rows, heard)
            run.drop_audio()
    return found


def main() -> None:
    (args,) = ScriptParser(MeasureArguments, __doc__).parse_args_into_dataclasses()
    threads = use_threads(args.threads)
    listeners = [open_listener(name, threads=threads) for name in args.recogniser]
    figures = measure(args, listeners)
    write_json(args.run / "figures.json", {"arm": args.arm, "split": args.split, "settings": figures})


if __name__ == "__main__":
    run_command(main)
