"""Serving: the engine, which generates for many callers at once, and the protocols over it."""

from .engine import Engine, EngineStats
from .engine_requests import (
    AudioDelta,
    EngineClosed,
    Event,
    Finished,
    Generation,
    GenerationRequest,
    Overloaded,
    TextDelta,
    Usage,
)

__all__ = [
    "AudioDelta",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Event",
    "Finished",
    "Generation",
    "GenerationRequest",
    "Overloaded",
    "TextDelta",
    "Usage",
]
