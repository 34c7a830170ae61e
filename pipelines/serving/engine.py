"""The engine: one model, many requests at once. Requests and events are in engine_requests.py, the threads of the audio
tokenizer in engine_codec.py, the decoding loop in modeling_ttt."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from modeling_ttt.cache_ttt import TttCache

from .engine_codec import AnswerThread, CodecThread
from .engine_requests import (
    MODALITIES,
    EngineClosed,
    Finished,
    Generation,
    GenerationRequest,
    Overloaded,
    Usage,
)

logger = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """Counts of an engine: gauges as they are now, counters since it was made."""

    max_rows: int = 0
    max_queue: int = 0
    queued: int = 0
    rows: int = 0
    encoding: int = 0
    sessions: int = 0
    session_bytes: int = 0
    submitted: int = 0
    overloaded: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    forwards: int = 0
    token_positions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text_tokens: int = 0
    audio_codes: int = 0


class _Cancelled(Exception):
    pass


class _Sink:
    def __init__(self, engine: Engine, generation: Generation):
        self.engine, self.generation, self.is_prompt = engine, generation, True
        self.ids: list[int] = []

    def put(self, ids: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        if self.generation.is_cancelled or self.generation.is_late or self.engine._is_aborting:
            raise _Cancelled
        self.ids += ids.tolist()
        self.engine._answers.push(self.generation, ids.tolist())

    def end(self) -> None:
        pass


class Engine:
    """
    Generation for many callers.

    Args:
        model (`TttForConditionalGeneration`): in eval mode; nothing else may train or move it meanwhile.
        processor (`TttProcessor`): its processor.
        max_rows (`int`, *optional*, defaults to 8): requests generated together.
        max_queue (`int`, *optional*, defaults to 64): requests that wait beyond those.
        max_context (`int`, *optional*): tokens of prompt and answer; what the model has positions for by default.
        max_audio_seconds (`float`, *optional*, defaults to 60): longest waveform that is encoded.
        session_memory (`int`, *optional*, defaults to 512 MiB): bytes of caches kept for sessions, least recently used
            ones going first.
        max_buffered_seconds (`float`, *optional*, defaults to 30): of waveform decoded ahead of a reader.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_rows: int = 8,
        max_queue: int = 64,
        max_context: int | None = None,
        max_audio_seconds: float = 60.0,
        session_memory: int = 512 * 2**20,
        max_buffered_seconds: float = 30.0,
    ):
        self.model, self.processor = model, processor
        self.max_rows, self.max_queue = max_rows, max_queue
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_context = most if max_context is None else max_context
        self.session_memory, self.max_buffered = session_memory, max_buffered_seconds * processor.sampling_rate
        self.sampling_rate: int = processor.sampling_rate
        self.input_sampling_rate: int = processor.feature_extractor.sampling_rate
        self._stats = EngineStats(max_rows=max_rows, max_queue=max_queue)
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._num_rows = 0
        self._sessions: OrderedDict[str, TttCache] = OrderedDict()
        self._is_open = self._is_aborting = False
        self._seconds_each = 1.0
        self._answers = AnswerThread(processor)
        self._codec = CodecThread(processor, max_audio_seconds, max_queue)
        self._thread = threading.Thread(target=self._run, name="ttt-engine", daemon=True)

    def start(self) -> Engine:
        """Start the threads. Returns the engine itself."""
        self._is_open = True
        self._answers.start()
        self._thread.start()
        return self

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; finish those there are (`drain`, for `timeout` seconds at most), or end them."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._is_open = False
            self._is_aborting = self._is_aborting or not drain
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(None if until is None else max(0.0, until - time.monotonic()))
            self._is_aborting = True
            self._thread.join()
        self._codec.close(drain)
        self._answers.close()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        return self._is_open and self._thread.is_alive()

    def stats(self) -> EngineStats:
        with self._changed:
            return replace(
                self._stats,
                finished=dict(self._stats.finished),
                queued=len(self._waiting),
                rows=self._num_rows,
                encoding=self._codec.num_waiting,
                sessions=len(self._sessions),
            )

    def forget(self, session: str) -> None:
        """Drop what is kept of a session."""
        with self._changed:
            self._sessions.pop(session, None)

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request into the queue. See [`GenerationRequest`]."""
        ids = request.input_ids
        prompt = (ids.reshape(-1).tolist()) if isinstance(ids, torch.Tensor) else [int(token) for token in ids]
        if not prompt:
            raise ValueError("`input_ids` is empty; pass a prompt of a token or more.")
        unknown = sorted(name for name in request.options if name not in self.model.generation_config.__dict__)
        if unknown:
            raise ValueError(f"There is no option {unknown[0]!r}; options are those of TttGenerationConfig.")
        if not set(request.modalities) <= set(MODALITIES) or "text" not in request.modalities:
            raise ValueError(f"`modalities` is {request.modalities!r}; use ('text', 'audio') or ('text',).")
        generation = Generation(prompt, request, self.max_buffered, self._on_cancel, self._answers.resume)
        with self._changed:
            if not self._is_open or not self._thread.is_alive():
                raise EngineClosed("The engine takes no requests: it has not started, or is closing.")
            if len(self._waiting) >= self.max_queue:
                self._stats.overloaded += 1
                raise Overloaded(max(1.0, self._seconds_each * len(self._waiting)))
            self._stats.submitted += 1
            self._waiting.append(generation)
            self._changed.notify_all()
        return generation

    def encode_audio(self, waveform: Any, sampling_rate: float) -> Future[list[int]]:
        """Encode a waveform of shape `(samples,)` on the codec's thread; gives its codes."""
        if not self._is_open:
            raise EngineClosed("The engine takes no requests: it has not started, or is closing.")
        return self._codec.encode(waveform, sampling_rate)

    def decode_audio(self, codes: Sequence[int]) -> Future[np.ndarray]:
        """Decode codes on the codec's thread; gives a waveform of shape `(samples,)`."""
        if not self._is_open:
            raise EngineClosed("The engine takes no requests: it has not started, or is closing.")
        return self._codec.decode(codes)

    def _on_cancel(self, generation: Generation) -> None:
        with self._changed:
            self._changed.notify_all()
        self._answers.resume(generation)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and self._is_open:
                    self._changed.wait()
                if not self._waiting:
                    return
                generation = self._waiting.popleft()
                self._num_rows = 1
            started = time.monotonic()
            try:
                finished = self._answer(generation)
            except Exception as error:
                logger.exception("An answer failed.")
                finished = Finished("failed", Usage(len(generation.prompt)), [], error)
            self._seconds_each = time.monotonic() - started
            with self._changed:
                counts = self._stats.finished
                counts[finished.reason] = counts.get(finished.reason, 0) + 1
                self._num_rows = 0
            self._answers.push(generation, finished)

    def _answer(self, generation: Generation) -> Finished:
        request, sink = generation.request, _Sink(self, generation)
        options = dict(request.options)
        if request.seed is not None:
            options["seed"] = request.seed
        if "text" in request.modalities and "audio" not in request.modalities:
            # The begin token of the last span stands where the text is complete, so it ends an answer in text.
            config, ends = self.model.config, options.get("eos_token_id", self.model.generation_config.eos_token_id)
            ends = [ends] if isinstance(ends, int) else list(ends or [])
            options["eos_token_id"] = [*ends, config.begin_of_last_audio_token_id]
            suppressed = [*(options.get("suppress_tokens") or []), config.begin_of_audio_token_id]
            options["suppress_tokens"] = suppressed
        if options.get("stop_strings") is not None:
            options["tokenizer"] = self.processor.tokenizer
        cache = self._sessions.pop(request.session, None) if request.session is not None else None
        cached = 0 if cache is None else len(cache.token_ids[0])
        forwards = 0
        try:
            if generation.is_cancelled or generation.is_late:
                raise _Cancelled
            output = self.model.generate(
                torch.tensor([generation.prompt]),
                streamer=sink,
                past_key_values=cache,
                return_dict_in_generate=True,
                **options,
            )
            forwards = output.num_forwards
            if request.session is not None:
                self._sessions[request.session] = output.past_key_values
            limit = options.get("max_new_tokens") or self.model.generation_config.max_new_tokens
            reason = "length" if len(sink.ids) == limit else "stop"
        except _Cancelled:
            reason = "cancelled" if generation.is_cancelled or self._is_aborting else "deadline"
        num_codes = sum(map(self.processor.token_ids.is_code, sink.ids))
        usage = Usage(len(generation.prompt), cached, len(sink.ids) - num_codes, num_codes, forwards)
        with self._changed:
            stats = self._stats
            stats.forwards += forwards
            stats.prompt_tokens += usage.prompt_tokens
            stats.text_tokens += usage.text_tokens
            stats.audio_codes += usage.audio_codes
        return Finished(reason, usage, sink.ids)


__all__ = ["Engine", "EngineStats"]
