"""Rooms, microphones, lines and noises: what happens to speech on its way to a model, and sounds that are no speech.

All functions are pure: float32 waveforms of shape `(samples,)`, their rate in Hz and, where chance has a part, a
`numpy.random.Generator` in; a new waveform out. The same generator state gives the same samples.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import soundfile
from scipy.signal import butter, fftconvolve, sosfilt

CODINGS = {"mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS")}
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)


def rms(samples: np.ndarray) -> float:
    """Return the root mean square of a waveform, 0 of none."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


# ------------------------------------------------------------------------------------------------------------- noises


def colored_noise(length: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """
    Return Gaussian noise whose power falls with frequency f as f^-exponent, at a root mean square of 1.

    Args:
        length (`int`): samples.
        exponent (`float`): 0 is white, 1 pink, 2 brown.
        rng (`np.random.Generator`): the source of chance.
    """
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.maximum(np.arange(len(spectrum)), 1.0)
    noise = np.fft.irfft(spectrum * frequency ** (-exponent / 2), length)
    return (noise / max(rms(noise), 1e-9)).astype(np.float32)


def hum(length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return mains hum, 50 or 60 Hz with up to eight falling harmonics, at a root mean square of 1."""
    time = np.arange(length) / rate
    base = rng.choice([50.0, 60.0]) * rng.uniform(0.995, 1.005)
    wave = np.zeros(length)
    for harmonic in range(1, int(rng.integers(3, 9))):
        wave += rng.uniform(0.2, 1.0) / harmonic * np.sin(2 * np.pi * (harmonic * base * time + rng.uniform()))
    return (wave / max(rms(wave), 1e-9)).astype(np.float32)


def babble(length: int, speech: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """
    Return four to eight voices at once, at a root mean square of 1.

    Args:
        length (`int`): samples.
        speech (`Sequence[np.ndarray]`): waveforms to draw the voices from, with replacement.
        rng (`np.random.Generator`): the source of chance.

    Raises:
        ValueError: If there is no speech to draw from.
    """
    if not len(speech):
        raise ValueError("`speech` is empty: babble is made of other speech")
    mixed = np.zeros(length)
    for _ in range(int(rng.integers(4, 9))):
        voice = np.asarray(speech[int(rng.integers(len(speech)))], dtype=np.float64)
        voice = np.resize(np.roll(voice, int(rng.integers(len(voice)))), length)
        mixed += rng.uniform(0.5, 1.0) * voice / max(rms(voice), 1e-9)
    return (mixed / max(rms(mixed), 1e-9)).astype(np.float32)


def music(length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return a little music (chords, a melody and, in half of it, a beat), at a root mean square of 1."""
    wave, tonic = np.zeros(length + rate), 110.0 * 2 ** rng.uniform(0, 1.5)
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12]) if rng.random() < 0.5 else np.array([0, 2, 3, 5, 7, 8, 10, 12])
    beat = int(rate * rng.uniform(0.2, 0.6))
    partials = rng.uniform(0.1, 1.0, 5) / np.arange(1, 6)
    drums = rng.random() < 0.5
    for start in range(0, length, beat):
        notes = [scale[rng.integers(8)] + 12]
        if (start // beat) % 4 == 0:
            root = int(rng.integers(8))
            notes += [scale[root], scale[(root + 2) % 8], scale[(root + 4) % 8]]
        for note in notes:
            seconds = np.arange(int(min(rate, beat * rng.uniform(1, 3)))) / rate
            envelope = np.exp(-seconds * rng.uniform(1.5, 6)) * np.minimum(seconds / 0.01, 1)
            tone = sum(
                partial * np.sin(2 * np.pi * tonic * 2 ** (note / 12) * (index + 1) * seconds)
                for index, partial in enumerate(partials)
            )
            wave[start : start + len(seconds)] += envelope * tone
        if drums:
            seconds = np.arange(int(0.1 * rate)) / rate
            wave[start : start + len(seconds)] += np.exp(-seconds * 40) * rng.standard_normal(len(seconds))
    wave = wave[:length]
    return (wave / max(rms(wave), 1e-9)).astype(np.float32)


def knocks(length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return a few knocks, clicks and taps in quiet, at a root mean square of 1."""
    wave = np.zeros(length)
    for _ in range(1 + int(rng.poisson(2 * length / rate))):
        start, seconds = int(rng.integers(length)), np.arange(int(0.15 * rate)) / rate
        ringing = np.sin(2 * np.pi * rng.uniform(80, 2500) * seconds) + rng.uniform(0, 1) * rng.standard_normal(
            len(seconds)
        )
        knock = rng.uniform(0.3, 1.0) * np.exp(-seconds * rng.uniform(30, 300)) * ringing
        wave[start : start + len(knock)] += knock[: length - start]
    return (wave / max(rms(wave), 1e-9)).astype(np.float32)


NO_SPEECH = ("silence", "noise", "hum", "music", "knocks", "babble")


def no_speech(
    kind: str, length: int, rate: int, rng: np.random.Generator, speech: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """
    Return a sound in which nobody speaks to the microphone, at a random level.

    Args:
        kind (`str`): one of `NO_SPEECH`.
        length (`int`): samples.
        rate (`int`): sampling rate in Hz.
        rng (`np.random.Generator`): the source of chance.
        speech (`Sequence[np.ndarray]`, *optional*): what `"babble"` is made of.

    Raises:
        ValueError: If the kind is unknown, or babble has no speech to be made of.
    """
    if kind not in NO_SPEECH:
        raise ValueError(f"`kind` is {kind!r}; use one of {NO_SPEECH}")
    level = 10 ** (rng.uniform(-60, -16) / 20)
    if kind == "silence":
        # Digital silence, a quiet room, or a room in which the microphone's own noise is all there is.
        level = 0.0 if rng.random() < 0.3 else 10 ** (rng.uniform(-90, -55) / 20)
        wave = colored_noise(length, rng.uniform(0, 2), rng)
    elif kind == "noise":
        wave = colored_noise(length, rng.uniform(0, 2), rng)
        if rng.random() < 0.5:  # gusts, passing cars
            time = np.arange(length) / rate
            wave = wave * (1 + rng.uniform(0.3, 1) * np.sin(2 * np.pi * (rng.uniform(0.1, 2) * time + rng.uniform())))
        if rng.random() < 0.3:
            wave = band_limit(wave, rate, rng.uniform(60, 1_000), rng.uniform(1_500, 0.45 * rate))
    elif kind == "hum":
        wave = hum(length, rate, rng) + rng.uniform(0, 0.5) * colored_noise(length, 1.0, rng)
    elif kind == "music":
        wave = music(length, rate, rng)
    elif kind == "knocks":
        wave = knocks(length, rate, rng) + rng.uniform(0.01, 0.1) * colored_noise(length, 1.0, rng)
    else:
        wave = reverberate(babble(length, speech, rng), room_response(rate, rng, seconds=rng.uniform(0.4, 1.0)))
    wave = level * wave / max(rms(wave), 1e-9)
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


# ---------------------------------------------------------------------------------- what happens to speech on its way


def add_noise(samples: np.ndarray, noise: np.ndarray, decibels: float) -> np.ndarray:
    """
    Return speech with noise below it.

    Args:
        samples (`np.ndarray`): speech of shape `(samples,)`; its level is taken where it is loud.
        noise (`np.ndarray`): as long as the speech.
        decibels (`float`): how far the noise lies below the speech (the signal-to-noise ratio).
    """
    speech = np.abs(samples) > 0.03 * np.abs(samples).max(initial=0.0)
    level = rms(samples[speech]) * 10 ** (-decibels / 20)
    return (samples + level * noise / max(rms(noise), 1e-9)).astype(np.float32)


def room_response(rate: int, rng: np.random.Generator, seconds: float | None = None) -> np.ndarray:
    """
    Return the impulse response of a simulated room: the direct sound, some early reflections, and noise that decays.

    Args:
        rate (`int`): sampling rate in Hz.
        rng (`np.random.Generator`): the source of chance.
        seconds (`float`, *optional*, defaults to a draw from 0.1 to 0.8): reverberation time, in which the sound falls
            by 60 dB.

    Returns:
        `np.ndarray`: the response; its first sample is the direct sound, of height 1. The reverberation holds 4 to
        15 dB less energy than the direct sound.
    """
    seconds = rng.uniform(0.1, 0.8) if seconds is None else seconds
    time = np.arange(1, max(int(seconds * rate), 2)) / rate
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / seconds)
    tail *= np.minimum(time / 0.02, 1.0)  # it builds up: the first reflections come one by one
    for _ in range(int(rng.integers(3, 9))):
        place = int(rng.uniform(0.001, 0.03) * rate)
        if place < len(tail):
            tail[place] += rng.choice([-1, 1]) * rng.uniform(1, 4)
    share = 10 ** (-rng.uniform(4, 15) / 20)
    return np.concatenate([[1.0], share * tail / np.sqrt(np.sum(tail**2))]).astype(np.float32)


def reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Return a waveform as it sounds in a room, as long as it was and as loud."""
    wet = fftconvolve(samples, response)[: len(samples)]
    return (wet * (rms(samples) / max(rms(wet), 1e-9))).astype(np.float32)


def band_limit(samples: np.ndarray, rate: int, low: float, high: float) -> np.ndarray:
    """
    Return what a narrow line or a cheap microphone leaves (Butterworth, 4th order).

    Args:
        samples (`np.ndarray`): waveform of shape `(samples,)`.
        rate (`int`): its rate in Hz.
        low (`float`): frequencies below are cut, in Hz.
        high (`float`): frequencies above are cut, in Hz; above 0.49 times the rate nothing is.
    """
    high = min(high, 0.49 * rate)
    if not 0 < low < high:
        raise ValueError(f"`low` is {low} and `high` {high} Hz; want 0 < low < high")
    return sosfilt(butter(4, [low, high], btype="bandpass", fs=rate, output="sos"), samples).astype(np.float32)


def color(samples: np.ndarray, rate: int, rng: np.random.Generator, decibels: float = 8.0) -> np.ndarray:
    """Return a waveform through a microphone of its own color: a smooth gain over frequency of up to +-`decibels`."""
    points = np.geomspace(60, rate / 2, 8)
    gains = rng.uniform(-decibels, decibels, len(points))
    frequency = np.fft.rfftfreq(len(samples), 1 / rate)
    gain = np.interp(np.log(np.maximum(frequency, 60)), np.log(points), gains)
    return np.fft.irfft(np.fft.rfft(samples) * 10 ** (gain / 20), len(samples)).astype(np.float32)


def clip(samples: np.ndarray, share: float) -> np.ndarray:
    """Return a waveform overdriven so that `share` of its samples are cut, at the peak it had."""
    if not 0 <= share < 1:
        raise ValueError(f"`share` is {share}; it must be from 0 to below 1")
    peak = float(np.abs(samples).max(initial=0.0))
    limit = float(np.quantile(np.abs(samples), 1 - share)) if len(samples) else 0.0
    return samples if limit <= 0 else (np.clip(samples, -limit, limit) * (peak / limit)).astype(np.float32)


def transcode(samples: np.ndarray, rate: int, coding: str, compression: float = 0.9) -> np.ndarray:
    """
    Return a waveform after lossy coding and decoding, as long as it was.

    Args:
        samples (`np.ndarray`): waveform of shape `(samples,)`, floats in [-1, 1].
        rate (`int`): its rate in Hz; Opus knows 8,000, 12,000, 16,000, 24,000 and 48,000.
        coding (`str`): `"mp3"` or `"opus"`.
        compression (`float`, *optional*, defaults to 0.9): from 0, the finest, to 0.99, at which either takes about
            12 kbit/s; Opus takes 35 at 0.9.

    Raises:
        ValueError: If the coding is unknown or does not know the rate, or the compression is out of range.
    """
    if coding not in CODINGS:
        raise ValueError(f"`coding` is {coding!r}; use one of {list(CODINGS)}")
    if coding == "opus" and rate not in OPUS_RATES:
        raise ValueError(f"`rate` is {rate} Hz; Opus knows {OPUS_RATES}")
    if not 0 <= compression <= 0.99:
        raise ValueError(f"`compression` is {compression}; it must be from 0 to 0.99")
    kind, subtype = CODINGS[coding]
    # Of MP3's modes this is the one that takes its own delay off again.
    mode = {"bitrate_mode": "VARIABLE"} if coding == "mp3" else {}
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype, compression_level=compression, **mode)
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float32")
    return np.pad(decoded[: len(samples)], (0, max(len(samples) - len(decoded), 0)))


def pad_silence(samples: np.ndarray, rate: int, before: float, after: float) -> np.ndarray:
    """Return a waveform with seconds of digital silence before and after it."""
    return np.pad(samples, (int(before * rate), int(after * rate))).astype(np.float32)


def splice(words: Sequence[np.ndarray], rate: int, gap: float) -> np.ndarray:
    """Return recordings one after the other with `gap` seconds of silence between them.

    Raises:
        ValueError: If there is none.
    """
    if not words:
        raise ValueError("`words` is empty: there is nothing to splice")
    between = np.zeros(int(gap * rate), np.float32)
    pieces = [piece for word in words for piece in (word, between)][:-1]
    return np.concatenate(pieces).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- all of it by lot


@dataclass(frozen=True)
class Recording:
    """
    How often each thing happens to an utterance on its way to the model; each is drawn by itself.

    Args:
        silence (`float`, *optional*, defaults to 0.7): silence before (up to 0.6 s) and after (up to 0.8 s).
        room (`float`, *optional*, defaults to 0.4): reverberation of 0.1 to 0.8 s.
        noise (`float`, *optional*, defaults to 0.6): white to brown noise, hum, babble or music, 5 to 30 dB below.
        microphone (`float`, *optional*, defaults to 0.5): a color of its own.
        band (`float`, *optional*, defaults to 0.2): a telephone's band or a cheap microphone's.
        clipping (`float`, *optional*, defaults to 0.08): up to 3 % of the samples cut.
        coding (`float`, *optional*, defaults to 0.2): MP3 or Opus.
        level (`tuple[float, float]`, *optional*, defaults to (-38, -12)): the root mean square in the end, in dB below
            full scale.
    """

    silence: float = 0.7
    room: float = 0.4
    noise: float = 0.6
    microphone: float = 0.5
    band: float = 0.2
    clipping: float = 0.08
    coding: float = 0.2
    level: tuple[float, float] = (-38.0, -12.0)


def record(
    samples: np.ndarray,
    rate: int,
    rng: np.random.Generator,
    recording: Recording | None = None,
    others: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """
    Return speech as if somebody had recorded it somewhere, in the order in which it happens there: silence around it,
    room, noise, microphone, band, overdrive, level, coding.

    Args:
        samples (`np.ndarray`): clean speech of shape `(samples,)`.
        rate (`int`): its rate in Hz.
        rng (`np.random.Generator`): the source of chance.
        recording (`Recording`, *optional*, defaults to `Recording()`): how often each thing happens.
        others (`Sequence[np.ndarray]`, *optional*): other speech, for babble; without it there is none.

    Returns:
        `np.ndarray`: float32 in [-1, 1], longer by the silence.
    """
    options = recording or Recording()
    wave = np.asarray(samples, dtype=np.float32)
    if rng.random() < options.silence:
        wave = pad_silence(wave, rate, rng.uniform(0, 0.6), rng.uniform(0, 0.8))
    if rng.random() < options.room:
        wave = reverberate(wave, room_response(rate, rng))
    if rng.random() < options.noise:
        wave = add_noise(wave, _background(len(wave), rate, rng, others), rng.uniform(5, 30))
    if rng.random() < options.microphone:
        wave = color(wave, rate, rng)
    if rng.random() < options.band:
        telephone = rng.random() < 0.5
        low, high = (300, 3_400) if telephone else (rng.uniform(60, 250), rng.uniform(3_500, 7_500))
        wave = band_limit(wave, rate, low, high)
    if rng.random() < options.clipping:
        wave = clip(wave, rng.uniform(0.001, 0.03))
    wave = wave * (10 ** (rng.uniform(*options.level) / 20) / max(rms(wave), 1e-9))
    wave = np.clip(wave, -1.0, 1.0).astype(np.float32)
    if rng.random() < options.coding:
        opus = rng.random() < 0.5
        wave = transcode(wave, rate, "opus" if opus else "mp3", rng.uniform(0.85 if opus else 0.3, 0.99))
    return np.clip(wave, -1.0, 1.0).astype(np.float32)


def _background(length: int, rate: int, rng: np.random.Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    draw = rng.random()
    if draw < 0.1:
        return hum(length, rate, rng)
    if draw < 0.2:
        return music(length, rate, rng)
    if draw < 0.4 and len(others):
        return babble(length, others, rng)
    return colored_noise(length, rng.uniform(0, 2), rng)


def splice_at_random(
    words: Mapping[str, np.ndarray], texts: Sequence[str], rate: int, rng: np.random.Generator
) -> tuple[str, np.ndarray]:
    """
    Return something said word by word: one of `texts`, spliced of single words with gaps of up to 0.25 s.

    Args:
        words (`Mapping[str, np.ndarray]`): recordings of single words by one voice, each of shape `(samples,)`.
        texts (`Sequence[str]`): what may be said; those with a word that is not there are passed over.
        rate (`int`): sampling rate in Hz.
        rng (`np.random.Generator`): the source of chance.

    Raises:
        ValueError: If there is no text whose words are all there.
    """
    possible = [text for text in texts if all(word in words for word in text.split())]
    if not possible:
        raise ValueError(f"none of {len(texts)} `texts` is made of the {len(words)} `words` alone")
    text = possible[int(rng.integers(len(possible)))]
    # The gaps of one speaker are alike; what a word is left with at its ends is a gap, too.
    return text, splice([words[word] for word in text.split()], rate, float(rng.uniform(0.0, 0.25)))
