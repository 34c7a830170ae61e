"""In-process speech synthesis: text and a voice in, a 24 kHz waveform out, by Kokoro, eSpeak NG or Flite.

eSpeak NG and Flite are called through their C libraries (Debian packages `libespeak-ng1` with `espeak-ng-data`, and
`libflite1`), Kokoro through `kokoro.py`. Only the data scripts need them; a trained model does not.
"""

import ctypes
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import librosa
import numpy as np

from training_examples.ttt_tiny import kokoro

SAMPLING_RATE = kokoro.SAMPLING_RATE
ASSISTANT_VOICE = "kokoro:af_heart"
# Voices of the questions. The held-out ones are never heard in training, not even by the audio tokenizer.
KOKORO_VOICES = (
    "af_alloy af_aoede af_bella af_heart af_jessica af_nicole af_nova af_river af_sarah af_sky am_adam am_eric "
    "am_fenrir am_liam am_onyx am_puck am_santa bf_alice bf_isabella bf_lily bm_daniel bm_fable bm_lewis"
).split()
UNHEARD_KOKORO_VOICES = "af_kore am_michael am_echo bf_emma bm_george".split()
# Voices of other languages say English words, too: they occur as the lesser part of mixtures.
FOREIGN_KOKORO_VOICES = (
    "ef_dora em_alex ff_siwis hf_alpha hf_beta hm_omega hm_psi if_sara im_nicola jf_alpha jf_gongitsune jm_kumo "
    "pf_dora pm_alex zf_xiaobei zf_xiaoyi zm_yunjian zm_yunxi"
).split()
ESPEAK_VOICES = (
    "en-us en-us+m2 en-us+m3 en-us+m4 en-us+m5 en-us+m7 en-us+f1 en-us+f2 en-us+f4 en-us+f5 en-us+Andrea "
    "en-us+anikaRobot en-us+linda en-us+steph en-us+Mario en-us+Michael en-us+Alex en-us+belinda gmw/en gmw/en+f2 "
    "gmw/en+m3 gmw/en-GB-x-rp gmw/en-GB-x-rp+f4 gmw/en-GB-scotland"
).split()
FLITE_VOICES = "awb kal kal16 slt".split()
UNHEARD_FLITE_VOICE = "rms"
TRAINED_VOICES = (
    *(f"kokoro:{name}" for name in KOKORO_VOICES),
    *(f"espeak:{name}" for name in ESPEAK_VOICES),
    *(f"flite:{name}" for name in FLITE_VOICES),
)
UNHEARD_VOICES = tuple(f"kokoro:{name}" for name in UNHEARD_KOKORO_VOICES)
UNHEARD_NATURAL_VOICE = f"flite:{UNHEARD_FLITE_VOICE}"
# How often each engine asks, and how often Kokoro does so with a mixture of two voices.
ENGINE_WEIGHTS = {"kokoro": 78.0, "espeak": 10.0, "flite": 12.0}
MIXTURE_SHARE = 0.4
# The level of every waveform: root mean square of its speech, and the most a peak may reach.
SPEECH_RMS = 0.08
PEAK = 0.95


@dataclass(frozen=True)
class Delivery:
    """How a sentence is spoken: `rate` 1.0 is the voice's own speed, `pitch` 1.0 its own pitch; `phrasing` is one of
    `"statement"`, `"question"` and `"list"`, which Kokoro alone tells apart."""

    voice: str
    rate: float = 1.0
    pitch: float = 1.0
    phrasing: str = "statement"


def random_delivery(rng: random.Random, voices: Sequence[str] | None = None, kind: str = "") -> Delivery:
    """
    Draw a voice with a speed and a pitch around its own.

    Args:
        rng (`random.Random`): the source of chance.
        voices (`Sequence[str]`, *optional*, defaults to the trained voices and mixtures of them): the voices to draw
            from, each as often as the others.
        kind (`str`, *optional*): `"dictation"` and `"digits"` are phrased as statements or lists, anything else as
            statements or questions.
    """
    if voices is not None:
        voice = rng.choice(voices)
    else:
        engine = rng.choices(list(ENGINE_WEIGHTS), weights=list(ENGINE_WEIGHTS.values()))[0]
        voice = rng.choice([name for name in TRAINED_VOICES if name.startswith(engine)])
        if engine == "kokoro" and rng.random() < MIXTURE_SHARE:
            voice = f"kokoro:{random_mixture(rng)}"
    other = "list" if kind in ("dictation", "digits") else "question"
    phrasing = other if rng.random() < 0.35 else "statement"
    if not voice.startswith("kokoro"):
        spread = 0.12 if voice.startswith("flite") else 0.2
        rate, pitch = rng.uniform(0.82, 1.25), rng.uniform(1 - spread, 1 + spread)
    else:
        rate = rng.triangular(0.75, 1.35, 1.0)
        # Half of them as they are; the others as a longer or shorter vocal tract would say it.
        pitch = 1.0 if rng.random() < 0.5 else rng.uniform(0.9, 1.12)
    return Delivery(voice, round(rate, 3), round(pitch, 3), phrasing)


