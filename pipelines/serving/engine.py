"""The engine: one model writes answers for many callers at once. Requests and events are in engine_requests.py, the
threads of the audio tokenizer in engine_codec.py, the decoding loop itself in modeling_ttt/decoding_ttt.py."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from modeling_ttt.cache_ttt import TttCache
from modeling_ttt.decoding_ttt import Call, Row
from modeling_ttt.ragged_runner_ttt import RaggedRunner
from modeling_ttt.runner_ttt import TttRunner

from .engine_codec import AnswerThread, CodecThread
from .engine_requests import MODALITIES, EngineClosed, Finished, Generation, GenerationRequest, Overloaded, Usage
from .engine_sessions import SessionCaches

logger = logging.getLogger(__name__)

# Options of `generate` that are about its output, of which the engine has its own.
OWN_OPTIONS = ("num_return_sequences", "output_logits", "output_scores", "return_dict_in_generate", "use_cache")


@dataclass
class EngineStats:
    """
    Counts of an engine. `queued`, `rows`, `encoding`, `sessions` and `session_bytes` are as they are now, beside the
    limits `max_rows` and `max_queue`; the others grow, `finished` by the reason of the end.
    """

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


@dataclass(eq=False)
class _Job:
    """A request on its way: prepared, then waiting, then a row of the batch."""

    generation: Generation
    call: Call
    started: float = 0.0

    @property
    def row(self) -> Row:
        return self.call.rows[0]

    @property
    def session(self) -> str | None:
        return self.generation.request.session

    @property
    def early_end(self) -> str | None:
        """Why it is to end where it is, if so."""
        if self.generation.is_cancelled:
            return "cancelled"
        return "deadline" if self.generation.is_late else None


class _Sink:
    """The streamer of one row: hands its ids on, and counts them."""

    def __init__(self, engine: Engine, generation: Generation):
        self.engine, self.generation = engine, generation

    def put(self, ids: torch.Tensor) -> None:
        tokens = ids.tolist()
        num_codes = sum(map(self.engine.processor.token_ids.is_code, tokens))
        self.engine._stats.audio_codes += num_codes
        self.engine._stats.text_tokens += len(tokens) - num_codes
        self.engine._written.append((self.generation, tokens))

    def end(self) -> None:
        pass


class Engine:
    """
    Answers for many callers, by continuous batching: between two forwards a request that waits joins the batch and an
    answer that is done leaves it, whatever the others are at. Each answer has, token for token, what `generate` gives
    for its request alone, since both run the same loop ([`TttDecoder`]) over rows that do not see each other.

    Transformers has continuous batching for models that write one token after the other (`generate_batch`, and
    `init_continuous_batching` for requests that come and go). Its paged cache and its scheduler take a token for final
    once it is written. Ours runs a block of masks several times, in which every token sees the later ones of its span,
    and takes back what it cached in between: so this engine has a loop of its own, over [`TttCache`].

    Threads: one runs the model, one turns ids into text and waveform, one encodes and decodes audio for those who ask.
    All methods may be called from any thread, and none waits for the model but `close`.

    ```python
    with Engine(model, processor, max_rows=16) as engine:
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        generation = engine.submit(GenerationRequest(inputs["input_ids"], {"max_new_tokens": 200}, session="ann"))
        for event in generation:  # or `async for`
            if isinstance(event, TextDelta):
                print(event.text, end="")
            elif isinstance(event, AudioDelta):
                play(event.waveform)
    ```

    Args:
        model ([`TttForConditionalGeneration`]): in eval mode. Nobody else may train, move or adapt it meanwhile.
        processor ([`TttProcessor`]): its processor. Without an audio tokenizer, speech comes as codes alone.
        max_rows (`int`, *optional*, defaults to 8): requests answered together.
        max_queue (`int`, *optional*, defaults to 64): requests that wait beyond those, and waveforms that do.
        max_context (`int`, *optional*): tokens of prompt and answer; the model's positions by default.
        max_audio_seconds (`float`, *optional*, defaults to 60.0): longest waveform that `encode_audio` takes.
        session_memory (`int`, *optional*, defaults to 512 MiB):
            Bytes of caches kept between the turns of sessions; least recently used ones go first.
        max_buffered_seconds (`float`, *optional*, defaults to 30.0):
            Of waveform that is decoded ahead of the reader of an answer. The rest waits as codes.

    Raises:
        ValueError: if the model cannot be served, or a limit makes no sense.
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
        if model.config.audio_objective == "autoregressive":
            raise ValueError(
                "This model writes its audio left to right: Transformers' own continuous batching serves it, see "
                "`generate_batch`."
            )
        if model.training:
            raise ValueError("The model is in training mode; call `model.eval()` first.")
        for name, value, least in (
            ("max_rows", max_rows, 1),
            ("max_queue", max_queue, 0),
            ("max_context", max_context, 2),
        ):
            if value is not None and not (isinstance(value, Integral) and value >= least):
                raise ValueError(f"`{name}` is {value!r}; use an integer of at least {least}.")
        self.model, self.processor = model, processor
        self.max_rows, self.max_queue = max_rows, max_queue
        limits = (max_context, getattr(model.config.get_text_config(), "max_position_embeddings", None))
        self.max_context: int | None = min((limit for limit in limits if limit is not None), default=None)
        self.sampling_rate: int = processor.sampling_rate
        self.input_sampling_rate: int = processor.feature_extractor.sampling_rate
        self._max_buffered = max_buffered_seconds * self.sampling_rate
        self._stats = EngineStats(max_rows=max_rows, max_queue=max_queue)
        self._sessions = SessionCaches(session_memory)
        self._answers = AnswerThread(processor)
        self._codec = CodecThread(processor, max_audio_seconds, max_queue)

        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._is_open = self._is_closed = self._is_aborting = False
        self._preparing = threading.Lock()

        # Of the loop's thread alone.
        self._live: dict[Row, _Job] = {}
        self._written: list[tuple[Generation, list[int] | Finished]] = []  # since it was handed on
        self._seconds_per_answer = 1.0
        self._runner_class = RaggedRunner if RaggedRunner.serves(model) else TttRunner
        self._make_decoder()
        self._thread = threading.Thread(target=self._run, name="ttt-engine", daemon=True)

    # ---- start and end -----------------------------------------------------------------------------------------------

    def start(self) -> Engine:
        """Start the threads, once. Returns the engine itself."""
        if self._thread.ident is not None or self._is_closed:
            raise EngineClosed("An engine starts once; make another one.")
        self._is_open = True
        self._answers.start()
        self._thread.start()
        return self

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """
        Take no more requests and stop. It may be called again.

        Args:
            drain (`bool`, *optional*, defaults to `True`): answer all requests first; otherwise they end as cancelled.
            timeout (`float`, *optional*): seconds after which they do all the same.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._is_open, self._is_closed = False, True
            self._is_aborting = self._is_aborting or not drain
            self._changed.notify_all()
        self._codec.close(drain)
        if self._thread.is_alive():
            self._thread.join(None if until is None else max(0.0, until - time.monotonic()))
            self._is_aborting = True
            self._thread.join()
        self._answers.close(None if until is None else max(0.0, until - time.monotonic()))

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        return self.start()

    async def __aexit__(self, *_: Any) -> None:
        await asyncio.to_thread(self.close)

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return self._is_open and self._thread.is_alive()

    def stats(self) -> EngineStats:
        """Return the counts, a copy."""
        with self._changed:
            return replace(
                self._stats,
                finished=dict(self._stats.finished),
                queued=len(self._waiting),
                rows=len(self._live),
                encoding=self._codec.num_waiting,
                sessions=len(self._sessions),
                session_bytes=self._sessions.num_bytes,
            )

    # ---- for callers -------------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> Generation:
        """
        Put a request into the queue.

        Returns:
            [`Generation`]: the answer, as it is written.

        Raises:
            EngineClosed: if the engine does not run.
            Overloaded: if the queue is full.
            ValueError: for a prompt, option or other setting that cannot be served, naming it.
        """
        self._refuse_when_closed()
        self._refuse_when_full()
        job = self._prepare(request)
        with self._changed:
            self._refuse_when_closed()
            self._refuse_when_full()
            self._stats.submitted += 1
            self._waiting.append(job)
            self._changed.notify_all()
        return job.generation

    def encode_audio(self, waveform: Any, sampling_rate: float) -> Future[list[int]]:
        """
        Encode a waveform on the audio tokenizer's thread. In asyncio: `await asyncio.wrap_future(...)`.

        Args:
            waveform (`np.ndarray` or `torch.Tensor` of shape `(samples,)`): float in [-1, 1], or integer PCM.
            sampling_rate (`float`): Hz; other rates than `input_sampling_rate` are resampled.

        Returns:
            `Future[list[int]]`: its codes, for `{"type": "audio", "audio_codes": codes}` in a message.

        Raises:
            EngineClosed, Overloaded: as `submit`.
            ValueError: for a waveform that is none, or longer than `max_audio_seconds`.
        """
        self._refuse_when_closed()
        return self._codec.encode(waveform, sampling_rate)

    def decode_audio(self, codes: Sequence[int]) -> Future[np.ndarray]:
        """
        Decode codes on the audio tokenizer's thread, into a waveform of shape `(samples,)` at `sampling_rate`. Raises
        as `encode_audio`.
        """
        self._refuse_when_closed()
        return self._codec.decode(codes)

    def forget(self, session: str) -> None:
        """Drop what is kept of a session."""
        self._sessions.forget(session)

    def _refuse_when_closed(self) -> None:
        if not self.is_running:
            raise EngineClosed("The engine takes no requests: it has not started, is closing, or has died.")

    def _refuse_when_full(self) -> None:
        if len(self._waiting) >= self.max_queue + max(0, self.max_rows - len(self._live)):
            with self._changed:
                self._stats.overloaded += 1
            raise Overloaded(max(1.0, self._seconds_per_answer / self.max_rows))

    # ---- from requests to rows ---------------------------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> _Job:
        """Check a request, and have the model prepare it as `generate` would."""
        prompt = self._read_prompt(request.input_ids)
        options = self._read_options(request)
        if request.deadline is not None and not (
            isinstance(request.deadline, Real) and not math.isnan(request.deadline)
        ):
            raise ValueError(f"`deadline` is {request.deadline!r}; use seconds, or None.")
        if request.session is not None and not (isinstance(request.session, str) and request.session):
            raise ValueError(f"`session` is {request.session!r}; use a name, or None.")
        if options.get("stop_strings") is not None:
            options["tokenizer"] = self.processor.tokenizer
        room = None if self.max_context is None else self.max_context - len(prompt)
        if room is not None and room < 1:
            raise ValueError(
                f"`input_ids` has {len(prompt)} tokens, which leaves no room for an answer: prompt and answer have "
                f"{self.max_context} together. Shorten the prompt."
            )
        ids = torch.tensor([prompt])
        with self._preparing, torch.no_grad():
            call = self.model.prepare_call(ids, attention_mask=torch.ones_like(ids), **options)
        if room is not None and call.max_new_tokens > room:
            if options.get("max_new_tokens") is not None or options.get("max_length") is not None:
                raise ValueError(
                    f"The prompt ({len(prompt)} tokens) and `max_new_tokens` ({call.max_new_tokens}) are longer than "
                    f"{self.max_context} together: shorten the prompt or lower `max_new_tokens`."
                )
            call.max_new_tokens = room
        generation = Generation(prompt, request, self._max_buffered, self._on_cancel, self._answers.resume)
        call.streamer = _Sink(self, generation)
        return _Job(generation, call)

    def _read_prompt(self, input_ids: Any) -> list[int]:
        if isinstance(input_ids, (torch.Tensor, np.ndarray)):
            if input_ids.ndim == 2 and input_ids.shape[0] == 1:
                input_ids = input_ids[0]
            if input_ids.ndim != 1:
                raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; use (length,) or (1, length).")
            input_ids = input_ids.tolist()
        if not isinstance(input_ids, Sequence) or isinstance(input_ids, str | bytes) or not len(input_ids):
            raise ValueError("`input_ids` must be a sequence of token ids, of one or more.")
        size = self.model.config.get_text_config().vocab_size
        for position, token in enumerate(input_ids):
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) < size:
                raise ValueError(f"`input_ids` holds {token!r} at position {position}; ids are from 0 to {size - 1}.")
        return [int(token) for token in input_ids]

    def _read_options(self, request: GenerationRequest) -> dict[str, Any]:
        if not isinstance(request.options, Mapping) or not all(isinstance(name, str) for name in request.options):
            raise ValueError(f"`options` is {request.options!r}; use a mapping of names to values.")
        options = {name: value for name, value in request.options.items() if value is not None}
        for name in options:
            if name.startswith("_") or name not in self.model.generation_config.__dict__:
                raise ValueError(f"There is no option {name!r}; options are those of TttGenerationConfig.")
            if name in OWN_OPTIONS:
                raise ValueError(f"`{name}` is not for the engine, which gives one answer, as events; leave it out.")
        modalities = request.modalities
        is_list = isinstance(modalities, Sequence) and not isinstance(modalities, str)
        if not is_list or not set(modalities) <= set(MODALITIES) or "text" not in modalities:
            raise ValueError(f"`modalities` is {modalities!r}; use ('text', 'audio') or ('text',).")
        if "audio" not in modalities:
            # The begin token of the last span stands where the text is complete, so it ends an answer in text.
            config, ends = self.model.config, options.get("eos_token_id", self.model.generation_config.eos_token_id)
            ends = [ends] if isinstance(ends, int) else list(ends or [])
            options["eos_token_id"] = [*ends, config.begin_of_last_audio_token_id]
            options["suppress_tokens"] = [*options.get("suppress_tokens", ()), config.begin_of_audio_token_id]
        if request.seed is not None:
            if "seed" in options:
                raise ValueError("`seed` is given twice, also in `options`; give it once.")
            options["seed"] = request.seed
        return options

    def _on_cancel(self, generation: Generation) -> None:
        with self._changed:
            self._changed.notify_all()
        self._answers.resume(generation)

    # ---- the loop's thread -------------------------------------------------------------------------------------------

    def _make_decoder(self) -> None:
        self._cache = TttCache(self.model.config.get_text_config().num_hidden_layers, 0, self.max_rows)
        longest = self.max_context or 2**31
        self._decoder = self.model.decoder_class(self.model, self._cache, longest, self._runner_class)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._end_early()
                job = self._next_job()
                if job is not None:
                    self._admit(job)
                if self._live:
                    self._step()
                self._hand_on()
        except BaseException as error:
            logger.exception("The engine has died.")
            with self._changed:
                self._is_open = False
                jobs = [*self._live.values(), *self._waiting]
                self._live.clear()
                self._waiting.clear()
            for job in jobs:
                self._report(job, "failed", error)
            self._hand_on()

    def _hand_on(self) -> None:
        """Give what was written to the thread that reads it."""
        written, self._written = self._written, []
        if written:
            self._answers.push(written)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False where there is nothing and will not be."""
        with self._changed:
            while not self._waiting and not self._live and self._is_open:
                self._changed.wait()
            return bool(self._waiting or self._live)

    def _end_early(self) -> None:
        """End what was cancelled or is late, waiting or live."""
        reason = "cancelled" if self._is_aborting else None
        with self._changed:
            ended = [(job, early) for job in self._waiting if (early := reason or job.early_end)]
            for job, _ in ended:
                self._waiting.remove(job)
        for job, early in [*ended, *((job, e) for job in self._live.values() if (e := reason or job.early_end))]:
            self._finish(job, early)

    def _next_job(self) -> _Job | None:
        """The first request that may join the batch: not while another turn of its session is there."""
        if len(self._live) >= self.max_rows:
            return None
        busy = {job.session for job in self._live.values()} - {None}
        with self._changed:
            for job in self._waiting:
                if job.session not in busy:
                    self._waiting.remove(job)
                    return job
                busy.add(job.session)
        return None

    def _admit(self, job: _Job) -> None:
        """Run a request's prompt alone, then have its row join the others. One between two forwards, lest they wait."""
        job.started = time.monotonic()
        cache = None if job.session is None else self._sessions.take(job.session)
        self._live[job.row] = job
        try:
            if cache is None:
                cache = TttCache(len(self._cache.layers), 1)
            done = self._decoder.admit(job.call, cache)
        except Exception as error:
            logger.exception("A prompt could not be run.")
            if self._cache.rows_held == len(self._live) - 1:  # it has not joined
                self._finish(job, "failed", error)
            else:
                self._fail_all(error)
            return
        self._stats.prompt_tokens += job.row.prompt_length
        self._stats.cached_tokens += job.row.reused
        self._count_forwards()
        self._retire(done)

    def _step(self) -> None:
        try:
            done = self._decoder.step()
        except Exception as error:
            logger.exception("A forward failed.")
            self._fail_all(error)
            return
        self._count_forwards()
        self._retire(done)

    def _retire(self, rows: list[Row]) -> None:
        for row in rows:
            if row.call.error is not None:
                logger.error("An answer failed.", exc_info=row.call.error)
            self._finish(self._live[row], row.reason or "stop", row.call.error)

    def _finish(self, job: _Job, reason: str, error: BaseException | None = None) -> None:
        """End an answer; its row leaves the batch, its cache is kept for its session."""
        row, session = job.row, job.session
        if self._live.pop(row, None) is not None:
            keep = session is not None and reason != "failed"
            cache = self._decoder.release(row, keep)
            if cache is not None and session is not None:
                self._sessions.keep(session, cache)
            taken = time.monotonic() - job.started
            self._seconds_per_answer += 0.2 * (taken - self._seconds_per_answer)
        self._report(job, reason, error)

    def _fail_all(self, error: BaseException) -> None:
        """A forward went wrong half-way: nothing in the cache can be trusted."""
        jobs = list(self._live.values())
        self._live.clear()
        self._make_decoder()
        for job in jobs:
            self._report(job, "failed", error)

    def _report(self, job: _Job, reason: str, error: BaseException | None) -> None:
        row, is_code = job.row, self.processor.token_ids.is_code
        if reason == "failed" and job.session is not None:
            self._sessions.forget(job.session)
        ids = row.ids[row.prompt_length :]
        num_codes = sum(map(is_code, ids))
        usage = Usage(row.prompt_length, row.reused, len(ids) - num_codes, num_codes, row.forwards)
        with self._changed:
            self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1
        self._written.append((job.generation, Finished(reason, usage, ids, error)))

    def _count_forwards(self) -> None:
        runner = self._decoder.runner
        self._stats.forwards += runner.num_forwards
        self._stats.token_positions += runner.num_token_positions
        runner.num_forwards = runner.num_token_positions = 0


__all__ = ["Engine", "EngineStats"]
