"""A record's audio to a waveform: files, addresses and parts of recordings, and the limits that a waveform must keep.
What the audio means lives in records.py, its codes in examples.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets.utils.file_utils import xopen

from processing.audio_input_ttt import load_waveform
from training_examples.preparation.records import RejectedError

FRAME_SECONDS = 0.05
FULL_SCALE = 0.99  # a clipped sample, after resampling, lies above it more often than not
PART_KEYS = ("offset", "duration", "channel")


@dataclass(frozen=True)
class AudioLimits:
    """
    Which audio is worth training on.

    Args:
        min_seconds, max_seconds (`float`): shortest and longest audio.
        min_level (`float`): in dB below full scale, what the root mean square of its loudest 50 ms must reach.
        max_clipping (`float`): largest share of samples at 99 % of full scale or above.
        min_speaking_rate, max_speaking_rate (`float`): in characters a second, of audio whose text is known; 0 sets no
            limit.
    """

    min_seconds: float = 0.0
    max_seconds: float = 30.0
    min_level: float = -60.0
    max_clipping: float = 0.05
    min_speaking_rate: float = 0.0
    max_speaking_rate: float = 0.0

    def check(self, waveform: np.ndarray, sampling_rate: int) -> None:
        """Raise a RejectedError for a waveform of shape `(samples,)` beyond a limit; the first one is named."""
        seconds = len(waveform) / sampling_rate
        if seconds > self.max_seconds:
            raise RejectedError("long audio", f"{seconds:.1f} s, above `--max_audio_seconds` {self.max_seconds:g}")
        if seconds < self.min_seconds:
            raise RejectedError("short audio", f"{seconds:.2f} s, below `--min_audio_seconds` {self.min_seconds:g}")
        if (level := loudest_level(waveform, sampling_rate)) < self.min_level:
            raise RejectedError(
                "silent audio", f"{level:.0f} dB at its loudest, below `--min_level` {self.min_level:g}"
            )
        share = float(np.mean(np.abs(waveform) >= FULL_SCALE))
        if share > self.max_clipping:
            raise RejectedError(
                "clipped audio", f"{share:.1%} of it is at full scale, above `--max_clipping` {self.max_clipping:g}"
            )

    def check_speaking_rate(self, text: str, seconds: float) -> None:
        """Raise a RejectedError for a text that is said too slowly or too fast to be what is said."""
        rate = len(text.strip()) / seconds
        said = f"{len(text.strip())} characters in {seconds:.1f} s are {rate:.1f} a second"
        if rate < self.min_speaking_rate:
            raise RejectedError("slow speech", f"{said}, below `--min_speaking_rate` {self.min_speaking_rate:g}")
        if self.max_speaking_rate and rate > self.max_speaking_rate:
            raise RejectedError("fast speech", f"{said}, above `--max_speaking_rate` {self.max_speaking_rate:g}")


def loudest_level(waveform: np.ndarray, sampling_rate: int) -> float:
    """Return the level of the loudest 50 ms of a waveform of shape `(samples,)`, in dB of full scale."""
    size = min(len(waveform), round(FRAME_SECONDS * sampling_rate))
    frames = waveform[: len(waveform) // size * size].reshape(-1, size)
    power = float(np.square(frames, dtype=np.float64).mean(1).max())
    return 10 * np.log10(max(power, 1e-20))


def name_audio(error: RejectedError, column: str, audio: Any) -> RejectedError:
    """Return an error that names the audio it is about, by its file or else its column: a record may have several."""
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    name = path if isinstance(path, str) and 0 < len(path) < 1000 else f"`{column}`"
    return error if name in str(error) else RejectedError(error.kind, f"{error} ({name})")


def load_recording(audio: Any, root: Path, sampling_rate: int, source_rate: int | None = None) -> np.ndarray:
    """
    Return a record's audio as a waveform.

    Args:
        audio (`Any`): as `load_waveform` takes it; or a mapping of `path` with `offset` and `duration` in seconds or a
            `channel`, which is a part of a recording; or of `path` with `start` and `size` in bytes, which is a file in
            a tar; or a mapping whose `problem` says why there is no audio.
        root (`Path`): where relative paths start.
        sampling_rate (`int`): of the waveform, in Hz.
        source_rate (`int`, *optional*): of audio given as bare numbers, in Hz.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32.

    Raises:
        RejectedError: If there is no such file, or it cannot be read.
    """
    if isinstance(audio, Mapping) and audio.get("problem") is not None:
        raise RejectedError("unreadable audio", audio["problem"])
    try:
        if isinstance(audio, list) and source_rate is None:
            raise ValueError("audio of bare numbers needs their `--sampling_rate`")
        source = read_path(audio, root)
        part = (
            {key: audio[key] for key in PART_KEYS if audio.get(key) is not None} if isinstance(audio, Mapping) else {}
        )
        if part and "array" not in audio:
            return _load_part(source, sampling_rate, **part)
        return load_waveform(source, sampling_rate, source_rate)
    except FileNotFoundError as error:
        raise RejectedError("missing audio", str(error)) from error
    except (ValueError, OSError) as error:
        path = audio.get("path") if isinstance(audio, Mapping) else audio
        where = f" ({path})" if isinstance(path, str) and len(path) < 1000 and path not in str(error) else ""
        raise RejectedError("unreadable audio", f"{error}{where}") from error


def _load_part(
    source: Any, sampling_rate: int, offset: float = 0.0, duration: float | None = None, channel: int | None = None
) -> np.ndarray:
    """Return so many seconds of a recording, reading no more of its file than that where soundfile can."""
    if offset < 0 or (duration is not None and duration <= 0):
        raise ValueError(f"the part from {offset} s of {duration} s is no part of a recording")
    if isinstance(source, str) and "://" not in source and Path(source).is_file():
        try:
            with soundfile.SoundFile(source) as file:
                if channel is not None and channel >= file.channels:
                    raise ValueError(f"{source} has {file.channels} channels, and no channel {channel}")
                file.seek(min(round(offset * file.samplerate), file.frames))
                frames = -1 if duration is None else round(duration * file.samplerate)
                samples = file.read(frames, dtype="float32", always_2d=True)
                mono = samples.mean(1) if channel is None else samples[:, channel]
                return load_waveform((mono, file.samplerate), sampling_rate, name=f"{source} from {offset:g} s")
        except soundfile.LibsndfileError:
            pass  # a format that only others read
    if channel:
        raise ValueError(f"channel {channel} of {str(source)[:100]!r} cannot be taken out; write it to a WAV file")
    waveform = load_waveform(source, sampling_rate)
    start = round(offset * sampling_rate)
    end = None if duration is None else start + round(duration * sampling_rate)
    return load_waveform((waveform[start:end], sampling_rate), sampling_rate, name=f"audio from {offset:g} s")


def read_path(audio: Any, root: Path) -> Any:
    """
    Return audio as `load_waveform` takes it: relative paths start at `root`, addresses of other file systems (`hf://`,
    `zip://`) and files in tars are read.
    """
    path = audio.get("path") if isinstance(audio, Mapping) and audio.get("bytes") is None else audio
    if not isinstance(path, str):
        return audio
    if isinstance(audio, Mapping) and audio.get("size") is not None:
        with (root / path).open("rb") as archive:
            archive.seek(audio["start"])
            return archive.read(audio["size"])
    if "://" not in path:
        return str(root / path) if not path.startswith("data:") else path
    if path.startswith(("http://", "https://", "file://")):
        return path
    with xopen(path, "rb") as file:
        return file.read()
