"""Measure one trained run of the study on the held-out lists, at the settings of its arm; run_study.py calls it.

    python training_examples/study/measure_run.py --run runs/study/ttt-0 --arm ttt --recogniser whisper:base

Answers and what was heard in them are kept as they come; figures-SPLIT.json in the run's folder has, for every list and
setting, what each row counts, so that report_study.py can draw rows and seeds anew for its intervals.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.backends import TttBackend
from training_examples.evaluation.listening import open_listener
from training_examples.evaluation.rows import EvaluationError, Listener, Run
from training_examples.files import write_json
from training_examples.study.arms import ARMS, FROM_THE_LEFT, setting_name
from training_examples.study.counting import count
from training_examples.study.lists import LISTS, SPLITS, choose_lists, hash_lists, list_path
from training_examples.study.samples import read_samples
from training_examples.threads import threads_field, use_threads
from training_examples.user_errors import run_command


@dataclass
class MeasureArguments:
    run: Path = field(metadata={"help": "Folder of the run; its model is in train/."})
    arm: str = field(metadata={"help": "Which arm it is of.", "choices": list(ARMS)})
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    split: str = field(
        default="evaluation", metadata={"help": "Which lists: choose on development.", "choices": SPLITS}
    )
    lists: list[str] = field(default_factory=list, metadata={"help": "Which of them; all of the split by default."})
    recogniser: list[str] = field(default_factory=list, metadata={"help": "Who listens, see evaluate_model.py."})
    limit: int = field(default=60, metadata={"help": "Rows of each list."})
    batch_size: int = field(default=32, metadata={"help": "Answers written side by side."})
    device: str = field(default="cpu", metadata={"help": "Where the model answers."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, limit=1, batch_size=1)


def measure(args: MeasureArguments, listeners: Sequence[Listener]) -> dict[str, Any]:
    """
    Return counts by setting and list.

    Raises:
        EvaluationError: If rows could not be answered; the next call asks them again.
    """
    backend, arm = TttBackend(str(args.run / "train"), args.device), ARMS[args.arm]
    found: dict[str, Any] = {}
    for setting in arm.settings:
        name = setting_name(setting)
        speaker = backend.with_generation(**setting)
        for list_name in choose_lists(args.data_dir, args.split, args.lists):
            kind = LISTS[list_name]
            listened = kind.spoken if setting == FROM_THE_LEFT else kind.task == "tts"
            if name not in arm.ends and not listened:
                continue
            samples = read_samples(args.data_dir, args.split, list_name, args.limit)
            title = list_path(args.data_dir, args.split, list_name).stem
            run = Run(args.run / "answers", f"{title}-{name}", kind.task, samples, speaker.settings)
            rows = run.answer(speaker, args.batch_size, keep_audio=kind.spoken)
            if failed := [row for row in rows if "error" in row]:
                raise EvaluationError(f"{len(failed)} rows of {run.folder} failed, the first: {failed[0]['error']}")
            heard = {listener.name: run.listen(listener) for listener in listeners} if kind.spoken else {}
            found.setdefault(name, {})[list_name] = count(rows, kind.task, heard)
    return found


def main() -> None:
    (args,) = ScriptParser(MeasureArguments, __doc__).parse_args_into_dataclasses()
    threads = use_threads(args.threads)
    listeners = [open_listener(name, device=args.device, threads=threads) for name in args.recogniser]
    names = choose_lists(args.data_dir, args.split, args.lists)
    content = {
        "arm": args.arm,
        "split": args.split,
        "lists": hash_lists(args.data_dir, args.split, names, args.limit),
        "judges": {listener.name: listener.settings for listener in listeners},
        "settings": measure(args, listeners),
    }
    write_json(args.run / f"figures-{args.split}.json", content)


if __name__ == "__main__":
    run_command(main)
