"""Two replicas under Ray Serve: conversations stay on theirs, and one that is killed takes only its own with it."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
from builders import build_model, build_processor
from serving import ROOT, RealtimeClient, RunningServer, spoken_pcm, wait_until
from websockets.exceptions import ConnectionClosed

from pipelines import save_repository

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"),
]
SESSIONS = 8  # so many that both replicas have some


def replicas(process: subprocess.Popen) -> set[int]:
    """The processes of the replicas that are there now."""
    found = psutil.Process(process.pid).children(recursive=True)
    return {child.pid for child in found if "ServeReplica" in " ".join(child.cmdline())}


@pytest.fixture
def server(tmp_path):
    processor = build_processor()
    folder = tmp_path / "tiny-folder"
    save_repository(build_model(processor), processor, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.serving.ray_app", "--model", str(folder), "--port", str(port)]
    command += ["--replicas", "2", "--cpus", "0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    guard = threading.Timer(500.0, lambda: os.killpg(process.pid, signal.SIGKILL))
    guard.daemon = True
    guard.start()
    try:
        assert any("replicas at" in line for line in process.stdout), "the replicas did not start"
        yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}", ws=f"ws://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(120)
        guard.cancel()


def answers(client: RealtimeClient) -> bool:
    """Whether a session is still there, and answers."""
    try:
        client.configure(instructions="x")
        client.send("response.create")
        return len(spoken_pcm(client.until("response.done"))) > 0
    except (ConnectionClosed, OSError):
        return False


def test_a_replica_that_is_killed_takes_only_its_own_sessions(server):
    assert RunningServer.request(server, "/health")[0] == 200
    clients = [RealtimeClient(server) for _ in range(SESSIONS)]
    assert all(map(answers, clients))
    before = replicas(server.process)
    assert len(before) == 2
    killed = sorted(before)[0]
    os.kill(killed, signal.SIGKILL)
    left = [client for client in clients if answers(client)]
    assert 0 < len(left) < SESSIONS

    def speaks() -> bool:
        status, _, body = RunningServer.request(server, "/v1/audio/speech", {"model": "tiny-folder", "input": "hi"})
        return status == 200 and len(body) > 1000

    wait_until(speaks, "an answer")
    wait_until(lambda: len(replicas(server.process) - {killed}) == 2, "another replica")
    message = {"role": "assistant", "audio": {"id": "audio_of_the_other"}}
    body = {"model": "tiny-folder", "messages": [message, {"role": "user", "content": "hi"}]}
    status, _, body = RunningServer.request(server, "/v1/chat/completions", body)
    assert status == 404 and json.loads(body)["error"]["code"] == "audio_not_found"
    for client in left:
        client.socket.close()
