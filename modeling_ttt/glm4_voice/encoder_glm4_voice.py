"""GLM-4-Voice's speech encoder: log-mel frames to hidden states at the rate of codes, and hidden states to codes."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer, sinusoids

from .configuration_glm4_voice import Glm4VoiceEncoderConfig


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
        codebook = self.codebook.weight.float()
        squared_norms = torch.linalg.vector_norm(codebook, dim=-1).square()  # without a copy of the codebook
        # |c|^2 - 2 x.c: the squared distance less |x|^2, which is the same for every code c.
        distances = torch.addmm(squared_norms, hidden.float().flatten(0, 1), codebook.T, alpha=-2)
        return distances.argmin(-1).unflatten(0, hidden.shape[:2])

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, codes) of one chunk to code vectors with positions, (batch, codes, d_model)."""
        return self.codebook(codes) + self.embed_positions.weight[: codes.shape[1]]


__all__ = ["Glm4VoiceEncoder", "Glm4VoiceQuantizer"]
