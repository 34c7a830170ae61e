"""The configuration of GLM-4-Voice's audio tokenizer: speech encoder, flow decoder and vocoder, one part each."""

import math
from collections.abc import Sequence

from transformers import PreTrainedConfig


class Glm4VoiceEncoderConfig(PreTrainedConfig):
    r"""Configuration of the speech encoder: Whisper's encoder made block-causal, and a codebook after its last layer.

    Names follow `WhisperConfig` where they mean the same. The defaults are the published sizes.

    Args:
        sampling_rate (`int`): of the waveforms that are encoded, Hz.
        num_mel_bins, n_fft, hop_length, chunk_length (`int`): of Whisper's log-mel features: channels, window in
            samples, samples per frame, and the seconds of speech that are encoded at once. Longer speech is cut into
            consecutive chunks.
        d_model, encoder_layers, encoder_attention_heads, encoder_ffn_dim (`int`): sizes of the Transformer.
        activation_function (`str`): in the Transformer's feed-forward layers and after its two convolutions.
        dropout, attention_dropout, activation_dropout (`float`): as in Whisper.
        max_source_positions (`int`): length of the position table, at two log-mel frames a position.
        attention_block_size (`int`): positions see all earlier ones and all of their own block of so many.
        pooling_kernel_size (`int`): positions averaged into one code.
        codebook_size (`int`): number of codes.
        initializer_range (`float`): standard deviation of new weights.
    """

    model_type = "glm4_voice_encoder"
    base_config_key = "encoder_config"

    sampling_rate: int = 16_000
    num_mel_bins: int = 128
    n_fft: int = 400
    hop_length: int = 160
    chunk_length: int = 30
    d_model: int = 1280
    encoder_layers: int = 16
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    activation_function: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    max_source_positions: int = 1500
    attention_block_size: int = 200
    pooling_kernel_size: int = 4
    codebook_size: int = 16_384
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        _check_divides("encoder_attention_heads", self.encoder_attention_heads, "d_model", self.d_model)
        positions = self.max_source_positions
        _check_divides("pooling_kernel_size", self.pooling_kernel_size, "max_source_positions", positions)
        if self.chunk_length * self.sampling_rate != 2 * self.hop_length * positions:
            raise ValueError(
                f"`chunk_length` ({self.chunk_length} s) does not fill `max_source_positions` "
                f"({positions} positions of {2 * self.hop_length} samples)."
            )

    @property
    def samples_per_code(self) -> int:
        """Samples of speech that one code stands for."""
        return 2 * self.hop_length * self.pooling_kernel_size


class Glm4VoiceFlowConfig(PreTrainedConfig):
    r"""Configuration of the flow decoder: codes to log-mel frames by conditional flow matching.

    The defaults are the published sizes.

    Args:
        codebook_size (`int`): number of codes that can be decoded.
        code_rate (`float`): codes a second.
        sampling_rate, hop_length (`int`): of the log-mel frames, Hz and samples per frame.
        num_mel_bins (`int`): log-mel channels.
        speaker_embedding_size (`int`): of the optional speaker embedding.
        embedding_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): of the
            encoder that reads the codes.
        attention_block_size (`int`): codes see all earlier ones and all of their own block of so many.
        num_regulator_layers (`int`): convolutions after the codes are stretched to log-mel frames.
        unet_channels (`list[int]`): of the estimator's stages; each but the last halves the frame rate.
        unet_num_layers (`int`): Transformer layers per stage.
        unet_num_mid_stages (`int`): stages at the lowest frame rate.
        unet_num_attention_heads, unet_head_dim (`int`): attention of those layers.
        num_steps (`int`): Euler steps of the solver, by default.
        guidance_scale (`float`): w in (1 + w) v(conditional) - w v(unconditional), by default.
        initializer_range (`float`): standard deviation of new weights.
    """

    model_type = "glm4_voice_flow"
    base_config_key = "flow_config"

    codebook_size: int = 16_384
    code_rate: float = 12.5
    sampling_rate: int = 22_050
    hop_length: int = 256
    num_mel_bins: int = 80
    speaker_embedding_size: int = 192
    embedding_size: int = 512
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    attention_block_size: int = 10
    num_regulator_layers: int = 4
    unet_channels: Sequence[int] = (256, 256)
    unet_num_layers: int = 4
    unet_num_mid_stages: int = 12
    unet_num_attention_heads: int = 8
    unet_head_dim: int = 64
    num_steps: int = 10
    guidance_scale: float = 0.7
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.unet_channels = list(self.unet_channels)
        _check_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)


