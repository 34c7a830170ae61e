"""Where speech begins and ends in a stream of sound: Silero VAD's probabilities, and the hysteresis that turns them
into turns. What a turn means to a session is the session's business."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

VAD_RATE = 16_000  # Hz
WINDOW = 512  # samples of one probability, 32 ms
HYSTERESIS = 0.15  # speech goes on while the probability is not this much below the threshold
MIN_SPEECH_WINDOWS = 2  # one window alone is a click


@dataclass(frozen=True)
class SpeechEvent:
    """Speech `started` or stopped at a position in the stream, in samples at `VAD_RATE`."""

    started: bool
    position: int


class SpeechDetector:
    """
    Find turns in a stream of samples.

    Args:
        probability (`Callable`): takes one window, float32 of shape `(512,)`; returns how likely it is speech.
        threshold (`float`, *optional*, defaults to 0.5): of the probability.
        silence_ms (`float`, *optional*, defaults to 500): speech has stopped after as much silence.
    """

    def __init__(self, probability: Callable[[np.ndarray], float], threshold: float = 0.5, silence_ms: float = 500.0):
        self.probability = probability
        self.configure(threshold, silence_ms)
        self.speaking = False
        self._rest = np.zeros(0, dtype=np.float32)
        self._position = 0  # of the next window
        self._count = 0  # windows in a row that speak for a change
        self._candidate = 0  # where the first of them began

    def configure(self, threshold: float, silence_ms: float) -> None:
        """Find turns by another threshold and silence from here on; see the class."""
        self.threshold = threshold
        self.silence_windows = max(1, round(silence_ms * VAD_RATE / 1000 / WINDOW))

    def push(self, samples: np.ndarray) -> list[SpeechEvent]:
        """Take float32 samples of shape `(samples,)` at `VAD_RATE`; return what began or ended in them."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // WINDOW * WINDOW
        self._rest = samples[whole:]
        events = []
        for window in samples[:whole].reshape(-1, WINDOW):
            probability = self.probability(window)
            events += self._silence(probability) if self.speaking else self._speech(probability)
            self._position += WINDOW
        return events

    def stop(self) -> None:
        """Take the turn for ended, as when it was committed by hand."""
        self.speaking, self._count = False, 0

    def _speech(self, probability: float) -> list[SpeechEvent]:
        if probability < self.threshold:
            self._count = 0
            return []
        if self._count == 0:
            self._candidate = self._position
        self._count += 1
        if self._count < MIN_SPEECH_WINDOWS:
            return []
        self.speaking, self._count = True, 0
        return [SpeechEvent(True, self._candidate)]

    def _silence(self, probability: float) -> list[SpeechEvent]:
        if probability >= max(self.threshold - HYSTERESIS, 0.01):
            if probability >= self.threshold:
                self._count = 0
            return []
        self._count += 1
        if self._count < self.silence_windows:
            return []
        self.speaking, self._count = False, 0
        return [SpeechEvent(False, self._position + WINDOW)]


def silero_probability() -> Callable[[np.ndarray], float]:
    """Return Silero VAD for one stream, with a state of its own."""
    with _LOADING:
        model = copy.deepcopy(_silero())
    model.reset_states()

    def probability(window: np.ndarray) -> float:
        with torch.inference_mode():
            return model(torch.from_numpy(window), VAD_RATE).item()

    return probability


_LOADING = threading.Lock()


@cache
def _silero() -> Any:
    """The model, loaded once. Its package sets the number of PyTorch's threads to 1 on import, which is undone."""
    threads = torch.get_num_threads()
    import silero_vad

    model = silero_vad.load_silero_vad()
    torch.set_num_threads(threads)
    return model
