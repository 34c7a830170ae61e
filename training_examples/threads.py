"""How many threads a script computes with: as many as there are free cores, one in each of several processes, or what
`--threads` says. What they compute lives elsewhere."""

import math
import os
import sys
from dataclasses import field
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
HELP = "Threads a process computes with on CPUs; 0 chooses by the free cores, and one in each of several processes."


def threads_field() -> Any:
    """Return the dataclass field of the option `--threads`."""
    return field(default=0, metadata={"help": HELP})


def use_threads(threads: int = 0, processes: int | None = None) -> int:
    """
    Set the threads of PyTorch, and say on standard error how many they are and why.

    Args:
        threads (`int`, *optional*, defaults to 0): how many; 0 chooses, see `choose_threads`.
        processes (`int`, *optional*): how many processes compute side by side; by default as the launcher says.

    Returns:
        `int`: the number of threads.
    """
    import torch  # here, so that options are read before it is loaded

    count, reason = choose_threads(threads, local_processes() if processes is None else processes)
    torch.set_num_threads(count)
    if os.environ.get("RANK", "0") == "0":
        print(f"{count} thread{'s' if count > 1 else ''}: {reason}", file=sys.stderr, flush=True)
    return count


def choose_threads(threads: int = 0, processes: int = 1) -> tuple[int, str]:
    """
    Return a number of threads and the reason for it.

    In this order: what was asked for; what `OMP_NUM_THREADS` says; one, where several processes share the machine; the
    cores that this process may use and that nobody keeps busy. More threads than free cores wait for each other: on two
    cores that others kept busy, a training step took 37 s and more with two threads and 3 s with one.

    Raises:
        ValueError: If `threads` is negative.
    """
    if threads < 0:
        raise ValueError(f"`--threads` is {threads}; give a number of threads, or 0 to have it chosen.")
    if threads:
        return threads, "as `--threads` says."
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"])), "as OMP_NUM_THREADS says."
    if processes > 1:
        return 1, f"one in each of {processes} processes; `--threads` sets another number."
    import torch

    cores, load = usable_cores(), load_average()
    free = min(cores, (os.cpu_count() or 1) - load)
    # PyTorch's own choice leaves out the second half of hyper-threaded cores.
    count = max(1, min(torch.get_num_threads(), round(free)))
    return count, f"{cores:g} cores for this process, load {load:.1f}; `--threads` sets another number."


def local_processes() -> int:
    """Return how many processes the launcher (torchrun, accelerate, mpirun) has started on this machine."""
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 1)


def usable_cores() -> float:
    """Return the cores that this process may run on, by its affinity and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, cpu_quota())


def load_average() -> float:
    """Return how many processes of the machine wanted a core over the last minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def cpu_quota(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float:
    """
    Return the cores' worth of time that the control groups allow this process, infinite without a limit.

    Both versions are read: `cpu.max` of every group from its own up to `root`, or quota and period of the first.
    """
    limits = [math.inf]
    for line in _read(membership).splitlines():
        controllers, path = line.split(":", 2)[1:]
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Within a container the path may be that of the host, and the group's own files lie at the top.
        top = root if not controllers else root / controllers if (root / controllers).is_dir() else root / "cpu"
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder != top and top not in folder.parents:
                break
            quota, period = (_read(folder / "cpu.max").split() + ["", ""])[:2]
            if not quota:
                quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
            if quota.isdigit() and period.isdigit() and int(period):
                limits.append(int(quota) / int(period))
    return min(limits)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
