"""GLM-4-Voice's audio tokenizer: speech at 16 kHz to one stream of codes at 12.5 Hz, and codes to speech at 22,050 Hz.

Encoder, flow decoder and vocoder live in files of their own; here they are put together behind the interface of
Transformers' audio tokenizers, whole and streamed.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForAudioTokenization
from transformers import initialization as init
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_tracing

from .configuration_glm4_voice import Glm4VoiceConfig
from .encoder_glm4_voice import Glm4VoiceEncoder, Glm4VoiceQuantizer, log_mel_frames
from .flow_glm4_voice import Glm4VoiceFlow, count_mel_frames, frames_of_length
from .vocoder_glm4_voice import Glm4VoiceVocoder


@dataclass
class Glm4VoiceEncoderOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch, 1, codes)`): 0 where `audio_codes_mask` is 0.
        audio_codes_mask (`torch.LongTensor` of shape `(batch, codes)`): 1 for a row's ceil(samples / hop) codes.
    """

    audio_codes: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None


@dataclass
class Glm4VoiceDecoderOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(batch, 1, samples)`): Waveform, zero past a row's end.
        audio_lengths (`torch.LongTensor` of shape `(batch,)`): Samples of each row; not a whole number per code.
    """

    audio_values: torch.Tensor | None = None
    audio_lengths: torch.Tensor | None = None


@dataclass
class Glm4VoiceOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch, 1, codes)`): Codes of the input.
        audio_values (`torch.FloatTensor` of shape `(batch, 1, samples)`): The same speech in the decoder's voice.
    """

    audio_codes: torch.Tensor | None = None
    audio_values: torch.Tensor | None = None


class Glm4VoicePreTrainedModel(PreTrainedAudioTokenizerBase):
    """Weights, loading and saving common to GLM-4-Voice's audio tokenizer."""

    config_class = Glm4VoiceConfig
    base_model_prefix = "glm4_voice"
    main_input_name = "input_values"
    input_modalities = "audio"
    batch_invariant = True  # rows of a padded batch get what they get alone: the processor may batch them
    _keep_in_fp32_modules_strict = ["quantizer"]  # in bfloat16 another code would often be the nearest
    _supports_sdpa = True
    _supports_attention_backend = True

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
        if isinstance(module, Glm4VoiceModel):
            init.copy_(module.mel_filters, module.build_mel_filters())


