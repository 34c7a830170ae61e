"""The engine's other threads: one turns the ids of answers into text and waveform, one encodes and decodes audio for
those who ask. So the audio tokenizer never holds up the decoding loop."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from processing.audio_codes_ttt import decode_codes, encode_waveforms
from processing.audio_input_ttt import load_waveform
from processing.interleaving_ttt import Deinterleaver
from processing.streaming_ttt import TextDecoder
from processing.waveform_stream_ttt import WaveformStream

from .engine_requests import AudioDelta, Finished, Generation, Overloaded, TextDelta, Usage

logger = logging.getLogger(__name__)

# Ids of an answer that are read at once, where so many wait. Decoders look at the codes around those that are new, so
# that a few at a time cost several times as much as many: whoever is behind catches up.
MOST_IDS = 26


class _Answer:
    """What is known of one answer: ids that wait to be read, and how far reading has come."""

    def __init__(self, generation: Generation, processor: Any):
        self.generation = generation
        self.pieces: deque[list[int] | Finished] = deque()
        self.is_queued = self.has_spoken = False
        self.wants_audio = "audio" in generation.request.modalities
        self.reader = Deinterleaver(processor.token_ids, processor.num_codebooks)
        self.text = TextDecoder(processor.tokenizer)
        self.text_ids: list[int] = []  # taken in, their text still held back
        has_codec = self.wants_audio and processor.audio_tokenizer is not None
        self.audio = WaveformStream(processor.audio_tokenizer) if has_codec else None

    def take(self) -> tuple[list[int], Finished | None]:
        """The next ids that wait, and the end of the answer where it follows on them."""
        ids: list[int] = []
        while self.pieces and len(ids) < MOST_IDS:
            piece = self.pieces.popleft()
            if isinstance(piece, Finished):
                return ids, piece
            ids += piece
        return ids, None

    def read(self, ids: list[int]) -> None:
        """Hand the next ids to the reader as what they mean."""
        text_ids, codes = self.reader.push(ids)
        self.text_ids += text_ids
        self._put_text(self.text.push(text_ids))
        if self.wants_audio and codes:
            self._put_audio(codes)

    def end(self) -> None:
        """Hand over what was held back."""
        self._put_text(self.text.flush())
        if self.audio is not None:
            waveform = self.audio.flush()
            if waveform.size:
                self.generation.put(AudioDelta(waveform, []))

    def _put_text(self, text: str) -> None:
        if text:
            self.generation.put(TextDelta(text, self.text_ids))
            self.text_ids = []

    def _put_audio(self, codes: list[int]) -> None:
        waveform = np.zeros(0, dtype=np.float32) if self.audio is None else self.audio.push(codes)
        self.has_spoken = True
        self.generation.put(AudioDelta(waveform, codes))


class AnswerThread:
    """
    Reads answers on a thread of its own, a piece of one and then of the next. An answer whose reader is behind waits.

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
                answer.pieces.append(piece)
                self._queue(answer)

    def resume(self, generation: Generation) -> None:
        """Its reader has read, or left."""
        with self._changed:
            answer = self._answers.get(generation)
            if answer is not None:
                self._queue(answer)

    def _queue(self, answer: _Answer) -> None:
        if not answer.is_queued and answer.pieces and (answer.generation.has_room or not self._is_open):
            answer.is_queued = True
            if answer.has_spoken:
                self._ready.append(answer)
            else:  # first audio is what one waits for
                self._ready.appendleft(answer)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ready:
                    if not self._is_open:
                        return
                    self._changed.wait()
                answer = self._ready.popleft()
                ids, end = answer.take()
            self._read(answer, ids, end)
            with self._changed:
                answer.is_queued = False
                if answer.generation.finished is not None:
                    self._answers.pop(answer.generation, None)
                else:
                    self._queue(answer)

    def _read(self, answer: _Answer, ids: list[int], end: Finished | None) -> None:
        generation = answer.generation
        try:
            if ids and not generation.is_cancelled:
                answer.read(ids)
            if end is not None and not generation.is_cancelled:
                answer.end()
        except Exception as error:  # of the audio tokenizer: this answer cannot be spoken, others can
            logger.exception("An answer could not be decoded.")
            usage, written = (end.usage, end.token_ids) if end is not None else (Usage(), [])
            generation.cancel()
            generation.put(Finished("failed", usage, written, error))
        if end is not None:
            reason = "cancelled" if generation.is_cancelled and end.reason != "failed" else end.reason
            generation.put(Finished(reason, end.usage, end.token_ids, end.error))


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
        self._executor.shutdown(wait=drain, cancel_futures=not drain)

    def _audio_tokenizer(self) -> Any:
        if self.processor.audio_tokenizer is None:
            raise ValueError("The processor has no audio tokenizer, so audio only comes as codes.")
        return self.processor.audio_tokenizer

    def _submit(self, run: Callable[[], Any]) -> Future[Any]:
        with self._lock:
            if self.num_waiting >= self.max_waiting:
                raise Overloaded(1.0)
            self.num_waiting += 1
        try:
            future = self._executor.submit(run)
        except BaseException:
            self._done()
            raise
        future.add_done_callback(lambda _: self._done())
        return future

    def _done(self) -> None:
        with self._lock:
            self.num_waiting -= 1


__all__ = ["AnswerThread", "CodecThread"]
