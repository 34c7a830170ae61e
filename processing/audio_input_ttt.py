"""Audio as users have it (arrays, files, addresses, decoded dataset items) to mono float32 waveforms at one sampling
rate, with errors that name the item. Nothing here knows about models or tokens."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np

MIN_SAMPLING_RATE = 1000  # Hz; what is below was given in kHz


def is_single_audio(audio: Any) -> bool:
    """Whether this is one audio rather than a sequence of them. Strings, paths, bytes, mappings, decoders, 1-D and 2-D
    arrays and lists of numbers are one audio."""
    if isinstance(audio, (str, bytes, os.PathLike, Mapping)) or hasattr(audio, "get_all_samples"):
        return True
    if hasattr(audio, "ndim") or hasattr(audio, "sample_rate"):
        return True
    return isinstance(audio, Sequence) and len(audio) > 0 and isinstance(audio[0], (int, float, np.number))


def load_waveform(audio: Any, sampling_rate: int, source_rate: int | None = None, name: str = "audio") -> np.ndarray:
    """One audio, in any accepted form, as a waveform.

    Args:
        audio: an array, tensor or list of numbers (samples,), (channels, samples) or (samples, channels), float in
            [-1, 1] or integer PCM; a path, `file://`, `http(s)://` or `data:` address, or the bytes of a file; a
            mapping with `array` and `sampling_rate`, or with `bytes` or `path` (an undecoded `datasets` item); a
            torchcodec decoder (a decoded `datasets` item) or its samples.
        sampling_rate: rate of the result, Hz.
        source_rate: rate of an array that brings none of its own, Hz; `sampling_rate` by default.
        name: how errors call the item.

    Returns:
        (samples,) float32; channels are averaged, other rates resampled as librosa does.

    Raises:
        ValueError: no samples, NaN or infinite samples, an unreadable file, a shape or type that is not audio, a
            sampling rate that is no number of Hz.
        FileNotFoundError: the file does not exist.
    """
    waveform, rate = _decode(audio, sampling_rate if source_rate is None else source_rate, name)
    waveform = _to_mono(waveform, name)
    if waveform.size == 0:
        raise ValueError(f"{name} is empty (0 samples). Pass at least one sample, or leave the item out.")
    if not np.isfinite(waveform).all():
        position = int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise ValueError(
            f"{name} holds {waveform[position]} at sample {position}. Remove NaN and infinite samples first, "
            "for example with `numpy.nan_to_num`."
        )
    return np.ascontiguousarray(resample(waveform, _checked_rate(rate, name), sampling_rate), dtype=np.float32)


def _checked_rate(rate: Any, name: str) -> float:
    """A sampling rate as a number of Hz."""
    try:
        number = float(rate)
    except (TypeError, ValueError):
        number = math.nan
    if not MIN_SAMPLING_RATE <= number < math.inf:
        raise ValueError(f"{name} has sampling rate {rate}; give it in Hz, a number of at least {MIN_SAMPLING_RATE}.")
    return number


def resample(waveform: np.ndarray, source_rate: float, target_rate: float) -> np.ndarray:
    """`librosa.resample` with its default quality, sample for sample: n samples of float32 become
    ceil(n * target_rate / source_rate). Calls librosa's resampler, soxr, directly: importing librosa takes seconds."""
    if source_rate == target_rate:
        return waveform
    import soxr

    length = math.ceil(waveform.shape[-1] * target_rate / source_rate)
    resampled = soxr.resample(waveform, source_rate, target_rate, quality="soxr_hq")
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length]


def _decode(audio: Any, default_rate: int, name: str) -> tuple[np.ndarray, Any]:
    """Samples of any shape, and their rate."""
    if isinstance(audio, Mapping):
        if audio.get("array") is not None:
            if audio.get("sampling_rate") is None:
                raise ValueError(f"{name} has an `array` but no `sampling_rate`; add it in Hz.")
            return _to_numpy(audio["array"], name), audio["sampling_rate"]
        for key in ("bytes", "path", "url", "audio"):
            if audio.get(key) is not None:
                return _decode(audio[key], audio.get("sampling_rate") or default_rate, name)
        raise ValueError(f"{name} is a mapping with keys {sorted(audio)}; expected `array` and `sampling_rate`.")
    if isinstance(audio, (str, os.PathLike)):
        return _read_address(os.fspath(audio), name)
    if isinstance(audio, (bytes, bytearray)):
        return _read_file(io.BytesIO(audio), name)
    if hasattr(audio, "get_all_samples"):
        audio = audio.get_all_samples()
    if hasattr(audio, "sample_rate") and hasattr(audio, "data"):
        return _to_numpy(audio.data, name), audio.sample_rate
    if audio is None or isinstance(audio, (bool, int, float)):
        raise ValueError(f"{name} is {audio!r}, not audio. Pass an array, a path, an address or a mapping.")
    return _to_numpy(audio, name), default_rate


