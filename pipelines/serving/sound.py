"""Sound on the wire: PCM16 in base64 and files in, within limits that hold before and while decoding; PCM16, WAV and
FLAC out. Resampling between the wire's 24 kHz and the model's rate, as it comes."""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

from .errors import ApiError
from .limits import Limits

WIRE_RATE = 24_000  # Hz, of PCM16 in OpenAI's protocols
SAMPLE_BYTES = 2
PIECE_SAMPLES = WIRE_RATE // 5  # 0.2 s
FORMATS_READ = {"WAV", "WAVEX", "FLAC", "OGG", "MPEG", "MP3", "AIFF"}  # soundfile's names of what is decoded
FORMATS_WRITTEN = {"wav": "audio/wav", "flac": "audio/flac", "pcm": "audio/pcm"}
RATES_READ = range(1000, 192_001)  # Hz
SHORTEST_MS = 100  # of what is to be understood
BLOCK_FRAMES = 65_536
SILENCE = np.zeros(0, dtype=np.float32)  # no samples: what is pushed to end a stream
UNKNOWN_LENGTH = 0xFFFFFFFF  # in the header of a WAV file whose end is not known yet


def decode_base64(text: str, param: str, most_bytes: int) -> bytes:
    """
    Return what base64 holds.

    Raises:
        ApiError: if it is none, or holds more than `most_bytes`.
    """
    if len(text) // 4 * 3 > most_bytes + 2:
        raise ApiError(f"'{param}' holds more than {most_bytes} bytes; send less at once.", 413, "too_large", param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(f"'{param}' is no valid base64.", code="invalid_base64", param=param) from None


def encode_base64(content: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(content).decode("ascii")


def check_length(num_samples: int, rate: int, param: str) -> None:
    """
    Refuse sound that is too short to be understood.

    Args:
        num_samples (`int`): of one channel.
        rate (`int`): Hz.
        param (`str`): how errors call it.

    Raises:
        ApiError: if it is shorter than `SHORTEST_MS`.
    """
    if num_samples * 1000 < SHORTEST_MS * rate:
        message = f"'{param}' lasts {num_samples * 1000 / rate:.0f} ms; send {SHORTEST_MS} ms or more."
        raise ApiError(message, code="audio_too_short", param=param)


def pcm_to_float(pcm: bytes | bytearray | memoryview) -> np.ndarray:
    """Return little-endian PCM16 as float32 samples of shape `(samples,)`, full scale 1."""
    return np.frombuffer(pcm, dtype="<i2").astype(np.float32) / 32768.0


def float_to_pcm(samples: np.ndarray) -> bytes:
    """Return float samples of shape `(samples,)`, full scale 1, as little-endian PCM16."""
    return (samples * 32768.0).round().clip(-32768, 32767).astype("<i2").tobytes()


class Resampler:
    """
    Samples at one rate to samples at another, as they come.

    Args:
        source_rate, target_rate (`int`): Hz.
    """

    def __init__(self, source_rate: int, target_rate: int):
        same = source_rate == target_rate
        self._stream = None if same else soxr.ResampleStream(source_rate, target_rate, 1, dtype="float32")

    def push(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        """Take float32 samples of shape `(samples,)`; return those that are ready, and with `last` all that is left."""
        return samples if self._stream is None else self._stream.resample_chunk(samples, last=last)


def decode_file(content: bytes, limits: Limits, param: str) -> tuple[np.ndarray, int]:
    """
    Decode a sound file in memory. No name or address in it is followed.

    Args:
        content (`bytes`): the file.
        limits (`Limits`): what it may be; checked in its header, and again while it is decoded.
        param (`str`): how errors call it.

    Returns:
        `tuple[np.ndarray, int]`: float32 samples of shape `(samples,)`, channels averaged; their rate, Hz.

    Raises:
        ApiError: if it cannot be read, is too short, or beyond a limit.
    """
    if not content:
        raise ApiError(f"'{param}' is empty (0 bytes).", code="invalid_audio", param=param)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            return _read(file, limits, param), file.samplerate
    except (RuntimeError, TypeError, ValueError, OSError):
        raise ApiError(
            f"'{param}' cannot be read as audio. Send a WAV, FLAC, OGG or MP3 file.", code="invalid_audio", param=param
        ) from None


def _read(file: soundfile.SoundFile, limits: Limits, param: str) -> np.ndarray:
    if file.format not in FORMATS_READ:
        message = f"'{param}' is a file of type {file.format}. Send WAV, FLAC, OGG or MP3."
        raise ApiError(message, code="unsupported_format", param=param)
    if file.samplerate not in RATES_READ:
        message = (
            f"'{param}' has a sampling rate of {file.samplerate} Hz; use {RATES_READ.start} to {RATES_READ.stop - 1}."
        )
        raise ApiError(message, code="invalid_audio", param=param)
    if file.channels > limits.audio_channels:
        message = f"'{param}' has {file.channels} channels; use {limits.audio_channels} or fewer."
        raise ApiError(message, code="too_many_channels", param=param)
    most = int(limits.audio_seconds * file.samplerate)
    blocks: list[np.ndarray] = []
    frames = file.frames  # what the header says, which may be anything
    while frames <= most and len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
        blocks.append(block.mean(axis=1))
        frames = max(frames, sum(map(len, blocks)))
    if frames > most:
        message = f"'{param}' lasts longer than {limits.audio_seconds:g} seconds. Send less."
        raise ApiError(message, 413, "audio_too_long", param)
    samples = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
    check_length(len(samples), file.samplerate, param)
    if not np.isfinite(samples).all():
        raise ApiError(f"'{param}' holds samples that are no numbers.", code="invalid_audio", param=param)
    return samples.clip(-1.0, 1.0)


def encode_file(samples: np.ndarray, rate: int, file_format: str) -> bytes:
    """
    Return a whole sound file.

    Args:
        samples (`np.ndarray` of shape `(samples,)`): float, full scale 1.
        rate (`int`): Hz.
        file_format (`str`): "wav", "flac", or "pcm" for little-endian PCM16 without a header.
    """
    if file_format == "pcm":
        return float_to_pcm(samples)
    file = io.BytesIO()
    pcm = np.frombuffer(float_to_pcm(samples), dtype="<i2")
    soundfile.write(file, pcm, rate, format=file_format.upper(), subtype="PCM_16")
    return file.getvalue()


class FileStream:
    """
    A sound file as it is written, in pieces that joined are the file.

    WAV has a header whose lengths say "unknown", which players take for "to the end". FLAC is encoded when the sound is
    complete, since its header cannot say so.

    Args:
        rate (`int`): of the samples, Hz.
        file_format (`str`): one of `FORMATS_WRITTEN`.
    """

    def __init__(self, rate: int, file_format: str):
        self.rate, self.file_format = rate, file_format
        self._begun = False
        self._held: list[np.ndarray] = []

    def push(self, samples: np.ndarray) -> bytes:
        """Take float samples of shape `(samples,)`; return the bytes that are ready."""
        if self.file_format == "flac":
            self._held.append(samples)
            return b""
        return self._header() + float_to_pcm(samples)

    def flush(self) -> bytes:
        """Return what is left."""
        if self.file_format == "flac":
            held = np.concatenate(self._held) if self._held else np.zeros(0, dtype=np.float32)
            return encode_file(held, self.rate, "flac")
        return self._header()

    def _header(self) -> bytes:
        if self._begun or self.file_format != "wav":
            return b""
        self._begun = True
        byte_rate = self.rate * SAMPLE_BYTES
        form = struct.pack("<HHIIHH", 1, 1, self.rate, byte_rate, SAMPLE_BYTES, 8 * SAMPLE_BYTES)
        return (
            b"RIFF" + struct.pack("<I", UNKNOWN_LENGTH) + b"WAVEfmt " + struct.pack("<I", len(form)) + form
            + b"data" + struct.pack("<I", UNKNOWN_LENGTH)
        )  # fmt: skip


def split_pcm(pcm: bytes) -> Iterator[bytes]:
    """Yield PCM16 in pieces of at most `PIECE_SAMPLES`, so that what was not sent can be held back."""
    size = PIECE_SAMPLES * SAMPLE_BYTES
    for start in range(0, len(pcm), size):
        yield pcm[start : start + size]
