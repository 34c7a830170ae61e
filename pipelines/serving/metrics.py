"""What /metrics tells: the engine's counts as they are when asked, and what only the server sees (first audio, pace,
requests, sessions)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
FACTORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0)
GAUGES = {
    "queued": "Requests that wait for a row.",
    "rows": "Requests that are being answered together.",
    "encoding": "Waveforms that wait for codes.",
    "sessions": "Sessions whose cache is kept.",
    "session_bytes": "Bytes of those caches.",
    "max_rows": "The most rows.",
    "max_queue": "The longest queue.",
}
COUNTERS = {
    "submitted": "Requests taken in.",
    "overloaded": "Requests refused since the queue was full.",
    "forwards": "Forwards of the model.",
    "token_positions": "Positions those computed.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that a session's cache had already.",
    "text_tokens": "Text tokens generated.",
    "audio_codes": "Audio codes generated; their rate is codes a second.",
}


class EngineCollector:
    """Reads `Engine.stats()` when Prometheus asks."""

    def __init__(self, engine: Any):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's figures."""
        stats = self.engine.stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"ttt_{name}", text, value=getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"ttt_{name}", text, value=getattr(stats, name))
        finished = CounterMetricFamily("ttt_finished", "Requests that ended, by reason.", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished


class Metrics:
    """
    Everything /metrics tells, in a registry of its own.

    Args:
        engine (`Engine`): whose figures are told.
    """

    def __init__(self, engine: Any):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.requests = Counter(
            "ttt_http_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.open_sessions = Gauge("ttt_realtime_sessions", "Realtime sessions open.", registry=self.registry)
        self.errors = Counter("ttt_realtime_errors", "Error events sent, by code.", ["code"], registry=self.registry)
        self.first_audio = Histogram(
            "ttt_first_audio_seconds", "From request to first waveform.", buckets=SECONDS, registry=self.registry
        )
        self.factor = Histogram(
            "ttt_real_time_factor",
            "Time of an answer by the length of its speech.",
            buckets=FACTORS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def watch(self, sampling_rate: int) -> Watch:
        """Return what follows one answer."""
        return Watch(self, sampling_rate)


class Watch:
    """Times one answer."""

    def __init__(self, metrics: Metrics, sampling_rate: int):
        self.metrics, self.sampling_rate = metrics, sampling_rate
        self.started = time.perf_counter()
        self.samples = 0

    def see(self, event: Any) -> None:
        """Take an event of the answer."""
        waveform = getattr(event, "waveform", None)
        if waveform is not None and len(waveform):
            if not self.samples:
                self.metrics.first_audio.observe(time.perf_counter() - self.started)
            self.samples += len(waveform)

    def end(self) -> None:
        """Take the answer for ended."""
        if self.samples:
            self.metrics.factor.observe((time.perf_counter() - self.started) * self.sampling_rate / self.samples)
