"""Processes of a pool end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path

from training_examples.workers import worker_pool


def note(folder):
    Path(folder, f"worker-{os.getpid()}").touch()


if __name__ == "__main__":
    with worker_pool(2, note, (sys.argv[1],)) as pool:
        list(pool.map(time.sleep, [0.1] * 8))
        Path(sys.argv[1], "started").touch()
        time.sleep(600)
"""


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], env=environment)
    while not (tmp_path / "started").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    workers = [int(file.name.partition("-")[2]) for file in tmp_path.glob("worker-*")]
    assert workers and all(is_running(worker) for worker in workers)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.05)
