"""The input buffer of a Realtime session: sound as it comes, and the turns in it. What follows from a turn is the
session's business."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from .sound import SAMPLE_BYTES, WIRE_RATE, Resampler, pcm_to_float
from .vad import VAD_RATE, SpeechDetector
from .wire_realtime import ServerVad

SLICE = WIRE_RATE // 2  # samples looked at together, so that streams take turns
SPARE = WIRE_RATE // 4  # samples kept before those that may turn out to be speech


@dataclass(frozen=True)
class Turn:
    """
    Speech that began, or ended.

    Args:
        started (`bool`): which of the two.
        milliseconds (`int`): where, since the session began; of a beginning, with its padding.
        pcm (`bytes`): what was said, of an end.
    """

    started: bool
    milliseconds: int
    pcm: bytes = b""


class InputBuffer:
    """
    PCM16 at 24 kHz, as it is appended.

    Args:
        most_seconds (`float`): that it holds.
        executor (`Executor`): where the detector runs.
        make_probability (`Callable`): returns what `SpeechDetector` takes; called in the executor.
    """

    def __init__(
        self, most_seconds: float, executor: Executor, make_probability: Callable[[], Callable[[np.ndarray], float]]
    ):
        self.most_samples = int(most_seconds * WIRE_RATE)
        self.executor, self.make_probability = executor, make_probability
        self.vad: ServerVad | None = None
        self._pcm = bytearray()
        self._first = 0  # the position of its first sample since the session began
        self._speech: int | None = None  # where the speech that goes on began, with its padding
        self._detector: SpeechDetector | None = None
        self._resampler = Resampler(WIRE_RATE, VAD_RATE)
        self._offset = 0  # where the detector's stream began

    @property
    def milliseconds(self) -> float:
        """How much it holds."""
        return len(self._pcm) / SAMPLE_BYTES / WIRE_RATE * 1000

    @property
    def end(self) -> int:
        """How much has come since the session began, in milliseconds."""
        return _to_ms(self._end)

    @property
    def hears_speech(self) -> bool:
        """Whether a turn has begun and not ended."""
        return self._speech is not None

    @property
    def _end(self) -> int:
        return self._first + len(self._pcm) // SAMPLE_BYTES

    def configure(self, vad: ServerVad | None) -> None:
        """Find turns by other settings from here on, or none. Speech that goes on does so where turns are found."""
        self.vad = vad
        if vad is None:
            self._detector, self._speech = None, None
        elif self._detector is not None:
            self._detector.configure(vad.threshold, vad.silence_duration_ms)

    def has_room(self, pcm: bytes) -> bool:
        """Whether it can hold as much more. With a detector it can: what is no speech is forgotten."""
        return self.vad is not None or (len(self._pcm) + len(pcm)) // SAMPLE_BYTES <= self.most_samples

    async def append(self, pcm: bytes) -> list[Turn]:
        """Take sound; return what began and ended in it."""
        turns: list[Turn] = []
        for piece in _slices(pcm):
            self._pcm += piece
            if self.vad is not None:
                turns += await self._detect(piece)
        return turns

    def take(self) -> bytes:
        """Return what it holds, and empty it."""
        return self._take(self._end)

    def clear(self) -> None:
        """Forget what it holds."""
        self._take(self._end)

    async def _detect(self, pcm: bytes) -> list[Turn]:
        loop = asyncio.get_running_loop()
        assert self.vad is not None
        if self._detector is None:
            probability = await loop.run_in_executor(self.executor, self.make_probability)
            self._detector = SpeechDetector(probability, self.vad.threshold, self.vad.silence_duration_ms)
            self._resampler = Resampler(WIRE_RATE, VAD_RATE)
            self._offset = self._end - len(pcm) // SAMPLE_BYTES
        samples = self._resampler.push(pcm_to_float(pcm))
        events = await loop.run_in_executor(self.executor, self._detector.push, samples)
        turns = []
        for event in events:
            position = self._offset + event.position * WIRE_RATE // VAD_RATE
            turns += self._began(position) if event.started else self._stopped(position)
        if self._speech is None:
            padding = self.vad.prefix_padding_ms * WIRE_RATE // 1000
            self._forget(self._end - padding - SPARE)
        elif len(self._pcm) // SAMPLE_BYTES >= self.most_samples:
            self._detector.stop()
            turns += self._stopped(self._end)
        return turns

    def _began(self, position: int) -> list[Turn]:
        assert self.vad is not None
        start = max(self._first, position - self.vad.prefix_padding_ms * WIRE_RATE // 1000)
        self._forget(start)
        self._speech = start
        return [Turn(True, _to_ms(start))]

    def _stopped(self, position: int) -> list[Turn]:
        if self._speech is None:  # it was committed or cleared meanwhile
            return []
        position = min(position, self._end)
        return [Turn(False, _to_ms(position), self._take(position))]

    def _take(self, position: int) -> bytes:
        size = (position - self._first) * SAMPLE_BYTES
        taken = bytes(self._pcm[:size])
        self._forget(position)
        if self._detector is not None:
            self._detector.stop()
        self._speech = None
        return taken

    def _forget(self, position: int) -> None:
        """Forget what lies before a position."""
        if position > self._first:
            del self._pcm[: (position - self._first) * SAMPLE_BYTES]
            self._first = position


def _slices(pcm: bytes) -> Iterator[bytes]:
    for start in range(0, len(pcm), SLICE * SAMPLE_BYTES):
        yield pcm[start : start + SLICE * SAMPLE_BYTES]


def _to_ms(samples: int) -> int:
    return samples * 1000 // WIRE_RATE
