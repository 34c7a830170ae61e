"""The task set of `evaluate_model.py` itself: the paper's benchmarks by name, and any data of the user's own.

What a benchmark's data looks like and how it is scored is in tasks.py, who answers in backends.py.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from processing.tasks_ttt import TASKS as PROMPTS
from training_examples.evaluation.backends import Backend, TttBackend
from training_examples.evaluation.figures import Figure
from training_examples.evaluation.judging import Judge
from training_examples.evaluation.measuring import Measured, of_scorer, speed_of
from training_examples.evaluation.openai_backend import OpenAIBackend
from training_examples.evaluation.options import EvaluationArguments, read_pairs
from training_examples.evaluation.reports import Section, write_report
from training_examples.evaluation.rows import Row, Run, hash_of, name_unusable
from training_examples.evaluation.tasks import TASKS, Task, own_task, read_samples
from training_examples.evaluation.text_forms import error_rate_options, has_words

NO_RECOGNISER = "speech not scored: no `--recogniser` was given"
NOT_JUDGED = "not judged: no `--judge` address was given"
ON_THE_HUB = [name for name, task in TASKS.items() if task.source is not None]
WITH_DATA = [name for name in TASKS if name not in ON_THE_HUB]
ALONE = "their data is not on the Hub in a form that is read here; measure each alone, with `--data`"


@dataclass
class Arguments(EvaluationArguments):
    """Options of the benchmarks and of data of the user's own."""

    task: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Benchmarks: {', '.join(ON_THE_HUB)}, which `all` stands for; each alone and with `--data`: "
            f"{', '.join(WITH_DATA)}."
        },
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Your own data, or where a benchmark's lies: a file, folder or Hub name."},
    )
    split: str | None = field(default=None, metadata={"help": "Split of the data, where it has any."})
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "FIELD=COLUMN for audio, text (the reference), question, kind and id."},
    )
    scorer: list[str] = field(
        default_factory=list,
        metadata={"help": "Of own data: wer, cer, qa, exact, cider_d, rouge_l, or the path of a module of `evaluate`."},
    )
    scorer_options: list[str] = field(
        default_factory=list, metadata={"help": "OPTION=VALUE of the scorers, such as normalizer=chinese."}
    )
    prompt: str = field(
        default="asr", metadata={"help": "Of own data: the processor's task (asr, spoken_qa, tts, captioning, ...)."}
    )
    language: str = field(default="en", metadata={"help": "Of own data: what is spoken, for recognisers."})
    address: str | None = field(
        default=None, metadata={"help": "An OpenAI-compatible address, such as http://127.0.0.1:8000/v1, that answers."}
    )
    voice: str | None = field(default=None, metadata={"help": "Voice asked of the address; without one, text alone."})
    judge: str | None = field(default=None, metadata={"help": "An OpenAI-compatible address that judges open answers."})
    judge_model: str = field(default="judge", metadata={"help": "Name of the judge at its address."})
    api_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the key of the addresses."}
    )
    keep_audio: bool = field(default=True, metadata={"help": "Keep spoken answers after they were listened to."})

    def __post_init__(self) -> None:
        super().__post_init__()
        names = list(ON_THE_HUB) if self.task == ["all"] else self.task
        if unknown := [name for name in names if name not in TASKS]:
            raise ValueError(f"`--task` {unknown[0]}: there is no such task; use {', '.join(TASKS)}, or `--data`.")
        if self.data is not None and len(names) > 1:
            raise ValueError(f"`--data` goes with one `--task`, got {', '.join(names)}.")
        if self.data is None and not names and not self.compare:
            raise ValueError("Give `--task`, `--data`, `--compare` or `--task_set`.")
        if self.scorer and names:
            raise ValueError(f"`--scorer` goes with data of your own; {names[0]} brings its scorers.")
        self.task = names
        if not self.compare:
            self._check_together()

    def _check_together(self) -> None:
        """Raise a ValueError for an option that nothing of what was chosen would read."""
        if self.data is None and (homeless := [name for name in self.task if name in WITH_DATA]):
            raise ValueError(f"`--task` {', '.join(homeless)}: {ALONE}.")
        if self.task:
            for name in ("scorer_options", "prompt", "language"):
                if getattr(self, name) != _default_of(name):
                    raise ValueError(f"`--{name}` goes with data of your own; {self.task[0]} brings its own.")
        elif not self.data:
            return
        if self.voice is not None and self.address is None:
            raise ValueError("`--voice` is asked of an `--address`; the model here has its own.")
        judged = [name for name in self.task if TASKS[name].judgement is not None or TASKS[name].by_kind]
        if self.judge is not None and not judged:
            some = [name for name, task in TASKS.items() if task.judgement is not None or task.by_kind]
            raise ValueError(f"`--judge` goes with a `--task` whose answers are judged: {', '.join(some)}.")

    @property
    def left_out(self) -> str:
        """What is said of the benchmarks that `--task all` does not stand for; nothing of other tasks."""
        return f"Not measured: {', '.join(WITH_DATA)}; {ALONE}." if self.task == ON_THE_HUB else ""

    def tasks(self) -> list[Task]:
        """Return what is measured: benchmarks, or data of the user's own."""
        if self.task:
            chosen = [TASKS[name] for name in self.task]
            return [replace(task, split=self.split) for task in chosen] if self.split else chosen
        options = read_pairs("scorer_options", self.scorer_options)
        return [own_task(self.prompt, self.scorer, options, self.language, self.split)]

    def column_names(self) -> dict[str, str]:
        """Return the columns of the fields that were named."""
        return read_pairs("columns", self.columns, as_json=False)

    def api_key(self) -> str | None:
        """Return the key of the addresses, if there is one."""
        return os.environ.get(self.api_key_variable)

    def backend(self) -> Backend:
        """Return who answers."""
        if self.address is None:
            options = self.generation_options()
            return TttBackend(
                self.model, self.device, self.dtype, options, trust_remote_code=self.trust_remote_code
            )  # fmt: skip
        return OpenAIBackend(self.address, self.model, self.voice, self.api_key(), self.generation_options())


