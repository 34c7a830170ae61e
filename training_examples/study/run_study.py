"""Train and measure every arm of the study (arms.py) with every seed; run again, it goes on where it stopped.

    python training_examples/study/run_study.py --start runs/tiny/warm --dataset data/ttt_tiny/examples/dataset \
        --output_dir runs/study --recogniser whisper:base --workers 2

Each run is a process of its own on one thread, `--workers` of them side by side. What a run is told and what it wrote
lies in OUTPUT/ARM-SEED: `train/` (the model, its log and curves), `answers/`, figures-SPLIT.json, log.txt, and a file
for each stage that was begun. A stage that fails ends its run; the other runs go on, and the next call tries it again.
A study begun with other data, steps or options is not mixed with this one. report_study.py makes the table and the
plots.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.figures import fingerprint
from training_examples.files import read_json, write_json
from training_examples.study.arms import ARMS, Arm, setting_name, training_flags
from training_examples.study.lists import SPLITS, choose_lists, hash_lists
from training_examples.user_errors import run_command

SCRIPTS = Path(__file__).parents[1]
# Large tensors come and go in every step: kept memory makes a step faster than memory that is asked for anew.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
ATTENTION = {"cpu": "eager", "cuda": "sdpa"}  # what trains fast, by device
DISTILLED_TASKS = ("tts", "spoken_qa")  # whose prompts the distilled arm answers
GRACE = 10  # seconds that an interrupted process has to end


@dataclass
class StudyArguments:
    start: Path = field(metadata={"help": "The model that every arm starts from."})
    dataset: str = field(metadata={"help": "Examples that every arm is trained on."})
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    output_dir: Path = field(default=Path("runs/study"), metadata={"help": "A folder for each run."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Which arms, see arms.py."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of data order and noise."})
    max_steps: int = field(default=500, metadata={"help": "Training steps of every run."})
    tokens_per_batch: int = field(default=2048, metadata={"help": "Tokens a step, padding included."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak of a cosine schedule."})
    eval_steps: int = field(default=100, metadata={"help": "Steps between two held-out losses; 0 is never."})
    save_steps: int = field(
        default=100, metadata={"help": "Steps between two checkpoints, which a killed run goes on from."}
    )
    distilled_records: int = field(default=1_500, metadata={"help": "Prompts that the distilled arm answers itself."})
    recogniser: list[str] = field(
        default_factory=list, metadata={"help": "Who listens: whisper:FOLDER and others, see evaluate_model.py."}
    )
    limit: int = field(default=60, metadata={"help": "Rows of each held-out list."})
    split: str = field(
        default="evaluation", metadata={"help": "Which lists: choose on development.", "choices": SPLITS}
    )
    lists: list[str] = field(default_factory=list, metadata={"help": "Which of them; all of the split by default."})
    workers: int = field(default=1, metadata={"help": "Runs side by side, one thread each; they share a GPU."})
    device: str = field(
        default="cpu", metadata={"help": "Where models are trained and answer.", "choices": list(ATTENTION)}
    )

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.arms) - set(ARMS)):
            raise ValueError(f"`--arms` {unknown}: there are {list(ARMS)}")
        check_least(self, max_steps=2, tokens_per_batch=1, eval_steps=0, save_steps=1)
        check_least(self, workers=1, limit=1, distilled_records=1)
        for name in ("arms", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"`--{name}` {getattr(self, name)}: one is named twice")
        if self.device not in ATTENTION:
            raise ValueError(f"`--device` is {self.device}; it must be one of {list(ATTENTION)}")
        if self.device == "cuda":
            import torch  # here, since it takes seconds that the CPU's study need not wait for

            if not torch.cuda.is_available():
                raise ValueError("`--device` is cuda, and PyTorch finds no GPU here; leave it out for the CPU")
        if not self.start.is_dir():
            raise ValueError(f"`--start` {self.start} is no folder; train_ttt.py makes one")


OPTIONS = {f"--{item.name}" for item in fields(StudyArguments)}  # of this script, not of its stages alone


@dataclass(frozen=True)
class Stage:
    """
    One process of a run.

    Args:
        name (`str`): what its file in the run's folder is called.
        folder (`Path`): of the run.
        script (`str`): which of training_examples.
        options (`list[str]`): what the script is told.
        depends (`Any`): what else the result depends on, JSON alone.
        trained (`Path`, *optional*): the output folder of a training stage.
    """

    name: str
    folder: Path
    script: str
    options: list[str]
    depends: Any
    trained: Path | None = None

    @property
    def file(self) -> Path:
        """What is remembered of it."""
        return self.folder / f"{self.name}.json"

    @property
    def asked(self) -> dict[str, Any]:
        """All that its result depends on."""
        return {"script": self.script, "options": self.options, "depends": self.depends}

    def remembered(self) -> dict[str, Any]:
        """Return what it was told, its seconds and whether it has ended; nothing before it has begun."""
        return read_json(self.file) if self.file.exists() else {}

    def is_finished(self) -> bool:
        """Whether it has ended with what is asked now."""
        before = self.remembered()
        return bool(before.get("finished")) and before["asked"] == self.asked

    def remember(self, seconds: float, finished: bool) -> None:
        """Write it down; seconds of calls that were interrupted add up."""
        before = self.remembered()
        if before and before["asked"] == self.asked:
            seconds += before["seconds"]
        write_json(self.file, {"asked": self.asked, "seconds": seconds, "finished": finished})


class StoppedError(Exception):
    """Raised in a worker after an interrupt."""


class FailedError(ValueError):
    """Stages that failed: what they say, and their logs, have the fault; that of the study itself has no traceback."""


def training_stage(
    args: StudyArguments, arm: Arm, seed: int, folder: Path, stage: tuple[str, int], start: Path,
    datasets: Sequence[str], depends: Any,
) -> Stage:  # fmt: skip
    """Return the stage, by its name and number of steps, that trains an arm from a model."""
    name, steps = stage
    place = ["--use_cpu"] if args.device == "cpu" else []
    options = [
        *("--model", str(start), "--dataset", *datasets, "--output_dir", str(folder / name), "--seed", str(seed)),
        *("--max_steps", str(steps), "--tokens_per_batch", str(args.tokens_per_batch), "--threads", "1", *place),
        *("--learning_rate", str(args.learning_rate), "--lr_scheduler_type", "cosine"),
        *("--warmup_steps", str(max(1, steps // 10)), "--weight_decay", "0.05", "--adam_beta2", "0.98"),
        *("--optim", "adamw_torch_fused", "--max_grad_norm", "1.0", "--bf16"),
        *("--attn_implementation", ATTENTION[args.device]),
        *("--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "10"),
        *("--save_steps", str(args.save_steps), "--save_total_limit", "1"),
        *training_flags(arm.options),
    ]
    if args.eval_steps:
        options += ["--eval_strategy", "steps", "--eval_steps", str(args.eval_steps), "--eval_dataset", args.dataset]
        options += ["--per_device_eval_batch_size", "50"]
    return Stage(name, folder, "train_ttt.py", options, depends, folder / name)


def stages_of(args: StudyArguments, name: str, seed: int, depends: Any = None) -> list[Stage]:
    """Return the training stages of one run in order. `depends` says which model and examples lie in their folders."""
    arm, folder, steps = ARMS[name], args.output_dir / f"{name}-{seed}", args.max_steps
    if not arm.distilled:
        return [training_stage(args, arm, seed, folder, ("train", steps), args.start, [args.dataset], depends)]
    half, answers = folder / "half", folder / "distilled"
    answering = [
        *("--model", str(half), "--dataset", args.dataset, "--output_dir", str(answers), "--threads", "1"),
        *("--generation", "audio_block_size=8", "audio_steps_per_block=8", "--tasks", *DISTILLED_TASKS),
        *("--max_records", str(args.distilled_records), "--shard_size", "128"),
    ]
    answering += device_options(args)
    mixture = [f"{answers}:2", f"{args.dataset}:1"]
    return [
        training_stage(args, arm, seed, folder, ("half", steps - steps // 2), args.start, [args.dataset], depends),
        Stage("answering", folder, "self_distill.py", answering, depends),
        training_stage(args, arm, seed, folder, ("train", steps // 2), half, mixture, depends),
    ]


def measuring_stage(args: StudyArguments, name: str, seed: int, depends: Any = None) -> Stage:
    """Return the stage that measures one run, at its arm's settings. `depends` says which lists lie in the folder."""
    folder = args.output_dir / f"{name}-{seed}"
    options = ["--run", str(folder), "--arm", name, "--threads", "1", *measuring_options(args)]
    return Stage(f"measured-{args.split}", folder, "study/measure_run.py", options, [depends, settings_of(name)])


