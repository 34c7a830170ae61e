"""What a client may ask of the server: sizes, rates, times. Who enforces a limit says so there; nothing here does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MIB = 1024 * 1024
BASE64 = 3 / 4  # bytes of sound in a byte of a message
PCM_BYTES = 2 * 24_000  # of a second


@dataclass(frozen=True)
class Limits:
    """
    Bounds on what one client may send, keep and wait for.

    Args:
        body_bytes (`int`): of an HTTP request, uploads included.
        message_bytes (`int`): of a WebSocket message.
        audio_seconds (`float`): of one upload, one spoken turn, one input buffer.
        audio_channels (`int`): of an upload.
        text_length (`int`): characters of one text in a request.
        messages (`int`): of a conversation; items of a Realtime session.
        sessions (`int`): Realtime sessions open at once.
        messages_per_second (`float`): taken from one WebSocket; what comes faster is read later.
        audio_rate (`float`): seconds of audio taken from one WebSocket a second, beyond `audio_seconds` at once.
        outbox_bytes (`int`): of events waiting for a slow reader; beyond, its connection is closed.
        send_seconds (`float`): how long a reader may take none of what waits for it.
        idle_seconds (`float`): after which a silent WebSocket is closed.
        session_seconds (`float`): after which any WebSocket is.
        kept_audio_bytes (`int`): of users' audio that a Realtime session keeps for `conversation.item.retrieve`.
        answer_seconds (`float`): how long a chat answer can be named by its `audio.id`.
        answers (`int`): how many of them are kept, oldest out first.
        drain_seconds (`float`): given to answers that are being written when the server is told to stop.
    """

    body_bytes: int = 25 * MIB
    message_bytes: int = 8 * MIB
    audio_seconds: float = 60.0
    audio_channels: int = 8
    text_length: int = 4096
    messages: int = 256
    sessions: int = 64
    messages_per_second: float = 200.0
    audio_rate: float = 4.0
    outbox_bytes: int = 8 * MIB
    send_seconds: float = 30.0
    idle_seconds: float = 600.0
    session_seconds: float = 3600.0
    kept_audio_bytes: int = 16 * MIB
    answer_seconds: float = 3600.0
    answers: int = 256
    drain_seconds: float = 20.0

    @property
    def seconds_held_back(self) -> float:
        """
        How long the largest message of sound may be held back for its rate. Nothing else of its client is read
        meanwhile, neither are its answers to pings.
        """
        return self.message_bytes * BASE64 / PCM_BYTES / self.audio_rate


class RateLimit:
    """
    A token bucket: `capacity` at once, `rate` a second after that.

    Args:
        rate (`float`): what is given back a second.
        capacity (`float`): the most there is.
        clock (`Callable[[], float]`, *optional*): seconds.
    """

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.capacity, self.clock = rate, capacity, clock
        self.level, self.updated = capacity, clock()

    def take(self, amount: float) -> float:
        """Take an amount; return the seconds to wait before the next is taken."""
        now = self.clock()
        self.level = min(self.capacity, self.level + (now - self.updated) * self.rate) - amount
        self.updated = now
        return max(0.0, -self.level / self.rate)
