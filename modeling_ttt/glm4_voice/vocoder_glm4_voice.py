"""GLM-4-Voice's vocoder HiFT: log-mel frames to waveform, by a pitch predictor, a harmonic source and an inverse
short-time Fourier transform. Padding is kept out, so that a row of a batch gets what it gets alone."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_glm4_voice import Glm4VoiceVocoderConfig
from .flow_glm4_voice import apply_mask, at_least_float32, length_mask

MAX_MAGNITUDE = 100.0


def build_sines(
    pitch: torch.Tensor, phase: torch.Tensor, noise: torch.Tensor, config: Glm4VoiceVocoderConfig
) -> torch.Tensor:
    """
    Return the fundamental and its harmonics, with noise.

    Args:
        pitch: Hz, (batch, frames), in float32 or better.
        phase: where each sine starts, radians, (batch, 1 + num_harmonics, 1); the fundamental always starts at 0.
        noise: standard normal, (batch, 1 + num_harmonics, frames * hop_length).

    Returns:
        (batch, 1 + num_harmonics, frames * hop_length); noise alone where the pitch is below the voiced threshold.
    """
    pitch = pitch.repeat_interleave(config.hop_length, -1)[:, None]  # (batch, 1, samples)
    multiples = torch.arange(1, config.num_harmonics + 2, device=pitch.device, dtype=pitch.dtype)[:, None]
    cycles = (pitch * multiples / config.sampling_rate).cumsum(-1) % 1
    phase = torch.cat([torch.zeros_like(phase[:, :1]), phase[:, 1:]], 1)
    sines = config.sine_amplitude * torch.sin(2 * math.pi * cycles + phase)
    voiced = (pitch > config.voiced_threshold).to(pitch.dtype)
    noise_amplitude = voiced * config.noise_amplitude + (1 - voiced) * config.sine_amplitude / 3
    return sines * voiced + noise_amplitude * noise


def reflected_positions(lengths: torch.Tensor, size: int, margin: int) -> torch.Tensor:
    """Return positions -margin to size + margin mirrored at 0 and at each row's own end: (batch, size + 2 * margin)."""
    positions = torch.arange(-margin, size + margin, device=lengths.device).abs()
    last = lengths[:, None] - 1
    return torch.where(positions > last, 2 * last - positions, positions.expand(len(lengths), -1)).clamp(min=0)


