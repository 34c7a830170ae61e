"""What an audio tokenizer's codes are, and codes of several codebooks as one stream and back, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

# As published: spans of 26 codes between the chunks of text, at 12.5 codes a second.
PUBLISHED_CHUNK_SIZE = 26
PUBLISHED_FRAME_RATE = 12.5


@dataclass(frozen=True)
class TttAudioFormat:
    """
    How an audio tokenizer writes sound: `frame_rate` frames a second, each one code of every codebook.

    TtT knows one stream of codes, so frames are written one after the other and codebook k's code c becomes
    `k * codebook_size + c`: a stream tells which codebook each of its codes is of, and the vocabulary needs
    `num_codes` tokens.

    Args:
        num_codebooks (`int`): codes of one frame.
        codebook_size (`int`): codes of one codebook.
        frame_rate (`float`, *optional*): frames a second; `None` where the configuration does not tell.
        sampling_rate (`int`, *optional*): of the waveforms that go in, Hz.
        output_sampling_rate (`int`, *optional*): of the waveforms that come out, Hz.
    """

    num_codebooks: int
    codebook_size: int
    frame_rate: float | None
    sampling_rate: int | None
    output_sampling_rate: int | None

    @classmethod
    def from_config(cls, config: Any) -> TttAudioFormat:
        """
        Read the configuration of any Transformers audio codec; they do not agree on names.

        Raises:
            ValueError: if it names no codebook size, as that of a tokenizer without codes, or is of an EnCodec that
                writes more than codes.
        """
        size = getattr(config, "codebook_size", None)
        if size is None and getattr(config, "quantization_levels", None):
            size = math.prod(config.quantization_levels)
        if size is None:
            raise ValueError(
                f"{type(config).__name__} has no `codebook_size`: TtT needs an audio tokenizer with discrete codes."
            )
        books = _first(config, "num_codebooks", "num_quantizers", "n_codebooks") or 1
        if getattr(config, "model_type", None) == "encodec":
            if config.normalize or config.chunk_length_s is not None or config.audio_channels != 1:
                raise ValueError(
                    "An EnCodec that normalises, cuts into chunks or is stereo (48 kHz) has scales beside its codes, "
                    "which tokens cannot hold. Use one like `facebook/encodec_24khz`."
                )
            bits_per_second = config.codebook_nbits * config.frame_rate
            books = max(1, int(1000 * config.target_bandwidths[0] // bits_per_second))  # what `encode` does unasked
        sampling_rate = _first(config, "sampling_rate", "input_sampling_rate")
        output_rate = getattr(config, "output_sampling_rate", None) or sampling_rate
        frame_rate, hop = getattr(config, "frame_rate", None), getattr(config, "hop_length", None)
        if hop and output_rate and (frame_rate is None or frame_rate == math.ceil(output_rate / hop)):
            frame_rate = output_rate / hop  # some configurations round theirs up
        return cls(books, size, frame_rate, sampling_rate, output_rate)

    @property
    def num_codes(self) -> int:
        """Codes of all codebooks together: the tokens `<|audio_0|>` to `<|audio_{num_codes - 1}|>`."""
        return self.num_codebooks * self.codebook_size

    @property
    def samples_per_frame(self) -> int | None:
        """Samples that come out for one frame; None where that is no whole number."""
        if not self.frame_rate or not self.output_sampling_rate:
            return None
        samples = self.output_sampling_rate / self.frame_rate
        return round(samples) if abs(samples - round(samples)) < 1e-6 else None

    @property
    def chunk_size(self) -> int:
        """Codes that last as long as the published 26 at 12.5 a second (2.08 s), in whole frames."""
        frames = PUBLISHED_CHUNK_SIZE * (self.frame_rate or PUBLISHED_FRAME_RATE) / PUBLISHED_FRAME_RATE
        return max(1, round(frames)) * self.num_codebooks


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def flatten_codes(codes: Any, codebook_size: int) -> torch.Tensor:
    """
    Return codes of several codebooks as one stream, frame by frame.

    Args:
        codes (`torch.Tensor` of shape `(codebooks, frames)`): 0 to codebook_size - 1.
        codebook_size (`int`): the offset from one codebook to the next.

    Returns:
        `torch.Tensor` of shape `(frames * codebooks,)`, long; `unflatten_codes` is the exact inverse.

    Raises:
        ValueError: if the codes have another shape, or one is outside its codebook.
    """
    codes = torch.as_tensor(codes).long()
    if codes.ndim != 2:
        raise ValueError(f"`codes` has shape {tuple(codes.shape)}; expected (codebooks, frames).")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ValueError(
            f"`codes` run from {int(codes.min())} to {int(codes.max())}, outside a codebook of {codebook_size} codes."
        )
    return (codes + _offsets(len(codes), codebook_size, codes.device)).T.reshape(-1)


def unflatten_codes(
    stream: Any, num_codebooks: int, codebook_size: int, previous: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return a stream of codes as frames: the inverse of `flatten_codes`, tolerant of what a model may generate.

    Position decides: the stream's n-th code is read as codebook n % num_codebooks. A code of another codebook there is
    taken for missing, and its codebook keeps the code of the frame before (0 in the first frame). Time stays in step,
    since a denoised block has its codes at fixed positions. An incomplete last frame is left out.

    Args:
        stream (`torch.Tensor` of shape `(codes,)`): flat codes.
        num_codebooks (`int`): codes of a frame.
        codebook_size (`int`): the offset from one codebook to the next.
        previous (`torch.Tensor` of shape `(codebooks, 1)`, *optional*): the frame before this part of a stream.

    Returns:
        `torch.Tensor` of shape `(codebooks, frames)`, long.
    """
    stream = torch.as_tensor(stream).long().reshape(-1)
    frames = len(stream) // num_codebooks
    codes = stream[: frames * num_codebooks].reshape(frames, num_codebooks).T
    codes = codes - _offsets(num_codebooks, codebook_size, stream.device)  # (codebooks, frames)
    if previous is None:
        previous = codes.new_zeros(num_codebooks, 1)
    belongs = (codes >= 0) & (codes < codebook_size)
    positions = torch.arange(1, frames + 1, device=stream.device) * belongs  # 0 stands for `previous`
    latest = positions.cummax(1).values if frames else positions
    return torch.cat([previous.to(codes), codes], 1).gather(1, latest)


def _offsets(num_codebooks: int, codebook_size: int, device: torch.device) -> torch.Tensor:
    return torch.arange(num_codebooks, device=device)[:, None] * codebook_size  # (codebooks, 1)
