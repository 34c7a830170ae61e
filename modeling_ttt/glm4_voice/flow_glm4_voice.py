"""GLM-4-Voice's flow decoder: codes to log-mel frames, by a block-causal encoder and conditional flow matching.

Rows of a batch may differ in length: padding is kept out of convolutions, norms and attention, so that a row gets what
it gets alone. A mask is None where no row is padded.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from .configuration_glm4_voice import Glm4VoiceFlowConfig

NORM_EPSILON = 1e-5
MAX_TIMESCALE = 10_000.0


def count_mel_frames(num_codes: torch.Tensor, config: Glm4VoiceFlowConfig) -> torch.Tensor:
    """Return the log-mel frames of so many codes (any shape), rounded down. In float32 as published: from a few
    thousand codes on it can be one frame less than exact."""
    # On the CPU, since a GPU divides by a number as it multiplies by its rounded inverse: a frame less here and there.
    seconds = num_codes.to("cpu", torch.float32) / config.code_rate
    return (seconds * config.sampling_rate / config.hop_length).long().to(num_codes.device)


def frames_of_length(num_codes: int, config: Glm4VoiceFlowConfig) -> int:
    """Return `count_mel_frames` of one number that is known without looking at a tensor."""
    return math.floor(_to_float32(_to_float32(num_codes / config.code_rate) * config.sampling_rate) / config.hop_length)


def _to_float32(value: float) -> float:
    """Round to 24 binary digits."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 2**24), exponent - 24)


def nearest_positions(lengths: torch.Tensor, new_lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Which of its `lengths` (batch,) positions each row repeats at each of its `new_lengths` (batch,) ones, as
    `interpolate(mode="nearest")` chooses them in float32: (batch, size)."""
    scale = lengths.to(torch.float32) / new_lengths.clamp(min=1).to(torch.float32)
    positions = torch.arange(size, device=lengths.device, dtype=torch.float32)
    return (positions * scale[:, None]).long().minimum((lengths[:, None] - 1).clamp(min=0))


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor | None:
    """Return 1.0 for each row's first `lengths` (batch,) positions, (batch, 1, size); None where all rows are full,
    unless a graph is traced, which has to serve rows that are not."""
    if not is_tracing(lengths) and bool((lengths >= size).all()):
        return None
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None].float()


def at_least_float32(hidden: torch.Tensor) -> torch.Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return hidden if hidden.dtype == torch.float64 else hidden.float()


def apply_mask(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Set padding of (batch, channels, length) to zero."""
    return hidden if mask is None else hidden * mask.to(hidden.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; query, key and value are (batch, heads, length, head_dim)."""
    weights = query @ key.transpose(2, 3) * scaling
    for bias in (position_bias, attention_mask):
        weights = weights if bias is None else weights + bias
    weights = weights.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Glm4VoiceGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics leave padding out."""

    def __init__(self, num_groups: int, num_channels: int):
        super().__init__(num_groups, num_channels, eps=NORM_EPSILON)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """hidden (batch, channels, length), mask (batch, 1, length)."""
        if mask is None:
            return super().forward(hidden)
        # (batch, groups, channels per group, length)
        grouped = at_least_float32(hidden).unflatten(1, (self.num_groups, -1))
        mask = mask[:, None]
        count = mask.sum((2, 3), keepdim=True).clamp(min=1) * grouped.shape[2]
        centred = grouped - (grouped * mask).sum((2, 3), keepdim=True) / count
        variance = (centred * mask).square().sum((2, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2).to(hidden.dtype)
        return normed * self.weight[:, None] + self.bias[:, None]


class Glm4VoiceRelativeAttention(nn.Module):
    """Attention with relative positions and two learned query biases (Dai et al., 2019)."""

    is_causal = False  # the mask says all

    def __init__(self, config: Glm4VoiceFlowConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.head_dim = size // config.num_attention_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.position_proj = nn.Linear(size, size, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(config.num_attention_heads, self.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(config.num_attention_heads, self.head_dim))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """hidden (batch, length, hidden_size), positions (2 * length - 1, hidden_size) as `relative_positions`."""
        batch, length, _ = hidden.shape
        query, key, value, relative = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)  # (..., heads, length, head_dim)
            for states in (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden), self.position_proj(positions))
        )
        by_distance = (query + self.position_bias[:, None]) @ relative.transpose(1, 2)  # (..., length, 2 * length - 1)
        steps = torch.arange(length, device=hidden.device)
        columns = (length - 1 - steps[:, None] + steps).expand(*by_distance.shape[:-1], length)
        scaling = self.head_dim**-0.5
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(
            self,
            query + self.content_bias[:, None],
            key,
            value,
            mask,
            scaling=scaling,
            position_bias=by_distance.gather(-1, columns) * scaling,
        )
        return self.out_proj(output.reshape(batch, length, -1))


def relative_positions(length: int, size: int, device: torch.device) -> torch.Tensor:
    """Return sinusoids of the distances length - 1 down to 1 - length, sine at even and cosine at odd channels:
    (2 * length - 1, size), float32."""
    distances = torch.arange(length - 1, -length, -1, device=device, dtype=torch.float32)
    frequencies = torch.exp(torch.arange(0, size, 2, device=device).float() * (-math.log(MAX_TIMESCALE) / size))
    angles = distances[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class Glm4VoiceFlowEncoderLayer(nn.Module):
    """Attention and a feed-forward layer, each after a norm and added."""

    def __init__(self, config: Glm4VoiceFlowConfig):
        super().__init__()
        self.self_attn = Glm4VoiceRelativeAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPSILON)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPSILON)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden), mask, positions)
        return hidden + self.fc2(F.silu(self.fc1(self.final_layer_norm(hidden))))