class Glm4VoiceModel(Glm4VoicePreTrainedModel):
    """A speech tokenizer with one codebook at 12.5 codes a second, and a decoder by flow matching.

    Decoding starts from noise. Without a generator every row takes its noise from a fresh CPU generator seeded with
    `config.noise_seed`, so that equal codes give equal speech; on the CPU it is the published code's own noise.
    """

    def __init__(self, config: Glm4VoiceConfig):
        super().__init__(config)
        encoder: Any = config.encoder_config
        flow: Any = config.flow_config
        vocoder: Any = config.vocoder_config
        self.encoder = Glm4VoiceEncoder(encoder)
        self.quantizer = Glm4VoiceQuantizer(encoder)
        self.flow = Glm4VoiceFlow(flow)
        self.vocoder = Glm4VoiceVocoder(vocoder)
        self.register_buffer("mel_filters", self.build_mel_filters(), persistent=False)
        self.post_init()

    def build_mel_filters(self) -> torch.Tensor:
        """Return Whisper's mel filter bank, of shape `(n_fft // 2 + 1, num_mel_bins)`."""
        config: Any = self.config.encoder_config
        rate, bins = config.sampling_rate, config.num_mel_bins
        filters = mel_filter_bank(1 + config.n_fft // 2, bins, 0.0, 8000.0, rate, norm="slaney", mel_scale="slaney")
        return torch.from_numpy(filters).float()

    # ------------------------------------------------------------------ speech to codes

    @can_return_tuple
    @torch.no_grad()
    def encode(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None, batch_size: int = 16, **kwargs
    ) -> Glm4VoiceEncoderOutput:
        """Turn speech into codes. Speech is cut into consecutive chunks of `config.encoder_config.chunk_length`
        seconds, which do not see each other. A row's codes do not depend on its neighbours or on padding.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch, samples)` or `(batch, 1, samples)`):
                Waveforms in [-1, 1] at `config.sampling_rate`.
            padding_mask (`torch.LongTensor` of the same shape, *optional*): 1 for samples, 0 for right padding.
            batch_size (`int`, *optional*, defaults to 16): Chunks encoded at once.

        Returns:
            [`Glm4VoiceEncoderOutput`]; a row of n samples has exactly ceil(n / config.hop_length) codes.

        Raises:
            ValueError: if the waveforms are not mono or have no samples, or the mask is not of their shape.
        """
        config: Any = self.config.encoder_config
        waveforms, lengths = self._check_waveforms(input_values, padding_mask)
        samples_per_code = config.samples_per_code
        num_codes = -(-waveforms.shape[1] // samples_per_code)
        chunk_codes = min(num_codes, config.chunk_length * config.sampling_rate // samples_per_code)
        num_chunks = -(-num_codes // chunk_codes)
        chunk_samples = chunk_codes * samples_per_code
        waveforms = nn.functional.pad(waveforms, (0, num_chunks * chunk_samples - waveforms.shape[1]))
        chunks = waveforms.view(-1, chunk_samples)  # (batch * num_chunks, samples)
        starts = torch.arange(num_chunks, device=self.device) * chunk_samples
        chunk_lengths = (lengths[:, None] - starts).clamp(0, chunk_samples).flatten()

        # Chunks of a length together, and none that is empty: for the least padding, where lengths may be looked at.
        order, longest = list(range(len(chunks))), [chunk_codes] * len(chunks)
        if not is_tracing(chunks):
            longest = (-(-chunk_lengths // samples_per_code)).tolist()
            order = sorted((chunk for chunk in order if longest[chunk]), key=lambda chunk: -longest[chunk])
        codes = torch.zeros(len(chunks), chunk_codes, dtype=torch.long, device=self.device)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = longest[batch[0]]
            features, frame_mask = self.extract_features(
                chunks[batch, : width * samples_per_code], chunk_lengths[batch]
            )
            hidden = self.encoder(features.to(self.encoder.conv1.weight.dtype), frame_mask)
            codes[batch, :width] = self.quantizer(hidden)
        codes = codes.view(len(waveforms), -1)[:, :num_codes]
        codes_mask = torch.arange(num_codes, device=self.device) * samples_per_code < lengths[:, None]
        codes = codes.masked_fill(~codes_mask, 0)
        return Glm4VoiceEncoderOutput(audio_codes=codes[:, None], audio_codes_mask=codes_mask.long())

    def extract_features(self, waveforms: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `log_mel_frames` of waveforms of at most one chunk each: `(batch, samples)`, of whole codes and zero
        from `lengths` on, `(batch,)`."""
        config: Any = self.config.encoder_config
        return log_mel_frames(waveforms, lengths, self.mel_filters, config)

    def _check_waveforms(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms (batch, samples) on the model's device, zero where padded, and each row's samples, (batch,)."""
        if input_values.ndim == 3:
            if input_values.shape[1] != 1:
                raise ValueError(f"input_values has {input_values.shape[1]} channels; mix down to mono first")
            input_values = input_values[:, 0]
        if input_values.ndim != 2 or input_values.shape[-1] == 0:
            raise ValueError(f"input_values must be (batch, samples) with samples > 0, not {tuple(input_values.shape)}")
        input_values = input_values.to(self.device)
        if padding_mask is None:
            return input_values, torch.full((len(input_values),), input_values.shape[1], device=self.device)
        if padding_mask.numel() != input_values.numel():
            raise ValueError(
                f"padding_mask must have a value for each sample, shape {tuple(input_values.shape)}, not "
                f"{tuple(padding_mask.shape)}"
            )
        padding_mask = padding_mask.reshape(input_values.shape).to(self.device)
        return input_values * padding_mask.to(input_values.dtype), padding_mask.long().sum(-1)

    # ------------------------------------------------------------------ codes to speech

    @can_return_tuple
    @torch.no_grad()
    def decode(
        self,
        audio_codes: torch.Tensor,
        audio_codes_mask: torch.Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        speaker_embedding: torch.Tensor | None = None,
        prompt_codes: torch.Tensor | None = None,
        prompt_mel: torch.Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        initial_noise: torch.Tensor | None = None,
        source_phase: torch.Tensor | None = None,
        source_noise: torch.Tensor | None = None,
        **kwargs,
    ) -> Glm4VoiceDecoderOutput:
        """Turn codes into speech. A row's speech does not depend on its neighbours or on padding.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch, codes)` or `(batch, 1, codes)`): In [0, codebook_size).
            audio_codes_mask (`torch.LongTensor` of shape `(batch, codes)`, *optional*): 1 for codes, 0 for padding.
            num_steps (`int`, *optional*): Euler steps of the flow's solver; `config.flow_config.num_steps` by default.
            guidance_scale (`float`, *optional*):
                w in (1 + w) v(conditional) - w v(unconditional); 0 saves the unconditional half of the work.
                `config.flow_config.guidance_scale` by default.
            speaker_embedding (`torch.FloatTensor` of shape `(batch, speaker_embedding_size)`, *optional*):
                Who speaks; zeros by default, as published.
            prompt_codes (`torch.LongTensor` of shape `(prompt codes,)` or `(batch, prompt codes)`, *optional*):
                Codes of speech to go on from.
            prompt_mel (`torch.FloatTensor` of shape `(batch, num_mel_bins, frames)`, *optional*):
                Its log-mel frames; they are not part of the result.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of the noise, one for all rows or one for each; see the class for the default. A traced graph has
                no generator: rows have the default noise of a row without padding.
            initial_noise (`torch.FloatTensor` of shape `(batch, num_mel_bins, frames)`, *optional*):
                What the solver starts from instead, prompt included.
            source_phase, source_noise (`torch.FloatTensor`, *optional*):
                Phases of the vocoder's sines, `(batch, 1 + num_harmonics, 1)`, and noise of its source, `(batch, 1 +
                num_harmonics, samples)`, instead.

        Returns:
            [`Glm4VoiceDecoderOutput`]; n codes give floor(441 n / 64) log-mel frames of 256 samples at
            `config.output_sampling_rate`.

        Raises:
            ValueError: if a code lies outside the codebook, the solver's settings are out of range, or the mask, the
                speaker, the prompt or the noise does not fit the codes.
        """
        codes, mask = self._check_codes(audio_codes, audio_codes_mask)
        num_prompt_codes = 0 if prompt_codes is None else prompt_codes.shape[-1]
        if is_tracing(codes):
            rows = len(codes), num_prompt_codes + codes.shape[1], 0 if prompt_mel is None else prompt_mel.shape[-1]
            fixed = self._fixed_noise(*rows)
            given = initial_noise, source_phase, source_noise
            initial_noise, source_phase, source_noise = (
                default if noise is None else noise for noise, default in zip(given, fixed, strict=True)
            )
        generators = [] if is_tracing(codes) else self.make_generators(generator, len(codes))
        if initial_noise is None:
            num_frames = count_mel_frames(num_prompt_codes + mask.sum(-1), self.config.flow_config)
            initial_noise = self.draw_initial_noise(num_frames, generators)
        mel, num_frames = self.decode_mel(
            codes, mask, num_steps, guidance_scale, speaker_embedding, prompt_codes, prompt_mel, initial_noise
        )
        if source_phase is None or source_noise is None:
            phase, noise = self.draw_source_noise(num_frames, generators)
            source_phase = phase if source_phase is None else source_phase
            source_noise = noise if source_noise is None else source_noise
        waveform, _ = self.vocoder(mel, num_frames, source_phase.to(mel), source_noise.to(mel))
        lengths = num_frames * self.config.vocoder_config.hop_length
        return Glm4VoiceDecoderOutput(audio_values=waveform[:, None], audio_lengths=lengths)

    @torch.no_grad()
    def decode_mel(
        self,
        audio_codes: torch.Tensor,
        audio_codes_mask: torch.Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        speaker_embedding: torch.Tensor | None = None,
        prompt_codes: torch.Tensor | None = None,
        prompt_mel: torch.Tensor | None = None,
        initial_noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the first half of `decode`, which see: log-mel frames (batch, num_mel_bins, frames), and how many each row
        has, (batch,)."""
        config = self.config.flow_config
        num_steps = config.num_steps if num_steps is None else num_steps
        guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; the solver takes at least 1 step")
        if guidance_scale < 0:
            raise ValueError(f"guidance_scale is {guidance_scale}; use at least 0, which switches guidance off")
        codes, mask = self._check_codes(audio_codes, audio_codes_mask)
        if speaker_embedding is not None:
            _check_shape("speaker_embedding", speaker_embedding, (len(codes), config.speaker_embedding_size))
        has_codes = mask.any(-1)
        if codes.shape[1] == 0:
            raise ValueError("audio_codes holds no codes")
        if prompt_codes is not None:
            prompt_codes, _ = self._check_codes(prompt_codes.expand(len(codes), -1))
            codes = torch.cat([prompt_codes.to(codes), codes], 1)
            mask = torch.cat([torch.ones_like(prompt_codes), mask], 1)
        num_frames = count_mel_frames(mask.sum(-1), config)
        if initial_noise is None:
            initial_noise = self.draw_initial_noise(num_frames, self.make_generators(None, len(codes)))
        size = frames_of_length(codes.shape[1], config)
        _check_shape("initial_noise", initial_noise, (len(codes), config.num_mel_bins, size))
        if prompt_mel is not None:
            _check_shape("prompt_mel", prompt_mel, (len(codes), config.num_mel_bins, prompt_mel.shape[-1]))
            num_frames = (num_frames - prompt_mel.shape[-1]) * has_codes
            if not is_tracing(codes) and not (num_frames[has_codes] > 0).all():
                raise ValueError(
                    f"prompt_mel has {prompt_mel.shape[-1]} frames, as many as prompt and codes together or more; "
                    "it belongs to prompt_codes"
                )
        mel = self.flow(
            codes,
            mask,
            initial_noise,
            num_steps,
            guidance_scale,
            speaker_embedding,
            prompt_mel,
        )
        return mel, num_frames

    def streaming_decoder(self, **options: Any) -> "Glm4VoiceStreamingDecoder":
        """Return a decoder that takes codes bit by bit; see [`Glm4VoiceStreamingDecoder`] for `options`."""
        return Glm4VoiceStreamingDecoder(self, **options)

    def _check_codes(
        self, audio_codes: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and mask, (batch, codes) each, long, on the model's device; 0 where the mask is."""
        codes = (audio_codes.squeeze(1) if audio_codes.ndim == 3 else audio_codes).long().to(self.device)
        if codes.ndim != 2:
            raise ValueError(f"audio_codes must be (batch, codes) or (batch, 1, codes), not {tuple(audio_codes.shape)}")
        mask = torch.ones_like(codes) if mask is None else mask.long().to(self.device)
        _check_shape("audio_codes_mask", mask, tuple(codes.shape))
        codes = codes * mask
        if not is_tracing(codes):
            size = self.config.flow_config.codebook_size
            if not ((codes >= 0) & (codes < size)).all():
                raise ValueError(f"audio_codes must lie in [0, {size}), found {codes.min()} to {codes.max()}")
            longest = mask.sum(-1).max().item() if mask.numel() else 0  # columns that are padding in all rows
            codes, mask = codes[:, :longest], mask[:, :longest]
        return codes, mask

    # ------------------------------------------------------------------ noise

    def make_generators(
        self, generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
    ) -> list[torch.Generator]:
        """Return one generator a row: those given, or fresh ones on the CPU seeded with `config.noise_seed`."""
        if generator is None:
            return [torch.Generator().manual_seed(self.config.noise_seed) for _ in range(batch)]
        if isinstance(generator, torch.Generator):
            return [generator] * batch
        if len(generator) != batch:
            raise ValueError(f"generator has {len(generator)} items for a batch of {batch}")
        return list(generator)

    def draw_initial_noise(self, num_frames: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Draw the solver's start: (batch, num_mel_bins, frames), zero past each row's `num_frames` (batch,)."""
        noise = [
            torch.randn(self.config.flow_config.num_mel_bins, frames, generator=generator, device=generator.device)
            for frames, generator in zip(num_frames.tolist(), generators, strict=True)
        ]
        return self._pad(noise)

    def draw_source_noise(
        self, num_frames: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw phases, uniform in [-pi, pi), (batch, 1 + num_harmonics, 1), and noise, (batch, 1 + num_harmonics,
        samples), of the vocoder's source for `num_frames` (batch,) log-mel frames a row."""
        config = self.config.vocoder_config
        phases, noises = [], []
        for frames, generator in zip(num_frames.tolist(), generators, strict=True):
            options: dict[str, Any] = {"generator": generator, "device": generator.device}
            phases.append(_to_phase(torch.rand(config.num_harmonics + 1, 1, **options)))
            noises.append(torch.randn(config.num_harmonics + 1, frames * config.hop_length, **options))
        return self._pad(phases), self._pad(noises)

    def _fixed_noise(self, batch: int, num_codes: int, num_prompt_frames: int) -> list[torch.Tensor]:
        """The default noise of rows without padding, as constants of a traced graph: initial noise, and the source's
        phases and noise, (batch, channels, length) each."""
        flow, vocoder = self.config.flow_config, self.config.vocoder_config
        frames = frames_of_length(num_codes, flow)
        sines, samples = 1 + vocoder.num_harmonics, (frames - num_prompt_frames) * vocoder.hop_length
        noise = _draw_outside_the_graph(flow.num_mel_bins, frames, sines, samples, self.config.noise_seed)
        return [part.to(self.device).expand(batch, -1, -1) for part in noise]

    def _pad(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """Rows (channels, length) as one batch (batch, channels, length) on the model's device, zeros at the end."""
        return nn.utils.rnn.pad_sequence([row.T.to(self.device) for row in rows], batch_first=True).transpose(1, 2)

    @can_return_tuple
    def forward(
        self, input_values: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs
    ) -> Glm4VoiceOutput:
        """Encode and decode: `encode`'s arguments, the speech in the decoder's voice as the result."""
        encoded = self.encode(input_values, padding_mask)
        codes_mask = None if padding_mask is None else encoded.audio_codes_mask
        values = self.decode(encoded.audio_codes, codes_mask).audio_values
        return Glm4VoiceOutput(audio_codes=encoded.audio_codes, audio_values=values)


class Glm4VoiceStreamingDecoder:
    """Decode a stream of codes in blocks, by the published scheme; what comes out does not depend on how the codes
    are split between calls.

    For every block:

    1. The flow decodes it after all earlier codes, with all log-mel frames vocoded so far as the prompt.
    2. The frames held back from the block before fade into its first frames, by the halves of a Hamming window.
    3. The last frame vocoded before is put in front.
    4. Unless it is the last block, its last frames are held back.
    5. The vocoder speaks the frames, beginning with the source samples that the block before ended with.
    6. Unless it is the last block, the last frame's samples are left out; the next block speaks them again.

    In the published scheme the frame of step 3 stays in the prompt. From the third block on the prompt is therefore
    one frame longer than its codes: the cross-fade is off by a frame, and each block loses a frame of speech. With
    `keep_drift=False` it is left out of the prompt, and a stream lasts as long as its codes decoded at once.

    A block is spoken once a code after it is known, since the last block of a stream is treated differently.

    Args:
        model: decodes the codes.
        block_sizes: codes per block; the last size is kept. The configuration's `stream_block_sizes` by default.
        keep_drift: keep to the published scheme.
        prompt_codes, prompt_mel: of speech to go on from, see `Glm4VoiceModel.decode`.
        generator: source of the noise; every block starts from a fresh one with the configuration's seed by default.
        options: of `Glm4VoiceModel.decode`: `num_steps`, `guidance_scale`, `speaker_embedding`.

    Raises:
        ValueError: all frames of the first block would be held back.
    """

    def __init__(
        self,
        model: "Glm4VoiceModel",
        block_sizes: Sequence[int] | None = None,
        keep_drift: bool = True,
        prompt_codes: torch.Tensor | None = None,
        prompt_mel: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ):
        config = model.config.flow_config
        self.model = model
        self.block_sizes = list(block_sizes or model.config.stream_block_sizes)
        self.keep_drift = keep_drift
        self.generator = generator
        self.options = options
        self.prompt_codes = torch.zeros(0, dtype=torch.long) if prompt_codes is None else prompt_codes.reshape(-1)
        self.prompt_mel = torch.zeros(1, config.num_mel_bins, 0) if prompt_mel is None else prompt_mel
        counts = torch.tensor([len(self.prompt_codes) + self.block_sizes[0], model.config.stream_overlap_codes])
        frames, self.overlap = count_mel_frames(counts, config).tolist()
        frames -= self.prompt_mel.shape[-1]
        if min(self.block_sizes) < 1 or frames <= self.overlap:
            raise ValueError(
                f"`block_sizes` is {self.block_sizes}: the first block gives {frames} log-mel frames, of which "
                f"{self.overlap} are held back for the next; make it longer"
            )
        self.window = torch.hamming_window(2 * self.overlap, periodic=False, dtype=torch.float64, device=model.device)
        self._reset()

    def _reset(self) -> None:
        self.pending = torch.zeros(0, dtype=torch.long, device=self.model.device)  # codes not yet spoken
        self.codes = self.prompt_codes.to(self.pending)  # prompt of the next block,
        self.mel = self.prompt_mel.to(self.model.device)  # and its log-mel frames, (1, num_mel_bins, frames)
        self.num_blocks = 0
        self.held_mel: torch.Tensor | None = None
        self.last_frame: torch.Tensor | None = None
        self.cached_source: torch.Tensor | None = None

    def push(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """Take codes of shape `(n,)` or `(1, 1, n)`; return the waveform, `(samples,)`, of complete blocks."""
        self.pending = torch.cat([self.pending, audio_codes.reshape(-1).to(self.pending)])
        pieces = [torch.zeros(0, device=self.model.device)]
        while len(self.pending) > (size := self.block_sizes[min(self.num_blocks, len(self.block_sizes) - 1)]):
            pieces.append(self._speak(size, is_last=False))
        return torch.cat(pieces)

    def flush(self) -> torch.Tensor:
        """End the stream: return the rest of the waveform, `(samples,)`, and start afresh."""
        if len(self.pending) == 0:
            return torch.zeros(0, device=self.model.device)
        waveform = self._speak(len(self.pending), is_last=True)
        self._reset()
        return waveform

    @torch.no_grad()
    def _speak(self, size: int, is_last: bool) -> torch.Tensor:
        model, config = self.model, self.model.config
        block, self.pending = self.pending[:size], self.pending[size:]
        generators = model.make_generators(self.generator, 1)
        num_codes = torch.tensor([len(self.codes) + size])
        initial_noise = model.draw_initial_noise(count_mel_frames(num_codes, config.flow_config), generators)
        mel, _ = model.decode_mel(  # 1.
            block[None], prompt_codes=self.codes, prompt_mel=self.mel, initial_noise=initial_noise, **self.options
        )
        if self.held_mel is not None:  # 2.
            fade_in, fade_out = self.window.chunk(2)
            mel[..., : self.overlap] = mel[..., : self.overlap] * fade_in + self.held_mel * fade_out
        num_repeated = 0
        if self.last_frame is not None:  # 3.
            mel = torch.cat([self.last_frame, mel], -1)
            num_repeated = 0 if self.keep_drift else 1
        if not is_last:  # 4.
            mel, self.held_mel = mel[..., : -self.overlap], mel[..., -self.overlap :]
        num_frames = torch.tensor([mel.shape[-1]], device=mel.device)
        phase, noise = model.draw_source_noise(num_frames, generators)
        waveform, source = model.vocoder(mel, num_frames, phase, noise, self.cached_source)  # 5.
        if not is_last:  # 6.
            hop_length = config.vocoder_config.hop_length
            self.last_frame, self.cached_source = mel[..., -1:], source[:, -hop_length:]
            waveform = waveform[:, :-hop_length]
        self.codes = torch.cat([self.codes, block])
        self.mel = torch.cat([self.mel, mel[..., num_repeated:]], -1)
        self.num_blocks += 1
        return waveform[0]


def _to_phase(uniform: torch.Tensor) -> torch.Tensor:
    """U[0, 1) to [-pi, pi)."""
    return uniform * 2 * math.pi - math.pi


@torch.compiler.assume_constant_result
def _draw_outside_the_graph(num_mel_bins: int, frames: int, sines: int, samples: int, seed: int) -> list[torch.Tensor]:
    """What `draw_initial_noise` and `draw_source_noise` draw for one row, in a thread of its own: what traces a graph
    watches its own thread only, and cannot keep a generator."""

    def draw() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        initial = torch.randn(num_mel_bins, frames, generator=generator)
        phase = _to_phase(torch.rand(sines, 1, generator=generator))
        return [initial, phase, torch.randn(sines, samples, generator=generator)]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(draw).result()


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")


Glm4VoiceModel.register_for_auto_class("AutoModelForAudioTokenization")
if not __name__.startswith("transformers_modules."):  # code from a model's folder serves that folder alone
    AutoConfig.register("glm4_voice", Glm4VoiceConfig, exist_ok=True)
    AutoModel.register(Glm4VoiceConfig, Glm4VoiceModel, exist_ok=True)
    AutoModelForAudioTokenization.register(Glm4VoiceConfig, Glm4VoiceModel, exist_ok=True)

__all__ = ["Glm4VoiceModel", "Glm4VoicePreTrainedModel", "Glm4VoiceStreamingDecoder"]
