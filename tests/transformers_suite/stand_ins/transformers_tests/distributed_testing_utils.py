"""In place of a file that the archive leaves out: runs a function in several processes that form a gloo group."""

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return what calls `function(rank, *arguments)` in `world_size` processes, and raises what any of them raises."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                store = Path(folder, "store").as_uri()
                _start_rank_processes(_join_group_and_run, (world_size, store, function, arguments), world_size)

        return run

    return decorate


def _join_group_and_run(rank: int, world_size: int, store: str, function: Callable[..., None], args: tuple) -> None:
    dist.init_process_group("gloo", store, timedelta(minutes=2), world_size, rank)
    function(rank, *args)
    dist.destroy_process_group()


def _start_rank_processes(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    torch.multiprocessing.spawn(_run_and_leave, (function, args), nprocs)


def _run_and_leave(rank: int, function: Callable[..., None], args: tuple) -> None:
    """Without the interpreter's end, at which PyTorch's threads now and then abort a process that has done its work."""
    torch.set_num_threads(1)
    function(rank, *args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing to set on CPUs."""
