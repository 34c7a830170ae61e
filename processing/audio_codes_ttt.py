"""Waveforms to audio codes and back with any Transformers audio codec, in batches where that changes nothing.

Codes are one stream here, whatever the number of codebooks (see codebooks_ttt.py). An audio tokenizer whose rows do not
depend on their neighbours in a padded batch says so with `batch_invariant = True`; it then takes `padding_mask` and
returns `audio_codes_mask` when it encodes, and takes `audio_codes_mask` and returns `audio_lengths` (samples of each
row) when it decodes. Every other one meets no padding: it encodes waveforms one by one and decodes sequences of equal
length together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .codebooks_ttt import TttAudioFormat, flatten_codes, unflatten_codes


def execution_device(audio_tokenizer: Any) -> torch.device:
    """Return where an audio tokenizer computes, also while accelerate keeps its weights on the CPU or on disk."""
    device = audio_tokenizer.device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in audio_tokenizer.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(place) for place in places if place is not None), device)


def encode_waveforms(
    audio_tokenizer: Any,
    feature_extractor: Any,
    waveforms: Sequence[np.ndarray],
    batch_size: int,
    names: Sequence[str] | None = None,
) -> list[torch.Tensor]:
    """
    Turn waveforms into flat codes.

    Args:
        audio_tokenizer (`PreTrainedModel`): any Transformers codec with `encode`.
        feature_extractor (`FeatureExtractionMixin`): prepares waveforms for it.
        waveforms (`Sequence[np.ndarray]`, each of shape `(samples,)`): at the feature extractor's rate.
        batch_size (`int`): waveforms encoded at once.
        names (`Sequence[str]`, *optional*): how errors call them; "audio 0" and so on.

    Returns:
        `list[torch.Tensor]`, each of shape `(codes,)`, long, on the CPU.

    Raises:
        ValueError: if a waveform is too short for a single code, or the codes' shape is not (batch, codebooks, frames)
            with the codebooks of the configuration.
    """
    audio_format = TttAudioFormat.from_config(audio_tokenizer.config)
    accepted = inspect.signature(audio_tokenizer.encode).parameters
    size = batch_size if getattr(audio_tokenizer, "batch_invariant", False) else 1
    device = execution_device(audio_tokenizer)
    codes: list[torch.Tensor] = []
    for start in range(0, len(waveforms), size):
        features = feature_extractor(
            list(waveforms[start : start + size]),
            sampling_rate=feature_extractor.sampling_rate,
            padding=True,
            return_tensors="pt",
        ).to(device, audio_tokenizer.dtype)
        with torch.no_grad():
            output = audio_tokenizer.encode(**{name: value for name, value in features.items() if name in accepted})
        batch = output.audio_codes.cpu()
        if batch.ndim == 4 and len(batch) == 1:
            batch = batch[0]  # EnCodec's chunks, of which a format that is accepted has one
        batch = batch[:, None] if batch.ndim == 2 else batch  # (batch, codebooks, frames)
        if batch.ndim != 3 or batch.shape[1] != audio_format.num_codebooks:
            raise ValueError(
                f"{type(audio_tokenizer).__name__} gives codes of shape {tuple(batch.shape)}; expected (batch, "
                f"{audio_format.num_codebooks} codebooks, frames), as its configuration says."
            )
        mask = getattr(output, "audio_codes_mask", None)
        masks = torch.ones_like(batch[:, 0]) if mask is None else mask.cpu().reshape(len(batch), -1)
        for frames, kept in zip(batch, masks.bool(), strict=True):
            if not kept.any():
                position = len(codes)
                raise ValueError(
                    f"{names[position] if names else f'audio {position}'} ({len(waveforms[position])} samples) is too "
                    f"short: {type(audio_tokenizer).__name__} has no code for it. Leave it out, or pad it with silence."
                )
            codes.append(flatten_codes(frames[:, kept], audio_format.codebook_size))
    return codes


def decode_frames(audio_tokenizer: Any, codes: torch.Tensor, **options: Any) -> Any:
    """
    Call an audio tokenizer's `decode`, whatever form it has.

    Args:
        audio_tokenizer (`PreTrainedModel`): any Transformers codec with `decode`.
        codes (`torch.Tensor` of shape `(batch, codebooks, frames)`): long, on its device.
        options (`dict`, *optional*): passed on.

    Returns:
        `ModelOutput`: its output, with `audio_values`.
    """
    if "audio_scales" in inspect.signature(audio_tokenizer.decode).parameters:  # EnCodec: one chunk, not scaled
        return audio_tokenizer.decode(codes[None], audio_scales=[None], **options)
    return audio_tokenizer.decode(audio_codes=codes, **options)


def decode_codes(audio_tokenizer: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> list[np.ndarray]:
    """
    Turn flat codes into waveforms; less than one frame gives an empty one. Streams that a model generated may hold
    codes at another codebook's position: see `unflatten_codes`.

    Args:
        audio_tokenizer (`PreTrainedModel`): any Transformers codec with `decode`.
        sequences (`Sequence[Sequence[int]]`, each of shape `(codes,)`): flat codes.
        batch_size (`int`): sequences decoded at once.

    Returns:
        `list[np.ndarray]`, each of shape `(samples,)`, float32.
    """
    audio_format = TttAudioFormat.from_config(audio_tokenizer.config)
    frames = [unflatten_codes(row, audio_format.num_codebooks, audio_format.codebook_size) for row in sequences]
    waveforms = [np.zeros(0, dtype=np.float32) for _ in sequences]
    padded = getattr(audio_tokenizer, "batch_invariant", False)
    device = execution_device(audio_tokenizer)
    for indices in _batches([row.shape[1] for row in frames], batch_size, padded):
        lengths = [frames[index].shape[1] for index in indices]
        codes = torch.zeros((len(indices), audio_format.num_codebooks, max(lengths)), dtype=torch.long)
        mask = torch.zeros((len(indices), max(lengths)), dtype=torch.long)
        for row, index in enumerate(indices):
            codes[row, :, : lengths[row]] = frames[index]
            mask[row, : lengths[row]] = 1
        options = {"audio_codes_mask": mask.to(device)} if padded else {}
        with torch.no_grad():
            output = decode_frames(audio_tokenizer, codes.to(device), **options)
        values = output.audio_values.reshape(len(indices), -1).float().cpu().numpy()  # (batch, samples)
        samples = output.audio_lengths.tolist() if padded else [values.shape[1]] * len(indices)
        for row, index in enumerate(indices):
            waveforms[index] = values[row, : samples[row]].copy()
    return waveforms


def _batches(lengths: Sequence[int], batch_size: int, mixed: bool) -> Iterator[list[int]]:
    """Yield positions of the rows that are decoded together, empty ones left out; unless `mixed`, of equal length."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            groups.setdefault(0 if mixed else length, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
