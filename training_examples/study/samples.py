"""Rows of the study's held-out lists as samples of an evaluation."""

import json
from pathlib import Path

from training_examples.evaluation.backends import Sample, Turn
from training_examples.study.lists import read_lines


def read_samples(folder: Path, split: str, name: str, limit: int) -> list[Sample]:
    """Return the first rows of a list as samples; their `answer_audio` is the file of the recorded answer, if any."""
    samples = []
    for row in map(json.loads, read_lines(folder, split, name, limit)):
        typed = row["audio"] is None
        turn = Turn(text=row["question"] or row["answer"]) if typed else Turn(audio=str(folder / row["audio"]))
        audio = row.get("answer_audio")
        details = {"answer_audio": str(folder / audio) if audio else None}
        samples.append(Sample(row["id"], (turn,), (row["answer"],), row["kind"], details))
    return samples
