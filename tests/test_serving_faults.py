"""Clients that send nonsense, leave at any moment or read slowly: everyone gets an answer or an error, and nothing is
left behind."""

import base64
import gc
import http.client
import json
import random
import socket
import time

import psutil
import pytest
from builders import build_model, build_processor, tone
from serving import RealtimeClient, is_at_rest, question_pcm, serve, silence_pcm, wait_until
from starlette.responses import Response
from starlette.routing import Route
from test_serving_http import CHAT, SPEECH, form, heard, wav
from test_serving_realtime import LONG

from pipelines import ttt_serve
from pipelines.serving.limits import Limits

LIMITS = Limits(audio_seconds=5.0, text_length=300, messages=10, messages_per_second=1e6, audio_rate=1e6)
PCM = base64.b64encode(silence_pcm(0.2)).decode()
ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
FRAMES = [
    {"type": "session.update", "session": {"type": "realtime", "instructions": "x", "output_modalities": ["text"]}},
    {
        "type": "session.update",
        "session": {
            "type": "realtime",
            "max_output_tokens": 5,
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": 24000},
                    "turn_detection": None,
                    "transcription": None,
                },
                "output": {"voice": "alloy", "speed": 1.0},
            },
            "ttt": {"task": "text_chat", "audio_top_k": 5, "audio_temperature": 0.5},
        },
    },
    {"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}},
    {"type": "input_audio_buffer.append", "audio": PCM},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear", "event_id": "e"},
    {"type": "conversation.item.create", "item": {**ITEM, "id": "a"}, "previous_item_id": "root"},
    {"type": "conversation.item.create", "item": {**ITEM, "content": [{"type": "input_audio", "audio": PCM}]}},
    {"type": "conversation.item.delete", "item_id": "a"},
    {"type": "conversation.item.retrieve", "item_id": "a"},
    {"type": "conversation.item.truncate", "item_id": "a", "content_index": 0, "audio_end_ms": 10},
    {"type": "response.create", "response": {"conversation": "none", "input": [ITEM], "metadata": {"a": "b"}}},
    {"type": "response.create", "response": {"output_modalities": ["text"], "max_output_tokens": 3}},
    {"type": "response.cancel"},
]
LONGER = {"max_audio_codes_per_span": 1400, "max_new_tokens": 1500, "audio_block_size": 100, "audio_steps_per_block": 1}
# What is answered by what comes of it: turns; the end of the response; the response, once a cancelled one has ended.
SILENT = ("input_audio_buffer.append", "response.cancel", "response.create")
VALUES = [None, True, -1, 0, 2**63, 1e308, "", "a" * 2000, "\0", "\ud800", [], {}, [[]], "<|im_end|>", [None] * 500]


def mutated(value, chance: random.Random):
    """A JSON value with one thing in it changed."""
    kind = chance.randrange(6)
    if isinstance(value, dict) and value and kind < 5:
        key = chance.choice(sorted(value))
        if kind == 0:
            return {name: part for name, part in value.items() if name != key}
        if kind == 1:
            return {**value, chance.choice(["", "x", key.upper(), "__class__"]): value[key]}
        return {**value, key: mutated(value[key], chance)}
    if isinstance(value, list) and value and kind < 5:
        place = chance.randrange(len(value))
        changed = [mutated(part, chance) if index == place else part for index, part in enumerate(value)]
        return changed * chance.choice([1, 1, 2, 300]) if kind == 0 else changed
    return chance.choice(VALUES)


def mangled(text: str, chance: random.Random) -> str:
    """A text with letters lost, doubled or replaced."""
    letters = list(text)
    for _ in range(chance.choice([1, 3, 10])):
        place = chance.randrange(len(letters))
        letters[place] = chance.choice(["", "{", '"', "\\", "\u2028", letters[place] * 2, "9" * 400, "[" * 300])
    return "".join(letters)


def frame(chance: random.Random) -> str:
    if chance.random() < 0.1:  # now and then what is right, so that there is something to disturb
        return json.dumps(chance.choice(FRAMES))
    text = json.dumps(mutated(chance.choice(FRAMES), chance))
    return mangled(text, chance) if chance.random() < 0.3 else text


def send_frames(server, count: int, seed: int) -> int:
    """Send mutated frames; return how many errors came. After each, an event that is none tells that it was read."""
    chance = random.Random(seed)
    errors = 0
    with RealtimeClient(server) as client:
        client.next()
        for number in range(count):
            text = frame(chance)
            client.socket.send(text)
            client.send("mark", event_id=f"mark {number}")
            came = []
            while True:
                event = client.next()
                if event["type"] == "error" and event["error"]["event_id"] == f"mark {number}":
                    break
                came.append(event)
            errors += sum(event["type"] == "error" for event in came)
            assert not [e for e in came if e["type"] == "error" and e["error"]["type"] == "server_error"], (text, came)
            assert came or any(f'"{kind}"' in text for kind in SILENT), text[:500]
        client.configure(instructions="still here")
    return errors


