"""Audio as users have it (arrays, files, addresses, decoded dataset items) to mono float32 waveforms at one sampling
rate, with errors that name the item. Nothing here knows about models or tokens."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
from transformers.audio_utils import load_audio
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Where a mapping has its audio, in this order, and the rate of its samples.
AUDIO_KEYS = ("array", "raw", "waveform", "samples", "audio", "bytes", "file", "path", "url")
RATE_KEYS = ("sampling_rate", "sample_rate", "samplerate", "sr")
MIN_SAMPLING_RATE = 1000  # Hz; what is below was given in kHz
LOUDEST = 10.0  # full scale is 1; a sample beyond this is PCM that was cast to float
FILE_START = re.compile(rb"RIFF....WAVE|fLaC|OggS", re.DOTALL)
# What libsndfile says of a header that names more bytes than there are, and from where on a size means "until the end".
CUT_OFF = re.compile(r"(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)")
UNKNOWN_SIZE = 0x7FFF0000
# What libsndfile says of a file that is there, where it looked for MP3 and found none.
NO_MPEG = "File does not exist"
SECONDS_TO_FETCH, SECONDS_TO_DECODE = 30.0, 120.0
# What ffmpeg may open: media alone, no playlists, which name other files.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,ogg,aac,ac3,amr,asf,avi,flv,mpegts,mpeg,mp3,wav,flac,caf,aiff"


def is_single_audio(audio: Any) -> bool:
    """
    Return whether this is one audio rather than several. Strings, paths, files and their bytes, mappings, decoders, 1-D
    and 2-D arrays, lists of numbers, and a tuple of samples and their rate are one audio.
    """
    if isinstance(audio, (str, os.PathLike, Mapping)) or _is_file(audio) or _as_pair(audio) is not None:
        return True
    if any(hasattr(audio, name) for name in ("ndim", "sample_rate", "get_all_samples")):
        return True
    return isinstance(audio, Sequence) and len(audio) > 0 and isinstance(audio[0], (int, float, np.number))


def list_audio(audio: Any) -> list[Any]:
    """Return one audio or any iterable of them as a list; `None` is none."""
    return [] if audio is None else [audio] if is_single_audio(audio) else list(audio)


def load_waveform(audio: Any, sampling_rate: int, source_rate: float | None = None, name: str = "audio") -> np.ndarray:
    """
    Return one audio, in any accepted form, as a waveform.

    Args:
        audio (`Any`):
            An array, tensor or list of numbers of shape `(samples,)`, `(channels, samples)` or `(samples, channels)`,
            float in [-1, 1] or integer PCM; a tuple of samples and their rate, in either order; a path, an
            `http(s)://`, `file://` or `data:` address or base64; the bytes of a file (also in an array of uint8, of
            WAV, FLAC and OGG files), or an object that reads them; a torchcodec decoder (a decoded `datasets` item) or
            its samples; a mapping that has one of these under one of `AUDIO_KEYS`, and the rate of samples under one
            of `RATE_KEYS`. Files soundfile cannot read (m4a, webm, mp4) are decoded by ffmpeg or torchcodec where
            either is installed.
        sampling_rate (`int`): rate of the result, Hz.
        source_rate (`float`, *optional*): rate of samples that bring none, Hz; `sampling_rate`, with a warning,
            where not given.
        name (`str`, *optional*, defaults to `"audio"`): how errors call the item.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32: channels are averaged, other rates resampled as librosa does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no samples, NaN or infinite samples, a shape or type that is not audio or a sampling rate
            that is no number of Hz, or a file cannot be read.
    """
    waveform = _load(audio, sampling_rate, source_rate, name)
    if waveform.size == 0:
        raise ValueError(f"{name} is empty (0 samples). Pass at least one sample, or leave the item out.")
    _check_finite(waveform, name)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def resample(waveform: np.ndarray, source_rate: float, target_rate: float) -> np.ndarray:
    """
    Resample as `librosa.resample` does by default, sample for sample. Calls librosa's resampler, soxr, directly:
    importing librosa takes seconds.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): float32.
        source_rate, target_rate (`float`): Hz.

    Returns:
        `np.ndarray` of shape `(ceil(samples * target_rate / source_rate),)`.
    """
    if source_rate == target_rate or not len(waveform):
        return waveform
    import soxr

    length = math.ceil(waveform.shape[-1] * target_rate / source_rate)
    resampled = soxr.resample(waveform, source_rate, target_rate, quality="soxr_hq")
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length]


def shorten(value: Any, length: int = 100) -> str:
    """Return what errors quote of a value: its repr, cut to about `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 20]}... ({len(text)} characters)"


def _load(audio: Any, target_rate: int, rate: Any, name: str) -> np.ndarray:
    """Return a mono waveform at `target_rate`; `rate` is that of samples, None where nobody told it."""
    if isinstance(audio, Mapping):
        return _load_mapping(audio, target_rate, rate, name)
    if (pair := _as_pair(audio)) is not None:
        return _load(pair[0], target_rate, pair[1], name)
    if _is_file(audio):
        return _read_file(_read_bytes(audio, name), target_rate, name)
    if isinstance(audio, (str, os.PathLike)):
        return _read_file(_resolve(os.fspath(audio), name), target_rate, name)
    if hasattr(audio, "get_all_samples"):
        audio = audio.get_all_samples()
    if hasattr(audio, "sample_rate") and hasattr(audio, "data"):
        audio, rate = audio.data, audio.sample_rate
    if audio is None or isinstance(audio, (bool, int, float)):
        raise ValueError(f"{name} is {audio!r}, not audio. Pass an array, a path, an address or a mapping.")
    waveform = _to_mono(_to_numpy(audio, name), name)
    _check_finite(waveform, name)  # before resampling, which spreads one bad sample over all
    if rate is None:
        logger.warning_once(
            f"Samples came without a sampling rate; {target_rate:g} Hz is assumed. At another rate they are misheard: "
            "pass `sampling_rate` (Hz) with them, or a tuple of samples and rate."
        )
    return resample(waveform, _checked_rate(target_rate if rate is None else rate, name), target_rate)


def _check_finite(waveform: np.ndarray, name: str) -> None:
    if not np.isfinite(waveform).all():
        position = int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise ValueError(
            f"{name} holds {waveform[position]} at sample {position}. Remove NaN and infinite samples first, "
            "for example with `numpy.nan_to_num`."
        )


def _load_mapping(audio: Mapping[str, Any], target_rate: int, rate: Any, name: str) -> np.ndarray:
    key = next((key for key in AUDIO_KEYS if audio.get(key) is not None), None)
    if key is None:
        raise ValueError(
            f"{name} is a mapping with keys {sorted(map(str, audio))}; expected `array` and `sampling_rate`, or one of "
            f"{', '.join(f'`{key}`' for key in AUDIO_KEYS[1:])}."
        )
    rates = {spelling: audio[spelling] for spelling in RATE_KEYS if audio.get(spelling) is not None}
    rate = next(iter(rates.values()), rate)
    if len(rates) > 1 and any(value != rate for value in rates.values()):
        told = " and ".join(f"`{spelling}` {value}" for spelling, value in rates.items())
        raise ValueError(f"{name} has {told}; leave one out.")
    if key == "array" and rate is None:
        raise ValueError(f"{name} has an `array` but no `sampling_rate`; add it in Hz.")
    return _load(audio[key], target_rate, rate, name)


def _as_pair(audio: Any) -> tuple[Any, Any] | None:
    """Return samples and rate of a tuple of the two (soundfile and torchaudio give samples first, SciPy the rate)."""
    if not isinstance(audio, tuple) or len(audio) != 2:
        return None
    is_rate = [isinstance(item, (int, float, np.number)) for item in audio]
    has_items = [hasattr(item, "__len__") and not isinstance(item, (str, bytes, Mapping)) for item in audio]
    if is_rate[1] and has_items[0]:
        return audio
    return (audio[1], audio[0]) if is_rate[0] and has_items[1] else None


def _is_file(audio: Any) -> bool:
    """
    Return whether this is the bytes of a file or an object that reads them; a view of numbers is samples, and so are
    8-bit numbers in an array, unless they begin as a file does.
    """
    if isinstance(audio, memoryview):
        return audio.format in ("B", "b", "c")
    if str(getattr(audio, "dtype", None)) in ("uint8", "torch.uint8") and getattr(audio, "ndim", None) == 1:
        return FILE_START.match(bytes(audio[:12].tolist())) is not None
    return isinstance(audio, (bytes, bytearray)) or callable(getattr(audio, "read", None))


def _read_bytes(file: Any, name: str) -> bytes:
    """Return the content of a file in memory or opened. One that was read or written to its end is read again."""
    if hasattr(file, "dtype"):
        file = _to_numpy(file, name).tobytes()
    content = file.read() if hasattr(file, "read") else bytes(file)
    if not content and hasattr(file, "seek"):
        file.seek(0)
        content = file.read()
    if not isinstance(content, (bytes, bytearray)):
        raise ValueError(f"{name}: {shorten(file)} reads {type(content).__name__}, not bytes. Open it with mode 'rb'.")
    if not content:
        raise ValueError(f"{name}: the file has no content (0 bytes).")
    return bytes(content)


def _checked_rate(rate: Any, name: str) -> float:
    """Return a sampling rate as a number of Hz."""
    try:
        number = float(rate)
    except (TypeError, ValueError):
        number = math.nan
    if not MIN_SAMPLING_RATE <= number < math.inf:
        raise ValueError(f"{name} has sampling rate {rate}; give it in Hz, a number of at least {MIN_SAMPLING_RATE}.")
    return number


def _to_numpy(samples: Any, name: str) -> np.ndarray:
    if hasattr(samples, "detach"):
        samples = samples.detach().cpu()
        samples = samples.float() if samples.is_floating_point() else samples
        return samples.numpy()
    try:
        return np.asarray(samples)
    except ValueError as error:  # such as rows of different length
        raise ValueError(
            f"{name} is a {type(samples).__name__} whose items do not make one array. Pass samples and their rate as "
            '`{"array": ..., "sampling_rate": ...}`, several audios as a list.'
        ) from error


def _resolve(address: str, name: str) -> str | bytes:
    """Return the path of an existing file, or the bytes behind an address."""
    scheme = address.partition(":")[0].lower()
    if scheme in ("http", "https") and "://" in address:
        return _fetch(address, name)
    if scheme == "data":
        try:
            return _decode_base64(unquote(address.partition(",")[2]))
        except ValueError as error:
            raise ValueError(f"{name}: the `data:` address is not valid base64.") from error
    path = unquote(urlparse(address).path) if address[:7].lower() == "file://" else address
    if not os.path.exists(path):
        try:
            if len(path) >= 64:  # the shortest files have a header of that size, and words are not base64
                return _decode_base64(path)
        except ValueError:
            pass
        raise FileNotFoundError(
            f"{name}: there is no file {shorten(path)}. Pass the path or address of an audio file; text goes into "
            '`text`, or is asked of a pipeline with `task="text_chat"`.'
        )
    if os.path.isdir(path):
        raise ValueError(f"{name}: {path!r} is a folder. Pass the audio files in it.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name}: the file {path!r} has no content (0 bytes).")
    return path


def _decode_base64(text: str) -> bytes:
    """Return what a text encodes, which may be in lines, as in mail. Spaces are not skipped: words are no base64."""
    return base64.b64decode("".join(text.splitlines()), validate=True)


def _fetch(address: str, name: str) -> bytes:
    """Return what lies behind an address. Not `load_audio`'s way, which takes 15 s to say that there is nothing."""
    import urllib.request
    from http.client import HTTPException

    try:
        with urllib.request.urlopen(address, timeout=SECONDS_TO_FETCH) as response:
            return response.read()
    except (OSError, HTTPException) as error:  # connection refused, timeout, HTTP status; an answer or address cut off
        raise ValueError(f"{name}: could not fetch {shorten(address)} ({error}).") from error


def _read_file(file: str | bytes, target_rate: int, name: str) -> np.ndarray:
    """Return a file's waveform: as soundfile reads it, or else as ffmpeg or torchcodec do."""
    described = repr(file) if isinstance(file, str) else "the data"
    _check_header(file, f"{name}: {described}")
    source = file if isinstance(file, str) else f"data:;base64,{base64.b64encode(file).decode()}"
    try:
        return load_audio(source, target_rate, backend="soundfile")
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).partition(". ")[0].rstrip(".")
        reason = "no whole frame of MP3 in it" if reason.startswith(NO_MPEG) else reason
    try:
        if (program := shutil.which("ffmpeg")) is not None:
            return _decode_with_ffmpeg(program, file, target_rate)
        return load_audio(source, target_rate, backend="torchcodec")
    except ImportError:
        raise ValueError(
            f"{name}: {described} cannot be read as audio ({reason}). "
            "Convert it to WAV, FLAC, OGG or MP3, or install ffmpeg or torchcodec for other formats."
        ) from None
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{name}: {described} cannot be read as audio ({reason}; {error}).") from error


def _check_header(file: str | bytes, name: str) -> None:
    """Refuse a rate that is none before samples are made of it: one second at 1 Hz would become 16,000 samples. Warn of
    a file that is shorter than its header says."""
    import soundfile

    try:
        info = soundfile.info(file if isinstance(file, str) else io.BytesIO(file))
    except (RuntimeError, TypeError):  # not a file soundfile reads; raw samples, which have no header
        return
    _checked_rate(info.samplerate, name)
    if (sizes := CUT_OFF.search(info.extra_info)) is not None and int(sizes[1]) < UNKNOWN_SIZE:
        named, there = map(int, sizes.groups())
        if there < named:
            seconds = info.frames / info.samplerate
            warnings.warn(
                f"{name} is cut off: of the {seconds * named / max(there, 1):.1f} seconds that its header names, "
                f"{seconds:.1f} are there. What is there is taken.",
                stacklevel=2,
            )


def _decode_with_ffmpeg(program: str, file: str | bytes, target_rate: int) -> np.ndarray:
    """Return the waveform of a file's audio stream. Bytes go through a temporary file: some containers have
    their index at the end."""
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(file, str):
            content, file = file, os.path.join(folder, "input")
            with open(file, "wb") as writer:
                writer.write(content)
        decoded = os.path.join(folder, "decoded.wav")
        command = [program, "-v", "error", "-nostdin", "-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
        command += ["-i", f"file:{file}", "-vn", "-c:a", "pcm_f32le", decoded]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS_TO_DECODE, check=False
        )
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            if len(lines) > 1 and lines[-1].endswith(": Invalid argument"):  # which says nothing; the line before does
                raise ValueError(f"ffmpeg: {lines[-2].partition('] ')[2] or lines[-2]}")
            raise ValueError(f"ffmpeg: {lines[-1].rpartition(': ')[2] if lines else 'failed'}")
        _check_header(decoded, "the decoded audio")
        return load_audio(decoded, target_rate, backend="soundfile")


def _to_mono(samples: np.ndarray, name: str) -> np.ndarray:
    """Return samples of any scale as float32 of shape (samples,) with full scale 1."""
    if samples.dtype.kind not in "fi" and samples.dtype != np.uint8:
        raise ValueError(
            f"{name} holds values of type {samples.dtype}, not samples. Pass numbers, or a path to an audio file."
        )
    if samples.size == 0:
        return np.zeros(0, dtype=np.float32)
    while samples.ndim > 2 and len(samples) == 1:  # a batch of one, as models return it
        samples = samples[0]
    if samples.ndim == 2:
        # Recordings have far fewer channels than samples, so the shorter side is taken for the channels.
        samples = samples.T if samples.shape[0] > samples.shape[1] else samples
        if len(samples) > 2:
            warnings.warn(
                f"{name} is one recording of {len(samples)} channels, which are averaged. If these are several "
                "recordings, pass them as a list.",
                stacklevel=2,
            )
    elif samples.ndim != 1:
        raise ValueError(
            f"{name} has shape {samples.shape}; expected (samples,) or (channels, samples). "
            "Pass several audios as a list."
        )
    if samples.dtype.kind == "i" and samples.dtype.itemsize in (2, 4):  # of any byte order
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    elif samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif samples.dtype.kind == "i" and np.abs(samples).max() > 1:
        raise ValueError(
            f"{name} holds integers of type {samples.dtype}, whose full scale is unknown. "
            "Pass int16 or int32 PCM, or floats in [-1, 1]."
        )
    elif samples.dtype.kind == "f" and LOUDEST < (peak := np.abs(samples).max()) < math.inf:
        warnings.warn(
            f"{name} holds floats up to {peak:g}, as PCM that was cast to float; full scale is 1. Divide 16-bit "
            "samples by 32768, or pass them as int16.",
            stacklevel=2,
        )
    samples = samples.astype(np.float32)
    return samples.mean(axis=0) if samples.ndim == 2 else samples
