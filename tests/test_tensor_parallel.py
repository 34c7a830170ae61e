"""Tensor parallelism over two processes: the whole model's logits, loss and answers, with the head sharded too."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_a_sharded_model_answers_as_the_whole_one(tmp_path):
    for name in ("tied", "untied"):
        model = make_model({"tie_word_embeddings": name == "tied", "initializer_range": 0.3})
        model.save_pretrained(tmp_path / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(TESTS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [*command, str(TESTS / "tensor_parallel.py"), str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "destroy_process_group() was not called" not in done.stderr
    for rank in range(2):
        for name, result in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert result["logits"] < 1e-3 and result["loss"] < 1e-3 and result["same_answers"], name
            assert result["head"] == result["embeddings"] == [89, 32], name  # half of 178 tokens
