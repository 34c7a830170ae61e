"""The configuration of TttCodec. The model itself lives in modeling_ttt_codec.py."""

import math
from collections.abc import Sequence

from transformers import PreTrainedConfig

VOCODERS = ("neural", "griffin_lim")


class TttCodecConfig(PreTrainedConfig):
    r"""Configuration of a [`TttCodecModel`].

    Args:
        sampling_rate (`int`, *optional*, defaults to 16000): Of the waveforms in and out, in Hz.
        hop_length (`int`, *optional*, defaults to 1280): Samples per code: 80 ms, so 12.5 codes a second.
        mel_hop_length (`int`, *optional*, defaults to 160): Samples per log-mel frame; `hop_length` must be a multiple
            of twice as much.
        n_fft (`int`, *optional*, defaults to 640): Window of the log-mel analysis and of the vocoder's inverse
            short-time Fourier transform, in samples; four times `mel_hop_length`.
        num_mel_bins (`int`, *optional*, defaults to 80): Log-mel channels.
        fsq_levels (`list[int]`, *optional*, defaults to `[5, 5, 4, 4]`): Levels of each dimension of the finite scalar
            quantiser (Mentzer et al., 2023); their product is the codebook size.
        hidden_size (`int`, *optional*, defaults to 256): Channels of encoder and decoder.
        num_encoder_blocks, num_code_blocks, num_mel_blocks, num_vocoder_blocks (`int`, *optional*): ConvNeXt blocks of
            the encoder (two frames per mel hop), of the decoder at code rate and at mel rate, and of the vocoder.
        encoder_kernel_size, code_kernel_size, mel_kernel_size, vocoder_kernel_size (`int`, *optional*): Their odd
            kernel sizes. They bound what a code sees of the speech and what a sample sees of the codes.
        vocoder_hidden_size (`int`, *optional*, defaults to 256): Channels of the vocoder.
        vocoder (`str`, *optional*, defaults to `"neural"`): Default of `decode`: `"neural"` or `"griffin_lim"`.
        griffin_lim_iterations (`int`, *optional*, defaults to 32): Iterations of `"griffin_lim"`.

    Raises:
        ValueError: if lengths in samples do not divide each other as said, a kernel size is even, a dimension has fewer
            than two levels, or `vocoder` is unknown.
    """

    model_type = "ttt_codec"

    sampling_rate: int = 16_000
    hop_length: int = 1280
    mel_hop_length: int = 160
    n_fft: int = 640
    num_mel_bins: int = 80
    fsq_levels: Sequence[int] = (5, 5, 4, 4)
    hidden_size: int = 256
    num_encoder_blocks: int = 3
    encoder_kernel_size: int = 5
    num_code_blocks: int = 3
    code_kernel_size: int = 3
    num_mel_blocks: int = 4
    mel_kernel_size: int = 5
    vocoder_hidden_size: int = 256
    num_vocoder_blocks: int = 5
    vocoder_kernel_size: int = 7
    vocoder: str = "neural"
    griffin_lim_iterations: int = 32

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.fsq_levels = list(self.fsq_levels)
        hop_length, mel_hop_length = self.hop_length, self.mel_hop_length
        if hop_length % (2 * mel_hop_length):
            raise ValueError(
                f"hop_length ({hop_length}) must be a multiple of 2 * mel_hop_length ({2 * mel_hop_length})"
            )
        if self.n_fft != 4 * mel_hop_length:
            raise ValueError(f"n_fft ({self.n_fft}) must be 4 * mel_hop_length ({4 * mel_hop_length})")
        if min(self.fsq_levels) < 2:
            raise ValueError(f"fsq_levels ({self.fsq_levels}) must be 2 or more each")
        if self.vocoder not in VOCODERS:
            raise ValueError(f"vocoder must be one of {VOCODERS}, not {self.vocoder!r}")
        for name in ("encoder", "code", "mel", "vocoder"):
            if getattr(self, f"{name}_kernel_size") % 2 == 0:
                raise ValueError(f"{name}_kernel_size must be odd, not {getattr(self, f'{name}_kernel_size')}")

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return math.prod(self.fsq_levels)

    @property
    def num_codebooks(self) -> int:
        """One stream of codes."""
        return 1

    @property
    def frame_rate(self) -> float:
        """Codes a second."""
        return self.sampling_rate / self.hop_length

    @property
    def frames_per_code(self) -> int:
        """Log-mel frames per code."""
        return self.hop_length // self.mel_hop_length

    @property
    def decoder_context_codes(self) -> int | None:
        """How many codes on either side a decoded sample can depend on: the lookahead of streaming decoding. `None`
        for all: the phase that `"griffin_lim"` finds depends on every one."""
        if self.vocoder == "griffin_lim":
            return None
        frames = self.num_mel_blocks * (self.mel_kernel_size // 2) + 2  # +2: the overlap-add of the inverse transform
        frames += (self.num_vocoder_blocks + 1) * (self.vocoder_kernel_size // 2)
        return self.num_code_blocks * (self.code_kernel_size // 2) + math.ceil(frames / self.frames_per_code)


TttCodecConfig.register_for_auto_class()

__all__ = ["TttCodecConfig"]