class Glm4VoiceFlowEncoder(nn.Module):
    """Reads the codes; each sees all earlier ones and those of its own block."""

    def __init__(self, config: Glm4VoiceFlowConfig):
        super().__init__()
        self.config = config
        self.embed_codes = nn.Embedding(config.codebook_size, config.embedding_size)
        self.proj_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.layer_norm_in = nn.LayerNorm(config.hidden_size, eps=NORM_EPSILON)
        self.layers = nn.ModuleList(Glm4VoiceFlowEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPSILON)

    def forward(self, codes: torch.Tensor, codes_mask: torch.Tensor) -> torch.Tensor:
        """codes, codes_mask (batch, codes) -> (batch, codes, hidden_size)."""
        hidden = self.layer_norm_in(self.proj_in(self.embed_codes(codes))) * self.config.hidden_size**0.5
        blocks = torch.arange(codes.shape[1], device=codes.device) // self.config.attention_block_size
        mask = create_causal_mask(
            self.config, hidden, codes_mask, past_key_values=None, block_sequence_ids=blocks.expand(len(codes), -1)
        )
        positions = relative_positions(codes.shape[1], self.config.hidden_size, codes.device).to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, mask, positions)
        return self.layer_norm(hidden)


class Glm4VoiceConvBlock(nn.Module):
    """Convolution, group normalisation, Mish."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = Glm4VoiceGroupNorm(num_groups, out_channels)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.mish(self.norm(self.conv(apply_mask(hidden, mask)), mask))


class Glm4VoiceLengthRegulator(nn.Module):
    """Stretches the codes' states to log-mel frames and smooths them."""

    def __init__(self, config: Glm4VoiceFlowConfig):
        super().__init__()
        size = config.num_mel_bins
        self.layers = nn.ModuleList(Glm4VoiceConvBlock(size, size, 1) for _ in range(config.num_regulator_layers))
        self.proj_out = nn.Conv1d(size, size, kernel_size=1)

    def forward(
        self, hidden: torch.Tensor, num_codes: torch.Tensor, num_frames: torch.Tensor, size: int
    ) -> torch.Tensor:
        """hidden (batch, num_mel_bins, codes), num_codes, num_frames (batch,) -> (batch, num_mel_bins, size)."""
        positions = nearest_positions(num_codes, num_frames, size)
        mask = length_mask(num_frames, size)
        hidden = hidden.gather(2, positions[:, None].expand(-1, hidden.shape[1], -1))
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.proj_out(hidden)


