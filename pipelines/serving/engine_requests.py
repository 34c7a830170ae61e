"""What goes into the engine and what comes out of it: requests, events, and the buffer in which a reader finds them.
Who writes them is in engine.py (the decoding loop) and engine_codec.py (text and waveforms)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

MODALITIES = ("text", "audio")


class Overloaded(RuntimeError):
    """
    Raised where the queue is full.

    Args:
        retry_after (`float`): seconds after which there should be room again.
    """

    def __init__(self, retry_after: float):
        super().__init__(f"The queue is full; try again in {retry_after:.0f} seconds.")
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """Raised where an engine takes no requests: it has not started, is closing, or its loop has died."""


@dataclass(frozen=True)
class GenerationRequest:
    """
    One answer that is wanted.

    Args:
        input_ids (`Sequence[int]`, or `torch.LongTensor` of shape `(length,)` or `(1, length)`): the whole prompt, as
            the processor writes it.
        options (`dict`, *optional*): settings of [`TttGenerationConfig`] by name.
        seed (`int`, *optional*): of the answer's noise, as `seed` of `generate`.
        deadline (`float`, *optional*): seconds from `submit` after which the answer ends where it is.
        session (`str`, *optional*): the conversation's name; its cache is kept for the next turn. Turns of one session
            run one after the other.
        modalities (`Sequence[str]`, *optional*, defaults to `("text", "audio")`): `("text",)` begins no span of audio.
    """

    input_ids: Sequence[int] | torch.Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    deadline: float | None = None
    session: str | None = None
    modalities: Sequence[str] = MODALITIES


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text, never empty, and the ids of the text tokens that it was written in."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class AudioDelta:
    """
    A piece of the answer's speech.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): float32, at the engine's `sampling_rate`. It lags behind its
            codes by what the decoder looks ahead, and may be empty. The last one has all that is left.
        codes (`list[int]`): the codes that were taken in; there may be none where the last samples come.
    """

    waveform: np.ndarray
    codes: list[int]


@dataclass(frozen=True)
class Usage:
    """
    What an answer took: tokens of the prompt, those of them whose cache was there already, text tokens (structural ones
    too), audio codes, and forwards that its row took part in.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    text_tokens: int = 0
    audio_codes: int = 0
    forwards: int = 0


@dataclass(frozen=True)
class Finished:
    """
    The last event of every answer.

    Args:
        reason (`str`): "stop" (its end, or a stopping criterion), "length" (`max_new_tokens`), "cancelled", "deadline"
            or "failed".
        usage ([`Usage`]): what it took.
        token_ids (`list[int]`): all ids of the answer; prompt and these are the beginning of the next turn.
        error (`Exception`, *optional*): why it failed.
    """

    reason: str
    usage: Usage
    token_ids: list[int]
    error: BaseException | None = None


Event = TextDelta | AudioDelta | Finished


class Generation:
    """
    An answer as it is written: iterate over its events with `for` or `async for`, by one reader. The last one is its
    only [`Finished`].

    Unread events wait here, with at most `max_buffered` samples of waveform: what is not decoded yet waits as codes. A
    reader that leaves early calls `cancel`.
    """

    def __init__(
        self,
        prompt: list[int],
        request: GenerationRequest,
        max_buffered: float,
        on_cancel: Callable[[Generation], None],
        on_read: Callable[[Generation], None],
    ):
        self.prompt, self.request = prompt, request
        self.deadline = None if request.deadline is None else time.monotonic() + request.deadline
        self.finished: Finished | None = None
        self.is_cancelled = False
        self._max_buffered, self._on_cancel, self._on_read = max_buffered, on_cancel, on_read
        self._changed = threading.Condition()
        self._events: deque[Event] = deque()
        self._buffered = 0  # samples of waveform
        self._is_read = False  # to its end
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    # ---- for readers -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = self._next(None)
        if event is None:
            raise StopIteration
        return event

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._changed:
                event, is_read = self._take(), self._is_read
                if event is None and not is_read:
                    loop = asyncio.get_running_loop()
                    waiter = loop.create_future()
                    self._waiter = (loop, waiter)
            if event is not None:
                self._on_read(self)
                return event
            if is_read:
                raise StopAsyncIteration
            try:
                await waiter
            finally:
                self._waiter = None

    def result(self, timeout: float | None = None) -> tuple[str, np.ndarray, Finished]:
        """
        Read what is left of the answer.

        Returns:
            `tuple`: text, waveform of shape `(samples,)`, and the last event.

        Raises:
            TimeoutError: if it takes longer than `timeout` seconds. The answer goes on.
        """
        until = None if timeout is None else time.monotonic() + timeout
        texts: list[str] = []
        waveforms: list[np.ndarray] = []
        while (event := self._next(until)) is not None:
            if isinstance(event, TextDelta):
                texts.append(event.text)
            elif isinstance(event, AudioDelta):
                waveforms.append(event.waveform)
        assert self.finished is not None
        waveform = np.concatenate(waveforms) if waveforms else np.zeros(0, dtype=np.float32)
        return "".join(texts), waveform, self.finished

    def cancel(self) -> None:
        """End the answer where it is, from any thread. What was not read is dropped; [`Finished`] follows."""
        with self._changed:
            if self.is_cancelled or self.finished is not None:
                return
            self.is_cancelled = True
            self._events.clear()
            self._buffered = 0
        self._on_cancel(self)

    # ---- for the engine ----------------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether more waveform may be decoded ahead of the reader."""
        return self.is_cancelled or self._buffered < self._max_buffered

    @property
    def is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def put(self, event: Event) -> None:
        """Hand an event to the reader; nothing comes after [`Finished`], nothing but it after `cancel`."""
        with self._changed:
            if self.finished is not None or (self.is_cancelled and not isinstance(event, Finished)):
                return
            if isinstance(event, Finished):
                self.finished = event
            elif isinstance(event, AudioDelta):
                self._buffered += event.waveform.size
            self._events.append(event)
            self._changed.notify_all()
            waiter = self._waiter
        if waiter is not None:
            _wake(*waiter)

    def _next(self, until: float | None) -> Event | None:
        with self._changed:
            while (event := self._take()) is None and not self._is_read:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("The answer is not finished yet.")
                self._changed.wait(left)
        if event is not None:
            self._on_read(self)
        return event

    def _take(self) -> Event | None:
        """The next event, where there is one. Called with the lock."""
        if not self._events:
            return None
        event = self._events.popleft()
        if isinstance(event, AudioDelta):
            self._buffered -= event.waveform.size
        self._is_read = isinstance(event, Finished)
        return event


def _wake(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
    def resolve() -> None:
        if not waiter.done():
            waiter.set_result(None)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:  # the reader's loop is closed: nobody waits any more
        pass


__all__ = [
    "MODALITIES",
    "AudioDelta",
    "EngineClosed",
    "Event",
    "Finished",
    "Generation",
    "GenerationRequest",
    "Overloaded",
    "TextDelta",
    "Usage",
]
