"""Batches of waveforms for the audio tokenizer of ttt-tiny, clean and as if recorded elsewhere.

`augment` is augmentation.py's chain for a whole batch at once, in the frequency domain and without lossy coding: fast
enough to be drawn anew at every training step.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch.nn import functional as F


def pad(
    waves: Sequence[np.ndarray], multiple: int, before: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return int16 waveforms as floats (batch, samples), padded to a multiple of `multiple`, and their lengths (batch,).

    Args:
        waves (`Sequence[np.ndarray]`): int16 waveforms, each of shape `(samples,)`.
        multiple (`int`): what the batch's length is a multiple of, in samples.
        before (`Sequence[int]`, *optional*): samples of silence to put before each; they count in its length.
    """
    starts = [0] * len(waves) if before is None else list(before)
    lengths = [start + len(wave) for start, wave in zip(starts, waves, strict=True)]
    batch = torch.zeros(len(waves), -(-max(lengths) // multiple) * multiple)
    for row, (start, wave) in enumerate(zip(starts, waves, strict=True)):
        batch[row, start : start + len(wave)] = torch.from_numpy(wave.astype(np.float32) / 32767)
    return batch, torch.tensor(lengths)


def _uniform(count: int, low: float, high: float) -> torch.Tensor:
    return torch.empty(count, 1).uniform_(low, high)


def _rms(waves: torch.Tensor) -> torch.Tensor:
    return waves.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


def room_spectra(batch: int, n_fft: int, rate: int) -> torch.Tensor:
    """
    Return the spectra of simulated rooms: a direct sound of 1 and noise that decays by 60 dB in 0.1 to 0.8 s, 4 to
    15 dB weaker in all; complex, of shape `(batch, n_fft // 2 + 1)`.
    """
    time = torch.arange(1, min(int(0.8 * rate), n_fft)) / rate
    tail = torch.randn(batch, len(time)) * 10 ** (-3 * time / _uniform(batch, 0.1, 0.8))
    tail = tail * (time / 0.02).clamp(max=1.0)  # the first reflections come one by one
    tail = tail * 10 ** (-_uniform(batch, 4, 15) / 20) / tail.square().sum(-1, keepdim=True).sqrt()
    return torch.fft.rfft(F.pad(tail, (1, 0)), n_fft) + 1.0


def colors(batch: int, frequency: torch.Tensor, decibels: float = 8.0, points: int = 8) -> torch.Tensor:
    """Return smooth gains over frequency, of up to +-`decibels`: (batch, frequencies)."""
    place = (frequency.clamp(min=60) / 60).log() / (frequency[-1] / 60).log() * (points - 1)
    left = place.long().clamp(max=points - 2)
    gains = torch.empty(batch, points).uniform_(-decibels, decibels)
    weight = place - left
    return 10 ** ((gains[:, left] * (1 - weight) + gains[:, left + 1] * weight) / 20)


def bands(batch: int, frequency: torch.Tensor) -> torch.Tensor:
    """Return the gains of telephones and of cheap microphones (4th order, no phase): (batch, frequencies)."""
    telephone = torch.rand(batch, 1) < 0.5
    low = torch.where(telephone, torch.tensor(300.0), _uniform(batch, 60, 250))
    high = torch.where(telephone, torch.tensor(3_400.0), _uniform(batch, 3_500, 7_500))
    frequency = frequency.clamp(min=1.0)
    return (1 + (low / frequency) ** 8).rsqrt() * (1 + (frequency / high) ** 8).rsqrt()


def backgrounds(spectra: torch.Tensor) -> torch.Tensor:
    """
    Return the spectra of noises, white to brown, and in a fifth of the rows of other rows' babble, scaled to a mean
    square of 1: complex, as `spectra`.

    Args:
        spectra (`torch.Tensor` of shape `(batch, n_fft // 2 + 1)`): the speech that babble is made of.
    """
    batch, bins = spectra.shape
    place = torch.arange(bins).clamp(min=1).float()
    noise = torch.randn(batch, bins, 2) * (place ** (-_uniform(batch, 0, 2) / 2))[..., None]
    voices = torch.zeros_like(spectra)
    for _ in range(4):
        turned = torch.polar(torch.ones(bins), -2 * math.pi * place * float(torch.rand(())) * 10_000 / bins)
        voices = voices + spectra[torch.randperm(batch)] * turned
    mixed = torch.where(torch.rand(batch, 1) < 0.2, voices, torch.view_as_complex(noise))
    return mixed / mixed.abs().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


def augment(waves: torch.Tensor, rate: int, clean_share: float = 0.2) -> torch.Tensor:
    """
    Return waveforms as if somebody had recorded them somewhere, as long as they were: room, noise, microphone, band,
    overdrive and level, each drawn by itself and as often as `augmentation.Recording` has it.

    Args:
        waves (`torch.Tensor` of shape `(batch, samples)`): clean speech, zero where a row has ended.
        rate (`int`): its rate in Hz.
        clean_share (`float`, *optional*, defaults to 0.2): rows in which nothing but the level changes.
    """
    batch, samples = waves.shape
    n_fft = next_fast_len(samples + int(0.2 * rate), real=True)
    frequency = torch.fft.rfftfreq(n_fft, 1 / rate)
    changed = torch.rand(batch, 1) >= clean_share

    def drawn(share: float) -> torch.Tensor:
        return changed & (torch.rand(batch, 1) < share)

    def now_and_then(share: float, gain: torch.Tensor) -> torch.Tensor:
        return torch.where(drawn(share), gain, torch.ones_like(gain))

    spectra = torch.fft.rfft(waves, n_fft)
    loud = waves.abs() > 0.03 * waves.abs().amax(-1, keepdim=True)
    level = ((waves.square() * loud).sum(-1, keepdim=True) / loud.sum(-1, keepdim=True).clamp(min=1)).sqrt()
    level = level * 10 ** (-_uniform(batch, 5, 30) / 20) * drawn(0.6)
    # A signal of mean square 1 has a spectrum whose squared magnitudes average n_fft.
    rooms = room_spectra(min(batch, 6), n_fft, rate)  # a few for all rows: their spectra cost more than the rest
    spectra = spectra * now_and_then(0.4, rooms[torch.randint(len(rooms), (batch,))])
    spectra = spectra + backgrounds(spectra) * level * n_fft**0.5
    line = now_and_then(0.5, colors(batch, frequency)) * now_and_then(0.2, bands(batch, frequency))
    out = torch.fft.irfft(spectra * line, n_fft)[:, :samples]
    limit = torch.stack([torch.quantile(row, random.uniform(0.97, 0.999)) for row in out.abs()[:, ::16]])[:, None]
    out = torch.where(drawn(0.08) & (limit > 0), out.clamp(-limit, limit), out)
    out = out * 10 ** (_uniform(batch, -38, -12) / 20) / _rms(out)
    return out.clamp(-1.0, 1.0)
