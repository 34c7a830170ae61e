"""In-process speech synthesis with eSpeak NG and Flite: text and a voice in, a 16 kHz waveform out.

Both are called through their C libraries (Debian packages `libespeak-ng1` with `espeak-ng-data`, and `libflite1`),
which is many times faster than one process per sentence. Only the data scripts need them; a trained model does not.
"""

import ctypes
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.signal import resample_poly

SAMPLING_RATE = 16_000
ASSISTANT_VOICE = "flite:slt"
# Voices of the questions. The held-out ones are never heard in training, not even by the audio tokenizer.
TRAINED_VOICES = (
    "espeak:en-us espeak:en-us+m2 espeak:en-us+m3 espeak:en-us+m4 espeak:en-us+m5 espeak:en-us+m7 espeak:en-us+f1 "
    "espeak:en-us+f2 espeak:en-us+f4 espeak:en-us+f5 espeak:en-us+Andrea espeak:en-us+anikaRobot espeak:en-us+linda "
    "espeak:en-us+steph espeak:en-us+Mario espeak:en-us+Michael espeak:en-us+Alex espeak:en-us+belinda "
    "espeak:gmw/en espeak:gmw/en+f2 espeak:gmw/en+m3 espeak:gmw/en-GB-x-rp espeak:gmw/en-GB-x-rp+f4 "
    "espeak:gmw/en-GB-scotland "
    "flite:awb flite:kal flite:kal16 flite:slt"
).split()
UNHEARD_VOICES = ("espeak:en-us+f3", "espeak:en-us+Annie")
UNHEARD_NATURAL_VOICE = "flite:rms"
# Flite's recorded voices are few: they take a larger share of the questions than one of the formant voices does.
VOICE_WEIGHTS = {"flite:awb": 3.0, "flite:kal16": 3.0, "flite:slt": 3.0, "flite:kal": 2.0}


@dataclass(frozen=True)
class Delivery:
    """How a sentence is spoken: `rate` 1.0 is the voice's own speed, `pitch` 1.0 its own pitch."""

    voice: str
    rate: float = 1.0
    pitch: float = 1.0


def random_delivery(rng: random.Random, voices: Sequence[str]) -> Delivery:
    """Draws a voice with a speed and a pitch around its own."""
    voice = rng.choices(voices, weights=[VOICE_WEIGHTS.get(name, 1.0) for name in voices])[0]
    spread = 0.12 if voice.startswith("flite") else 0.2
    return Delivery(voice, round(rng.uniform(0.82, 1.25), 3), round(rng.uniform(1 - spread, 1 + spread), 3))


def speak(text: str, delivery: Delivery | str) -> np.ndarray:
    """Speaks `text`.

    Args:
        text: What to say.
        delivery: A `Delivery`, or a voice name such as `"flite:slt"` or `"espeak:en-us+f3"`.

    Returns:
        float32 waveform, shape (samples,), 16 kHz mono, silence at both ends cut to 50 ms, peak 0.6.

    Raises:
        ValueError: if the voice is unknown or nothing was spoken.
    """
    if isinstance(delivery, str):
        delivery = Delivery(delivery)
    engine, _, name = delivery.voice.partition(":")
    if engine == "flite":
        samples, rate = _flite(text, name, delivery.rate * delivery.pitch)
        rate = int(rate * delivery.pitch)  # played faster: higher pitch; the duration stretch above undoes the speed
    elif engine == "espeak":
        samples, rate = _espeak(text, name, delivery)
    else:
        raise ValueError(f"unknown voice {delivery.voice!r}: use 'flite:NAME' or 'espeak:NAME'")
    if not len(samples):
        raise ValueError(f"voice {delivery.voice!r} said nothing for {text!r}")
    if rate != SAMPLING_RATE:
        step = math.gcd(rate // 50 * 50, SAMPLING_RATE)
        samples = resample_poly(samples, SAMPLING_RATE // step, rate // 50 * 50 // step)
    return _trim(samples / max(np.abs(samples).max(), 1e-3) * 0.6).astype(np.float32)


def _trim(samples: np.ndarray, keep: float = 0.05, threshold: float = 0.012) -> np.ndarray:
    loud = np.flatnonzero(np.abs(samples) > threshold)
    margin = int(keep * SAMPLING_RATE)
    return samples[max(loud[0] - margin, 0) : loud[-1] + margin]


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    ]


class _Voice(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


@cache
def _flite_library() -> ctypes.CDLL:
    library = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
    for name in ("libflite_cmulex.so.1", "libflite_usenglish.so.1"):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    library.flite_init()
    library.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
    library.flite_text_to_wave.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.delete_wave.argtypes = [ctypes.c_void_p]
    library.flite_feat_set_float.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float]
    return library


@cache
def _flite_voice(name: str) -> int:
    _flite_library()
    try:
        register = getattr(ctypes.CDLL(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
    except OSError as error:
        raise ValueError(f"unknown flite voice {name!r}; installed voices: awb, kal, kal16, rms, slt") from error
    register.restype = ctypes.c_void_p
    register.argtypes = [ctypes.c_void_p]
    return register(None)


def _flite(text: str, name: str, rate: float) -> tuple[np.ndarray, int]:
    library, voice = _flite_library(), _flite_voice(name)
    features = ctypes.cast(voice, ctypes.POINTER(_Voice)).contents.features
    base = 1.1 if name in ("kal", "kal16") else 1.0
    library.flite_feat_set_float(features, b"duration_stretch", base / rate)
    wave = library.flite_text_to_wave(text.encode(), voice)
    samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).astype(np.float64) / 32768
    sampling_rate = wave.contents.sample_rate
    library.delete_wave(wave)
    return samples, sampling_rate


_ESPEAK_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_espeak_chunks: list[np.ndarray] = []


@_ESPEAK_CALLBACK
def _collect(samples, count, _events):  # eSpeak hands its samples over in chunks
    if samples and count > 0:
        _espeak_chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0


@cache
def _espeak_library() -> tuple[ctypes.CDLL, int]:
    library = ctypes.CDLL("libespeak-ng.so.1")
    sampling_rate = library.espeak_Initialize(2, 0, None, 0)  # 2: synchronous, no playback
    if sampling_rate <= 0:
        raise RuntimeError("eSpeak NG could not start: install the packages libespeak-ng1 and espeak-ng-data")
    library.espeak_SetSynthCallback(_collect)
    return library, sampling_rate


def _espeak(text: str, name: str, delivery: Delivery) -> tuple[np.ndarray, int]:
    library, sampling_rate = _espeak_library()
    if library.espeak_SetVoiceByName(name.encode()) != 0:
        raise ValueError(f"unknown espeak voice {name!r}; `espeak-ng --voices=en` and `--voices=variant` list them")
    library.espeak_SetParameter(1, int(160 * delivery.rate), 0)  # 1: words per minute
    library.espeak_SetParameter(3, int(min(max(50 * delivery.pitch, 0), 99)), 0)  # 3: pitch, 0 to 99
    _espeak_chunks.clear()
    data = text.encode() + b"\0"
    library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, 1, None, None)  # 1: UTF-8
    chunks = np.concatenate(_espeak_chunks) if _espeak_chunks else np.zeros(0, np.int16)
    return chunks.astype(np.float64) / 32768, sampling_rate