class Glm4VoiceTimeEmbedding(nn.Module):
    """Flow time in [0, 1] to a vector."""

    def __init__(self, in_size: int, size: int):
        super().__init__()
        self.in_size = in_size
        self.linear_1 = nn.Linear(in_size, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """times (steps,), float32 -> (steps, size)."""
        half = self.in_size // 2
        steps = torch.arange(half, device=times.device).float()
        frequencies = torch.exp(steps * (-math.log(MAX_TIMESCALE) / (half - 1)))
        angles = 1000 * times[:, None] * frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], -1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))


class Glm4VoiceResnetBlock(nn.Module):
    """Two convolution blocks with the time between them, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, time_size: int):
        super().__init__()
        self.block1 = Glm4VoiceConvBlock(in_channels, out_channels, 8)
        self.time_proj = nn.Linear(time_size, out_channels)
        self.block2 = Glm4VoiceConvBlock(out_channels, out_channels, 8)
        self.shortcut = nn.Conv1d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden: torch.Tensor, time: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """hidden (batch, in_channels, frames), time (time_size,)."""
        inner = self.block1(hidden, mask) + self.time_proj(F.mish(time))[:, None]
        return self.block2(inner, mask) + self.shortcut(hidden)


class Glm4VoiceTransformerLayer(nn.Module):
    """Bidirectional attention and a feed-forward layer, each after a norm and added."""

    is_causal = False

    def __init__(self, config: Glm4VoiceFlowConfig, size: int):
        super().__init__()
        self.config = config
        inner_size = config.unet_num_attention_heads * config.unet_head_dim
        self.layer_norm1 = nn.LayerNorm(size, eps=NORM_EPSILON)
        self.q_proj = nn.Linear(size, inner_size, bias=False)
        self.k_proj = nn.Linear(size, inner_size, bias=False)
        self.v_proj = nn.Linear(size, inner_size, bias=False)
        self.out_proj = nn.Linear(inner_size, size)
        self.layer_norm2 = nn.LayerNorm(size, eps=NORM_EPSILON)
        self.fc1 = nn.Linear(size, 4 * size)
        self.fc2 = nn.Linear(4 * size, size)

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """hidden (batch, frames, size)."""
        normed = self.layer_norm1(hidden)
        query, key, value = (
            proj(normed).unflatten(-1, (-1, self.config.unet_head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(self, query, key, value, attention_mask, scaling=self.config.unet_head_dim**-0.5)
        hidden = hidden + self.out_proj(output.flatten(2))
        return hidden + self.fc2(F.gelu(self.fc1(self.layer_norm2(hidden))))


class Glm4VoiceUNetStage(nn.Module):
    """A residual block and Transformer layers at one frame rate, then a convolution that may change the rate."""

    def __init__(
        self, config: Glm4VoiceFlowConfig, in_channels: int, out_channels: int, resample: nn.Module | None = None
    ):
        super().__init__()
        self.resnet = Glm4VoiceResnetBlock(in_channels, out_channels, 4 * config.unet_channels[0])
        self.layers = nn.ModuleList(
            Glm4VoiceTransformerLayer(config, out_channels) for _ in range(config.unet_num_layers)
        )
        self.resample = resample

    def forward(
        self,
        hidden: torch.Tensor,
        time: torch.Tensor,
        mask: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (batch, in_channels, frames) -> after the layers, and after the convolution as well."""
        hidden = self.resnet(hidden, time, mask).transpose(1, 2).contiguous()
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        hidden = apply_mask(hidden.transpose(1, 2), mask)
        return hidden, hidden if self.resample is None else self.resample(hidden)


