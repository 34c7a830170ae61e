"""What prepare_dataset.py may be told, which is read before PyTorch is loaded, for that takes seconds. What is done
with it lives in preparing.py."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from training_examples.command_line import check_least
from training_examples.preparation.layouts import LAYOUTS
from training_examples.preparation.records import FIELDS, TASK_NAMES
from training_examples.threads import threads_field

MOST_RECORDS = 1000  # a shard, by default


@dataclass
class PrepareArguments:
    model: str = field(metadata={"help": "Folder or Hub name of the TtT checkpoint whose processor is used."})
    output_dir: Path = field(metadata={"help": "Folder to write."})
    source: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders, saved datasets or Hub names; all are read with the same tasks and columns."},
    )
    data_config: Path | None = field(
        default=None, metadata={"help": "Published form of a list of sources: JSON with `path` and `sample_ratio`."}
    )
    name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    layout: str | None = field(
        default=None,
        metadata={
            "help": f"Layout of a corpus: {', '.join(LAYOUTS)}. By default it is found by looking.",
            "choices": list(LAYOUTS),
        },
    )
    split: str = field(default="train", metadata={"help": "Split to read."})
    output_split: str = field(default="", metadata={"help": "Split to write; the one read by default."})
    streaming: bool = field(default=False, metadata={"help": "Read record by record instead of building a cache."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"What to make of each record: {', '.join(TASK_NAMES)}, or a task of the processor's own. Without "
            "it, records must have a published form: `messages`, `conversations`, `prompt` and `response`, or `text`."
        },
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"FIELD=COLUMN, or TASK.FIELD=COLUMN for one task. Fields: {', '.join(FIELDS)} (default: a column "
            "of that name). `text` is what `audio` says, or what the user writes; `answer` the reply, caption or label."
        },
    )
    questions: list[str] = field(
        default_factory=list,
        metadata={"help": "TASK=INSTRUCTION before the audio, for captioning, emotion and scene."},
    )
    asr_speech: bool = field(
        default=True,
        metadata={"help": "Recognition answers with the heard codes after the text, as published; else text alone."},
    )
    min_audio_seconds: float = field(default=0.0, metadata={"help": "Shorter audio is rejected."})
    max_audio_seconds: float = field(default=30.0, metadata={"help": "Longer audio is rejected."})
    min_level: float = field(
        default=-60.0, metadata={"help": "Audio is rejected as silent whose loudest 50 ms stay below so many dB."}
    )
    max_clipping: float = field(
        default=0.05, metadata={"help": "Audio is rejected as clipped with a larger share of samples at full scale."}
    )
    min_speaking_rate: float = field(
        default=0.0, metadata={"help": "Speech with its text is rejected below so many characters a second; 0 is off."}
    )
    max_speaking_rate: float = field(
        default=0.0, metadata={"help": "Speech with its text is rejected above so many characters a second; 0 is off."}
    )
    max_length: int = field(default=2048, metadata={"help": "Longer examples are rejected, in tokens."})
    sampling_rate: int | None = field(default=None, metadata={"help": "Of audio given as bare numbers, Hz."})
    audio_root: Path | None = field(
        default=None, metadata={"help": "Where relative audio paths start; by default the folder of their file."}
    )
    max_records: int | None = field(default=None, metadata={"help": "Read only so many records of each source."})
    shard_size: int | None = field(
        default=None,
        metadata={
            "help": f"Records per shard, which is saved as soon as it is done; by default {MOST_RECORDS}, and fewer "
            "where that would leave processes without work."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Audios encoded at once."})
    device: str = field(default="cpu", metadata={"help": "Where audio is encoded; processes share the GPUs of `cuda`."})
    num_proc: int = field(default=1, metadata={"help": "Processes side by side."})
    threads: int = threads_field()
    seed: int = field(default=0, metadata={"help": "Seed of sampling and of the documents of continuation."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code in the checkpoint to run."})

    def __post_init__(self) -> None:
        if bool(self.source) == (self.data_config is not None):
            raise ValueError("Give either `--source` or `--data_config`.")
        for name in ("max_audio_seconds", "max_length", "shard_size", "batch_size", "num_proc"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be above 0.")
        check_least(self, min_audio_seconds=0, min_speaking_rate=0, max_speaking_rate=0)
        for name in ("audio_seconds", "speaking_rate"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if most and least > most:
                raise ValueError(f"`--min_{name}` is {least:g}, above `--max_{name}` {most:g}.")
        if not 0 <= self.max_clipping <= 1:
            raise ValueError(f"`--max_clipping` is {self.max_clipping}; it is a share, from 0 to 1.")
        self.output_split = self.output_split or self.split
        if not re.fullmatch(r"\w+", self.output_split):
            raise ValueError(f"`--output_split` is {self.output_split!r}; use letters, digits and underscores.")

    def pairs(self, name: str) -> dict[str, str]:
        """Return the KEY=VALUE items of an argument."""
        items = getattr(self, name)
        if not all("=" in item for item in items):
            raise ValueError(f"`--{name}` {' '.join(items)}: every item needs the form KEY=VALUE.")
        return dict(item.split("=", 1) for item in items)
