"""GLM-4-Voice's speech encoder: waveforms to log-mel frames, these to hidden states at the rate of codes, and hidden
states to codes."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer, sinusoids

from .configuration_glm4_voice import Glm4VoiceEncoderConfig


def log_mel_frames(
    waveforms: torch.Tensor, lengths: torch.Tensor, mel_filters: torch.Tensor, config: Glm4VoiceEncoderConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return Whisper's log-mel features of rows that do not know each other: each is padded to whole codes with zeros,
    mirrored at its own end, and scaled by its own loudest frame.

    Args:
        waveforms (`torch.FloatTensor` of shape `(batch, samples)`): of whole codes, zero from `lengths` on.
        lengths (`torch.LongTensor` of shape `(batch,)`): samples of each row.
        mel_filters (`torch.FloatTensor` of shape `(n_fft // 2 + 1, num_mel_bins)`).

    Returns:
        `tuple`: features of shape `(batch, num_mel_bins, samples // hop_length)` in float32, zero past a row's last
        code, and which frames begin within a row, long, `(batch, samples // hop_length)`.
    """
    margin, hop, size = config.n_fft // 2, config.hop_length, waveforms.shape[1]
    ends = (lengths + config.samples_per_code - 1) // config.samples_per_code * config.samples_per_code
    places = torch.arange(-margin, size + margin, device=waveforms.device).abs()
    last = ends[:, None] - 1
    places = torch.where(places > last, 2 * last - places, places.expand(len(ends), -1)).clamp(0, size - 1)
    mirrored = waveforms.float().gather(1, places)  # (batch, samples + n_fft)
    window = torch.hann_window(config.n_fft, device=waveforms.device)
    spectrum = torch.stft(mirrored, config.n_fft, hop, window=window, center=False, return_complex=True)
    power = (spectrum[..., :-1].abs() ** 2).contiguous()  # (batch, n_fft // 2 + 1, frames)
    levels = torch.clamp(mel_filters.float().T @ power, min=1e-10).log10()
    starts = torch.arange(levels.shape[-1], device=waveforms.device) * hop
    is_own = (starts < ends[:, None])[:, None]
    loudest = levels.masked_fill(~is_own, -torch.inf).amax((1, 2), keepdim=True)
    features = (torch.maximum(levels, loudest - 8.0) + 4.0) / 4.0
    return features.masked_fill(~is_own, 0.0), (starts < lengths[:, None]).long()


class Glm4VoiceEncoder(PreTrainedModel):
    """Whisper's encoder with causal convolutions and attention to the past and the position's own block."""

    config_class = Glm4VoiceEncoderConfig
    main_input_name = "input_features"
    input_modalities = "audio"
    _no_split_modules = ["WhisperEncoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Glm4VoiceEncoderConfig):
        super().__init__(config)
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2)
        self.activation = ACT2FN[config.activation_function]
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(config.encoder_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.embed_positions:
            init.copy_(module.weight, sinusoids(*module.weight.shape))

    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_features: log-mel frames, (batch, num_mel_bins, frames), frames a multiple of 8.
            attention_mask: 1 for frames, 0 for right padding, (batch, frames).

        Returns:
            Hidden states before quantisation, (batch, codes, d_model).
        """
        hidden = self.activation(self.conv1(F.pad(input_features, (2, 0))))
        hidden = self.activation(self.conv2(F.pad(hidden, (2, 0)))).transpose(1, 2)  # (batch, positions, d_model)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        hidden = hidden + self.embed_positions(positions)
        blocks = (positions // self.config.attention_block_size).expand(len(hidden), -1)
        mask = create_causal_mask(
            self.config, hidden, attention_mask[:, ::2], past_key_values=None, block_sequence_ids=blocks
        )
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden.unflatten(1, (-1, self.config.pooling_kernel_size)).mean(2)


class Glm4VoiceQuantizer(nn.Module):
    """The codebook: to the nearest code, and from codes to the states that a speech model may read."""

    def __init__(self, config: Glm4VoiceEncoderConfig):
        super().__init__()
        self.codebook = nn.Embedding(config.codebook_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_source_positions // config.pooling_kernel_size, config.d_model)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states x (batch, codes, d_model) to the nearest codes (batch, codes), measured in float32."""
        codebook = self._rows(self.codebook).float()
        squared_norms = torch.linalg.vector_norm(codebook, dim=-1).square()  # without a copy of the codebook
        # |c|^2 - 2 x.c: the squared distance less |x|^2, which is the same for every code c.
        distances = torch.addmm(squared_norms, hidden.float().flatten(0, 1), codebook.T, alpha=-2)
        return distances.argmin(-1).unflatten(0, hidden.shape[:2])

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Turn codes (batch, codes) of one chunk into code vectors with positions, (batch, codes, d_model)."""
        return self.codebook(codes) + self._rows(self.embed_positions)[: codes.shape[1]]

    @staticmethod
    def _rows(table: nn.Embedding) -> torch.Tensor:
        """All rows of a table; while its weight is kept elsewhere, only the table itself can get at it."""
        hook: Any = getattr(table, "_hf_hook", None)
        if table.weight.device.type != "meta" or hook is None:
            return table.weight
        return table(torch.arange(table.num_embeddings, device=hook.execution_device))


__all__ = ["Glm4VoiceEncoder", "Glm4VoiceQuantizer", "log_mel_frames"]