def last_stage(args: StudyArguments, depends: Any = None) -> Stage:
    """Return the stage that measures what is needed once, by the runs of the first seed."""
    options = ["--study", str(args.output_dir), "--arms", *args.arms, "--seed", str(args.seeds[0]), "--threads", "1"]
    options += measuring_options(args)
    depends = [depends, {name: settings_of(name) for name in args.arms}]
    return Stage(f"measured-{args.split}", args.output_dir / "once", "study/measure_once.py", options, depends)


def settings_of(name: str) -> list[str]:
    """Return what an arm is measured at."""
    return [setting_name(setting) for setting in ARMS[name].settings]


def measuring_options(args: StudyArguments) -> list[str]:
    """Return what both scripts that measure are told."""
    options = ["--data_dir", str(args.data_dir), "--limit", str(args.limit), "--split", args.split]
    options += device_options(args)
    for name, values in (("recogniser", args.recogniser), ("lists", args.lists)):
        options += [f"--{name}", *values] if values else []
    return options


def device_options(args: StudyArguments) -> list[str]:
    """Return how a script that answers is told where."""
    return ["--device", args.device] if args.device != "cpu" else []


def by_flag(options: Sequence[str]) -> dict[str, str]:
    """Return the options of a command line by their flags."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in options:
        if word.startswith("--"):
            flag = word
        found.setdefault(flag, []).append(word)
    return {flag: " ".join(words[1:]) or "given" for flag, words in found.items()}


def check_unchanged(stages: Sequence[Stage]) -> None:
    """
    Raise a ValueError if a training stage was begun with something else than is asked now; the message says with what.
    """
    for stage in stages:
        before = stage.remembered().get("asked")
        if before is None or before == stage.asked:
            continue
        was, now = by_flag(before["options"]), by_flag(stage.asked["options"])
        changed = [flag for flag in {**was, **now} if was.get(flag) != now.get(flag)]
        if not changed:
            change = "other weights or examples lie in the same folders"
        else:
            flag = next((flag for flag in changed if flag in OPTIONS), changed[0])
            change = f"{flag} was {was.get(flag, 'left out')} and is {now.get(flag, 'left out')}"
        raise ValueError(
            f"{stage.folder} was begun otherwise, in stage {stage.name}: {change}. Repeat the former options to go on, "
            "choose another --output_dir, or remove that folder."
        )


def check_examples(args: StudyArguments) -> None:
    """Raise a ValueError if `--dataset` lacks what a later stage of some arm reads."""
    from training_examples.preparation.mixtures import load_mixture  # takes seconds, which a wrong option need not wait

    if args.eval_steps:
        load_mixture([args.dataset], split="eval")
    if any(ARMS[name].distilled for name in args.arms):
        tasks = set(load_mixture([args.dataset]).unique("task"))
        if not tasks & set(DISTILLED_TASKS):
            raise ValueError(
                f"`--dataset` {args.dataset} has examples of {', '.join(sorted(tasks))} alone, and the arm distilled "
                f"answers those of {' and '.join(DISTILLED_TASKS)}: prepare some, or leave it out of `--arms`."
            )


def what_lies_there(args: StudyArguments) -> dict[str, str]:
    """Return hashes of the start and of the examples, so that other ones in the same folders are noticed."""
    return {"start": fingerprint(args.start), "dataset": fingerprint(args.dataset)}


@contextmanager
def held(folder: Path, stop: threading.Event) -> Iterator[int]:
    """
    Hold a run's folder, and yield the file descriptor that does. A process that inherits it holds the folder, too, so
    that the stage of a study that was killed ends before its run goes on.

    Raises:
        StoppedError: If the study is interrupted while it waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        waits = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits:
                    print(f"{folder.name}: a process of an earlier call is still at work; waiting for it", flush=True)
                waits = True
                if stop.wait(2):
                    raise StoppedError from None
        yield file.fileno()