def send_requests(server, count: int, seed: int) -> None:
    """Send mutated requests; each gets an answer or an error in OpenAI's form, and none an internal one."""
    chance = random.Random(seed)
    speech, chat = {**SPEECH, "ttt": {"max_new_tokens": 8}}, {**CHAT, "max_tokens": 4, "temperature": 0}
    bodies = [speech, chat, heard(wav(tone(0.2))) | {"max_tokens": 4}]
    for _ in range(count):
        if chance.random() < 0.3:
            sound = bytearray(wav(tone(0.2), file_format=chance.choice(["WAV", "FLAC"])))
            for _ in range(chance.choice([0, 3, 30])):
                sound[chance.randrange(min(len(sound), 200))] = chance.randrange(256)
            body, headers = form({"model": "ttt-tiny", "stream": "false"}, {"file": bytes(sound)})
            body = mangled(body.decode("latin-1"), chance).encode("utf-8") if chance.random() < 0.5 else body
            path = "/v1/audio/transcriptions"
        else:
            index = chance.randrange(len(bodies))
            path = "/v1/audio/speech" if index == 0 else "/v1/chat/completions"
            text = json.dumps(mutated(bodies[index], chance))
            body = (mangled(text, chance) if chance.random() < 0.3 else text).encode("utf-8", "surrogatepass")
            headers = {"Content-Type": "application/json"}
        status, _, content = server.request(path, body, headers)
        assert status in (200, 400, 404, 408, 413, 415), (status, body[:500], content[:500])
        if status != 200:
            assert set(json.loads(content)["error"]) == {"message", "type", "code", "param"}


@pytest.fixture(scope="module")
def server():
    processor = build_processor()
    model = build_model(processor)
    model.generation_config.max_audio_codes_per_span = 4
    with serve(model, processor, limits=LIMITS) as running:
        yield running


def test_nonsense_gets_an_answer_or_an_error(server):
    assert send_frames(server, 200, seed=1) > 100
    send_requests(server, 100, seed=1)
    wait_until(lambda: is_at_rest(server), "rest")


@pytest.mark.slow
def test_ten_thousand_pieces_of_nonsense_leave_nothing_behind(server):
    process = psutil.Process()

    def memory() -> int:
        wait_until(lambda: is_at_rest(server), "rest")
        gc.collect()
        return process.memory_info().rss

    send_frames(server, 1000, seed=2)
    send_requests(server, 500, seed=2)
    before = memory()
    for seed in range(3, 10):
        send_frames(server, 1000, seed)
        send_requests(server, 500, seed)
    assert memory() - before < 100 * 2**20
    assert server.request("/health")[0] == 200


# ---- clients that leave --------------------------------------------------------------------------------------------


def stages(client: RealtimeClient):
    """What a client has done when it leaves; one more thing each time."""
    yield "connected"
    client.next()
    yield "greeted"
    client.configure(instructions="x", ttt=LONG, audio={"input": {"transcription": {}}})
    yield "configured"
    client.append(silence_pcm(0.5) + question_pcm())
    yield "speaking"
    client.append(silence_pcm(1.0))
    yield "spoken"
    client.until("response.created")
    yield "answered"
    client.until("response.output_audio.delta")
    yield "listening"


@pytest.mark.parametrize("stage", range(7))
@pytest.mark.parametrize("politely", [True, False], ids=["closing", "vanishing"])
def test_a_realtime_client_may_leave_at_any_moment(server, stage, politely):
    client = RealtimeClient(server)
    for number, _ in enumerate(stages(client)):
        if number == stage:
            break
    if politely:
        client.socket.close()
    else:
        client.abort()
    wait_until(lambda: is_at_rest(server), "rest")
    assert server.service.engine.stats().sessions == 0


@pytest.mark.parametrize("stage", ["headers", "body", "request", "answer"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/speech", {**SPEECH, "ttt": LONG}),
        ("/v1/audio/speech", {**SPEECH, "ttt": LONG, "stream_format": "sse"}),
        ("/v1/chat/completions", {**CHAT, "ttt": LONG, "modalities": ["text", "audio"]}),
        ("/v1/chat/completions", {**CHAT, "ttt": LONG, "modalities": ["text", "audio"], "stream": True}),
    ],
    ids=["speech", "speech-events", "chat", "chat-stream"],
)
def test_an_http_client_may_leave_at_any_moment(server, stage, path, body):
    if "modalities" in body:
        body = {**body, "audio": {"voice": "alloy", "format": "pcm16"}}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    content = json.dumps(body).encode()
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(content)))
    before = server.service.engine.stats().submitted
    if stage == "headers":
        connection.send(b"X-Half: a")
    else:
        connection.endheaders()
        connection.send(content[:20] if stage == "body" else content)
    if stage in ("request", "answer"):
        wait_until(lambda: server.service.engine.stats().submitted > before, "the request")
    if stage == "answer" and body.get("stream") is not None or path.endswith("speech") and stage == "answer":
        connection.getresponse().read(100)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_until(lambda: is_at_rest(server), "rest")


def test_a_slow_reader_gets_all_of_its_answer_though_the_server_stops(monkeypatch):
    monkeypatch.setattr(ttt_serve, "FLUSH_TICKS", 1)
    size, processor = 12_000_000, build_processor()

    async def large(request) -> Response:
        return Response(bytes(size))

    with serve(build_model(processor), processor) as server:
        server.server.config.app.router.routes.insert(0, Route("/large", large))
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        taken = 0
        while piece := connection.recv(65_536):
            taken += len(piece)
            server.server.should_exit |= taken > 1_000_000
            time.sleep(0.01)
        assert taken > size  # with its head
        connection.close()


def test_a_reader_of_http_that_stops_is_left_and_its_answer_ends():
    processor = build_processor()
    with serve(build_model(processor), processor, limits=Limits(send_seconds=0.5)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        content = json.dumps({**SPEECH, "ttt": LONGER, "response_format": "pcm"}).encode()
        head = "POST /v1/audio/speech HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: server.service.engine.stats().rows == 1, "the answer")
        wait_until(lambda: is_at_rest(server), "rest")
        connection.close()