def random_mixture(rng: random.Random) -> str:
    """Return a new Kokoro voice: two English voices, or an English one and a smaller part of a foreign one."""
    if rng.random() < 0.25:
        first, second, weight = rng.choice(KOKORO_VOICES), rng.choice(FOREIGN_KOKORO_VOICES), rng.uniform(0.5, 0.75)
    else:
        (first, second), weight = rng.sample(KOKORO_VOICES, 2), rng.uniform(0.3, 0.7)
    weight = round(weight, 2)
    return f"{first}:{weight:.2f}+{second}:{1 - weight:.2f}"


def speak(text: str, delivery: Delivery | str) -> np.ndarray:
    """
    Speak `text`.

    Args:
        text (`str`): what to say, lower-case words.
        delivery (`Delivery` or `str`): how, or a voice name such as `"kokoro:af_heart"`, `"flite:slt"` or
            `"espeak:en-us+f3"`.

    Returns:
        `np.ndarray`: float32 of shape `(samples,)`, 24 kHz, silence at both ends cut to 50 ms, at `SPEECH_RMS`.

    Raises:
        ValueError: If the voice is unknown or nothing was spoken.
    """
    if isinstance(delivery, str):
        delivery = Delivery(delivery)
    engine, _, name = delivery.voice.partition(":")
    # Spoken slower and played faster: a higher pitch and a shorter vocal tract at the same speed.
    rate = delivery.rate / delivery.pitch
    if engine == "kokoro":
        samples = kokoro.kokoro().speak(text, name, rate, delivery.phrasing)
        played_at = kokoro.SAMPLING_RATE * delivery.pitch
    elif engine == "flite":
        samples, played_at = _flite(text, name, rate)
        played_at *= delivery.pitch
    elif engine == "espeak":
        samples, played_at = _espeak(text, name, delivery)
    else:
        raise ValueError(f"unknown voice {delivery.voice!r}: use 'kokoro:NAME', 'flite:NAME' or 'espeak:NAME'")
    if not len(samples) or not np.abs(samples).max() > 1e-3:
        raise ValueError(f"voice {delivery.voice!r} said nothing for {text!r}")
    if played_at != SAMPLING_RATE:
        samples = librosa.resample(samples, orig_sr=played_at, target_sr=SAMPLING_RATE)
    return level(trim(samples)).astype(np.float32)


def trim(samples: np.ndarray, rate: int = SAMPLING_RATE, keep: float = 0.05, threshold: float = -42.0) -> np.ndarray:
    """
    Cut what is quiet at both ends, down to `keep` seconds.

    Args:
        samples (`np.ndarray`): waveform of shape `(samples,)`, not silent.
        rate (`int`, *optional*, defaults to 24,000): its sampling rate in Hz.
        keep (`float`, *optional*, defaults to 0.05): seconds left before the first and after the last loud frame;
            silence is added where there is less.
        threshold (`float`, *optional*, defaults to -42): decibels, against the loudest frame of 10 ms, at which a frame
            counts as quiet.
    """
    frame, margin = rate // 100, int(keep * rate)
    padded = np.pad(samples, (0, -len(samples) % frame))
    power = np.mean(padded.reshape(-1, frame) ** 2, axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (threshold / 10)) * frame
    return np.pad(samples, margin)[loud[0] : loud[-1] + frame + 2 * margin]


def level(samples: np.ndarray, rms: float = SPEECH_RMS) -> np.ndarray:
    """
    Bring the speech in a waveform of shape `(samples,)` to a root mean square of `rms`, no peak above `PEAK`.

    Pauses do not count: the mean is taken over samples above a thirtieth of the peak.
    """
    peak = np.abs(samples).max()
    speech = samples[np.abs(samples) > 0.03 * peak]
    return samples * min(rms / np.sqrt(np.mean(speech**2)), PEAK / peak)


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