def _default_of(name: str) -> Any:
    item = next(item for item in fields(Arguments) if item.name == name)
    return item.default if item.default_factory is MISSING else item.default_factory()


def measure_task(args: Arguments, task: Task, backend: Backend) -> Section:
    """Answer, listen, judge and score one task."""
    samples = read_samples(task, args.data, args.column_names(), args.limit, asks_text_alone(backend, task.prompt))
    listeners = args.listeners(task.language)  # a wrong one is refused before anything is answered
    prompt = task.instruction or ""
    system = backend.system_prompt(task.prompt) if isinstance(backend, TttBackend) else "none"
    # Rows are named by what is asked, not by how many: a higher limit goes on with the same rows.
    settings = {**backend.settings, "prompt": task.prompt, "system_prompt": hash_of(system), "instruction": prompt}
    run = Run(args.output_dir / "rows", task.name, task.prompt, samples, {**settings, "data": args.data or task.source})
    run.answer(backend, args.batch_size)
    rows, unusable = run.usable, run.unusable
    if not rows:
        raise ValueError(f"`--data`: no recording of {task.title} can be read; the first: {unusable[0]['unusable']}")
    remarks, figures = [], []
    if unusable:
        remarks.append(name_unusable(unusable, len(samples)))
    if failed := [row for row in rows if "error" in row]:
        remarks.append(f"{len(failed)} rows were not answered and count as wrong; the first: {failed[0]['error']}")
    if blank := [row["id"] for row in rows if any(not use.scores(row) for use in task.scorings_of(row["kind"]))]:
        have = "row has" if len(blank) == 1 else "rows have"
        remarks.append(f"{len(blank)} {have} no reference and no part in figures of scorers; the first: {blank[0]}")
    speaks = any(row.get("audio") for row in rows)
    listeners = listeners if speaks else []
    figures += score(rows, {row["id"]: row["text"] for row in rows}, task, "text", "text")
    said: dict[str, Mapping[str, str]] = {}
    for listener in listeners:
        heard = said[listener.name] = run.listen(listener)
        figures += score(rows, heard, task, f"speech/{listener.name}", f"speech, by {listener.name}")
        figures += own_speech(rows, heard, listener.name, task.language)
    if speaks and not listeners:
        remarks.append(f"{NO_RECOGNISER}.")
    judged = sorted({kind for row in rows if task.judgement_of(kind := row["kind"]) is not None})
    if judged and args.judge is None:
        remarks.append(f"{NOT_JUDGED}.")
    elif args.judge is not None:
        ratings, prompts = judge_rows(args, args.judge, task, run, judged, said)
        figures += ratings
        settings["judge"] = f"{args.judge_model} at {args.judge}"
        remarks += [f"The judge was asked (prompt {name}): {' '.join(p.split())!r}" for name, p in prompts.items()]
    figures += means(figures, task)
    figures += speed_of(rows)
    if not args.keep_audio and listeners:
        run.drop_audio()
    own = {"source": args.data or task.source, "split": task.split or "none", "data": run.data_hash}
    if isinstance(backend, TttBackend):
        own |= {"device": args.device, "threads": str(torch.get_num_threads())}
    title, notes = describe(task, args, len(rows), bool(unusable))
    return Section(task.name, title, figures, [*notes, *remarks], {**own, **settings, "system prompt": system})


def asks_text_alone(backend: Backend, prompt: str) -> bool:
    """Return whether a task of the processor asks a text and never audio; an address has the tasks of any processor."""
    if isinstance(backend, TttBackend):
        return backend.processor.get_task(prompt).takes_text_alone
    return prompt in PROMPTS and PROMPTS[prompt].takes_text_alone


