"""Batches of waveforms for the audio tokenizer of ttt-tiny, clean and as if recorded elsewhere."""

import random

import numpy as np
import torch
from torch.nn import functional as F


def pad(waves: list[np.ndarray], multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int16 waveforms as floats (batch, samples), padded to a multiple of `multiple`, and their lengths."""
    length = -(-max(map(len, waves)) // multiple) * multiple
    batch = torch.zeros(len(waves), length)
    for row, wave in enumerate(waves):
        batch[row, : len(wave)] = torch.from_numpy(wave.astype(np.float32) / 32767)
    return batch, torch.tensor([len(wave) for wave in waves])


def augment(waves: torch.Tensor) -> torch.Tensor:
    """Apply random gain, spectral tilt, equaliser and noise to (batch, samples)."""
    batch = len(waves)
    tilt = torch.empty(batch, 1).uniform_(-0.6, 0.6)
    out = waves + tilt * F.pad(waves, (1, 0))[:, :-1]
    echo = torch.empty(batch, 1).uniform_(-0.4, 0.4)
    delay = random.randrange(4, 40)
    out = out + echo * F.pad(out, (delay, 0))[:, :-delay]
    level = out.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-4)
    noise = torch.randn_like(out)
    noise = noise + torch.empty(batch, 1).uniform_(-0.95, 0.95) * F.pad(noise, (1, 0))[:, :-1]
    out = out + noise * level * 10 ** (-torch.empty(batch, 1).uniform_(15, 50) / 20)
    return out * 10 ** (torch.empty(batch, 1).uniform_(-15, 6) / 20)
