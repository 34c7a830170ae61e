"""Caches of conversations between their turns, within a budget of memory. Which part of a cache a prompt can use is
decided by the decoding loop."""

from __future__ import annotations

import threading
from collections import OrderedDict

from modeling_ttt.cache_ttt import TttCache


class SessionCaches:
    """
    One cache of one row for each session; where they outgrow the budget, the least recently used ones go first.

    Args:
        max_bytes (`int`): memory of all of them together. A cache that is larger alone is not kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._caches: OrderedDict[str, TttCache] = OrderedDict()
        self._out: set[str] = set()  # taken, and to be kept again
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._caches)

    def take(self, session: str) -> TttCache | None:
        """Take a session's cache out, which `keep` puts back."""
        with self._lock:
            self._out.add(session)
            return self._remove(session)

    def keep(self, session: str, cache: TttCache) -> None:
        """Put a session's cache back, unless it was forgotten meanwhile."""
        with self._lock:
            if session not in self._out:
                return
            self._out.discard(session)
            if cache.num_bytes > self.max_bytes:
                return
            self._caches[session] = cache
            self.num_bytes += cache.num_bytes
            while self.num_bytes > self.max_bytes:
                self._remove(next(iter(self._caches)))

    def forget(self, session: str) -> None:
        """Drop what is kept of a session, and what is out of it."""
        with self._lock:
            self._out.discard(session)
            self._remove(session)

    def _remove(self, session: str) -> TttCache | None:
        cache = self._caches.pop(session, None)
        self.num_bytes -= 0 if cache is None else cache.num_bytes
        return cache


__all__ = ["SessionCaches"]
