"""Answer a dataset of questions offline with Ray Data: as many engines as are asked for, on one machine or many, each
with a batch of questions in its rows.

    pip install -c constraints.txt -e ".[ray]"
    python -m pipelines.serving.answer_dataset --questions questions.jsonl --output_dir answers --engines 2 --cpus 0.5

A question is a line of JSON with "id" and "audio" (a sound file) or "text", and perhaps a "task" of the processor (by
default "spoken_chat", of text alone "text_chat").
Answers are lines in `output_dir/rows`: "text", "audio" (a WAV file), "seconds" of speech, "error" where there is one.
Engines on other machines need `output_dir` and sound files in a place that all share."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from pipelines.ttt_talk import DEFAULT_MODEL


@dataclass
class Arguments:
    """What to answer, and by what."""

    questions: str = field(metadata={"help": "JSON lines: id, audio or text, task."})
    output_dir: Path = field(metadata={"help": "Where answers are written; it is new."})
    model: str = field(default=str(DEFAULT_MODEL), metadata={"help": "Folder or Hub name."})
    engines: int = field(default=1, metadata={"help": "Engines, each in a process of its own."})
    rows: int = field(default=16, metadata={"help": "Questions that an engine answers together."})
    cpus: float = field(default=1.0, metadata={"help": "Cores of an engine."})
    gpus: float = field(default=0.0, metadata={"help": "GPUs of an engine; without one it runs on the CPU."})
    max_new_tokens: int = field(default=400, metadata={"help": "Of each answer, at most."})
    address: str | None = field(default=None, metadata={"help": "Of a Ray cluster; a new one on this machine."})

    def __post_init__(self) -> None:
        if self.output_dir.exists():
            raise ValueError(f"--output_dir {self.output_dir} exists; give answers a new folder")
        if not Path(self.questions).is_file():
            raise ValueError(f"--questions: there is no file {self.questions}")


class Answerer:
    """One engine. Ray Data makes as many as it is told, and hands each one batch after the other."""

    def __init__(self, arguments: Arguments):
        from modeling_ttt import TttForConditionalGeneration
        from pipelines.serving import Engine
        from processing import TttProcessor

        self.arguments = arguments
        self.processor = TttProcessor.from_pretrained(arguments.model)
        model = TttForConditionalGeneration.from_pretrained(arguments.model).eval()
        model.to("cuda" if arguments.gpus else "cpu")
        self.engine = Engine(model, self.processor, max_rows=arguments.rows, max_queue=arguments.rows).start()

    def __call__(self, batch: Any) -> Any:
        """Take a table of questions; return one of answers."""
        import pyarrow

        questions = batch.to_pylist()
        asked = [self._ask(question) for question in questions]  # all of them, before the first is waited for
        rows = [self._answer(question, one) for question, one in zip(questions, asked, strict=True)]
        return pyarrow.Table.from_pylist(rows)

    def _ask(self, question: dict[str, Any]) -> Any:
        from pipelines.serving import GenerationRequest

        try:
            asked = {name: question[name] for name in ("audio", "text") if question.get(name) is not None}
            task = question.get("task") or ("spoken_chat" if "audio" in asked else "text_chat")
            ids = self.processor(**asked, task=task)["input_ids"]
            return self.engine.submit(GenerationRequest(ids, {"max_new_tokens": self.arguments.max_new_tokens}))
        except (OSError, ValueError) as error:  # a question that cannot be asked does not end the others
            return error

    def _answer(self, question: dict[str, Any], asked: Any) -> dict[str, Any]:
        row = {"id": str(question["id"]), "text": None, "audio": None, "seconds": 0.0, "error": None}
        if isinstance(asked, Exception):
            return row | {"error": str(asked)}
        import soundfile

        text, waveform, end = asked.result()
        if end.error is not None:
            return row | {"error": str(end.error)}
        path = self.arguments.output_dir / "audio" / f"{row['id']}.wav"
        soundfile.write(path, waveform, self.engine.sampling_rate, subtype="PCM_16")
        return row | {"text": text, "audio": str(path), "seconds": len(waveform) / self.engine.sampling_rate}


def check_cores(arguments: Arguments, cores: float) -> None:
    """
    Refuse engines that take all cores, since Ray Data would then wait without end for one to read and write with.

    Args:
        arguments (`Arguments`): what is asked for.
        cores (`float`): of the cluster.

    Raises:
        ValueError: naming what would fit.
    """
    taken = arguments.engines * arguments.cpus
    if cores - taken < 1.0:
        most = max(cores - 1.0, 0.0) / arguments.engines
        remedy = f"give --cpus {most:.2g} or less, or fewer --engines" if most else "a machine of 2 is needed"
        raise ValueError(
            f"{arguments.engines} engines of {arguments.cpus:g} cores take {taken:g} of {cores:g}, and reading and "
            f"writing takes 1: {remedy}"
        )


def check_ids(ids: Iterable[Any]) -> None:
    """
    Refuse ids that cannot name a file, or would name the same one.

    Args:
        ids (`Iterable`): of all questions.

    Raises:
        ValueError: naming the first.
    """
    seen: set[str] = set()
    for given in ids:
        name = str(given)
        if given is None or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"a question has the id {given!r}, which is to name a file; use letters and digits")
        if name in seen:
            raise ValueError(f"two questions have the id {name!r}, which is to name a file; number them")
        seen.add(name)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=False)
    check_cores(arguments, ray.cluster_resources().get("CPU", 0.0))
    questions = ray.data.read_json(arguments.questions, lines=True)
    check_ids(row.get("id") for row in questions.iter_rows())
    arguments.output_dir = arguments.output_dir.resolve()
    (arguments.output_dir / "audio").mkdir(parents=True)
    answers = questions.repartition(target_num_rows_per_block=arguments.rows).map_batches(
        Answerer,
        fn_constructor_args=(arguments,),
        batch_size=arguments.rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=arguments.engines),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    )
    answers.write_json(str(arguments.output_dir / "rows"))
    count = sum(1 for _ in (arguments.output_dir / "audio").iterdir())
    print(f"{count} answers in {arguments.output_dir}")


if __name__ == "__main__":
    main()
