"""Frames of codes to waveform as they come, for audio tokenizers with and without a streaming decoder of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.dac.modeling_dac import Snake1d

from .codebooks_ttt import TttAudioFormat, unflatten_codes

# Layers that treat every sample alone. `Snake1d` is also the activation of the codecs that build on DAC.
POINTWISE = (nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, Snake1d)


class WaveformStream:
    """Decodes frames as they come. In 2. and 3. the pieces joined are the waveform of all frames decoded at once.

    1. An audio tokenizer with a method `streaming_decoder()` is left to it: an object whose `push` takes codes (1,
       codebooks, frames) and returns the samples that became final, and whose `flush` returns the rest. Whether they
       join to what `decode` gives is up to it.
    2. Of one whose decoder is convolutional or causal, `decoder_context` tells what a frame's samples depend on.
       New frames are decoded together with that context, and the samples that can no longer change are returned. A
       causal decoder sees everything before, so each piece decodes the answer anew up to there.
    3. Any other is decoded once, at the end.

    Args:
        audio_tokenizer: any Transformers codec with `decode`.
    """

    def __init__(self, audio_tokenizer: Any):
        self.audio_tokenizer = audio_tokenizer
        self.format = TttAudioFormat.from_config(audio_tokenizer.config)
        make_decoder = getattr(audio_tokenizer, "streaming_decoder", None)
        self.decoder = None if make_decoder is None else make_decoder()
        whole = self.format.samples_per_frame is None
        self.left, self.right = (None, None) if whole else decoder_context(audio_tokenizer)
        self.frames = torch.zeros(self.format.num_codebooks, 0, dtype=torch.long)  # context, then what is not spoken
        self.num_context = 0  # how many leading ones of `frames` have been spoken
        self.last_frame: torch.Tensor | None = None

    @torch.no_grad()
    def push(self, codes: Sequence[int]) -> np.ndarray:
        """Takes the flat codes of whole frames; returns the waveform (samples,) that became final, possibly empty."""
        if not len(codes):
            return np.zeros(0, dtype=np.float32)
        new = unflatten_codes(codes, self.format.num_codebooks, self.format.codebook_size, self.last_frame)
        self.last_frame = new[:, -1:]
        if self.decoder is not None:
            return _to_numpy(self.decoder.push(new[None].to(self.audio_tokenizer.device)))
        self.frames = torch.cat([self.frames, new], 1)
        samples = self.format.samples_per_frame
        if samples is None or self.right is None or self.frames.shape[1] - self.right <= self.num_context:
            return np.zeros(0, dtype=np.float32)
        end = self.frames.shape[1] - self.right
        waveform = self._decode()[self.num_context * samples : end * samples]
        dropped = 0 if self.left is None else max(end - self.left, 0)
        self.frames, self.num_context = self.frames[:, dropped:], end - dropped
        return waveform

    @torch.no_grad()
    def flush(self) -> np.ndarray:
        """Ends the stream; returns the rest of the waveform, (samples,)."""
        if self.decoder is not None:
            return _to_numpy(self.decoder.flush())
        if self.frames.shape[1] == self.num_context:
            return np.zeros(0, dtype=np.float32)
        return self._decode()[self.num_context * (self.format.samples_per_frame or 0) :]

    def _decode(self) -> np.ndarray:
        codes = self.frames[None].to(self.audio_tokenizer.device)  # (1, codebooks, frames)
        return _to_numpy(self.audio_tokenizer.decode(audio_codes=codes).audio_values)


def decoder_context(audio_tokenizer: Any) -> tuple[int | None, int | None]:
    """How many frames before and after a frame its samples can depend on.

    A configuration with `use_causal_conv` (Mimi) means a causal decoder: everything before, nothing after. Otherwise
    the context is counted where `decoder` holds nothing but 1-D convolutions, in the order in which they are applied,
    and layers that treat every sample alone (DAC).

    Returns:
        (before, after); None for all there are.
    """
    if getattr(audio_tokenizer.config, "use_causal_conv", False):
        return None, 0
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
