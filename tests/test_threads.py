"""How many threads a script takes: by the cores that are free, by the launcher, by what it is told."""

import math
import os
import re
from pathlib import Path

import pytest
import torch

from training_examples import threads
from training_examples.threads import choose_threads, cpu_quota, use_threads

SCRIPTS = sorted(
    path
    for path in Path(threads.__file__).parent.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
COMPUTE_NOTHING = ("quicken_kokoro", "run_study", "report_study")  # rewrite a file, start others, write a table


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """Sixteen cores, idle, of which PyTorch would take all; nothing set."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 9.0, 9.0))
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)


def test_an_idle_machine_gives_all_its_cores_and_a_busy_one_those_that_are_free(monkeypatch):
    assert choose_threads()[0] == 16
    for load, expected in ((3.2, 13), (15.4, 1), (40.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        count, reason = choose_threads()
        assert count == expected and f"load {load:.1f}" in reason and "--threads" in reason


def test_affinity_quota_and_torchs_own_choice_are_bounds(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    assert choose_threads()[0] == 5
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2.5)
    assert choose_threads()[0] == 2
    monkeypatch.setattr(threads, "cpu_quota", lambda: 0.5)
    assert choose_threads()[0] == 1
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert choose_threads()[0] == 3


def test_several_processes_have_one_thread_each_unless_told_otherwise(monkeypatch):
    assert choose_threads(processes=2)[0] == 1
    assert choose_threads(4, processes=2)[0] == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.local_processes() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(processes=2) == (3, "as OMP_NUM_THREADS says.")
    assert choose_threads(4)[0] == 4
    with pytest.raises(ValueError, match="`--threads` is -1"):
        choose_threads(-1)


def test_the_choice_is_set_and_said_once(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    assert use_threads() == 16 and use_threads(1) == 1
    assert capsys.readouterr().err.splitlines() == [
        "16 threads: 16 cores for this process, load 0.1; `--threads` sets another number.",
        "1 thread: as `--threads` says.",
    ]
    monkeypatch.setenv("RANK", "1")
    use_threads()
    assert chosen == [16, 1, 16] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5),
        ("0::/gone", {"cpu.max": "200000 100000"}, 2.0),
        (
            "3:cpuset:/a\n2:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("1:memory:/", {"memory/cpu.max": "1 100000"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_quota_of_a_control_group_is_read(membership, files, expected, tmp_path):
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content + "\n")
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "membership") == expected


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_takes_threads_and_ends_in_one_line(path):
    text = path.read_text(encoding="utf-8")
    assert "    run_command(main)\n" in text
    if path.stem not in COMPUTE_NOTHING:
        shared = "parse_arguments(" in text  # of training/arguments.py
        assert shared or re.search(r"use_threads\(args\.threads", text)