def judge_rows(
    args: Arguments, address: str, task: Task, run: Run, kinds: Sequence[str], said: Mapping[str, Mapping[str, str]]
) -> tuple[list[Measured], dict[str, str]]:
    """Return a judge's ratings of written answers and of what recognisers heard, and its prompts by their hashes."""
    found, prompts = [], {}
    for kind in kinds:
        judgement = task.judgement_of(kind)
        assert judgement is not None
        judge = Judge(address, args.judge_model, args.api_key(), judgement)
        prompts[hash_of(judgement.prompt)] = judgement.prompt
        of = kind if task.by_kind else None
        found += judge.measure(run, of)
        for name, heard in said.items():
            found += judge.measure(run, of, heard, name)
    return found, prompts


def describe(task: Task, args: Arguments, count: int, lost: bool = False) -> tuple[str, list[str]]:
    """
    Return how a task is called and what is said of the paper's figure. It is called the benchmark, and the paper's
    figure stands beside, only where all of its rows were measured and none was `lost`: a stand-in or a part of it has
    its layout alone.
    """
    if not task.published and task.rows is None and task.source is None:
        return f"Own data: {args.data}", []
    whole = count == task.rows if task.rows is not None else args.data is None and args.limit is None and not lost
    if not whole:
        size = f"{count} of {task.rows} rows" if task.rows is not None else f"{count} rows"
        return f"Data in the layout of {task.title} ({size}): not the benchmark", []
    return task.title, [f"Published for the 3B model: {task.published}. {task.metric_note}"] if task.published else []


def score(rows: Sequence[Row], said: Mapping[str, str], task: Task, key: str, of: str) -> list[Measured]:
    """Return the figures of a task's scorers, over all rows or, where kinds are scored apart, of each kind."""
    kinds = sorted({row["kind"] for row in rows}) if task.by_kind else [""]
    found = []
    for kind in kinds:
        group = [row for row in rows if not task.by_kind or row["kind"] == kind]
        for use in task.scorings_of(kind):
            scored = [row for row in group if use.scores(row)]
            if not scored:
                continue
            references = [row["references"] for row in scored]
            if use.single_reference or all(len(row) <= 1 for row in references):
                references = [row[0] if row else "" for row in references]
            found.append(
                of_scorer(
                    f"{key}/{kind + '/' if kind else ''}{use.name}",
                    f"{kind + ', ' if kind else ''}{use.title}, {of}",
                    use.scorer,
                    [row["id"] for row in scored],
                    [said[row["id"]] for row in scored],
                    references,
                    use.options,
                )
            )
    return found


def means(figures: Sequence[Measured], task: Task) -> list[Measured]:
    """Return the mean over the sets that make up a benchmark's figure, if all of them were measured."""
    wanted: dict[str, Measured] = {}
    for kind in task.mean_of:
        keys = (f"judged/{kind}", *(f"text/{kind}/{use.name}" for use in task.scorings_of(kind)))
        found = next((measured for measured in figures if measured.key in keys), None)
        if found is not None:
            wanted[kind] = found
    if not task.mean_of or len(wanted) < len(task.mean_of):
        return []
    draws = np.mean([m.draws(seed) for seed, m in enumerate(wanted.values())], axis=0)
    low, high = np.quantile(draws, (0.025, 0.975))
    value = float(np.mean([measured.figure.value for measured in wanted.values()]))
    rows = sum(measured.figure.count for measured in wanted.values())
    title = f"understanding, mean of {len(wanted)} sets, of 100"
    return [Measured("understanding", title, Figure(value, rows, "points", float(low), float(high)))]


def own_speech(rows: Sequence[Row], heard: Mapping[str, str], name: str, language: str) -> list[Measured]:
    """Return the errors of the speech against the answer's own text: how well it says what it writes. There are none
    where no answer holds a word."""
    spoken = [row for row in rows if row["text"].strip() and row.get("audio")]
    ids, own = [row["id"] for row in spoken], [row["text"] for row in spoken]
    options = error_rate_options(language)
    if not has_words(own, options["normalizer"]):
        return []
    title = f"speech against the answer's own text, by {name}: error rate"
    return [of_scorer(f"own_speech/{name}", title, "error_rate", ids, [heard[i] for i in ids], own, options)]


def run(args: Arguments) -> str:
    """Measure every task, and write and return the report after each."""
    tasks, sections, text = args.tasks(), [], ""  # refused, they need not wait for a model
    if args.left_out:
        print(args.left_out, file=sys.stderr)
    backend = args.backend()
    for task in tasks:
        sections.append(measure_task(args, task, backend))
        text = write_report(args.output_dir, f"Evaluation of {backend.name}", sections)
    return text


__all__ = ["Arguments", "run"]
