"""A server for tests, the real one, in a thread of its own: on a free port of this machine."""

import argparse
import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from pipelines.serving.engine import Engine
from pipelines.serving.limits import Limits
from pipelines.serving.service import Service
from pipelines.ttt_serve import build_parser, make_server

ROOT = Path(__file__).resolve().parent.parent
QUESTION = ROOT / "tests" / "fixtures" / "question.wav"  # "what is seven plus eight"
ANSWER = "seven plus eight is fifteen"
SECONDS = 120.0  # after which a test gives up


class RunningServer:
    """A server that answers at `url`."""

    def __init__(self, service: Service, arguments: argparse.Namespace, keys: list[str]):
        self.service = service
        self.server = make_server(service, arguments, keys)
        self.server.config.ws_ping_interval = 5.0
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> "RunningServer":
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            self.thread.join(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url, self.ws = f"http://127.0.0.1:{self.port}", f"ws://127.0.0.1:{self.port}"
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "the server did not stop"

    def request(
        self,
        path: str,
        data: bytes | dict | None = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request; a mapping is sent as JSON."""
        headers = dict(headers or {})
        if isinstance(data, dict):
            data = json.dumps(data).encode()
            headers.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return response.status, dict(response.headers), response.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def error(self, path: str, data: bytes | dict | None = None, **kwargs) -> tuple[int, dict]:
        """Status and error of a request that is refused."""
        status, _, body = self.request(path, data, **kwargs)
        assert status >= 400, body
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "code", "param"} and error["message"]
        return status, error


@contextlib.contextmanager
def serve(model, processor, keys=(), arguments=(), limits=None, **engine_options) -> Iterator[RunningServer]:
    """Serve a model while the context is open."""
    engine = Engine(model, processor, **engine_options)
    engine.start()
    service = Service(engine, processor, "ttt-tiny", limits or Limits())
    parsed = build_parser().parse_args(["--port", "0", "--log_level", "warning", *arguments])
    server = RunningServer(service, parsed, list(keys)).start()
    try:
        yield server
    finally:
        server.stop()
        engine.close(drain=False, timeout=SECONDS)


def question_pcm(rate: int = 24_000) -> bytes:
    """The fixture question as PCM16."""
    import soxr

    samples, source = soundfile.read(QUESTION, dtype="float32")
    return (soxr.resample(samples, source, rate).clip(-1, 1) * 32767).astype("<i2").tobytes()


def silence_pcm(seconds: float, rate: int = 24_000) -> bytes:
    return np.zeros(int(seconds * rate), "<i2").tobytes()