def short_time_spectrum(source: torch.Tensor, lengths: torch.Tensor, n_fft: int, hop_length: int) -> torch.Tensor:
    """Centred short-time Fourier transform (periodic Hann window) of (batch, samples), each row mirrored at its own
    end: real parts, then imaginary ones, (batch, n_fft + 2, samples / hop_length + 1)."""
    positions = reflected_positions(lengths, source.shape[-1], n_fft // 2)
    frames = source.gather(1, positions).unfold(-1, n_fft, hop_length)
    spectrum = torch.fft.rfft(frames * torch.hann_window(n_fft, dtype=source.dtype, device=source.device))
    return torch.cat([spectrum.real, spectrum.imag], -1).transpose(1, 2)


def waveform_from_spectrum(
    magnitude: torch.Tensor, phase: torch.Tensor, mask: torch.Tensor | None, hop_length: int
) -> torch.Tensor:
    """Inverse of a centred short-time Fourier transform (periodic Hann window), each row ending with its own last
    frame: magnitude and phase (batch, n_fft / 2 + 1, frames), mask (batch, 1, frames) -> (batch, samples)."""
    n_fft = 2 * (magnitude.shape[1] - 1)
    window = torch.hann_window(n_fft, dtype=magnitude.dtype, device=magnitude.device)[:, None]
    frames = torch.fft.irfft(torch.polar(magnitude, phase), n_fft, dim=1) * window  # (batch, n_fft, frames)
    if mask is None:
        mask = torch.ones_like(frames[:1, :1])
    length = (frames.shape[-1] - 1) * hop_length + n_fft
    summed, envelope = (
        F.fold(parts, (1, length), (1, n_fft), stride=(1, hop_length))[:, 0, 0]
        for parts in (frames * mask, window.square() * mask)
    )
    margin = n_fft // 2
    return (summed / envelope.clamp(min=1e-11))[:, margin:-margin]


class Glm4VoiceSnake(nn.Module):
    """x + sin^2(alpha x) / alpha with one alpha a channel (Ziyin et al., 2020)."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(num_channels))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        alpha = self.alpha[:, None]
        sine = torch.sin(alpha * hidden)
        epsilon = max(1e-9, torch.finfo(alpha.dtype).tiny)
        return torch.addcmul(hidden, sine, sine / (alpha + epsilon))


class Glm4VoiceVocoderResidualBlock(nn.Module):
    """Pairs of convolutions, the first of each dilated, added to what goes in."""

    def __init__(self, num_channels: int, kernel_size: int, dilations: Sequence[int]):
        super().__init__()
        self.activations1 = nn.ModuleList(Glm4VoiceSnake(num_channels) for _ in dilations)
        self.convs1 = nn.ModuleList(
            nn.Conv1d(num_channels, num_channels, kernel_size, dilation=dilation, padding=kernel_size // 2 * dilation)
            for dilation in dilations
        )
        self.activations2 = nn.ModuleList(Glm4VoiceSnake(num_channels) for _ in dilations)
        self.convs2 = nn.ModuleList(
            nn.Conv1d(num_channels, num_channels, kernel_size, padding=kernel_size // 2) for _ in dilations
        )

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """hidden (batch, num_channels, length), zero at padding, and so is the result."""
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for activation1, conv1, activation2, conv2 in layers:
            inner = apply_mask(conv1(activation1(hidden)), mask)
            hidden = hidden + apply_mask(conv2(activation2(inner)), mask)
        return hidden


class Glm4VoicePitchPredictor(nn.Module):
    """Log-mel frames to the pitch of each."""

    def __init__(self, config: Glm4VoiceVocoderConfig):
        super().__init__()
        sizes = [config.num_mel_bins, *[config.pitch_hidden_size] * config.num_pitch_layers]
        self.convs = nn.ModuleList(
            nn.Conv1d(in_size, out_size, kernel_size=3, padding=1)
            for in_size, out_size in zip(sizes, sizes[1:], strict=False)
        )
        self.proj_out = nn.Linear(config.pitch_hidden_size, 1)

    def forward(self, mel: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """mel (batch, num_mel_bins, frames) -> Hz, (batch, frames)."""
        hidden = mel.to(self.proj_out.weight.dtype)
        for conv in self.convs:
            hidden = F.elu(conv(apply_mask(hidden, mask)))
        return self.proj_out(hidden.transpose(1, 2))[..., 0].abs()


class Glm4VoiceVocoder(PreTrainedModel):
    """Log-mel frames to waveform."""

    config_class = Glm4VoiceVocoderConfig
    main_input_name = "mel"
    # Rounding of the pitch adds up in the phase of the sines.
    _keep_in_fp32_modules_strict = ["pitch_predictor", "source_proj"]
    _supports_sdpa = True  # there is no attention to compute
    _supports_attention_backend = True

    def __init__(self, config: Glm4VoiceVocoderConfig):
        super().__init__(config)
        self.pitch_predictor = Glm4VoicePitchPredictor(config)
        self.source_proj = nn.Linear(1 + config.num_harmonics, 1)
        self.conv_in = nn.Conv1d(config.num_mel_bins, config.hidden_size, kernel_size=7, padding=3)
        self.upsamples, self.resblocks = nn.ModuleList(), nn.ModuleList()
        self.source_downsamples, self.source_resblocks = nn.ModuleList(), nn.ModuleList()
        size = config.hidden_size
        for index, (rate, kernel_size) in enumerate(
            zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
        ):
            size = size // 2
            self.upsamples.append(
                nn.ConvTranspose1d(2 * size, size, kernel_size, stride=rate, padding=(kernel_size - rate) // 2)
            )
            down = math.prod(config.upsample_rates[index + 1 :])
            self.source_downsamples.append(
                nn.Conv1d(config.n_fft + 2, size, 2 * down, stride=down, padding=down // 2)
                if down > 1
                else nn.Conv1d(config.n_fft + 2, size, kernel_size=1)
            )
            self.source_resblocks.append(
                Glm4VoiceVocoderResidualBlock(
                    size, config.source_resblock_kernel_sizes[index], config.source_resblock_dilation_sizes[index]
                )
            )
            self.resblocks.extend(
                Glm4VoiceVocoderResidualBlock(size, kernel_size, dilations)
                for kernel_size, dilations in zip(
                    config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
                )
            )
        self.conv_out = nn.Conv1d(size, config.n_fft + 2, kernel_size=7, padding=3)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Glm4VoiceSnake):
            init.ones_(module.alpha)

    def forward(
        self,
        mel: torch.Tensor,
        num_frames: torch.Tensor,
        phase: torch.Tensor,
        noise: torch.Tensor,
        cached_source: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            mel: (batch, num_mel_bins, frames).
            num_frames: frames of each row that are no padding, (batch,).
            phase, noise: of the source, see `build_sines`.
            cached_source: samples to begin the source with, (batch, samples).

        Returns:
            Waveform and source, (batch, frames * hop_length) each, in float32 or better; zero past a row's end.
        """
        source = self.build_source(self.predict_pitch(mel, num_frames), phase, noise)
        if cached_source is not None:
            source = torch.cat([cached_source, source[:, cached_source.shape[1] :]], 1)
        return self.synthesize(mel, num_frames, source), source

    def predict_pitch(self, mel: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """mel (batch, num_mel_bins, frames) -> Hz, (batch, frames), in float32 or better."""
        return at_least_float32(self.pitch_predictor(mel, length_mask(num_frames, mel.shape[-1])))

    def build_source(self, pitch: torch.Tensor, phase: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the excitation: sines of the pitch as one signal (batch, frames * hop_length), float32 or better."""
        sines = build_sines(pitch, phase, noise, self.config).transpose(1, 2)
        return torch.tanh(at_least_float32(self.source_proj(sines.to(self.source_proj.weight.dtype))))[..., 0]

    def synthesize(self, mel: torch.Tensor, num_frames: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Filter the source by the log-mel frames: waveform (batch, frames * hop_length), in float32 or better."""
        config = self.config
        spectrum, mask = self.predict_spectrum(mel, num_frames, source)
        log_magnitude, angle = spectrum.chunk(2, 1)
        magnitude, phase = log_magnitude.exp().clamp(max=MAX_MAGNITUDE), angle.sin()
        waveform = waveform_from_spectrum(magnitude, phase, mask, config.istft_hop_length)
        waveform = waveform.clamp(-config.max_amplitude, config.max_amplitude)
        mask = length_mask(num_frames * config.hop_length, waveform.shape[-1])
        return waveform if mask is None else waveform.masked_fill(mask[:, 0] == 0, 0)

    def predict_spectrum(
        self, mel: torch.Tensor, num_frames: torch.Tensor, source: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logarithmic magnitudes and then angles of the waveform's short-time spectrum, (batch, n_fft + 2, frames),
        in float32 or better, and the mask of its frames."""
        config, dtype = self.config, self.conv_in.weight.dtype
        num_samples = num_frames * config.hop_length
        spectrum = short_time_spectrum(source, num_samples, config.n_fft, config.istft_hop_length).to(dtype)
        spectrum = apply_mask(spectrum, length_mask(num_samples // config.istft_hop_length + 1, spectrum.shape[-1]))

        blocks_per_stage = len(config.resblock_kernel_sizes)
        mask = length_mask(num_frames, mel.shape[-1])
        hidden = self.conv_in(apply_mask(mel.to(dtype), mask))
        for index, upsample in enumerate(self.upsamples):
            hidden = upsample(apply_mask(F.leaky_relu(hidden, config.leaky_relu_slope), mask))
            num_frames = num_frames * config.upsample_rates[index]
            if index == len(self.upsamples) - 1:
                hidden = F.pad(hidden, (1, 0), mode="reflect")
                num_frames = num_frames + 1
            mask = length_mask(num_frames, hidden.shape[-1])
            excitation = apply_mask(self.source_downsamples[index](spectrum), mask)
            hidden = apply_mask(hidden, mask) + self.source_resblocks[index](excitation, mask)
            blocks = self.resblocks[index * blocks_per_stage : (index + 1) * blocks_per_stage]
            hidden = sum(block(hidden, mask) for block in blocks) / len(blocks)
        hidden = F.leaky_relu(hidden)  # PyTorch's own slope here, as published
        return at_least_float32(self.conv_out(hidden)), mask


__all__ = ["Glm4VoiceVocoder", "build_sines"]
