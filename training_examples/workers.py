"""Processes that work side by side and end with the one that started them, however it ends. What they do lives in the
scripts."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any


def worker_pool(
    processes: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """
    Return a pool of processes, started afresh: a fork would inherit threads and an initialised GPU.

    Args:
        processes (`int`): how many.
        initializer (`Callable`, *optional*): called with `initargs` as each of them begins.
    """
    return ProcessPoolExecutor(processes, get_context("spawn"), _begin, (initializer, initargs))


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    """End this process when its parent has gone; a pool's workers wait for work for ever otherwise."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
