"""Replicas under Ray Serve: sessions stay on theirs, one that is killed takes only its own with it, answers are found
by id on each, and there are more of them while more is asked. A dataset is answered by Ray Data."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import soundfile
from builders import build_model, build_processor
from serving import QUESTION, ROOT, RealtimeClient, RunningServer, spoken_pcm, wait_until
from websockets.exceptions import ConnectionClosed

from pipelines import save_repository
from pipelines.serving import answer_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"),
]
SESSIONS = 8  # so many that both replicas have some
MODEL = "tiny-folder"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    processor = build_processor()
    folder = tmp_path_factory.mktemp("served") / MODEL
    save_repository(build_model(processor), processor, folder)
    return folder


@contextlib.contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[SimpleNamespace]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.serving.ray_app", "--model", str(folder), "--port", str(port)]
    command += ["--cpus", "0.5", *arguments]
    for _ in range(3):  # on a busy machine Ray gives up after half a minute
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        guard = threading.Timer(550.0, os.killpg, (process.pid, signal.SIGKILL))
        guard.daemon = True
        guard.start()
        if has_started := any("replicas at" in line for line in process.stdout):
            break
        process.wait(120)
        guard.cancel()
    try:
        assert has_started, "the replicas did not start"
        yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}", ws=f"ws://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(120)
        guard.cancel()


def replicas(server: SimpleNamespace) -> set[int]:
    """The processes of the replicas that are there now."""
    found = psutil.Process(server.process.pid).children(recursive=True)
    return {child.pid for child in found if "ServeReplica" in " ".join(child.cmdline())}


def sessions_of_a_replica(server: SimpleNamespace) -> int:
    """How many sessions are open on one of the replicas, whichever answers."""
    _, _, body = RunningServer.request(server, "/metrics")
    return int(float(re.search(rb"^ttt_realtime_sessions (\S+)", body, re.MULTILINE).group(1)))


class Talker(threading.Thread):
    """A session in which one question follows on the other."""

    def __init__(self, server: SimpleNamespace):
        super().__init__(daemon=True)
        self.client = RealtimeClient(server)
        self.client.configure(instructions="x")
        self.answers: list[tuple[str, int]] = []
        self.is_lost = self.is_over = False

    def run(self) -> None:
        try:
            while not self.is_over:
                self.client.send("response.create")
                events = self.client.until("response.done")
                self.answers.append((events[-1]["response"]["status"], len(spoken_pcm(events))))
        except (ConnectionClosed, OSError):
            self.is_lost = True


def ask(server: SimpleNamespace, *earlier: str) -> tuple[int, dict]:
    """Ask by HTTP, after answers that are named by their ids."""
    messages: list[dict] = [{"role": "user", "content": "hi"}]
    for audio_id in earlier:
        messages += [{"role": "assistant", "audio": {"id": audio_id}}, {"role": "user", "content": "hi"}]
    body = {"model": MODEL, "messages": messages, "modalities": ["text", "audio"]}
    body["audio"] = {"voice": "alloy", "format": "pcm16"}
    status, _, content = RunningServer.request(server, "/v1/chat/completions", body)
    return status, json.loads(content) if content.startswith(b"{") else {}


def test_a_replica_that_is_killed_under_load_takes_only_its_own_sessions(folder):
    with serve(folder, "--replicas", "2") as server:
        talkers = [Talker(server) for _ in range(SESSIONS)]
        for talker in talkers:
            talker.start()
        wait_until(lambda: all(talker.answers for talker in talkers), "an answer in each session")
        before = replicas(server)
        assert len(before) == 2
        counts = {sessions_of_a_replica(server) for _ in range(20)}
        assert 1 <= len(counts) <= 2 and sum(counts) in (SESSIONS, SESSIONS / 2) and 0 not in counts
        killed = sorted(before)[0]
        os.kill(killed, signal.SIGKILL)
        so_far = [len(talker.answers) for talker in talkers]

        def have_gone_on() -> bool:
            pairs = zip(talkers, so_far, strict=True)
            return all(talker.is_lost or len(talker.answers) >= count + 2 for talker, count in pairs)

        wait_until(have_gone_on, "two more answers in each session that is left")
        assert sum(talker.is_lost for talker in talkers) in counts
        sizes = {answer for talker in talkers for answer in talker.answers}
        assert {status for status, _ in sizes} == {"completed"} and len({size for _, size in sizes}) == 1
        for talker in talkers:
            talker.is_over = True
        wait_until(lambda: ask(server)[0] == 200, "an answer")
        wait_until(lambda: len(replicas(server) - {killed}) == 2, "another replica")


def test_an_answer_is_found_by_its_id_on_every_replica(folder):
    with serve(folder, "--replicas", "2") as server:
        status, answer = ask(server)
        assert status == 200
        audio_id = answer["choices"][0]["message"]["audio"]["id"]
        later = [ask(server, audio_id) for _ in range(12)]  # so many that both replicas are asked
        assert [status for status, _ in later] == [200] * 12
        assert {answer["usage"]["prompt_tokens"] for _, answer in later} != {0}
        status, answer = ask(server, "audio_of_another_server")
        assert status == 404 and answer["error"]["code"] == "audio_not_found"
        assert "expired, or another server gave it" in answer["error"]["message"]


@pytest.mark.parametrize(("cores", "remedy"), [(2.0, "--cpus 0.5 or less"), (1.0, "a machine of 2")])
def test_engines_leave_a_core_to_read_and_write_with(tmp_path, cores, remedy):
    """Ray Data would wait for one without end."""
    questions = tmp_path / "questions.jsonl"
    questions.touch()
    arguments = answer_dataset.Arguments(str(questions), tmp_path / "answers", engines=2)
    with pytest.raises(ValueError, match=remedy):
        answer_dataset.check_cores(arguments, cores)
    answer_dataset.check_cores(arguments, 3.0)


def test_a_dataset_is_answered_by_two_engines(folder, tmp_path):
    questions: list[dict] = [{"id": f"q{index}", "text": "hi", "task": "text_chat"} for index in range(5)]
    questions += [{"id": "spoken", "audio": str(QUESTION)}, {"id": "lost", "audio": "/nowhere/question.wav"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    command = [sys.executable, "-m", "pipelines.serving.answer_dataset", "--model", str(folder), "--cpus", "0.5"]
    command += ["--questions", "questions.jsonl", "--output_dir", "answers", "--engines", "2", "--rows", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("6 answers in ")
    lines = "".join(path.read_text() for path in (tmp_path / "answers" / "rows").iterdir()).splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert set(rows) == {question["id"] for question in questions}
    assert "/nowhere/question.wav" in rows.pop("lost")["error"]
    for row in rows.values():
        assert (row["text"], row["error"], row["seconds"]) == ("hi", None, 3.2)
        assert soundfile.info(row["audio"]).duration == 3.2


def test_while_more_is_asked_than_one_replica_answers_there_are_two(folder):
    with serve(folder, "--replicas", "1", "--max_replicas", "2", "--max_rows", "2") as server:
        assert len(replicas(server)) == 1
        talkers = [Talker(server) for _ in range(SESSIONS)]
        for talker in talkers:
            talker.start()
        wait_until(lambda: len(replicas(server)) == 2, "another replica")
        for talker in talkers:
            talker.is_over = True
        assert not any(talker.is_lost for talker in talkers)
