"""Options of the command line that all evaluations share, and how NAME=VALUE is read."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training_examples.command_line import check_least
from training_examples.evaluation.listening import open_listener
from training_examples.evaluation.rows import Listener
from training_examples.threads import threads_field


def read_pairs(option: str, items: Iterable[str], as_json: bool = True) -> dict[str, Any]:
    """
    Return NAME=VALUE items; with `as_json` each value is read as JSON or, where it is none, as a string.

    Raises:
        ValueError: If an item has another form, naming the option.
    """
    pairs: dict[str, Any] = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise ValueError(f"`--{option}` {item}: every item needs the form NAME=VALUE.")
        try:
            pairs[name] = json.loads(value) if as_json else value
        except json.JSONDecodeError:
            pairs[name] = value
    return pairs


@dataclass
class EvaluationArguments:
    """Options of every evaluation."""

    task_set: str | None = field(
        default=None,
        metadata={"help": "Module or file of a task set of your own; without it, the benchmarks and your own data."},
    )
    compare: list[Path] = field(
        default_factory=list, metadata={"help": "Compare reports (report.json or their folders) and measure nothing."}
    )

    model: str = field(
        default="model_cards/ttt-tiny", metadata={"help": "Folder or Hub name of a TtT model, or of an adapter."}
    )
    output_dir: Path = field(default=Path("runs/evaluate_model"), metadata={"help": "Where rows and reports go."})
    limit: int | None = field(default=None, metadata={"help": "Rows a list; all by default."})
    batch_size: int = field(default=16, metadata={"help": "Samples answered at once."})
    generation: list[str] = field(
        default_factory=list, metadata={"help": "OPTION=VALUE of `generate`, such as audio_steps_per_block=8."}
    )
    recogniser: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Who listens to spoken answers: a faster-whisper folder or name (whisper:base), a speech "
            "recogniser of Transformers (transformers:NAME), PocketSphinx over sentences (pocketsphinx:FILE)."
        },
    )
    device: str = field(default="cpu", metadata={"help": "Where the model runs."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the model's weights.", "choices": ["float32", "bfloat16", "float16"]}
    )
    threads: int = threads_field()
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code in the checkpoint to run."})

    def __post_init__(self) -> None:
        check_least(self, batch_size=1, limit=1)

    def generation_options(self) -> dict[str, Any]:
        """Return the options of `generate`."""
        return read_pairs("generation", self.generation)

    def listeners(self, language: str = "en") -> list[Listener]:
        """Return the recognisers that listen to spoken answers, no two of one name."""
        found: list[Listener] = []
        for spec in self.recogniser:
            listener, number = open_listener(spec, language, self.device, max(1, self.threads)), 2
            names = {other.name for other in found}
            name = listener.name
            while name in names:  # "whisper:base" and "transformers:openai/whisper-base", say
                number, name = number + 1, f"{listener.name}-{number}"
            found.append(replace(listener, name=name))
        return found
