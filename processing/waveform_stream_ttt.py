"""Frames of codes to waveform as they come, for audio tokenizers with and without a streaming decoder of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from transformers.models.dac.modeling_dac import Snake1d

from .audio_codes_ttt import decode_frames, execution_device
from .codebooks_ttt import TttAudioFormat, unflatten_codes

# Layers that treat every sample alone. `Snake1d` is also the activation of the codecs that build on DAC.
POINTWISE = (nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, Snake1d)


@runtime_checkable
class StreamingDecoder(Protocol):
    """
    Codes to waveform as they come: what an audio tokenizer's `streaming_decoder()` returns.

    What the pieces join to does not depend on how the codes are split between calls. Whether it is what `decode` gives
    for all codes at once is up to the audio tokenizer.

    A decoder may also have a static method `push_together(decoders, audio_codes, is_last)`, which takes the next codes
    of several streams in one pass, ends those that `is_last` says and returns the samples of each. Where it fails, no
    stream has taken anything.
    """

    def push(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """Take codes of shape `(1, codebooks, frames)`; return the samples that became final, `(samples,)`, or none."""
        ...

    def flush(self) -> torch.Tensor:
        """End the stream: return the rest of the waveform, `(samples,)`, and start afresh."""
        ...


class BoundedContextDecoder:
    """
    The [`StreamingDecoder`] of an audio tokenizer that has none of its own. The pieces join to what `decode` gives.

    `decoder_context` tells which frames a sample can depend on. New frames are decoded together with those, and the
    samples that can no longer change are returned; memory stays bounded, since older frames are dropped. A causal
    decoder sees everything before, so that each piece decodes the answer anew up to there; where everything after
    counts too, all is decoded at the end.

    Args:
        audio_tokenizer: any Transformers codec with `decode`.
    """

    def __init__(self, audio_tokenizer: Any):
        self.audio_tokenizer = audio_tokenizer
        audio_format = TttAudioFormat.from_config(audio_tokenizer.config)
        self.samples = audio_format.samples_per_frame
        self.left, self.right = (None, None) if self.samples is None else decoder_context(audio_tokenizer)
        self.frames = torch.zeros(
            1, audio_format.num_codebooks, 0, dtype=torch.long
        )  # context, then what is not spoken
        self.num_context = 0  # how many leading ones of `frames` have been spoken

    def push(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """Take codes of shape `(1, codebooks, frames)`; return the samples that became final, `(samples,)`, or none."""
        self.frames = torch.cat([self.frames, audio_codes.to(self.frames)], -1)
        end = self.frames.shape[-1] - (self.right or 0)
        if self.samples is None or self.right is None or end <= self.num_context:
            return torch.zeros(0)
        waveform = self._decode()[self.num_context * self.samples : end * self.samples]
        dropped = 0 if self.left is None else max(end - self.left, 0)
        self.frames, self.num_context = self.frames[..., dropped:], end - dropped
        return waveform

    def flush(self) -> torch.Tensor:
        """End the stream: return the rest of the waveform, `(samples,)`, and start afresh."""
        rest = torch.zeros(0)
        if self.frames.shape[-1] > self.num_context:
            rest = self._decode()[self.num_context * (self.samples or 0) :]
        self.frames, self.num_context = self.frames[..., :0], 0
        return rest

    @torch.no_grad()
    def _decode(self) -> torch.Tensor:
        codes = self.frames.to(execution_device(self.audio_tokenizer))
        return decode_frames(self.audio_tokenizer, codes).audio_values.reshape(-1)


class WaveformStream:
    """
    Flat codes to waveform as they come.

    Args:
        audio_tokenizer: any Transformers codec with `decode`. One with a method `streaming_decoder()` that returns a
            [`StreamingDecoder`] is streamed by it, any other, or one that returns None, by [`BoundedContextDecoder`].

    Raises:
        TypeError: what `streaming_decoder()` returns is no [`StreamingDecoder`].
    """

    def __init__(self, audio_tokenizer: Any):
        self.format = TttAudioFormat.from_config(audio_tokenizer.config)
        self.device = execution_device(audio_tokenizer)
        make_decoder = getattr(audio_tokenizer, "streaming_decoder", None)
        decoder = None if make_decoder is None else make_decoder()
        self.decoder = BoundedContextDecoder(audio_tokenizer) if decoder is None else decoder
        if not isinstance(self.decoder, StreamingDecoder):
            raise TypeError(
                f"`{type(audio_tokenizer).__name__}.streaming_decoder()` returned a {type(self.decoder).__name__}, "
                "which lacks `push` or `flush`: see StreamingDecoder."
            )
        self.last_frame: torch.Tensor | None = None

    @property
    def can_join(self) -> bool:
        """Whether it may share a pass of the audio tokenizer with other streams: see `push_together`."""
        return hasattr(self.decoder, "push_together")

    @torch.no_grad()
    def push(self, codes: Sequence[int]) -> np.ndarray:
        """Take the flat codes of whole frames; return the waveform that became final, `(samples,)`, or none."""
        if not len(codes):
            return np.zeros(0, dtype=np.float32)
        frames = self._frames(codes)
        self.last_frame = frames[:, -1:]
        return _to_numpy(self.decoder.push(frames[None]))

    @torch.no_grad()
    def flush(self) -> np.ndarray:
        """End the stream: return the rest of the waveform, `(samples,)`, and start afresh."""
        self.last_frame = None
        return _to_numpy(self.decoder.flush())

    def _frames(self, codes: Sequence[int]) -> torch.Tensor:
        """Flat codes as frames, (codebooks, frames)."""
        books, size = self.format.num_codebooks, self.format.codebook_size
        return unflatten_codes(codes, books, size, self.last_frame).to(self.device)


@torch.no_grad()
def push_together(
    streams: Sequence[WaveformStream], codes: Sequence[Sequence[int]], is_last: Sequence[bool]
) -> list[np.ndarray]:
    """
    Take the next codes of several streams of one audio tokenizer, in one pass of it where they can join.

    Args:
        streams (`Sequence[WaveformStream]`): none of them twice.
        codes (`Sequence[Sequence[int]]`): of each, the flat codes of whole frames, or none.
        is_last (`Sequence[bool]`): whether the stream ends with them, as by `flush`.

    Returns:
        `list[np.ndarray]`: of each, the waveform that became final, `(samples,)`, or none.
    """
    if not all(stream.can_join for stream in streams):
        pairs = [
            (stream.push(new), stream.flush() if last else None)
            for stream, new, last in zip(streams, codes, is_last, strict=True)
        ]
        return [first if rest is None else np.concatenate([first, rest]) for first, rest in pairs]
    frames = [stream._frames(new) for stream, new in zip(streams, codes, strict=True)]
    decoders = [stream.decoder for stream in streams]
    waveforms = type(decoders[0]).push_together(decoders, [each[None] for each in frames], is_last) if decoders else []
    for stream, each, last in zip(streams, frames, is_last, strict=True):
        if last:
            stream.last_frame = None
        elif each.shape[1]:
            stream.last_frame = each[:, -1:]
    return [_to_numpy(waveform) for waveform in waveforms]


def decoder_context(audio_tokenizer: Any) -> tuple[int | None, int | None]:
    """
    Return how many frames before and after a frame its samples can depend on.

    A configuration may say so itself (`decoder_context_codes`, on either side). One with `use_causal_conv` (Mimi) means
    a causal decoder: everything before, nothing after. Otherwise the context is counted where `decoder` holds nothing
    but 1-D convolutions, in the order in which they are applied, and layers that treat every sample alone (DAC).

    Returns:
        `tuple[int | None, int | None]`: before and after; `None` for all there are.
    """
    config = audio_tokenizer.config
    if hasattr(config, "decoder_context_codes"):
        return config.decoder_context_codes, config.decoder_context_codes
    if getattr(config, "use_causal_conv", False):
        # EnCodec mirrors its input at the start instead of padding it: the first frames depend on as many after.
        return None, config.kernel_size - 1 if getattr(config, "pad_mode", None) == "reflect" else 0
    decoder = getattr(audio_tokenizer, "decoder", None)
    if not isinstance(decoder, nn.Module):
        return None, None
    reach, rate = 0.0, 1  # frames; steps of the current layer in a frame
    for layer in decoder.modules():
        if isinstance(layer, nn.ConvTranspose1d):
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
            reach += max(padding, layer.dilation[0] * (kernel - 1) - padding) / stride / rate
            rate *= stride
        elif isinstance(layer, nn.Conv1d) and layer.stride[0] == 1 and not isinstance(layer.padding, str):
            span, padding = layer.dilation[0] * (layer.kernel_size[0] - 1), int(layer.padding[0])
            reach += max(padding, span - padding) / rate
        elif not isinstance(layer, POINTWISE) and not list(layer.children()):
            return None, None
    return math.ceil(reach), math.ceil(reach)


def _to_numpy(waveform: torch.Tensor) -> np.ndarray:
    return waveform.reshape(-1).float().cpu().numpy()
