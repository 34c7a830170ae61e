"""Speech on disk: shards of what is trained on, and held-out lists with a file for each recording. What is said, and by
whom, is the business of build_speech.py and build_skill.py."""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile
from safetensors import safe_open
from safetensors.numpy import save_file

from training_examples.files import whole_file, write_text
from training_examples.ttt_tiny.augmentation import no_speech
from training_examples.ttt_tiny.synthesis import ASSISTANT_VOICE, SAMPLING_RATE, Delivery, speak


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Return floats in [-1, 1] as 16-bit samples."""
    return np.round(np.clip(samples, -1.0, 1.0) * 32767).astype(np.int16)


def resample_int16(wave: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Return an int16 waveform of shape `(samples,)` at `rate` Hz as it is at `target` Hz."""
    if rate == target:
        return wave
    resampled = librosa.resample(wave.astype(np.float32), orig_sr=rate, target_sr=target)
    return np.round(resampled).clip(-32768, 32767).astype(np.int16)


def write_shard(path: Path, rows: Sequence[dict], waves: Sequence[np.ndarray]) -> None:
    """
    Write one shard: `samples` (int16, all sentences end to end) and `offsets` (int64, one more than rows); its metadata
    has the rows and the sampling rate.

    Args:
        path (`Path`): a `.safetensors` file.
        rows (`Sequence[dict]`): what is known about each sentence, `text` among it.
        waves (`Sequence[np.ndarray]`): int16 waveforms at 24 kHz, each of shape `(samples,)`.
    """
    offsets = np.cumsum([0, *map(len, waves)], dtype=np.int64)
    metadata = {"rows": json.dumps(rows), "sampling_rate": str(SAMPLING_RATE)}
    with whole_file(path) as partial:
        save_file({"samples": np.concatenate(waves), "offsets": offsets}, partial, metadata=metadata)


def read_shard(path: Path, sampling_rate: int) -> tuple[list[dict], list[np.ndarray]]:
    """Return a shard's rows and their int16 waveforms, each of shape `(samples,)`, at `sampling_rate` Hz."""
    with safe_open(path, "numpy") as shard:
        metadata = shard.metadata()
        samples, offsets = shard.get_tensor("samples"), shard.get_tensor("offsets")
    waves = [samples[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
    stored = int(metadata["sampling_rate"])
    return json.loads(metadata["rows"]), [resample_int16(wave, stored, sampling_rate) for wave in waves]


def read_rows(path: Path) -> list[dict]:
    """Return what is known about each sentence of a shard, without its waveforms."""
    with safe_open(path, "numpy") as shard:
        return json.loads(shard.metadata()["rows"])


def speak_row(row: dict) -> np.ndarray:
    """Return what a row says, in its voice: float32 of shape `(samples,)`, 24 kHz."""
    delivery = Delivery(row["voice"], row["rate"], row["pitch"], row["phrasing"])
    return speak(row.get("text") or row["question"] or row["answer"], delivery)


@cache
def _crowd() -> list[np.ndarray]:
    texts = ("what is seven plus eight", "monday tuesday wednesday", "a bird lives in a tree", "please count to ten")
    return [speak(text, voice) for text in texts for voice in ("flite:awb", "espeak:en-us+f1", "espeak:gmw/en+m3")]


def make_sound(row: dict) -> np.ndarray:
    """Return the sound of a row in which nobody speaks: float32 of shape `(samples,)`, 24 kHz."""
    rng, length = np.random.default_rng(row["sound_seed"]), int(row["seconds"] * SAMPLING_RATE)
    return no_speech(row["kind"], length, SAMPLING_RATE, rng, _crowd() if row["kind"] == "babble" else ())


@cache
def speak_answer(text: str) -> np.ndarray:
    """Return `text` in the assistant's voice: float32 of shape `(samples,)`, 24 kHz. Many questions share an answer."""
    return speak(text, ASSISTANT_VOICE)


def speak_list(folder: Path, name: str, rows: Sequence[dict]) -> Path:
    """Speak one held-out list into `folder`: FLAC files and `name`.jsonl. A list that is there is left as it is."""
    target = folder / f"{name}.jsonl"
    if target.exists():
        return target
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, row in enumerate(rows):
        row = {"id": f"{name}-{index:04d}", **row, "audio": None, "answer_audio": None}
        if "voice" in row or "sound_seed" in row:
            row["audio"] = f"{name}/{index:04d}.flac"
            wave = speak_row(row) if "voice" in row else make_sound(row)
            soundfile.write(folder / row["audio"], wave, SAMPLING_RATE)
        if row["task"] != "asr":
            row["answer_audio"] = f"{name}/{index:04d}-answer.flac"
            soundfile.write(folder / row["answer_audio"], speak_answer(row["answer"]), SAMPLING_RATE)
        lines.append(json.dumps(row) + "\n")
    write_text(target, "".join(lines))
    return target


def pair_turns(rows: Sequence[dict], count: int, seed: int) -> list[dict]:
    """
    Return conversations of two turns made of the rows of a spoken list: in turn spoken then spoken, spoken then typed,
    and typed then spoken.

    Args:
        rows (`Sequence[dict]`): rows of a list with `question`, `answer`, `kind`, `audio` and `answer_audio`.
        count (`int`): how many.
        seed (`int`): which rows meet.
    """
    rng, found = random.Random(seed), []
    for index in range(count):
        typed = (None, 1, 0)[index % 3]
        turns = []
        for place, row in enumerate(rng.sample(rows, 2)):
            turn = {key: row[key] for key in ("question", "answer", "kind", "audio", "answer_audio")}
            turns.append(turn | {"audio": None} if place == typed else turn)
        form = " then ".join("typed" if turn["audio"] is None else "spoken" for turn in turns)
        found.append({"id": f"two_turns-{index:04d}", "task": "spoken_qa", "kind": form, "turns": turns})
    return found


def read_list(folder: str | Path, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """
    Return the rows of the held-out list `name`.jsonl, the first `limit` of them.

    Raises:
        FileNotFoundError: If there is no such list; the message says which script makes it.
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit of rows is {limit}; give at least 1, or none for all")
    path = Path(folder, f"{name}.jsonl")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: make the held-out lists with training_examples/ttt_tiny/build_speech.py"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return rows[:limit]


def read_audio(folder: str | Path, path: str, sampling_rate: int) -> np.ndarray:
    """
    Return a mono waveform of a held-out list, float32 of shape `(samples,)`, at `sampling_rate` Hz.

    Raises:
        ValueError: If the file has more than one channel.
    """
    samples, rate = soundfile.read(Path(folder, path), dtype="float32")
    if samples.ndim != 1:
        raise ValueError(f"{path} has shape {samples.shape}; expected one channel")
    return samples if rate == sampling_rate else librosa.resample(samples, orig_sr=rate, target_sr=sampling_rate)
