"""TttCodec: speech to one stream of codes at 12.5 Hz, and codes to speech in one fixed voice.

Encoder (log-mel, local convolutions, finite scalar quantisation), decoder (codes to log-mel) and vocoder (log-mel to
waveform by an inverse short-time Fourier transform) are convolutions with a bounded receptive field: what is far away
or padding never changes a result, so rows of a batch are independent and streamed decoding equals whole decoding. The
codes carry what was said; the decoder's voice is the one it was trained on. Training lives in training_examples/.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForAudioTokenization
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .configuration_ttt_codec import VOCODERS, TttCodecConfig

LOG_FLOOR = 1e-4
MOMENTUM = 0.99  # of Griffin and Lim's algorithm
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


@dataclass
class TttCodecEncoderOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch, 1, codes)`): 0 where `audio_codes_mask` is 0.
        audio_codes_mask (`torch.LongTensor` of shape `(batch, codes)`): 1 for a row's ceil(samples / hop) codes.
    """

    audio_codes: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None


@dataclass
class TttCodecDecoderOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(batch, 1, codes * hop_length)`): Waveform, zero past a row's end.
        audio_lengths (`torch.LongTensor` of shape `(batch,)`): Samples of each row.
    """

    audio_values: torch.Tensor | None = None
    audio_lengths: torch.Tensor | None = None


@dataclass
class TttCodecOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch, 1, codes)`): Codes of the input.
        audio_values (`torch.FloatTensor` of shape `(batch, 1, samples)`): The same speech in the decoder's voice.
    """

    audio_codes: torch.Tensor | None = None
    audio_values: torch.Tensor | None = None


class TttCodecFiniteScalarQuantizer(nn.Module):
    """Finite scalar quantisation (Mentzer et al., 2023): each dimension is bounded and rounded to a few levels."""

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = levels
        self.bases = [1]
        for level in levels[:-1]:
            self.bases.append(self.bases[-1] * level)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., dims) of any size to the nearest grid point in [-1, 1]; the gradient passes straight through."""
        hidden = hidden.float()
        levels = torch.tensor(self.levels, device=hidden.device, dtype=hidden.dtype)
        half = (levels - 1) * 1.001 / 2
        offset = (levels % 2 == 0) * 0.5
        bounded = torch.tanh(hidden + torch.atanh(offset / half)) * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (levels // 2)

    def to_codes(self, grid: torch.Tensor) -> torch.Tensor:
        """Grid points (..., dims) to codes (...)."""
        levels = torch.tensor(self.levels, device=grid.device)
        digits = (grid * (levels // 2)).round().long() + levels // 2
        return (digits * torch.tensor(self.bases, device=grid.device)).sum(-1)

    def to_grid(self, codes: torch.Tensor) -> torch.Tensor:
        """Turn codes (...) into grid points (..., dims), float32."""
        levels = torch.tensor(self.levels, device=codes.device)
        digits = codes[..., None] // torch.tensor(self.bases, device=codes.device) % levels
        return (digits - levels // 2) / (levels // 2)


class TttCodecBlock(nn.Module):
    """One ConvNeXt block (Liu et al., 2022) over time; padded positions enter the convolution as zeros."""

    def __init__(self, hidden_size: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 3 * hidden_size)
        self.down = nn.Linear(3 * hidden_size, hidden_size)
        self.scale = nn.Parameter(torch.full((hidden_size,), 0.3))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (batch, time, channels), mask (batch, time, 1)."""
        mixed = self.conv((hidden * mask).transpose(1, 2)).transpose(1, 2)
        return hidden + self.scale * self.down(F.gelu(self.up(self.norm(mixed))))


class TttCodecEncoder(nn.Module):
    """Log-mel frames to points before quantisation, one per code."""

    def __init__(self, config: TttCodecConfig):
        super().__init__()
        size = config.hidden_size
        self.stride = config.frames_per_code // 2
        self.conv_in = nn.Conv1d(config.num_mel_bins, size, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            TttCodecBlock(size, config.encoder_kernel_size) for _ in range(config.num_encoder_blocks)
        )
        self.norm = nn.LayerNorm(size)
        self.pool = nn.Linear(size * self.stride, 2 * size)
        self.proj_out = nn.Linear(2 * size, len(config.fsq_levels))

    def forward(self, mel: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """mel (batch, codes * frames_per_code, bins), mask (batch, codes) -> (batch, codes, dims)."""
        return self.project(self.extract_features(mel, mask))

    def extract_features(self, mel: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return what `forward` pools: (batch, codes * frames_per_code / 2, hidden_size)."""
        half_rate = mask.repeat_interleave(self.stride, 1)[..., None].to(mel.dtype)  # (batch, codes * stride, 1)
        mel = mel * half_rate.repeat_interleave(2, 1)
        hidden = F.gelu(self.conv_in(mel.transpose(1, 2)).transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden, half_rate)
        return self.norm(hidden)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Pool `extract_features` to one point per code: (batch, codes, dims)."""
        pooled = features.reshape(
            len(features), -1, features.shape[-1] * self.stride
        )  # (batch, codes, stride * hidden)
        return self.proj_out(F.gelu(self.pool(pooled)))


class TttCodecDecoder(nn.Module):
    """Quantised points to log-mel frames of the fixed voice."""

    def __init__(self, config: TttCodecConfig):
        super().__init__()
        size = config.hidden_size
        self.frames_per_code = config.frames_per_code
        self.proj_in = nn.Linear(len(config.fsq_levels), size)
        self.embedding = nn.Embedding(config.codebook_size, size)
        self.code_blocks = nn.ModuleList(
            TttCodecBlock(size, config.code_kernel_size) for _ in range(config.num_code_blocks)
        )
        self.upsample = nn.Linear(size, size * self.frames_per_code)
        self.mel_blocks = nn.ModuleList(
            TttCodecBlock(size, config.mel_kernel_size) for _ in range(config.num_mel_blocks)
        )
        self.norm = nn.LayerNorm(size)
        self.proj_out = nn.Linear(size, config.num_mel_bins)

    def forward(self, grid: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """grid (batch, codes, dims), codes, mask (batch, codes) -> log-mel (batch, codes * frames_per_code, bins)."""
        batch, length = mask.shape
        code_mask = mask[..., None].to(grid.dtype)
        hidden = self.proj_in(grid) + self.embedding(codes)
        for block in self.code_blocks:
            hidden = block(hidden, code_mask)
        hidden = self.upsample(hidden).reshape(batch, length * self.frames_per_code, -1)
        frame_mask = code_mask.repeat_interleave(self.frames_per_code, 1)
        for block in self.mel_blocks:
            hidden = block(hidden, frame_mask)
        return self.proj_out(self.norm(hidden))


class TttCodecVocoder(nn.Module):
    """Log-mel frames to waveform: predicts magnitude and phase of a short-time spectrum (after Vocos, 2023)."""

    def __init__(self, config: TttCodecConfig):
        super().__init__()
        size, kernel_size = config.vocoder_hidden_size, config.vocoder_kernel_size
        self.n_fft, self.hop = config.n_fft, config.mel_hop_length
        self.conv_in = nn.Conv1d(config.num_mel_bins, size, kernel_size, padding=kernel_size // 2)
        self.blocks = nn.ModuleList(TttCodecBlock(size, kernel_size) for _ in range(config.num_vocoder_blocks))
        self.norm = nn.LayerNorm(size)
        self.proj_out = nn.Linear(size, self.n_fft + 2)

    def forward(self, mel: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """mel (batch, frames, bins), mask (batch, frames) -> waveform (batch, frames * mel_hop_length)."""
        frame_mask = mask[..., None].to(mel.dtype)
        hidden = self.embed(mel * frame_mask)
        for block in self.blocks:
            hidden = block(hidden, frame_mask)
        return from_spectrum(self.predict_spectrum(hidden, frame_mask), self.n_fft, self.hop)

    def embed(self, mel: torch.Tensor) -> torch.Tensor:
        """(batch, frames, bins) -> (batch, frames, channels), by a convolution."""
        return self.conv_in(mel.transpose(1, 2)).transpose(1, 2)

    def predict_spectrum(self, hidden: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels), mask (batch, frames, 1) -> (batch, frames, n_fft / 2 + 1), complex."""
        log_magnitude, phase = self.proj_out(self.norm(hidden)).float().chunk(2, -1)
        magnitude = torch.exp(log_magnitude.clamp(max=6.0)) * frame_mask
        return torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))


def overlap_add(frames: torch.Tensor, hop: int) -> torch.Tensor:
    """Sum windowed frames (batch, frames, n_fft) at `hop`; returns the central (batch, frames * hop) samples.

    A periodic Hann window squared sums to 1.5 at a hop of a quarter window. The first and last frames have fewer
    neighbours, so a waveform fades in and out over three hops; no sample depends on the length of the batch.
    """
    start = (frames.shape[-1] - hop) // 2
    return sum_frames(frames, hop)[:, start : start + frames.shape[1] * hop]


def sum_frames(frames: torch.Tensor, hop: int) -> torch.Tensor:
    """Sum (batch, frames, n_fft), each `hop` samples after the one before: (batch, (frames - 1) * hop + n_fft)."""
    batch, count, n_fft = frames.shape
    length = (count - 1) * hop + n_fft
    return F.fold(frames.transpose(1, 2), (1, length), (1, n_fft), stride=(1, hop)).reshape(batch, length)


def to_spectrum(waveform: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """Short-time spectrum (periodic Hann window) of (batch, frames * hop): (batch, frames, n_fft / 2 + 1), float32."""
    margin = (n_fft - hop) // 2
    frames = F.pad(waveform.float(), (margin, margin)).unfold(-1, n_fft, hop)
    return torch.fft.rfft(frames * torch.hann_window(n_fft, device=waveform.device))


def from_spectrum(spectrum: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """Return the waveform with the closest `to_spectrum`: (batch, frames, n_fft / 2 + 1) to (batch, frames * hop)."""
    return overlap_add(to_frames(spectrum, n_fft), hop) / 1.5


def to_frames(spectrum: torch.Tensor, n_fft: int) -> torch.Tensor:
    """Short-time spectrum (batch, frames, n_fft / 2 + 1) to windowed frames (batch, frames, n_fft)."""
    return torch.fft.irfft(spectrum, n_fft) * torch.hann_window(n_fft, device=spectrum.device)


class TttCodecPreTrainedModel(PreTrainedAudioTokenizerBase):
    """Weights, loading and saving common to TttCodec."""

    config_class = TttCodecConfig
    base_model_prefix = "ttt_codec"
    main_input_name = "input_values"
    input_modalities = "audio"
    batch_invariant = True  # rows of a padded batch get what they get alone: the processor may batch them
    _no_split_modules = ["TttCodecBlock"]

    @property
    def device(self) -> torch.device:
        """Where the model computes, also while accelerate keeps its weights on the CPU or on disk."""
        device = next(parameter.device for parameter in self.parameters())
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(place) for place in places if place is not None), device)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            nn.init.trunc_normal_(
                module.weight, std=(module.in_channels // module.groups * module.kernel_size[0]) ** -0.5
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, TttCodecBlock):
            nn.init.constant_(module.scale, 0.3)
        elif isinstance(module, TttCodecModel):
            module.mel_filters.copy_(module.build_mel_filters())


class TttCodecModel(TttCodecPreTrainedModel):
    """A speech tokenizer with one codebook at 12.5 codes a second and a decoder with one fixed voice."""

    def __init__(self, config: TttCodecConfig):
        super().__init__(config)
        self.encoder = TttCodecEncoder(config)
        self.quantizer = TttCodecFiniteScalarQuantizer(config.fsq_levels)
        self.decoder = TttCodecDecoder(config)
        self.vocoder = TttCodecVocoder(config)
        self.register_buffer("mel_filters", self.build_mel_filters(), persistent=False)
        self.post_init()

    def build_mel_filters(self) -> torch.Tensor:
        """Mel filter bank, shape (n_fft // 2 + 1, num_mel_bins)."""
        config = self.config
        filters = mel_filter_bank(
            config.n_fft // 2 + 1,
            config.num_mel_bins,
            0.0,
            config.sampling_rate / 2,
            config.sampling_rate,
            "slaney",
            "slaney",
        )
        return torch.from_numpy(filters).float()

    def log_mel(self, waveform: torch.Tensor) -> torch.Tensor:
        """Scaled log-mel frames of (batch, samples), samples a multiple of `mel_hop_length`: (batch, frames, bins)."""
        config = self.config
        magnitude = to_spectrum(waveform, config.n_fft, config.mel_hop_length).abs()
        return (torch.log((magnitude @ self.mel_filters.float()).clamp(min=LOG_FLOOR)) + 4.0) / 3.0

    @can_return_tuple
    def encode(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs
    ) -> TttCodecEncoderOutput:
        """Turn speech into codes. A row's codes do not depend on its neighbours or on padding.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch, samples)` or `(batch, 1, samples)`):
                Waveforms in [-1, 1] at `config.sampling_rate`.
            padding_mask (`torch.LongTensor` of the same shape, *optional*): 1 for samples, 0 for right padding.

        Returns:
            [`TttCodecEncoderOutput`]; a row of n samples has exactly ceil(n / hop_length) codes.

        Raises:
            ValueError: if the waveforms are not mono or have no samples, or the mask does not fit them.
        """
        waveform, codes_mask = self._pad_waveform(input_values, padding_mask)
        grid = self.quantizer(self.encoder(self.log_mel(waveform).to(self.dtype), codes_mask))
        codes = self.quantizer.to_codes(grid) * codes_mask
        return TttCodecEncoderOutput(audio_codes=codes[:, None], audio_codes_mask=codes_mask)

    def _pad_waveform(self, input_values: torch.Tensor, padding_mask: torch.Tensor | None):
        """Zero-pad to whole codes: waveform (batch, codes * hop_length) and code mask (batch, codes)."""
        hop = self.config.hop_length
        if input_values.ndim == 3:
            if input_values.shape[1] != 1:
                raise ValueError(f"input_values has {input_values.shape[1]} channels; mix down to mono first")
            input_values = input_values[:, 0]
        if input_values.ndim != 2 or input_values.shape[-1] == 0:
            raise ValueError(f"input_values must be (batch, samples) with samples > 0, not {tuple(input_values.shape)}")
        if padding_mask is None:
            padding_mask = torch.ones_like(input_values, dtype=torch.long)
        if padding_mask.numel() != input_values.numel():
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask.shape)}, input_values {tuple(input_values.shape)}; give "
                "each sample its 1 or 0"
            )
        padding_mask = padding_mask.reshape(input_values.shape)
        lengths = padding_mask.long().sum(-1)
        extra = -input_values.shape[-1] % hop
        waveform = F.pad(input_values * padding_mask.to(input_values.dtype), (0, extra))
        positions = torch.arange(waveform.shape[-1] // hop, device=waveform.device)
        return waveform, (positions * hop < lengths[:, None]).long()

    @can_return_tuple
    def decode(
        self,
        audio_codes: torch.Tensor,
        audio_codes_mask: torch.Tensor | None = None,
        vocoder: str | None = None,
        **kwargs,
    ) -> TttCodecDecoderOutput:
        """Turn codes into speech of the fixed voice. A row's speech does not depend on its neighbours or on padding.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch, codes)` or `(batch, 1, codes)`): In [0, codebook_size).
            audio_codes_mask (`torch.LongTensor` of the same shape, *optional*): 1 for codes, 0 for right padding.
            vocoder (`str`, *optional*):
                `"neural"` or `"griffin_lim"` (slower, phase by iteration); the configuration's by default.

        Returns:
            [`TttCodecDecoderOutput`] with exactly codes * hop_length samples.

        Raises:
            ValueError: if the codes are not integers of one codebook in rows, if one lies outside the codebook, or if
                `vocoder` is unknown.
        """
        codes = audio_codes[:, 0] if audio_codes.ndim == 3 and audio_codes.shape[1] == 1 else audio_codes
        if codes.ndim != 2 or codes.is_floating_point():
            raise ValueError(
                "audio_codes must be integers of shape (batch, codes) or (batch, 1, codes), not "
                f"{audio_codes.dtype} of shape {tuple(audio_codes.shape)}"
            )
        vocoder = vocoder or self.config.vocoder
        if vocoder not in VOCODERS:
            raise ValueError(f"vocoder must be one of {VOCODERS}, not {vocoder!r}")
        mask = torch.ones_like(codes) if audio_codes_mask is None else audio_codes_mask.long().reshape(codes.shape)
        codes = codes * mask
        if codes.numel() == 0:
            silence = torch.zeros(len(codes), 1, 0, device=codes.device)
            return TttCodecDecoderOutput(audio_values=silence, audio_lengths=mask.sum(-1))
        if not is_tracing(codes):
            self.check_codes(codes)
        mel = self.decode_mel(codes, mask)
        frame_mask = mask.repeat_interleave(self.config.frames_per_code, 1)
        waveform = (self.vocoder if vocoder == "neural" else self._griffin_lim)(mel, frame_mask)
        waveform = waveform * frame_mask.repeat_interleave(self.config.mel_hop_length, 1)
        lengths = mask.sum(-1) * self.config.hop_length
        return TttCodecDecoderOutput(audio_values=waveform.clamp(-1, 1)[:, None], audio_lengths=lengths)

    def check_codes(self, codes: torch.Tensor) -> None:
        """Raise a `ValueError` if a code lies outside the codebook."""
        size = self.config.codebook_size
        if not ((codes >= 0) & (codes < size)).all():
            raise ValueError(f"audio_codes must lie in [0, {size}), found {codes.min()} to {codes.max()}")

    def streaming_decoder(self) -> "TttCodecStreamingDecoder | None":
        """Return a decoder that takes codes bit by bit; None where [`TttCodecStreamingDecoder`] has none: for
        `"griffin_lim"`, whose phase depends on every code, and where a kernel size is 1."""
        return TttCodecStreamingDecoder(self) if TttCodecStreamingDecoder.serves(self) else None

    def decode_mel(self, codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Turn codes (batch, codes) into scaled log-mel frames (batch, codes * frames_per_code, bins)."""
        return self.decoder(self.quantizer.to_grid(codes).to(self.dtype), codes, mask)

    @torch.no_grad()
    def _griffin_lim(self, mel: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """Phase by alternating projections (Griffin and Lim, 1984) with momentum (Perraudin et al., 2013): what is past
        a row's end stays silent, so that rows do not know each other."""
        config = self.config
        sizes = config.n_fft, config.mel_hop_length
        levels = torch.exp(mel.float() * 3.0 - 4.0) - LOG_FLOOR
        magnitude = (levels @ torch.linalg.pinv(self.mel_filters.float())).clamp(min=0) * frame_mask[..., None]
        sample_mask = frame_mask.repeat_interleave(config.mel_hop_length, 1)
        # Phases that go on by each bin's frequency, from a start that differs from bin to bin.
        bins = torch.arange(magnitude.shape[-1], device=mel.device)
        turns = bins * config.mel_hop_length / config.n_fft * torch.arange(mel.shape[1], device=mel.device)[:, None]
        angle = 2 * math.pi * (turns + bins * GOLDEN_RATIO)
        phase = torch.polar(torch.ones_like(angle), angle).expand(magnitude.shape)
        previous = torch.zeros_like(phase)
        for _ in range(config.griffin_lim_iterations):
            rebuilt = to_spectrum(from_spectrum(magnitude * phase, *sizes) * sample_mask, *sizes)
            ahead = rebuilt - MOMENTUM / (1 + MOMENTUM) * previous
            phase, previous = ahead / ahead.abs().clamp(min=1e-16), rebuilt
        return from_spectrum(magnitude * phase, *sizes)

    @can_return_tuple
    def forward(self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs) -> TttCodecOutput:
        """Encode and decode: `encode`'s arguments, the speech in the decoder's voice as the result."""
        encoded = self.encode(input_values, padding_mask)
        values = self.decode(encoded.audio_codes, encoded.audio_codes_mask).audio_values
        return TttCodecOutput(audio_codes=encoded.audio_codes, audio_values=values[..., : input_values.shape[-1]])


class TttCodecStreamingDecoder:
    """Decode a stream of codes as they come. The pieces join to what `decode` gives for all codes at once.

    Every layer keeps the last of its inputs, on which later outputs depend as well, and hands on the outputs that are
    final. So nothing is decoded twice, whatever the size of the pieces, and the waveform lags behind the codes by no
    more than the layers look ahead.

    Args:
        model ([`TttCodecModel`]): decodes the codes, with its neural vocoder and kernel sizes above 1.

    Raises:
        ValueError: if the model is another one.
    """

    def __init__(self, model: TttCodecModel):
        if not self.serves(model):
            raise ValueError(
                f"vocoder is {model.config.vocoder!r}; a streaming decoder needs 'neural', and kernel sizes above 1 in "
                "decoder and vocoder. Use `decode`, or processing's BoundedContextDecoder"
            )
        self.model = model
        self._reset()

    @staticmethod
    def serves(model: TttCodecModel) -> bool:
        """Whether there is a streaming decoder of this model."""
        config = model.config
        sizes = (config.code_kernel_size, config.mel_kernel_size, config.vocoder_kernel_size)
        return config.vocoder == "neural" and min(sizes) > 1

    def _reset(self) -> None:
        self.waiting = torch.zeros(0, dtype=torch.long, device=self.model.device)  # too few to speak yet
        self.kept: list[torch.Tensor] = []  # the last inputs of every layer, (steps, channels)
        self.tail: torch.Tensor | None = None  # samples to which later frames will add

    def push(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """Take codes of shape `(n,)` or `(1, 1, n)`; return the samples that became final, `(samples,)`, or none."""
        return self.push_together([self], [audio_codes], [False])[0]

    def flush(self) -> torch.Tensor:
        """End the stream: return the rest of the waveform, `(samples,)`, and start afresh."""
        return self.push_together([self], [self.waiting[:0]], [True])[0]

    @staticmethod
    @torch.no_grad()
    def push_together(
        decoders: Sequence["TttCodecStreamingDecoder"], audio_codes: Sequence[torch.Tensor], is_last: Sequence[bool]
    ) -> list[torch.Tensor]:
        """Take the next codes of several streams of one model in one pass, which costs less than one for each.

        Args:
            decoders: of one model, none of them twice.
            audio_codes: as `push` takes them, of each stream; none are taken too.
            is_last: whether the stream ends with them, as by `flush`.

        Returns:
            The samples of each that became final, `(samples,)`.

        Raises:
            ValueError: if a code lies outside the codebook. No stream has taken anything then.
        """
        if not decoders:
            return []
        model = decoders[0].model
        codes = [
            torch.cat([d.waiting, new.reshape(-1).to(d.waiting)]) for d, new in zip(decoders, audio_codes, strict=True)
        ]
        model.check_codes(torch.cat(codes))
        # A stream that has not begun waits until something can be spoken. From then on every code is.
        least = model.config.decoder_context_codes
        speaking = [
            index
            for index, (decoder, new, last) in enumerate(zip(decoders, codes, is_last, strict=True))
            if (len(new) > 0 and (decoder.kept or last or len(new) >= least)) or (decoder.kept and last)
        ]
        waveforms = [torch.zeros(0, device=model.device) for _ in decoders]
        if speaking:
            streams = _JoinedStreams(
                [decoders[i] for i in speaking], [codes[i] for i in speaking], [is_last[i] for i in speaking]
            )
            for index, waveform in zip(speaking, streams.decode(), strict=True):
                waveforms[index] = waveform
        for index, decoder in enumerate(decoders):
            decoder.waiting = codes[index][:0] if index in speaking else codes[index]
            if is_last[index]:
                decoder._reset()
        return waveforms


class _JoinedStreams:
    """One pass of [`TttCodecStreamingDecoder`] over the next codes of some streams. They are laid end to end as one
    sequence: what a layer sees of a neighbour at a border is left out, since those outputs are not final or not new."""

    def __init__(self, decoders: list[TttCodecStreamingDecoder], codes: list[torch.Tensor], is_last: list[bool]):
        self.decoders, self.model, self.is_last = decoders, decoders[0].model, is_last
        self.codes, self.lengths = torch.cat(codes), [len(new) for new in codes]
        self.kept: list[list[torch.Tensor]] = [[] for _ in decoders]

    def decode(self) -> list[torch.Tensor]:
        """Return the samples of each stream that became final."""
        decoder, vocoder, config = self.model.decoder, self.model.vocoder, self.model.config
        grid = self.model.quantizer.to_grid(self.codes).to(self.model.dtype)
        hidden = decoder.proj_in(grid) + decoder.embedding(self.codes)  # (codes, channels)
        hidden = self._run_blocks(decoder.code_blocks, config.code_kernel_size, hidden)
        hidden = decoder.upsample(hidden).reshape(-1, hidden.shape[-1])  # (mel frames, channels)
        self.lengths = [length * decoder.frames_per_code for length in self.lengths]
        hidden = self._run_blocks(decoder.mel_blocks, config.mel_kernel_size, hidden)
        mel = decoder.proj_out(decoder.norm(hidden))
        hidden = self._run(vocoder.embed, config.vocoder_kernel_size // 2, mel)
        hidden = self._run_blocks(vocoder.blocks, config.vocoder_kernel_size, hidden)
        spectrum = vocoder.predict_spectrum(hidden, hidden.new_ones(1, 1))
        frames = to_frames(spectrum, vocoder.n_fft).split(self.lengths)  # of each (frames, n_fft)
        spoken = [self._overlap_add(*each) for each in zip(self.decoders, frames, self.is_last, strict=True)]
        for stream, (_, tail) in enumerate(spoken):
            self.decoders[stream].kept, self.decoders[stream].tail = self.kept[stream], tail
        return [waveform for waveform, _ in spoken]

    def _run_blocks(self, blocks: nn.ModuleList, kernel_size: int, hidden: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            run = partial(block, mask=hidden.new_ones(1, 1, 1))
            hidden = self._run(run, kernel_size // 2, hidden)
        return hidden

    def _run(self, layer: Callable[[torch.Tensor], torch.Tensor], reach: int, new: torch.Tensor) -> torch.Tensor:
        """Run a layer that looks `reach` steps to either side: new inputs to new outputs, (steps, channels)."""
        nothing = new.new_zeros(reach, new.shape[-1])  # before the first input and after the last
        number = len(self.kept[0])  # of the layer
        pieces: list[torch.Tensor] = []
        lengths: list[int] = []
        for decoder, inputs, last in zip(self.decoders, new.split(self.lengths), self.is_last, strict=True):
            segment = [decoder.kept[number] if decoder.kept else nothing, inputs, *([nothing] if last else [])]
            pieces += segment
            lengths.append(sum(map(len, segment)))
        sequence = torch.cat(pieces)
        for kept, segment in zip(self.kept, sequence.split(lengths), strict=True):
            kept.append(segment[max(0, len(segment) - 2 * reach) :].clone())
        outputs = [part[reach : len(part) - reach] for part in layer(sequence[None])[0].split(lengths)]
        self.lengths = [len(part) for part in outputs]
        return torch.cat(outputs)

    def _overlap_add(
        self, decoder: TttCodecStreamingDecoder, frames: torch.Tensor, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`overlap_add` of the next frames of a stream: the samples that are final, and those that are not."""
        hop = self.model.vocoder.hop
        summed = sum_frames(frames[None], hop)[0]
        margin = (frames.shape[-1] - hop) // 2
        if decoder.tail is not None:
            summed[: len(decoder.tail)] += decoder.tail
        start = 0 if decoder.tail is not None else margin
        end = len(frames) * hop
        waveform = summed[start : end + (margin if last else 0)] / 1.5
        return waveform.clamp(-1, 1), summed[end:].clone()


TttCodecModel.register_for_auto_class("AutoModelForAudioTokenization")
if not __name__.startswith("transformers_modules."):  # code from a model's folder serves that folder alone
    AutoConfig.register("ttt_codec", TttCodecConfig, exist_ok=True)
    AutoModel.register(TttCodecConfig, TttCodecModel, exist_ok=True)
    AutoModelForAudioTokenization.register(TttCodecConfig, TttCodecModel, exist_ok=True)

__all__ = ["TttCodecModel", "TttCodecPreTrainedModel", "TttCodecStreamingDecoder"]
