"""An answer as it is generated: `generate`'s streamer hands ids in on one thread, pieces of text and waveform come out
on another."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from .interleaving_ttt import Deinterleaver
from .vocabulary_ttt import TttTokenIds, to_list
from .waveform_stream_ttt import WaveformStream


class TttStreamCancelled(Exception):
    """Raised inside `generate` when the reader of a stream has left."""


class TttStreamer(BaseStreamer):
    """
    An answer in pieces: passed to `generate(streamer=...)`, which runs in another thread, and iterated over in this.

    Each item is `{"text": str}` or `{"audio": (samples,) float32, "sampling_rate": int}`. Texts joined are the answer's
    text, waveforms joined its speech; the prompt, which `generate` hands in first, is left out. When a piece of
    waveform comes depends on the audio tokenizer: see `WaveformStream`. Waveforms are decoded in the thread that
    iterates. After `end` or `fail` it takes another answer, read by iterating again; after `cancel` it is of no more
    use.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes text ids.
        token_ids (`TttTokenIds`): tells text from audio.
        audio_tokenizer (`PreTrainedModel`, *optional*): decodes codes; without one, audio is left out.
        sampling_rate (`int`, *optional*): of the waveforms, Hz; that of the audio tokenizer where not given.
        timeout (`float`, *optional*):
            Seconds to wait for the next piece before `queue.Empty` is raised; for ever where not given.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_ids: TttTokenIds,
        audio_tokenizer: Any | None = None,
        sampling_rate: int | None = None,
        timeout: float | None = None,
    ):
        self.tokenizer = tokenizer
        self.token_ids = token_ids
        self.audio_tokenizer = audio_tokenizer
        self.sampling_rate = sampling_rate
        self.timeout = timeout
        self._is_prompt_next = True
        self._queue: queue.Queue[Any] = queue.Queue()
        self._cancelled = False
        self._read_anew()
        if sampling_rate is None and self._audio is not None:
            self.sampling_rate = self._audio.format.output_sampling_rate

    def _read_anew(self) -> None:
        """Forget what was read of an answer."""
        self._text = TextDecoder(self.tokenizer)
        self._audio = None if self.audio_tokenizer is None else WaveformStream(self.audio_tokenizer)
        self._reader = Deinterleaver(self.token_ids, self._audio.format.num_codebooks if self._audio else 1)

    def put(self, value: torch.Tensor) -> None:
        """
        Take ids; called by `generate`.

        Args:
            value (`torch.Tensor` of shape `(length,)` or `(1, length)`): token ids.

        Raises:
            ValueError: if there is more than one row.
            TttStreamCancelled: if the reader has left.
        """
        if self._cancelled:
            raise TttStreamCancelled
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"A stream carries one answer, got a batch of {value.shape[0]}. Generate them one by one.")
        if self._is_prompt_next:
            self._is_prompt_next = False
            return
        self._queue.put(to_list(value.reshape(-1)))

    def end(self) -> None:
        """End the stream; called by `generate` when the answer is complete."""
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """End the stream with an error, raised where it is read."""
        self._end(error)

    def _end(self, last: BaseException | None) -> None:
        self._is_prompt_next = True
        self._queue.put(last)

    def cancel(self) -> None:
        """Stop the generation at its next token."""
        self._cancelled = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            ids = self._queue.get(timeout=self.timeout)
            if isinstance(ids, BaseException):
                self._read_anew()
                raise ids
            if ids is None:
                break
            text_ids, codes = self._reader.push(ids)
            yield from self._written(self._text.push(text_ids))
            if self._audio is not None and codes:
                yield from self._spoken(self._audio.push(codes))
        text, audio = self._text, self._audio
        self._read_anew()
        yield from self._written(text.flush())
        if audio is not None:
            yield from self._spoken(audio.flush())

    def _written(self, text: str) -> Iterator[dict[str, Any]]:
        if text:
            yield {"text": text}

    def _spoken(self, waveform: np.ndarray) -> Iterator[dict[str, Any]]:
        if waveform.size:
            yield {"audio": waveform, "sampling_rate": self.sampling_rate}


class TextDecoder:
    """Text ids to text, however many come at once, held back while a character is incomplete, for four ids at most: a
    character has at most four bytes and every id at least one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.held = 0
        self.printed = ""

    def push(self, ids: list[int]) -> str:
        return "".join(map(self._push, ids))

    def _push(self, token_id: int) -> str:
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.held += 1
        return "" if text.endswith("\ufffd") and self.held < 4 else self._emit(text)

    def flush(self) -> str:
        return self._emit(self.tokenizer.decode(self.ids, skip_special_tokens=True)) if self.ids else ""

    def _emit(self, text: str) -> str:
        piece = text[len(self.printed) :]
        self.printed, self.held = text, 0
        return piece
