"""A server for tests, the real one, in a thread of its own: on a free port of this machine."""

import argparse
import base64
import contextlib
import json
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from websockets.exceptions import ConnectionClosed

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
        self.server.config.ws_ping_interval = 1.0
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


def words_of(samples: np.ndarray) -> str:
    """
    What an independent recogniser of sums makes of PCM16 samples at 24 kHz. Where the machine is slower than speech,
    the voice waits for what is to come; these silences are left out.
    """
    from training_examples.evaluation.recognisers import Recognizer

    names = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    names = names.split()
    sums = [f"{names[a]} plus {names[b]} is {names[a + b]}" for a in range(9) for b in range(9)]
    silence = np.zeros(4800)
    waveform = np.concatenate([silence, samples[samples != 0] / 32768, silence]).astype(np.float32)
    with Recognizer(sorted({*names, "plus", "is"}), sums, num_workers=1) as recognizer:
        return recognizer.transcribe([waveform], sampling_rate=24_000)[0]


class RealtimeClient:
    """A plain client of /v1/realtime: events out, events in."""

    def __init__(self, server: RunningServer, path: str = "/v1/realtime", **options):
        from websockets.sync.client import connect

        self.socket = connect(server.ws + path, max_size=None, compression=None, ping_interval=None, **options)

    def __enter__(self) -> "RealtimeClient":
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def send(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self) -> dict:
        return json.loads(self.socket.recv(timeout=SECONDS))

    def until(self, *kinds: str) -> list[dict]:
        """Events up to the first of one of these types."""
        events = [self.next()]
        while events[-1]["type"] not in kinds:
            events.append(self.next())
        return events

    def ask(self, kind: str, answer: str, **fields) -> dict:
        """Send an event; return the first of a type that follows."""
        self.send(kind, **fields)
        return self.until(answer)[-1]

    def error(self, kind: str, **fields) -> dict:
        """Send an event that is refused; return the error."""
        return self.ask(kind, "error", **fields)["error"]

    def say(self, text: str, **item) -> str:
        """Add the user's text; return its item's id."""
        content = [{"type": "input_text", "text": text}]
        added = self.ask(
            "conversation.item.create",
            "conversation.item.done",
            item={"type": "message", "role": "user", "content": content},
            **item,
        )
        return added["item"]["id"]

    def append(self, pcm: bytes) -> None:
        self.send("input_audio_buffer.append", audio=base64.b64encode(pcm).decode())

    def configure(self, **session) -> dict:
        return self.ask("session.update", "session.updated", session={"type": "realtime", **session})["session"]

    def abort(self) -> None:
        """Vanish without a word."""
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.socket.close()


def spoken_pcm(events: list[dict]) -> bytes:
    """The sound in events, PCM16."""
    return b"".join(base64.b64decode(e["delta"]) for e in events if e["type"] == "response.output_audio.delta")


def wait_until(condition, what: str) -> None:
    """Wait until something is so."""
    ends = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < ends, f"{what} did not come about"
        time.sleep(0.02)


def is_at_rest(server: RunningServer) -> bool:
    """Whether nothing is being answered, encoded or talked about."""
    stats = server.service.engine.stats()
    return not (stats.rows or stats.queued or stats.encoding or server.service.sessions)


def closing(client: RealtimeClient) -> tuple[int, list[dict]]:
    """How the server closes a connection, and what it says before."""
    events = []
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            events.append(client.next())
    return closed.value.rcvd.code, events
