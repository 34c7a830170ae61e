"""The engine's other threads: one turns the ids of answers into text and waveform, one encodes and decodes audio for
those who ask. So the audio tokenizer never holds up the decoding loop."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from processing.audio_codes_ttt import decode_codes, encode_waveforms
from processing.audio_input_ttt import load_waveform
from processing.interleaving_ttt import Deinterleaver
from processing.streaming_ttt import TextDecoder
from processing.waveform_stream_ttt import WaveformStream, push_together

from .engine_requests import AudioDelta, EngineClosed, Finished, Generation, Overloaded, TextDelta, Usage

logger = logging.getLogger(__name__)

# Ids of several answers that are read at once. Of one answer it is as many codes as last 2.08 s: each pass of a decoder
# has a cost of its own, and some decode what is around the new codes again, so that many at a time cost less each.
MOST_IDS_TOGETHER = 64


class _Answer:
    """What is known of one answer: ids that wait to be read, and how far reading has come."""

    def __init__(self, generation: Generation, processor: Any):
        self.generation = generation
        self.is_queued = False
        self.ids: deque[int] = deque()  # that wait
        self.last: Finished | None = None  # that waits behind them
        self.num_codes = self.num_waiting_codes = 0
        self.wants_audio = "audio" in generation.request.modalities
        self.is_code = processor.token_ids.is_code
        self.reader = Deinterleaver(processor.token_ids, processor.num_codebooks)
        self.text = TextDecoder(processor.tokenizer)
        self.text_ids: list[int] = []  # taken in, their text still held back
        has_codec = self.wants_audio and processor.audio_tokenizer is not None
        self.audio = WaveformStream(processor.audio_tokenizer) if has_codec else None
        self.most_ids = self.audio.format.chunk_size if self.audio is not None else MOST_IDS_TOGETHER

    def add(self, piece: list[int] | Finished) -> None:
        """Put the next ids, or the end of the answer, behind those that wait."""
        if isinstance(piece, Finished):
            self.last = piece
        else:
            self.ids.extend(piece)
            self.num_waiting_codes += sum(map(self.is_code, piece))

    @property
    def is_due(self) -> bool:
        """
        Whether what waits is to be read. Codes wait until they are half as many as were spoken before: so the first
        ones are heard at once, and while those sound, larger pieces are put together, which cost less. Who writes as
        fast as one listens never falls silent by that.
        """
        if self.audio is None or self.last is not None or self.num_waiting_codes < len(self.ids):
            return self.has_waiting
        return self.has_waiting and self.num_waiting_codes >= min(self.most_ids, self.num_codes // 2)

    @property
    def has_waiting(self) -> bool:
        return bool(self.ids) or self.last is not None

    def take(self) -> tuple[list[int], Finished | None]:
        """The next ids that wait, and the end of the answer where it follows on them."""
        ids = [self.ids.popleft() for _ in range(min(self.most_ids, len(self.ids)))]
        num_codes = sum(map(self.is_code, ids))
        self.num_waiting_codes -= num_codes
        self.num_codes += num_codes
        return ids, None if self.ids else self.last

    def read(self, ids: list[int], is_last: bool) -> list[int]:
        """Hand text on; return the codes."""
        text_ids, codes = self.reader.push(ids)
        self.text_ids += text_ids
        self._put_text(self.text.push(text_ids))
        if is_last:
            self._put_text(self.text.flush())
        return codes if self.wants_audio else []

    def _put_text(self, text: str) -> None:
        if text:
            self.generation.put(TextDelta(text, self.text_ids))
            self.text_ids = []


@dataclass(eq=False)
class _Piece:
    """The next ids of an answer, on their way to text and waveform; its end, where it follows on them."""

    answer: _Answer
    ids: list[int]
    end: Finished | None
    codes: list[int] = field(default_factory=list)
    error: Exception | None = None

    @property
    def is_wanted(self) -> bool:
        return self.error is None and not self.answer.generation.is_cancelled

    def read(self) -> None:
        """Hand its text on, and find its codes."""
        try:
            if self.is_wanted:
                self.codes = self.answer.read(self.ids, self.end is not None)
        except Exception as error:
            self.error = error

    def finish(self) -> None:
        """Report a failure, or the end of the answer."""
        generation, end = self.answer.generation, self.end
        if self.error is not None:  # of the audio tokenizer: this answer cannot be spoken, others can
            logger.error("An answer could not be decoded.", exc_info=self.error)
            usage, written = (end.usage, end.token_ids) if end is not None else (Usage(), [])
            generation.cancel()
            generation.put(Finished("failed", usage, written, self.error))
        if end is not None:
            reason = "cancelled" if generation.is_cancelled and end.reason != "failed" else end.reason
            generation.put(Finished(reason, end.usage, end.token_ids, end.error))


def _speak(pieces: list[_Piece]) -> None:
    """Hand on the codes of some answers with their waveform, decoded together; each by itself where that fails."""
    speaking: list[_Piece] = []
    streams: list[WaveformStream] = []
    for piece in pieces:
        if piece.is_wanted and piece.answer.audio is not None and (piece.codes or piece.end is not None):
            speaking.append(piece)
            streams.append(piece.answer.audio)
        elif piece.is_wanted and piece.codes:
            piece.answer.generation.put(AudioDelta(np.zeros(0, dtype=np.float32), piece.codes))
    try:
        is_last = [piece.end is not None for piece in speaking]
        waveforms = push_together(streams, [piece.codes for piece in speaking], is_last)
    except Exception as error:
        if len(speaking) > 1:
            for piece in speaking:
                _speak([piece])
        else:
            speaking[0].error = error
        return
    for piece, waveform in zip(speaking, waveforms, strict=True):
        if piece.codes or waveform.size:
            piece.answer.generation.put(AudioDelta(waveform, piece.codes))


class AnswerThread:
    """
    Reads answers on a thread of its own: a piece of each that has one, those together that the audio tokenizer can
    decode in one pass. An answer whose reader is behind waits.

    Args:
        processor (`TttProcessor`): knows text, codes and the audio tokenizer.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self._changed = threading.Condition()
        self._answers: dict[Generation, _Answer] = {}
        self._ready: deque[_Answer] = deque()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="ttt-engine-answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """
        Read all answers to their end, whether or not anyone takes them, and stop; what is left after `timeout` seconds
        is cancelled. All have ended by now.
        """
        with self._changed:
            self._is_open = False
            for answer in self._answers.values():
                self._queue(answer)
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        for answer in list(self._answers.values()):
            answer.generation.cancel()  # which leaves nothing to be decoded
        if self._thread.is_alive():
            self._thread.join()

    def push(self, written: Sequence[tuple[Generation, list[int] | Finished]]) -> None:
        """Take the next ids of answers, or their ends."""
        with self._changed:
            for generation, piece in written:
                answer = self._answers.get(generation)
                if answer is None:
                    answer = self._answers[generation] = _Answer(generation, self.processor)
                answer.add(piece)
                self._queue(answer)

    def resume(self, generation: Generation) -> None:
        """Its reader has read, or left."""
        with self._changed:
            answer = self._answers.get(generation)
            if answer is not None:
                self._queue(answer)

    def _queue(self, answer: _Answer) -> None:
        is_due = answer.is_due and answer.generation.has_room if self._is_open else answer.has_waiting
        if is_due and not answer.is_queued:
            answer.is_queued = True
            if answer.num_codes:
                self._ready.append(answer)
            else:  # first audio is what one waits for
                self._ready.appendleft(answer)
            self._changed.notify_all()

    def _take(self) -> list[_Piece]:
        """The next piece, and what can be read together with it."""
        pieces: list[_Piece] = []
        num_ids = 0
        while self._ready and num_ids < MOST_IDS_TOGETHER:
            audio = self._ready[0].audio
            if pieces and audio is not None and not audio.can_join:
                break
            answer = self._ready.popleft()
            pieces.append(_Piece(answer, *answer.take()))
            num_ids += len(pieces[-1].ids)
        return pieces

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ready:
                    if not self._is_open:
                        return
                    self._changed.wait()
                pieces = self._take()
            for piece in pieces:
                piece.read()
            _speak(pieces)
            for piece in pieces:
                piece.finish()
            with self._changed:
                for piece in pieces:
                    piece.answer.is_queued = False
                    if piece.answer.generation.finished is not None:
                        self._answers.pop(piece.answer.generation, None)
                    else:
                        self._queue(piece.answer)


class CodecThread:
    """
    Encodes and decodes audio for those who ask, one after the other, on a thread of its own.

    Args:
        processor (`TttProcessor`): with an audio tokenizer.
        max_seconds (`float`): longest waveform taken.
        max_waiting (`int`): most jobs that wait.
    """

    def __init__(self, processor: Any, max_seconds: float, max_waiting: int):
        self.processor, self.max_seconds, self.max_waiting = processor, max_seconds, max_waiting
        self._executor = ThreadPoolExecutor(1, "ttt-engine-codec")
        self._lock = threading.Lock()
        self.num_waiting = 0
        self._is_aborting = False

    def encode(self, waveform: Any, sampling_rate: float) -> Future[list[int]]:
        """See [`Engine.encode_audio`]."""
        samples = waveform.detach().cpu().numpy() if isinstance(waveform, torch.Tensor) else np.asarray(waveform)
        if samples.ndim != 1 or samples.size == 0 or samples.dtype.kind not in "fiu":
            raise ValueError(
                f"`waveform` has shape {samples.shape} and type {samples.dtype}; use (samples,) of numbers, not empty."
            )
        if not (isinstance(sampling_rate, (int, float)) and 1000 <= sampling_rate <= 768_000):
            raise ValueError(f"`sampling_rate` is {sampling_rate!r}; use a number of Hz, from 1000 to 768000.")
        seconds = samples.size / sampling_rate
        if seconds > self.max_seconds:
            raise ValueError(f"`waveform` lasts {seconds:.1f} s, but at most {self.max_seconds:g} s are taken.")
        if not np.isfinite(samples).all():
            raise ValueError("`waveform` holds NaN or infinite samples; remove them first.")

        def run() -> list[int]:
            extractor, audio_tokenizer = self.processor.feature_extractor, self._audio_tokenizer()
            mono = load_waveform(samples, extractor.sampling_rate, sampling_rate, "waveform")
            return encode_waveforms(audio_tokenizer, extractor, [mono], 1, ["waveform"])[0].tolist()

        return self._submit(run)

    def decode(self, codes: Sequence[int]) -> Future[np.ndarray]:
        """See [`Engine.decode_audio`]."""
        codes = [int(code) for code in codes]
        if not all(0 <= code < self.processor.token_ids.num_audio_codes for code in codes):
            raise ValueError(f"`codes` must be from 0 to {self.processor.token_ids.num_audio_codes - 1}.")
        return self._submit(lambda: decode_codes(self._audio_tokenizer(), [codes], 1)[0])

    def close(self, drain: bool) -> None:
        """Take no more jobs; without `drain` those that wait end with `EngineClosed`, which their callers can tell."""
        self._is_aborting = self._is_aborting or not drain
        self._executor.shutdown(wait=drain)

    def _audio_tokenizer(self) -> Any:
        if self.processor.audio_tokenizer is None:
            raise ValueError("The processor has no audio tokenizer, so audio only comes as codes.")
        return self.processor.audio_tokenizer

    def _submit(self, run: Callable[[], Any]) -> Future[Any]:
        def job() -> Any:
            if self._is_aborting:
                raise EngineClosed("The engine was closed before it came to this audio.")
            return run()

        with self._lock:
            if self.num_waiting > self.max_waiting:  # one of them is being worked on
                raise Overloaded(1.0)
            self.num_waiting += 1
        try:
            future = self._executor.submit(job)
        except RuntimeError as error:  # closed since the caller looked
            self._done()
            raise EngineClosed("The engine takes no audio: it is closing.") from error
        except BaseException:
            self._done()
            raise
        future.add_done_callback(lambda _: self._done())
        return future

    def _done(self) -> None:
        with self._lock:
            self.num_waiting -= 1


__all__ = ["AnswerThread", "CodecThread"]
