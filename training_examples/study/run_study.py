"""Train and measure every arm of the study (arms.py) with every seed; run again, it goes on where it stopped.

    python training_examples/study/run_study.py --start runs/tiny/warm --dataset data/ttt_tiny/examples/dataset \
        --output_dir runs/study --workers 2

Each run is a process of its own on one thread, `--workers` of them side by side. What a run is told and what it wrote
lies in OUTPUT/ARM-SEED: `train/` (the model, its log and curves), `answers/` and `figures.json`. report_study.py makes
the table and the plots.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from training_examples.command_line import ScriptParser
from training_examples.study.arms import ARMS, Arm, training_flags
from training_examples.user_errors import run_command

SCRIPTS = Path(__file__).parents[1]


@dataclass
class StudyArguments:
    start: Path = field(metadata={"help": "The model that every arm starts from."})
    dataset: str = field(metadata={"help": "Examples that every arm is trained on."})
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    output_dir: Path = field(default=Path("runs/study"), metadata={"help": "A folder for each run."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Which arms, see arms.py."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of data order and noise."})
    max_steps: int = field(default=400, metadata={"help": "Training steps of every run."})
    batch_size: int = field(default=48, metadata={"help": "Examples a step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak of a cosine schedule."})
    distilled_records: int = field(default=4_000, metadata={"help": "Answers that the distilled arm learns from."})
    recogniser: list[str] = field(
        default_factory=list, metadata={"help": "Who listens: whisper:FOLDER and others, see evaluate_model.py."}
    )
    limit: int = field(default=100, metadata={"help": "Rows of each held-out list."})
    split: str = field(
        default="evaluation",
        metadata={"help": "Which lists: choose on development.", "choices": ["evaluation", "development"]},
    )
    workers: int = field(default=1, metadata={"help": "Runs side by side, one thread each."})

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.arms) - set(ARMS)):
            raise ValueError(f"`--arms` {unknown}: there are {list(ARMS)}")
        for name in ("max_steps", "workers", "limit", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be at least 1")


def training_command(
    args: StudyArguments, arm: Arm, seed: int, steps: int, start: Path, datasets: Sequence[str], folder: Path
) -> list[str]:
    """Return the command that trains one stage of a run."""
    return [
        *(sys.executable, str(SCRIPTS / "train_ttt.py"), "--model", str(start), "--dataset", *datasets),
        *("--output_dir", str(folder), "--max_steps", str(steps), "--seed", str(seed), "--threads", "1", "--use_cpu"),
        *("--per_device_train_batch_size", str(args.batch_size), "--train_sampling_strategy", "group_by_length"),
        *("--learning_rate", str(args.learning_rate), "--lr_scheduler_type", "cosine", "--warmup_steps", "40"),
        *("--weight_decay", "0.05", "--adam_beta2", "0.98", "--bf16", "--report_to", "none", "--logging_steps", "20"),
        *("--save_steps", "100", "--save_total_limit", "1", "--max_grad_norm", "1.0"),
        *training_flags(arm.options),
    ]


def distilling_command(args: StudyArguments, model: Path, folder: Path) -> list[str]:
    """Return the command that lets the model of a run's first half answer training examples."""
    slow = ["audio_block_size=8", "audio_steps_per_block=8"]
    return [
        *(sys.executable, str(SCRIPTS / "self_distill.py"), "--model", str(model), "--dataset", args.dataset),
        *("--output_dir", str(folder), "--generation", *slow, "--max_records", str(args.distilled_records)),
        *("--tasks", "tts", "spoken_qa", "--threads", "1"),
    ]


def stages_of(args: StudyArguments, name: str, seed: int) -> list[tuple[Path, list[str]]]:
    """Return the commands of one run in order, each with the file or folder that is there when it has ended."""
    arm, folder = ARMS[name], args.output_dir / f"{name}-{seed}"
    final, steps = folder / "train", args.max_steps
    if not arm.distilled:
        command = training_command(args, arm, seed, steps, args.start, [args.dataset], final)
        return [(final / "model.safetensors", command)]
    half, answers = folder / "half", folder / "distilled"
    first, second = steps - steps // 2, steps // 2
    mixture = [f"{answers}:2", f"{args.dataset}:1"]
    return [
        (half / "model.safetensors", training_command(args, arm, seed, first, args.start, [args.dataset], half)),
        (answers / "summary-train.json", distilling_command(args, half, answers)),
        (final / "model.safetensors", training_command(args, arm, seed, second, half, mixture, final)),
    ]


def measuring_command(args: StudyArguments, name: str, seed: int) -> tuple[Path, list[str]]:
    """Return the command that measures one run, with the file that is there when it has ended."""
    folder = args.output_dir / f"{name}-{seed}"
    command = [
        *(sys.executable, str(SCRIPTS / "study" / "measure_run.py"), "--run", str(folder), "--arm", name),
        *("--data_dir", str(args.data_dir), "--limit", str(args.limit), "--threads", "1", "--split", args.split),
    ]
    if args.recogniser:
        command += ["--recogniser", *args.recogniser]
    return folder / "figures.json", command


def run_all(args: StudyArguments) -> None:
    """
    Run every stage of every run that has not ended, `--workers` runs side by side, seed after seed, so that all arms
    have as many seeds at any time.

    Raises:
        RuntimeError: If a stage fails; the message says which, and where its log is. The other runs go on to the end.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), *sys.path])}
    runs = [(name, seed) for seed in args.seeds for name in args.arms]
    lock = threading.Lock()
    with tqdm(total=len(runs), desc="study", unit="run") as bar:

        def finish(run: tuple[str, int]) -> str | None:
            name, seed = run
            folder = args.output_dir / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            for target, command in [*stages_of(args, name, seed), measuring_command(args, name, seed)]:
                if target.exists():
                    continue
                with (folder / "log.txt").open("a") as log:
                    log.write(" ".join(command) + "\n")
                    log.flush()
                    code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
                if code:
                    return (
                        f"{name} with seed {seed} ended with status {code} on the way to {target}: {folder / 'log.txt'}"
                    )
            with lock:
                bar.update()
            return None

        with ThreadPoolExecutor(args.workers) as pool:
            failures = [failure for failure in pool.map(finish, runs) if failure]
    if failures:
        raise RuntimeError("; ".join(failures))


def main() -> None:
    (args,) = ScriptParser(StudyArguments, __doc__).parse_args_into_dataclasses()
    run_all(args)


if __name__ == "__main__":
    run_command(main)
