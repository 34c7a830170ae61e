"""The held-out lists of ttt-tiny as samples of an evaluation. What is measured of them is in task_set.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_examples.evaluation.backends import Sample, Turn
from training_examples.evaluation.figures import fingerprint, normalized
from training_examples.ttt_tiny.speech import read_list

PROCESSOR_TASKS = {"spoken_qa": "spoken_qa", "asr": "asr", "tts": "tts", "text_qa": "text_chat", "codec": "tts"}


@dataclass(frozen=True)
class HeldOutLists:
    """The held-out lists of a folder, those of evaluation or those on which choices are made (`"development"`)."""

    folder: Path
    split: str = "evaluation"

    def name(self, name: str) -> str:
        """Return what a list, or a part measured on it, is called in this split."""
        return name if self.split == "evaluation" else f"{self.split}_{name}"

    def has(self, name: str) -> bool:
        """Return whether a list is there."""
        return (self.folder / f"{self.name(name)}.jsonl").exists()

    def fingerprint(self, *names: str) -> str:
        """Return a short hash of lists."""
        return fingerprint(*(self.folder / f"{self.name(name)}.jsonl" for name in names))

    def read(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the rows of a list, the first `limit` of them."""
        return read_list(self.folder, self.name(name), limit)

    def task(self, name: str) -> str:
        """Return the processor's task of a list."""
        return PROCESSOR_TASKS[self.read(name, 1)[0]["task"]]

    def samples(self, name: str, limit: int | None = None) -> list[Sample]:
        """
        Return a list as samples: its text in lower case is the reference; `details` have the question in words
        (`asked`), the recorded answer's file (`answer_audio`) and, of two turns, the first one's reference.
        """
        samples = []
        for row in self.read(name, limit):
            turns = row.get("turns") or [row]
            details = {"asked": turns[-1]["question"], "answer_audio": turns[-1].get("answer_audio")}
            if len(turns) > 1:
                details["first_reference"] = normalized(turns[0]["answer"])
            reference = (normalized(turns[-1]["answer"]),)
            samples.append(Sample(row["id"], tuple(map(self._turn, turns)), reference, row["kind"], details))
        return samples

    def _turn(self, row: Mapping[str, Any]) -> Turn:
        if row["audio"] is None:
            return Turn(text=row["question"] or row["answer"])
        return Turn(audio=str(self.folder / row["audio"]))