class Processes:
    """Runs stages in processes, which it ends on an interrupt."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        path = os.pathsep.join([str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = ALLOCATOR | os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def run(self, stage: Stage, descriptor: int) -> None:
        """
        Run a stage to its end; its output goes to the run's log.

        Raises:
            FailedError: If it fails, with the last line of its log.
            StoppedError: If the study was interrupted.
        """
        command = [sys.executable, str(SCRIPTS / stage.script), *stage.options]
        begin = time.monotonic()
        stage.remember(0.0, finished=False)
        log_path = stage.folder / "log.txt"
        with log_path.open("a") as log:
            log.write(" ".join(command) + "\n")
            log.flush()
            with self.lock:  # no process is started after an interrupt
                if self.stop.is_set():
                    raise StoppedError
                process = subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, pass_fds=[descriptor],
                )  # fmt: skip
                self.running.add(process)
            code = process.wait()
        with self.lock:
            self.running.discard(process)
        if code and self.stop.is_set():
            stage.remember(time.monotonic() - begin, finished=False)
            raise StoppedError
        stage.remember(time.monotonic() - begin, finished=code == 0)
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}: {last_line(log_path)}"
            raise FailedError(f"stage {stage.name} {how} ({log_path})")
        if stage.trained is not None:  # what a killed run would go on from
            for folder in stage.trained.glob("checkpoint-*"):
                shutil.rmtree(folder)

    def end(self) -> None:
        """End all processes, and start no more."""
        with self.lock:
            self.stop.set()
            running = list(self.running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def last_line(path: Path) -> str:
    """Return what a log says last; a progress bar writes one line again and again."""
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Progress:
    """Says on a line of its own how each run ended and about how long the others will take."""

    def __init__(self, runs: Sequence[str], workers: int):
        self.waiting, self.workers = list(runs), workers
        self.total = len(runs)
        self.seconds: dict[str, list[float]] = {}
        self.begun: dict[str, float] = {}
        self.lock = threading.Lock()

    def learn(self, run: str, seconds: float) -> None:
        """Take the seconds of a run that was finished before."""
        with self.lock:
            self.waiting.remove(run)
            self.seconds.setdefault(run.rpartition("-")[0], []).append(seconds)

    def begin(self, run: str) -> None:
        """Note when a run begins."""
        with self.lock:
            self.begun[run] = time.monotonic()

    def end(self, run: str, outcome: str, seconds: float | None = None) -> None:
        """Say how a run ended."""
        with self.lock:
            self.begun.pop(run, None)
            self.waiting.remove(run)
            if seconds is not None:
                self.seconds.setdefault(run.rpartition("-")[0], []).append(seconds)
            done = self.total - len(self.waiting)
            print(f"[{done}/{self.total}] {time.strftime('%H:%M')} {run}: {outcome}{self.remaining()}", flush=True)

    def remaining(self) -> str:
        """Return about how long the runs that wait or are at work will take, by the time of those like them."""
        known = [seconds for found in self.seconds.values() for seconds in found]
        if not self.waiting or not known:
            return ""
        left = 0.0
        for run in self.waiting:
            like = self.seconds.get(run.rpartition("-")[0], known)
            gone = time.monotonic() - self.begun[run] if run in self.begun else 0.0
            left += max(0.0, sum(like) / len(like) - gone)
        return f"; about {duration(left / min(self.workers, len(self.waiting)))} to go"


def duration(seconds: float) -> str:
    """Return a duration in minutes, or in hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def run_all(args: StudyArguments) -> None:
    """
    Run every stage of every run that has not ended, `--workers` runs side by side, seed after seed, so that all arms
    have as many seeds at any time; then, alone, what is measured once.

    Raises:
        ValueError, FileNotFoundError: If what was begun is another study, or lists or examples are missing.
        FailedError: If stages fail; the message says which, why, and where their logs are. The other runs go on.
    """
    names = choose_lists(args.data_dir, args.split, args.lists)
    check_examples(args)
    depends, lists = what_lies_there(args), hash_lists(args.data_dir, args.split, names, args.limit)
    runs = {
        f"{name}-{seed}": (stages_of(args, name, seed, depends), measuring_stage(args, name, seed, lists))
        for seed in args.seeds
        for name in args.arms
    }
    check_unchanged([stage for training, _ in runs.values() for stage in training])
    processes, progress, failures = Processes(), Progress(list(runs), args.workers), []
    waiting: deque[str] = deque()
    for run, (training, measuring) in runs.items():
        stages = [*training, measuring]
        if all(stage.is_finished() for stage in stages):
            progress.learn(run, sum(stage.remembered()["seconds"] for stage in stages))
        else:
            waiting.append(run)
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished{progress.remaining()}", flush=True)

    def finish(run: str) -> None:
        training, measuring = runs[run]
        try:
            with held(args.output_dir / run, processes.stop) as descriptor:
                progress.begin(run)
                for stage in (*training, measuring):
                    if not stage.is_finished():
                        processes.run(stage, descriptor)
        except StoppedError:
            return
        except Exception as error:  # a full disk, say: the other runs go on
            failures.append(f"{run}: {error}")
            progress.end(run, f"FAILED, {error}")
            return
        seconds = [stage.remembered()["seconds"] for stage in (*training, measuring)]
        outcome = f"trained in {duration(sum(seconds[:-1]))}, measured in {duration(seconds[-1])}"
        progress.end(run, outcome, sum(seconds))

    try:
        with ThreadPoolExecutor(args.workers) as pool:
            try:
                list(pool.map(finish, waiting))
            except BaseException:
                processes.end()
                raise
        if not failures:
            once = last_stage(args, {"lists": lists, "runs": depends})
            if not once.is_finished():
                with held(once.folder, processes.stop) as descriptor:
                    processes.run(once, descriptor)
    except BaseException:
        processes.end()
        raise
    if failures:
        told = f"{len(failures)} of {len(runs)} runs failed, and are tried again by the next call"
        raise FailedError("; ".join([told, *failures]))


def interrupt(*_: Any) -> None:
    """End as an interrupt from the keyboard does."""
    raise KeyboardInterrupt


def main() -> None:
    (args,) = ScriptParser(StudyArguments, __doc__).parse_args_into_dataclasses()
    signal.signal(signal.SIGTERM, interrupt)
    run_all(args)
    print(f"done: python training_examples/study/report_study.py --output_dir {args.output_dir}", flush=True)


if __name__ == "__main__":
    run_command(main)
