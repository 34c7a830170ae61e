"""An answer as it is generated: `generate`'s streamer hands ids in on one thread, pieces of text and waveform come out
on another."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from .interleaving_ttt import TttTokenIds, to_list


class TttStreamCancelled(Exception):
    """Raised inside `generate` when the reader of a stream has left."""


class TttStreamer(BaseStreamer):
    """Passed to `generate(streamer=...)`, which runs in another thread, and iterated over in this one.

    Each item is `{"text": str}` or `{"audio": (samples,) float32, "sampling_rate": int}`. Texts joined are the answer's
    text; waveforms joined are the answer decoded as a whole (exactly so with an audio tokenizer that has
    `streaming_decoder()`; with any other, the waveform comes in one piece at the end). Waveforms are decoded in the
    thread that iterates.

    Args:
        tokenizer: decodes text ids.
        token_ids: tells text from audio.
        audio_tokenizer: decodes codes; None to leave audio out.
        sampling_rate: of the waveforms, Hz.
        skip_prompt: `generate` hands the prompt in first; leave it out.
        timeout: seconds to wait for the next piece before `queue.Empty` is raised; None waits for ever.
    """

    def __init__(
        self,
        tokenizer: Any,
        token_ids: TttTokenIds,
        audio_tokenizer: Any | None = None,
        sampling_rate: int = 16_000,
        skip_prompt: bool = True,
        timeout: float | None = None,
    ):
        self.tokenizer = tokenizer
        self.token_ids = token_ids
        self.audio_tokenizer = audio_tokenizer
        self.sampling_rate = sampling_rate
        self.timeout = timeout
        self._skip_next = skip_prompt
        self._queue: queue.Queue[Any] = queue.Queue()
        self._cancelled = False
        self._text = _TextDecoder(tokenizer)
        self._audio = None if audio_tokenizer is None else _AudioDecoder(audio_tokenizer)

    def put(self, value: torch.Tensor) -> None:
        """Takes ids, (length,) or (1, length); called by `generate`.

        Raises:
            ValueError: more than one row.
            TttStreamCancelled: the reader has left.
        """
        if self._cancelled:
            raise TttStreamCancelled
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"A stream carries one answer, got a batch of {value.shape[0]}. Generate them one by one.")
        if self._skip_next:
            self._skip_next = False
            return
        self._queue.put(to_list(value.reshape(-1)))

    def end(self) -> None:
        """Called by `generate` when the answer is complete."""
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error, raised where it is read."""
        self._queue.put(error)

    def cancel(self) -> None:
        """Stops the generation at its next token."""
        self._cancelled = True

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            ids = self._queue.get(timeout=self.timeout)
            if isinstance(ids, BaseException):
                raise ids
            if ids is None:
                break
            text_ids, codes = self._separate(ids)
            yield from self._pieces(self._text.push(text_ids), codes)
        yield from self._pieces(self._text.flush(), [])
        if self._audio is not None:
            yield from self._waveform(self._audio.flush())

    def _separate(self, ids: list[int]) -> tuple[list[int], list[int]]:
        structural = self.token_ids.structural
        text_ids = [i for i in ids if i < self.token_ids.audio_token_id_start and i not in structural]
        codes = [i - self.token_ids.audio_code_id_start for i in ids if self.token_ids.is_code(i)]
        return text_ids, codes

    def _pieces(self, text: str, codes: list[int]) -> Iterator[dict[str, Any]]:
        if text:
            yield {"text": text}
        if codes and self._audio is not None:
            yield from self._waveform(self._audio.push(codes))

    def _waveform(self, waveform: np.ndarray) -> Iterator[dict[str, Any]]:
        if waveform.size:
            yield {"audio": waveform, "sampling_rate": self.sampling_rate}


class _TextDecoder:
    """Text ids to text, held back while a character is incomplete, for four ids at most: a character has at most four
    bytes and every id at least one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.held = 0
        self.printed = ""

    def push(self, ids: list[int]) -> str:
        if not ids:
            return ""
        self.ids += ids
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        self.held += len(ids)
        return "" if text.endswith("\ufffd") and self.held < 4 else self._emit(text)

    def flush(self) -> str:
        return self._emit(self.tokenizer.decode(self.ids, skip_special_tokens=True)) if self.ids else ""

    def _emit(self, text: str) -> str:
        piece = text[len(self.printed) :]
        self.printed, self.held = text, 0
        return piece


class _AudioDecoder:
    """Codes to waveform: with the audio tokenizer's own streaming decoder, else all at once at the end."""

    def __init__(self, audio_tokenizer: Any):
        self.audio_tokenizer = audio_tokenizer
        self.codes: list[int] = []
        has_stream = hasattr(audio_tokenizer, "streaming_decoder")
        self.stream = audio_tokenizer.streaming_decoder() if has_stream else None

    @torch.no_grad()
    def push(self, codes: list[int]) -> np.ndarray:
        if self.stream is None:
            self.codes += codes
            return np.zeros(0, dtype=np.float32)
        return self._to_numpy(self.stream.push(self._to_tensor(codes)))

    @torch.no_grad()
    def flush(self) -> np.ndarray:
        if self.stream is not None:
            return self._to_numpy(self.stream.flush())
        if not self.codes:
            return np.zeros(0, dtype=np.float32)
        return self._to_numpy(self.audio_tokenizer.decode(self._to_tensor(self.codes)[None, None]).audio_values)

    def _to_tensor(self, codes: list[int]) -> torch.Tensor:
        return torch.tensor(codes, dtype=torch.long, device=self.audio_tokenizer.device)

    def _to_numpy(self, waveform: torch.Tensor) -> np.ndarray:
        return waveform.reshape(-1).float().cpu().numpy()