class Glm4VoiceVelocityEstimator(nn.Module):
    """A one-dimensional U-Net over log-mel frames: from a noisy state, the condition and the time to the velocity."""

    def __init__(self, config: Glm4VoiceFlowConfig):
        super().__init__()
        self.config = config
        in_channels, channels = 4 * config.num_mel_bins, config.unet_channels
        self.time_embedding = Glm4VoiceTimeEmbedding(in_channels, 4 * channels[0])
        self.down_stages, self.up_stages = nn.ModuleList(), nn.ModuleList()
        for index, size in enumerate(channels):
            stride = 1 if index == len(channels) - 1 else 2
            resample: nn.Module = nn.Conv1d(size, size, kernel_size=3, stride=stride, padding=1)
            self.down_stages.append(Glm4VoiceUNetStage(config, in_channels, size, resample))
            in_channels = size
        self.mid_stages = nn.ModuleList(
            Glm4VoiceUNetStage(config, in_channels, in_channels) for _ in range(config.unet_num_mid_stages)
        )
        for index in reversed(range(len(channels))):
            size = channels[max(index - 1, 0)]
            if index > 0:
                resample = nn.ConvTranspose1d(size, size, kernel_size=4, stride=2, padding=1)
            else:
                resample = nn.Conv1d(size, size, kernel_size=3, padding=1)
            self.up_stages.append(Glm4VoiceUNetStage(config, 2 * channels[index], size, resample))
        self.final_block = Glm4VoiceConvBlock(channels[0], channels[0], 8)
        self.proj_out = nn.Conv1d(channels[0], config.num_mel_bins, kernel_size=1)

    def prepare_masks(
        self, num_frames: torch.Tensor, size: int
    ) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Convolution and attention mask of every frame rate, highest first, for rows of `num_frames` (batch,)."""
        masks = []
        for _ in self.config.unet_channels:
            mask, attention_mask = length_mask(num_frames, size), None
            if mask is not None:
                like = torch.empty(len(num_frames), size, 1, dtype=self.proj_out.weight.dtype, device=mask.device)
                attention_mask = create_bidirectional_mask(self.config, like, mask[:, 0].bool())
            masks.append((mask, attention_mask))
            num_frames, size = (num_frames + 1) // 2, (size + 1) // 2
        return masks

    def forward(
        self,
        state: torch.Tensor,
        condition: torch.Tensor,
        time: torch.Tensor,
        masks: list[tuple[torch.Tensor | None, torch.Tensor | None]],
    ) -> torch.Tensor:
        """
        Args:
            state: x, (batch, num_mel_bins, frames).
            condition: stretched codes, speaker and prompt, (batch, 3 * num_mel_bins, frames).
            time: one of `time_embedding`'s vectors, (size,).
            masks: of `prepare_masks`.

        Returns:
            Velocity, (batch, num_mel_bins, frames).
        """
        hidden = torch.cat([state, condition], 1)
        skips = []
        for stage, (mask, attention_mask) in zip(self.down_stages, masks, strict=True):
            skip, hidden = stage(hidden, time, mask, attention_mask)
            skips.append(skip)
        for stage in self.mid_stages:
            hidden, _ = stage(hidden, time, *masks[-1])
        for stage, (mask, attention_mask) in zip(self.up_stages, reversed(masks), strict=True):
            skip = skips.pop()
            hidden = torch.cat([hidden[..., : skip.shape[-1]], skip], 1)
            _, hidden = stage(hidden, time, mask, attention_mask)
        return self.proj_out(self.final_block(hidden, masks[0][0]))


class Glm4VoiceFlow(PreTrainedModel):
    """Codes to log-mel frames."""

    config_class = Glm4VoiceFlowConfig
    main_input_name = "codes"
    _no_split_modules = ["Glm4VoiceFlowEncoderLayer", "Glm4VoiceUNetStage"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Glm4VoiceFlowConfig):
        super().__init__(config)
        self.encoder = Glm4VoiceFlowEncoder(config)
        self.encoder_proj = nn.Linear(config.hidden_size, config.num_mel_bins)
        self.length_regulator = Glm4VoiceLengthRegulator(config)
        self.speaker_proj = nn.Linear(config.speaker_embedding_size, config.num_mel_bins)
        self.estimator = Glm4VoiceVelocityEstimator(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Glm4VoiceRelativeAttention):
            init.xavier_uniform_(module.content_bias)
            init.xavier_uniform_(module.position_bias)

    def forward(
        self,
        codes: torch.Tensor,
        codes_mask: torch.Tensor,
        initial_noise: torch.Tensor,
        num_steps: int,
        guidance_scale: float,
        speaker_embedding: torch.Tensor | None = None,
        prompt_mel: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            codes, codes_mask: codes, those of a prompt first, and which of them are no padding, (batch, codes).
            initial_noise: the solver's first state, (batch, num_mel_bins, frames) with `count_mel_frames` frames a row.
            num_steps: Euler steps.
            guidance_scale: w in (1 + w) v(conditional) - w v(unconditional).
            speaker_embedding: (batch, speaker_embedding_size); zeros by default, as published.
            prompt_mel: (batch, num_mel_bins, prompt frames).

        Returns:
            Log-mel frames after the prompt's, (batch, num_mel_bins, frames - prompt frames), in float32 or better.
        """
        num_codes = codes_mask.sum(-1)
        num_frames = count_mel_frames(num_codes, self.config)
        hidden = self.encoder_proj(self.encoder(codes, codes_mask)).transpose(1, 2)
        stretched = self.length_regulator(hidden, num_codes, num_frames, initial_noise.shape[-1])
        condition = self.build_condition(stretched, speaker_embedding, prompt_mel)
        mel = self.solve(initial_noise, condition, num_frames, num_steps, guidance_scale)
        return mel if prompt_mel is None else mel[..., prompt_mel.shape[-1] :]

    def build_condition(
        self,
        stretched: torch.Tensor,
        speaker_embedding: torch.Tensor | None = None,
        prompt_mel: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the estimator is told: stretched codes (batch, num_mel_bins, frames), the speaker in every frame,
        and the prompt's frames followed by zeros: (batch, 3 * num_mel_bins, frames)."""
        batch, _, frames = stretched.shape
        if speaker_embedding is None:
            speaker_embedding = stretched.new_zeros(batch, self.config.speaker_embedding_size)
        direction = F.normalize(at_least_float32(speaker_embedding)).to(stretched)
        speaker = self.speaker_proj(direction)[..., None].expand(-1, -1, frames)
        prompt = torch.zeros_like(stretched)
        if prompt_mel is not None:
            prompt[..., : prompt_mel.shape[-1]] = prompt_mel
        return torch.cat([stretched, speaker, prompt], 1)

    def solve(
        self,
        initial_noise: torch.Tensor,
        condition: torch.Tensor,
        num_frames: torch.Tensor,
        num_steps: int,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Euler's method from noise (t = 0) to log-mel frames (t = 1), with steps that grow as 1 - cos."""
        times = 1 - torch.cos(torch.linspace(0, 1, num_steps + 1, device=condition.device) * (0.5 * math.pi))
        state = initial_noise.to(condition.device, torch.promote_types(condition.dtype, torch.float32))
        if guidance_scale:  # both branches in one forward; the unconditional one is told nothing
            condition = torch.cat([condition, torch.zeros_like(condition)])
            num_frames = num_frames.repeat(2)
        masks = self.estimator.prepare_masks(num_frames, state.shape[-1])
        time_embeddings = self.estimator.time_embedding(times[:-1])
        for step in range(num_steps):
            repeated = state.to(condition.dtype).repeat(len(condition) // len(state), 1, 1)
            velocity = at_least_float32(self.estimator(repeated, condition, time_embeddings[step], masks))
            if guidance_scale:
                conditional, unconditional = velocity.chunk(2)
                velocity = (1 + guidance_scale) * conditional - guidance_scale * unconditional
            state = state + (times[step + 1] - times[step]) * velocity
        return state


__all__ = ["Glm4VoiceFlow", "count_mel_frames", "frames_of_length"]
