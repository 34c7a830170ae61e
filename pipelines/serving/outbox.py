"""Events on their way to one client: in order, bounded, and droppable while they wait."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .conversation import new_id

ROOM_BYTES = 256 * 1024  # what waits beyond this holds back who writes


class SlowReader(Exception):
    """Raised where a client takes nothing for too long, or lets too much pile up."""


@dataclass(frozen=True)
class Entry:
    """An event that waits; of sound, how many samples it holds and whose they are."""

    text: str
    source: str | None
    samples: int


class Outbox:
    """
    Send events one after the other.

    Args:
        send (`Callable`): sends one, and waits while the client's buffer is full.
        most_bytes (`int`): that may wait.
        seconds (`float`): for which a client may take nothing.
    """

    def __init__(self, send: Callable[[str], Awaitable[None]], most_bytes: int, seconds: float):
        self.send, self.most_bytes, self.seconds = send, most_bytes, seconds
        self.sent: Counter[str] = Counter()  # samples, by source
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._overflowed = False
        self._wakers: list[asyncio.Future[None]] = []

    def put(self, event: dict[str, Any], source: str | None = None, samples: int = 0) -> None:
        """
        Have an event sent.

        Args:
            event (`dict`): without its `event_id`.
            source (`str`, *optional*): the response whose sound it is.
            samples (`int`, *optional*, defaults to 0): how much of it.

        Raises:
            SlowReader: if too much waits already.
        """
        text = json.dumps({"event_id": new_id("event"), **event}, ensure_ascii=False, separators=(",", ":"))
        if self._bytes + len(text) > self.most_bytes:
            self._overflowed = True
            self._wake()
            raise SlowReader
        self._entries.append(Entry(text, source, samples))
        self._bytes += len(text)
        self._wake()

    def drop(self, source: str) -> None:
        """Take back the sound of a response that was not sent yet."""
        kept = [entry for entry in self._entries if entry.source != source or not entry.samples]
        self._entries = deque(kept)
        self._bytes = sum(len(entry.text) for entry in kept)
        self._wake()

    async def room(self) -> None:
        """Wait until not much waits."""
        while self._bytes > ROOM_BYTES:
            await self._wait()

    async def empty(self) -> None:
        """Wait until everything is sent."""
        while self._entries:
            await self._wait()

    async def sent_all(self, source: str) -> None:
        """Wait until the sound of a response is sent, or dropped."""
        while any(entry.source == source for entry in self._entries):
            await self._wait()

    async def run(self) -> None:
        """
        Send what there is, for ever. Where that ends, what waits is forgotten, and nobody waits for it any more.

        Raises:
            SlowReader: if the client takes nothing for too long, or too much waited.
        """
        try:
            while True:
                while not self._entries:
                    await self._wait()
                if self._overflowed:
                    raise SlowReader
                await self._send(self._entries[0])
        finally:
            self._entries.clear()
            self._bytes = 0
            self._wake()

    async def _send(self, entry: Entry) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await self.send(entry.text)
        except TimeoutError:
            raise SlowReader from None
        if self._entries and self._entries[0] is entry:  # it may have been dropped while it was sent
            self._entries.popleft()
            self._bytes -= len(entry.text)
        if entry.source is not None:
            self.sent[entry.source] += entry.samples
        self._wake()

    async def _wait(self) -> None:
        waker = asyncio.get_running_loop().create_future()
        self._wakers.append(waker)
        await waker

    def _wake(self) -> None:
        wakers, self._wakers = self._wakers, []
        for waker in wakers:
            if not waker.done():
                waker.set_result(None)