def _to_numpy(samples: Any, name: str) -> np.ndarray:
    if hasattr(samples, "detach"):
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
        return samples.numpy()
    try:
        return np.asarray(samples)
    except ValueError as error:  # such as a pair of sampling rate and array
        raise ValueError(
            f"{name} is a {type(samples).__name__} whose items do not make one array. Pass samples and their rate as "
            '`{"array": ..., "sampling_rate": ...}`, several audios as a list.'
        ) from error


def _read_address(address: str, name: str) -> tuple[np.ndarray, float]:
    if address.startswith(("http://", "https://", "data:")):
        return _read_file(io.BytesIO(_fetch(address, name)), name)
    path = unquote(urlparse(address).path) if address.startswith("file://") else address
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{name}: there is no file {path!r}. Pass the path or address of an audio file; text goes into `text`."
        )
    if os.path.isdir(path):
        raise ValueError(f"{name}: {path!r} is a folder. Pass the audio files in it.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name}: the file {path!r} has no content (0 bytes).")
    return _read_file(path, name)


def _fetch(address: str, name: str) -> bytes:
    if address.startswith("data:"):
        import base64

        try:
            return base64.b64decode(address.partition(",")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"{name}: the `data:` address is not valid base64.") from error
    import urllib.request
    from http.client import HTTPException

    try:
        with urllib.request.urlopen(address, timeout=30.0) as response:
            return response.read()
    except (OSError, HTTPException) as error:  # connection refused, timeout, HTTP status; an answer or address cut off
        raise ValueError(f"{name}: could not fetch {address!r} ({error}).") from error


def _read_file(file: str | io.BytesIO, name: str) -> tuple[np.ndarray, float]:
    import soundfile

    described = repr(file) if isinstance(file, str) else "the data"
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        decoder = _torchcodec_decoder()
        if decoder is None:
            reason = str(getattr(error, "error_string", error)).rstrip(".")
            raise ValueError(
                f"{name}: {described} cannot be read as audio ({reason}). "
                "Convert it to WAV, FLAC, OGG or MP3, or install torchcodec for other formats."
            ) from error
        try:
            decoded = decoder(file if isinstance(file, str) else file.getvalue()).get_all_samples()
        except Exception as codec_error:
            raise ValueError(f"{name}: {described} cannot be read as audio ({codec_error}).") from codec_error
        return decoded.data.numpy(), decoded.sample_rate
    return samples.T, rate


def _torchcodec_decoder() -> Any | None:
    """torchcodec's decoder, which reads what soundfile cannot; None where it is not installed or does not load."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError):
        return None
    return AudioDecoder


def _to_mono(samples: np.ndarray, name: str) -> np.ndarray:
    if samples.dtype.kind not in "fi" and samples.dtype != np.uint8:
        raise ValueError(
            f"{name} holds values of type {samples.dtype}, not samples. Pass numbers, or a path to an audio file."
        )
    if samples.size == 0:
        return np.zeros(0, dtype=np.float32)
    if samples.ndim == 2:
        # Recordings have far fewer channels than samples, so the shorter side is taken for the channels.
        samples = samples.T if samples.shape[0] > samples.shape[1] else samples
    elif samples.ndim != 1:
        raise ValueError(
            f"{name} has shape {samples.shape}; expected (samples,) or (channels, samples). "
            "Pass several audios as a list."
        )
    if samples.dtype in (np.int16, np.int32):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif samples.dtype.kind == "i" and samples.size and np.abs(samples).max() > 1:
        raise ValueError(
            f"{name} holds integers of type {samples.dtype}, whose full scale is unknown. "
            "Pass int16 or int32 PCM, or floats in [-1, 1]."
        )
    samples = samples.astype(np.float32)
    return samples.mean(axis=0) if samples.ndim == 2 else samples
