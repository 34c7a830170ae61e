"""Waveforms to audio codes and back with any audio tokenizer of one codebook, in batches where it can."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def encode_waveforms(
    audio_tokenizer: Any, feature_extractor: Any, waveforms: Sequence[np.ndarray], batch_size: int
) -> list[torch.Tensor]:
    """Waveforms (samples,) at the feature extractor's rate to codes (codes,), long, on the CPU.

    Audio tokenizers that take no `padding_mask` or return no `audio_codes_mask` get one waveform at a time.

    Raises:
        ValueError: the audio tokenizer has more than one codebook.
    """
    codes: list[torch.Tensor] = []
    masked = "padding_mask" in inspect.signature(audio_tokenizer.encode).parameters
    start = 0
    while start < len(waveforms):
        size = batch_size if masked else 1
        features = feature_extractor(
            list(waveforms[start : start + size]),
            sampling_rate=feature_extractor.sampling_rate,
            padding=True,
            return_tensors="pt",
        ).to(audio_tokenizer.device)
        with torch.no_grad():
            output = audio_tokenizer.encode(**features)
        batch = output.audio_codes.cpu()  # (batch, codebooks, codes) or (batch, codes)
        if batch.ndim == 3 and batch.shape[1] != 1:
            raise ValueError(f"TtT needs an audio tokenizer of one codebook, this one has {batch.shape[1]}.")
        batch = batch.reshape(len(batch), -1)
        mask = getattr(output, "audio_codes_mask", None)
        if mask is None and len(batch) > 1:
            masked = False
            continue
        codes += list(batch) if mask is None else [row[m.bool()] for row, m in zip(batch, mask.cpu(), strict=True)]
        start += len(batch)
    return codes


def decode_codes(audio_tokenizer: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> list[np.ndarray]:
    """Codes to waveforms (samples,), float32; an empty sequence gives an empty waveform.

    Audio tokenizers whose `decode` takes no `audio_codes_mask` get one sequence at a time.
    """
    waveforms = [np.zeros(0, dtype=np.float32) for _ in sequences]
    spoken = [index for index, codes in enumerate(sequences) if len(codes) > 0]
    masked = "audio_codes_mask" in inspect.signature(audio_tokenizer.decode).parameters
    size = batch_size if masked else 1
    for start in range(0, len(spoken), size):
        indices = spoken[start : start + size]
        lengths = [len(sequences[index]) for index in indices]
        codes = torch.zeros((len(indices), 1, max(lengths)), dtype=torch.long)
        mask = torch.zeros((len(indices), max(lengths)), dtype=torch.long)
        for row, index in enumerate(indices):
            codes[row, 0, : lengths[row]] = torch.tensor(sequences[index])
            mask[row, : lengths[row]] = 1
        options = {"audio_codes_mask": mask.to(audio_tokenizer.device)} if masked else {}
        with torch.no_grad():
            values = audio_tokenizer.decode(audio_codes=codes.to(audio_tokenizer.device), **options).audio_values
        values = values.reshape(len(indices), -1).float().cpu().numpy()  # (batch, samples)
        samples_per_code = values.shape[-1] // max(lengths)
        for row, index in enumerate(indices):
            waveforms[index] = values[row, : lengths[row] * samples_per_code].copy()
    return waveforms