class Glm4VoiceVocoderConfig(PreTrainedConfig):
    r"""Configuration of the vocoder HiFT: log-mel frames to waveform from a harmonic source and an inverse short-time
    Fourier transform.

    The defaults are the published sizes.

    Args:
        sampling_rate (`int`): of the waveform, Hz.
        num_mel_bins (`int`): log-mel channels.
        hidden_size (`int`): channels after the first convolution, halved by every upsampling.
        upsample_rates, upsample_kernel_sizes (`list[int]`): of the transposed convolutions.
        resblock_kernel_sizes, resblock_dilation_sizes (`list`): of the residual blocks after each upsampling.
        source_resblock_kernel_sizes, source_resblock_dilation_sizes (`list`): of the residual blocks of the source.
        n_fft, istft_hop_length (`int`): of the short-time Fourier transforms, in samples.
        pitch_hidden_size, num_pitch_layers (`int`): of the pitch predictor.
        num_harmonics (`int`): of the source, beside the fundamental.
        sine_amplitude, noise_amplitude (`float`): of the source's voiced part, and of the noise in it.
        voiced_threshold (`float`): pitch above which a frame is voiced, Hz.
        leaky_relu_slope (`float`): before each upsampling.
        max_amplitude (`float`): the waveform is clamped to it.
        initializer_range (`float`): standard deviation of new weights.
    """

    model_type = "glm4_voice_vocoder"
    base_config_key = "vocoder_config"

    sampling_rate: int = 22_050
    num_mel_bins: int = 80
    hidden_size: int = 512
    upsample_rates: Sequence[int] = (8, 8)
    upsample_kernel_sizes: Sequence[int] = (16, 16)
    resblock_kernel_sizes: Sequence[int] = (3, 7, 11)
    resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: Sequence[int] = (7, 11)
    source_resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5), (1, 3, 5))
    n_fft: int = 16
    istft_hop_length: int = 4
    pitch_hidden_size: int = 512
    num_pitch_layers: int = 5
    num_harmonics: int = 8
    sine_amplitude: float = 0.1
    noise_amplitude: float = 0.003
    voiced_threshold: float = 10.0
    leaky_relu_slope: float = 0.1
    max_amplitude: float = 0.99
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        sizes = ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "source_resblock_kernel_sizes")
        for name in sizes:
            setattr(self, name, list(getattr(self, name)))
        for name in ("resblock_dilation_sizes", "source_resblock_dilation_sizes"):
            setattr(self, name, [list(dilations) for dilations in getattr(self, name)])
        stages = len(self.upsample_rates)
        for name in ("upsample_kernel_sizes", "source_resblock_kernel_sizes", "source_resblock_dilation_sizes"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"`{name}` has {len(getattr(self, name))} items, `upsample_rates` has {stages}.")

    @property
    def hop_length(self) -> int:
        """Samples per log-mel frame."""
        return math.prod(self.upsample_rates) * self.istft_hop_length


class Glm4VoiceConfig(PreTrainedConfig):
    r"""Configuration of a [`Glm4VoiceModel`]: speech at 16 kHz to one stream of 12.5 codes a second, and codes to
    speech at 22,050 Hz.

    Args:
        encoder_config ([`Glm4VoiceEncoderConfig`] or `dict`, *optional*): speech to codes.
        flow_config ([`Glm4VoiceFlowConfig`] or `dict`, *optional*): codes to log-mel frames.
        vocoder_config ([`Glm4VoiceVocoderConfig`] or `dict`, *optional*): log-mel frames to waveform.
        noise_seed (`int`): seed of the noise that decoding starts from where no generator is given. Every row and every
            block of a stream starts from it anew, as published.
        stream_block_sizes (`list[int]`): codes per block of a stream; the last size is kept. `[25, 50, 100, 150, 200]`
            are the growing blocks of the published web demo.
        stream_overlap_codes (`int`): codes' worth of log-mel frames that are cross-faded between blocks.

    Raises:
        ValueError: if the parts do not fit each other, or a block of a stream would be too short to be spoken.
    """

    model_type = "glm4_voice"
    sub_configs_defaults = {
        "encoder_config": Glm4VoiceEncoderConfig,
        "flow_config": Glm4VoiceFlowConfig,
        "vocoder_config": Glm4VoiceVocoderConfig,
    }

    encoder_config: dict | PreTrainedConfig | None = None
    flow_config: dict | PreTrainedConfig | None = None
    vocoder_config: dict | PreTrainedConfig | None = None
    noise_seed: int = 42
    stream_block_sizes: Sequence[int] = (10,)
    stream_overlap_codes: int = 5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.stream_block_sizes = list(self.stream_block_sizes)
        encoder, flow, vocoder = self.encoder_config, self.flow_config, self.vocoder_config
        if flow.codebook_size < encoder.codebook_size:
            raise ValueError(
                f"`encoder_config.codebook_size` ({encoder.codebook_size}) is more than can be decoded, "
                f"`flow_config.codebook_size` ({flow.codebook_size})."
            )
        if flow.code_rate != self.frame_rate:
            raise ValueError(f"The encoder makes {self.frame_rate} codes a second, the flow takes {flow.code_rate}.")
        for name in ("num_mel_bins", "sampling_rate", "hop_length"):
            if getattr(flow, name) != getattr(vocoder, name):
                raise ValueError(
                    f"`{name}` is {getattr(flow, name)} in `flow_config` and {getattr(vocoder, name)} in "
                    "`vocoder_config`; both speak of the same log-mel frames."
                )

    @property
    def sampling_rate(self) -> int:
        """Of the waveforms that go in, Hz."""
        return self.encoder_config.sampling_rate

    @property
    def output_sampling_rate(self) -> int:
        """Of the waveforms that come out, Hz."""
        return self.vocoder_config.sampling_rate

    @property
    def hop_length(self) -> int:
        """Samples that go in for one code. What comes out per code is not a whole number of samples."""
        return self.encoder_config.samples_per_code

    @property
    def frame_rate(self) -> float:
        """Codes a second."""
        return self.sampling_rate / self.hop_length

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.encoder_config.codebook_size

    @property
    def num_codebooks(self) -> int:
        """One stream of codes."""
        return 1


def _check_divides(name: str, value: int, of_name: str, of_value: int) -> None:
    if value < 1 or of_value % value:
        raise ValueError(f"`{name}` ({value}) must divide `{of_name}` ({of_value}).")


Glm4VoiceConfig.register_for_auto_class()

__all__ = ["Glm4VoiceConfig", "Glm4VoiceEncoderConfig", "Glm4VoiceFlowConfig", "Glm4VoiceVocoderConfig"]
