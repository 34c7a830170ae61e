"""Streaming decoding of GLM-4-Voice codes: block by block, each with all earlier ones as its prompt, cross-faded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .flow_glm4_voice import count_mel_frames

if TYPE_CHECKING:
    from .modeling_glm4_voice import Glm4VoiceModel


class Glm4VoiceStreamingDecoder:
    """Decodes a stream of codes in blocks, by the published scheme; what comes out does not depend on how the codes
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
        model: Glm4VoiceModel,
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
        """Takes codes, shape (n,) or (1, 1, n); returns the waveform (samples,) of the blocks that are complete."""
        self.pending = torch.cat([self.pending, audio_codes.reshape(-1).to(self.pending)])
        pieces = [torch.zeros(0, device=self.model.device)]
        while len(self.pending) > (size := self.block_sizes[min(self.num_blocks, len(self.block_sizes) - 1)]):
            pieces.append(self._speak(size, is_last=False))
        return torch.cat(pieces)

    def flush(self) -> torch.Tensor:
        """Ends the stream; returns the rest of the waveform, shape (samples,), and starts afresh."""
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


__all__ = ["Glm4VoiceStreamingDecoder"]
