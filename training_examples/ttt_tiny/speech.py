"""Speech on disk: shards of what is trained on, and held-out lists with a file for each recording. What is said, and by
whom, is the business of build_speech.py and build_skill.py."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from safetensors import safe_open
from safetensors.numpy import save_file

from training_examples.files import whole_file, write_text
from training_examples.ttt_tiny.synthesis import ASSISTANT_VOICE, SAMPLING_RATE, Delivery, speak


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Return floats in [-1, 1] as 16-bit samples."""
    return np.round(samples * 32767).astype(np.int16)


def write_shard(path: Path, rows: Sequence[dict], waves: Sequence[np.ndarray]) -> None:
    """
    Write one shard: `samples` (int16, all sentences end to end), `offsets` (int64, one more than rows), and the rows as
    metadata.

    Args:
        path (`Path`): a `.safetensors` file.
        rows (`Sequence[dict]`): what is known about each sentence, `text` among it.
        waves (`Sequence[np.ndarray]`): int16 waveforms at 16 kHz, each of shape `(samples,)`.
    """
    offsets = np.cumsum([0, *map(len, waves)], dtype=np.int64)
    with whole_file(path) as partial:
        save_file({"samples": np.concatenate(waves), "offsets": offsets}, partial, metadata={"rows": json.dumps(rows)})


def read_shard(path: Path) -> tuple[list[dict], list[np.ndarray]]:
    """Return a shard's rows and their int16 waveforms (16 kHz)."""
    with safe_open(path, "numpy") as shard:
        rows = json.loads(shard.metadata()["rows"])
        samples, offsets = shard.get_tensor("samples"), shard.get_tensor("offsets")
    return rows, [samples[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def speak_list(folder: Path, name: str, rows: Sequence[dict]) -> Path:
    """Speak one held-out list into `folder`: FLAC files and `name`.jsonl. A list that is there is left as it is."""
    target = folder / f"{name}.jsonl"
    if target.exists():
        return target
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, row in enumerate(rows):
        row = {"id": f"{name}-{index:04d}", **row, "audio": None, "answer_audio": f"{name}/{index:04d}-answer.flac"}
        if "rate" in row:
            row["audio"] = f"{name}/{index:04d}.flac"
            spoken = row["question"] or row["answer"]
            delivery = Delivery(row["voice"], row["rate"], row["pitch"])
            soundfile.write(folder / row["audio"], speak(spoken, delivery), SAMPLING_RATE)
        soundfile.write(folder / row["answer_audio"], speak(row["answer"], ASSISTANT_VOICE), SAMPLING_RATE)
        lines.append(json.dumps(row) + "\n")
    write_text(target, "".join(lines))
    return target


def read_list(folder: str | Path, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """
    Return the rows of the held-out list `name`.jsonl, the first `limit` of them.

    Raises:
        FileNotFoundError: If there is no such list; the message says which script makes it.
    """
    path = Path(folder, f"{name}.jsonl")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: make the held-out lists with training_examples/ttt_tiny/build_speech.py"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return rows[:limit]


def read_audio(folder: str | Path, path: str) -> np.ndarray:
    """
    Return a mono waveform of a held-out list, float32 of shape `(samples,)` at 16 kHz.

    Raises:
        ValueError: If its rate is another one.
    """
    samples, rate = soundfile.read(Path(folder, path), dtype="float32")
    if rate != SAMPLING_RATE or samples.ndim != 1:
        raise ValueError(f"{path} has {rate} Hz and shape {samples.shape}; expected mono at {SAMPLING_RATE} Hz")
    return samples
