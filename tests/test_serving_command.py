"""ttt-serve as users start it: its help, its arguments, and how it stops."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from builders import build_model, build_processor
from serving import ROOT, SECONDS, RealtimeClient, RunningServer, closing, serve, spoken_pcm, wait_until
from test_serving_realtime import LONG
from websockets.exceptions import InvalidStatus

from pipelines import save_repository, ttt_serve
from pipelines.serving.limits import Limits, RateLimit

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def test_help_has_examples_and_does_not_wait_for_torch():
    script = (
        "import sys; sys.argv = ['ttt-serve', '--help']\n"
        "from pipelines.ttt_serve import main\n"
        "try: main()\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "assert 'torch' not in sys.modules and 'fastapi' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "curl" in done.stdout
    for option in ("host", "port", "model", "device", "max_rows", "max_queue", "api_key_file"):
        assert f"--{option}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_rows", "0"], "--max_rows must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--max_audio_seconds", "nan"], "--max_audio_seconds must be more than 0"),
        (["--max_audio_seconds", "inf"], "--max_audio_seconds must be a number of seconds, got inf"),
        (["--idle_seconds", "inf"], "--idle_seconds must be a number of seconds, got inf"),
        (["--drain_seconds", "inf"], "--drain_seconds must be a number of seconds, got inf"),
        (["--drain_seconds", "nan"], "--drain_seconds must be a number of seconds, got nan"),
        (["--port", "70000"], "at most 65535"),
        (["--ssl_certfile", "x.pem"], "go together"),
        (["--api_key_file", "/nowhere/keys"], "there is no file /nowhere/keys"),
        (["--host", "0.0.0.0"], "takes an API key"),
        (["--host", "::"], "takes an API key"),
        (["--host", "example.org"], "takes an API key"),
        (["--allowed_host", "https://talk.example"], "--allowed_host takes a name alone"),
        (["--allowed_host", "talk.example:8443"], "--allowed_host takes a name alone"),
        (["--colour", "blue"], "unrecognized arguments"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TTT_SERVE_API_KEY", raising=False)
    with pytest.raises(SystemExit) as leaving:
        ttt_serve.main(arguments)
    assert leaving.value.code == 2 and message in capsys.readouterr().err


def test_a_weak_key_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TTT_SERVE_API_KEY", "1234")
    with pytest.raises(SystemExit):
        ttt_serve.main(["--host", "0.0.0.0"])
    assert "16 or more" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error_in_one_line(capsys):
    assert ttt_serve.main(["--model", "/nowhere/model"]) == 1
    assert capsys.readouterr().err.startswith("ttt-serve: error: there is no folder /nowhere/model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    processor = build_processor()
    folder = tmp_path_factory.mktemp("served") / "tiny-folder"
    save_repository(build_model(processor), processor, folder)
    return folder


def start(folder, *arguments: str) -> tuple[subprocess.Popen, SimpleNamespace]:
    """A server in a process of its own, and where it is."""
    command = [sys.executable, "-m", "pipelines.ttt_serve", "--model", str(folder), "--port", "0", *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    guard = threading.Timer(SECONDS, process.kill)
    guard.daemon = True
    guard.start()
    line = process.stdout.readline()
    assert "tiny-folder at http://127.0.0.1:" in line, line + process.stderr.read()
    port = int(line.rpartition(":")[2])
    return process, SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}", ws=f"ws://127.0.0.1:{port}")


def test_sigterm_lets_answers_end_and_takes_no_more(folder):
    process, server = start(folder, "--drain_seconds", "60")
    answer: list = []
    speech = {"model": "tiny-folder", "input": "hi", "ttt": {**LONG, "max_audio_codes_per_span": 150}}
    listener = threading.Thread(target=lambda: answer.append(RunningServer.request(server, "/v1/audio/speech", speech)))
    with RealtimeClient(server) as client, RealtimeClient(server) as idle:
        client.configure(instructions="x", ttt=speech["ttt"])
        client.send("response.create")
        events = client.until("response.output_audio.delta")
        listener.start()
        while "ttt_submitted_total 3" not in RunningServer.request(server, "/metrics")[2].decode():  # one warmed it up
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code, said = closing(idle)
        assert code == 1001 and said[-1]["error"]["code"] == "server_shutting_down"
        events += client.until("response.done")
        assert events[-1]["response"]["status"] == "completed"
        assert len(spoken_pcm(events)) == 2 * 24_000 * 150 // 12.5
        assert closing(client)[0] == 1001
    listener.join(SECONDS)
    status, _, body = answer[0]
    assert status == 200 and len(body) == 44 + 2 * 24_000 * 150 // 12.5
    assert process.wait(SECONDS) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


@pytest.mark.slow
def test_what_does_not_end_in_time_is_cut_off(folder):
    process, server = start(folder, "--drain_seconds", "0")
    with RealtimeClient(server) as client:
        client.configure(instructions="x", ttt=LONG)
        client.send("response.create")
        client.until("response.output_audio.delta")
        process.send_signal(signal.SIGINT)
        assert closing(client)[0] in (1001, 1012)
    assert process.wait(SECONDS) == 0


def test_a_client_that_is_slowed_has_the_time_to_answer_a_ping():
    """Nothing of it is read while its sound is held back for its rate."""
    limits = Limits()
    service = SimpleNamespace(limits=limits, sessions=set())
    config = ttt_serve.make_server(service, ttt_serve.build_parser().parse_args([]), []).config
    seconds = limits.message_bytes * 3 / 4 / 48_000  # of sound, in one message
    rate = RateLimit(limits.audio_rate, 2 * limits.audio_seconds, clock=lambda: 0.0)
    waits = [rate.take(seconds) for _ in range(3)]
    assert waits[2] - waits[1] == pytest.approx(limits.seconds_held_back)
    assert config.ws_ping_timeout > 2 * limits.seconds_held_back > 60


def test_who_presses_ctrl_c_twice_does_not_wait_for_answers_and_clients_are_told(caplog):
    processor = build_processor()
    limits = Limits(drain_seconds=SECONDS)
    chat = {"model": "ttt-tiny", "messages": [{"role": "user", "content": "hi"}], "ttt": LONG}
    chat |= {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    answers: dict[str, tuple] = {}

    def ask(name: str, body: dict) -> None:
        answers[name] = running.request("/v1/chat/completions", body)

    with serve(build_model(processor), processor, limits=limits) as running, RealtimeClient(running) as client:
        client.configure(instructions="x", ttt=LONG)
        client.send("response.create")
        client.until("response.output_audio.delta")
        bodies = {"whole": chat, "stream": {**chat, "stream": True}}
        threads = [threading.Thread(target=ask, args=pair) for pair in bodies.items()]
        logging.getLogger("uvicorn").addHandler(caplog.handler)
        for thread in threads:
            thread.start()
        wait_until(lambda: running.service.engine.stats().rows == 3, "the answers")
        for _ in range(2):
            running.server.handle_exit(signal.SIGINT, None)
        code, said = closing(client)
        for thread in threads:
            thread.join(SECONDS)
    logging.getLogger("uvicorn").removeHandler(caplog.handler)
    done = next(event["response"] for event in said if event["type"] == "response.done")
    assert done["status"] == "failed" and done["status_details"]["error"]["code"] == "server_shutting_down"
    assert code == 1001 and said[-1]["error"]["code"] == "server_shutting_down"
    status, headers, body = answers["whole"]
    assert status == 503 and json.loads(body)["error"]["code"] == "server_shutting_down" and headers["retry-after"]
    status, _, body = answers["stream"]
    last = json.loads(body.decode().strip().rpartition("data: ")[2])
    assert status == 200 and last["error"]["code"] == "server_shutting_down"
    assert "Traceback" not in caplog.text


def test_logs_tell_what_goes_wrong_and_neither_keys_nor_what_is_said():
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    key, said = "a-key-that-nobody-may-read", "a word for the model alone"
    processor = build_processor()
    arguments = ["--log_level", "debug"]
    with serve(build_model(processor), processor, keys=[key], arguments=arguments) as running:
        loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.access", "pipelines")]
        for logger in loggers:
            logger.addHandler(handler)
        try:
            protocols = ["realtime", f"openai-insecure-api-key.{key}"]
            with RealtimeClient(running, subprotocols=protocols) as client:
                client.say(said)
            headers = {"Authorization": f"Bearer {key}"}
            assert running.request("/v1/audio/speech", {"model": "ttt-tiny", "input": said}, headers)[0] == 200
            assert running.request(f"/v1/models?api_key={key}", headers=headers)[0] == 200
            for path in (f"/v1/realtime?api_key={key}", f"/v1/nothing?api_key={key}"):
                with pytest.raises(InvalidStatus):
                    RealtimeClient(running, path, subprotocols=protocols)
            assert logging.getLogger("pipelines.serving.realtime").isEnabledFor(logging.DEBUG)
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
    assert any("/v1/audio/speech" in line for line in lines)
    assert any('"WebSocket /v1/realtime" 400' in line for line in lines)
    assert not [line for line in lines if key in line or said[:20] in line or "handshake" in line]
    assert {handler["stream"] for handler in ttt_serve.log_config("debug")["handlers"].values()} == {"ext://sys.stderr"}


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert ttt_serve.main(["--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port} (Address already in use)" in capsys.readouterr().err


@pytest.mark.slow
def test_keys_of_a_file_and_names_of_a_proxy(folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("the-only-key-there-is\n")
    process, server = start(folder, "--api_key_file", str(keys), "--model_name", "tiny-folder")
    assert RunningServer.request(server, "/v1/models")[0] == 401
    headers = {"Authorization": "Bearer the-only-key-there-is"}
    assert RunningServer.request(server, "/v1/models", headers=headers)[0] == 200
    process.terminate()
    assert process.wait(SECONDS) == 0
    process, server = start(folder, "--allowed_host", "talk.example")
    assert RunningServer.request(server, "/v1/models", headers={"Host": "talk.example"})[0] == 200
    assert RunningServer.request(server, "/v1/models", headers={"Host": "other.example"})[0] == 403
    process.terminate()
    assert process.wait(SECONDS) == 0
