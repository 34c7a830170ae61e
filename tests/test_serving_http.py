"""The HTTP endpoints with a small model: what is refused and how it is told, uploads within limits, who may come in."""

import base64
import io
import json
import re
import socket

import numpy as np
import pytest
import soundfile
from builders import build_model, build_processor, tone
from serving import QUESTION, RealtimeClient, is_at_rest, serve, wait_until
from websockets.exceptions import InvalidStatus

from pipelines.serving.limits import Limits

SPEECH = {"model": "ttt-tiny", "input": "hello", "voice": "alloy"}
CHAT = {"model": "ttt-tiny", "messages": [{"role": "user", "content": "hello"}]}
SYSTEM = [{"role": "system", "content": "be brief"}, *CHAT["messages"]]
KEY, OTHER_KEY = "a-key-that-opens-it", "another-key-that-does"
LIMITS = Limits(audio_seconds=5.0, text_length=300, messages=10, body_bytes=600_000)


@pytest.fixture(scope="module")
def server():
    processor = build_processor()
    with serve(build_model(processor), processor, limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def locked():
    processor = build_processor()
    with serve(build_model(processor), processor, keys=[OTHER_KEY, KEY]) as running:
        yield running


def form(fields: dict[str, str], files: dict[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A multipart body and its headers."""
    parts = []
    for name, value in fields.items():
        parts.append(f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, content in files.items():
        head = f'--B\r\nContent-Disposition: form-data; name="{name}"; filename="a.wav"\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts) + b"--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


def wav(samples: np.ndarray, rate: int = 16_000, file_format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format)
    return file.getvalue()


def heard(content: bytes, **part) -> dict:
    audio = {"data": base64.b64encode(content).decode(), "format": "wav", **part}
    return {**CHAT, "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}]}


WEBM = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "webm"}}


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/v1/audio/speech", {**SPEECH, "colour": 1}, "colour", "unknown_parameter"),
        ("/v1/audio/speech", {"model": "ttt-tiny"}, "input", "missing_required_parameter"),
        ("/v1/audio/speech", {**SPEECH, "input": 7}, "input", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "input": " "}, "input", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "input": "a" * 301}, "input", "too_long"),
        ("/v1/audio/speech", {**SPEECH, "response_format": "mp3"}, "response_format", "unsupported_format"),
        ("/v1/audio/speech", {**SPEECH, "speed": 2.0}, "speed", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "voice": "my aunt"}, "voice", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "voice": {"id": "x"}}, "voice", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "voice": None}, "voice", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "ttt": {"task": ""}}, "ttt.task", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "ttt": {"audio_top_k": 0}}, "ttt.audio_top_k", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "ttt": {"audio_top_p": 0}}, "ttt.audio_top_p", "invalid_value"),
        ("/v1/audio/speech", {**SPEECH, "instructions": "be glad"}, "instructions", "unknown_parameter"),
        ("/v1/audio/speech", {**SPEECH, "ttt": {"custom_generate": "x"}}, "ttt.custom_generate", "unknown_parameter"),
        ("/v1/audio/speech", {**SPEECH, "ttt": {"audio_block_size": 0}}, "ttt.audio_block_size", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "tools": [{}]}, "tools", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "stop": ["a"]}, "stop", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "presence_penalty": 0.5}, "presence_penalty", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format.type", None),
        ("/v1/chat/completions", {**CHAT, "n": 2}, "n", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "n": True}, "n", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "messages": []}, "messages", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "messages": CHAT["messages"] * 11}, "messages", "too_long"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "tool", "content": "x"}]}, "messages[0]", None),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": ""}]}, "messages[0].content", None),
        *(
            ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": content}]}, param, code)
            for content, param, code in (
                ([{"type": "image_url", "image_url": {}}], "messages[0].content[0]", "invalid_value"),
                ([{"text": "hi"}], "messages[0].content[0]", "invalid_value"),
                (["hi"], "messages[0].content[0]", "invalid_value"),
                ([{"type": "text", "text": 5}], "messages[0].content[0].text", "invalid_value"),
                ([{"type": "text", "text": "hi", "zzz": 1}], "messages[0].content[0].zzz", "unknown_parameter"),
                ([WEBM], "messages[0].content[0].input_audio.format", "invalid_value"),
                (5, "messages[0].content", "invalid_value"),
                (None, "messages[0].content", "invalid_value"),
            )
        ),
        ("/v1/chat/completions", {**CHAT, "ttt": {"task": "asr"}}, "ttt.task", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "modalities": ["text", "audio"]}, "audio", "missing_required_parameter"),
        ("/v1/chat/completions", {**CHAT, "audio": {"voice": "ash", "format": "wav"}}, "modalities", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "invalid_value"),
        *(
            ("/v1/chat/completions", {**CHAT, name: 3, "ttt": {ours: 3}}, f"ttt.{ours}", "invalid_value")
            for name, ours in (
                ("max_tokens", "max_new_tokens"),
                ("max_completion_tokens", "max_new_tokens"),
                ("seed", "seed"),
            )
        ),
        *(
            ("/v1/chat/completions", {"model": "ttt-tiny", "messages": SYSTEM, "ttt": {"task": task}}, "ttt.task", None)
            for task in ("text_chat", "sing", "asr", "")
        ),
        ("/v1/chat/completions", {**CHAT, "stream_options": {}}, "stream_options", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "temperature": -1}, "temperature", "invalid_value"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 5000}, "messages", "context_length_exceeded"),
        ("/v1/audio/speech", {**SPEECH, "ttt": {"max_new_tokens": 5000}}, "input", "context_length_exceeded"),
        (
            "/v1/chat/completions",
            {**CHAT, "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "opus"}},
            "audio.format",
            "unsupported_format",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(server, path, body, param, code):
    status, error = server.error(path, body)
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and code in (None, error["code"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "Input should be a text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' found using 'type'"),
        ({"stop": "END"}, "this server has nothing of the kind; leave it out"),
        ({"tools": [{}]}, "this server has nothing of the kind; leave it out"),
        ({"ttt": {"task": "asr"}}, "The task 'asr' needs sound"),
        ({"messages": SYSTEM, "ttt": {"task": "text_chat"}}, "Leave one of them out"),
        ({"messages": SYSTEM, "ttt": {"task": "sing"}}, "There is no task 'sing'"),
        ({"seed": 1, "ttt": {"seed": 1}}, "'seed' and 'ttt.seed' are two names of one option"),
        (
            {"modalities": ["text", "audio"], "audio": {"voice": None, "format": "wav"}},
            "Input should be 'default', 'al",
        ),
    ],
)
def test_what_is_refused_is_told_in_words_of_the_request(server, more, message):
    assert message in server.error("/v1/chat/completions", {**CHAT, **more})[1]["message"]


def test_a_reading_without_speech_is_an_error(server):
    """No sound would pass for silence."""
    body = {**SPEECH, "ttt": {"max_new_tokens": 1}}
    assert server.error("/v1/audio/speech", {**body, "stream_format": "sse"})[0] == 422
    status, error = server.error("/v1/audio/speech", body)
    assert status == 422 and error["code"] == "no_speech" and "ttt.max_new_tokens" in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"no json", b"[]", b"[" * 100_000, b'{"model": NaN}', b"\xff\xfe", b'{"a": "\\ud800"}'],
    ids=lambda body: str(len(body)),
)
def test_bodies_that_are_no_json_are_refused(server, body):
    status, error = server.error("/v1/chat/completions", body, headers={"Content-Type": "application/json"})
    assert status == 400 and error["code"] in ("invalid_json", "missing_required_parameter", "unknown_parameter")


@pytest.mark.parametrize(("stream", "name", "remedy"), [(False, "pcm", "wav, flac, pcm16"), (True, "wav", "pcm16")])
def test_a_format_of_a_spoken_answer_is_refused_by_its_name_with_those_there_are(server, stream, name, remedy):
    body = {**CHAT, "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": name}, "stream": stream}
    error = server.error("/v1/chat/completions", body)[1]
    assert f"'{name}'" in error["message"] and error["message"].endswith(f"{remedy}.")


def test_what_clients_send_by_habit_is_taken_with_the_values_that_mean_nothing(server):
    habits = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "stop": [],
        "store": False,
        "tool_choice": "none",
        "tools": [],
    }
    assert server.request("/v1/chat/completions", {**CHAT, **habits})[0] == 200
    assert server.request("/v1/chat/completions", {**CHAT, **dict.fromkeys(habits)})[0] == 200


def test_an_answer_in_which_nothing_was_said_may_come_back(server):
    user = CHAT["messages"][0]
    silent = {**CHAT, "messages": [user, {"role": "assistant", "content": ""}, user]}
    status, _, body = server.request("/v1/chat/completions", silent)
    assert status == 200
    without = server.request("/v1/chat/completions", {**CHAT, "messages": [user, user]})[2]
    assert json.loads(body)["usage"]["prompt_tokens"] == json.loads(without)["usage"]["prompt_tokens"]
    nothing = {**CHAT, "messages": [user, {"role": "assistant"}, user]}
    assert server.error("/v1/chat/completions", nothing)[1]["param"] == "messages[1].content"


def test_what_was_heard_is_counted_apart_in_the_usage(server):
    usage = json.loads(server.request("/v1/chat/completions", heard(wav(tone(2.0))))[2])["usage"]
    assert usage["prompt_tokens_details"]["audio_tokens"] == 25 < usage["prompt_tokens"]
    usage = json.loads(server.request("/v1/chat/completions", CHAT)[2])["usage"]
    assert usage["prompt_tokens_details"]["audio_tokens"] == 0


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/audio/speech", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/health", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/v1/embeddings", None),
        ("GET", "/v1/embeddings", None),
    ],
)
def test_a_method_that_a_path_does_not_take_is_told_apart_from_a_path_that_is_not_there(server, method, path, allow):
    status, headers, body = server.request(path, method=method)
    assert (status, headers.get("allow")) == ((404, None) if allow is None else (405, allow))
    assert path in json.loads(body)["error"]["message"]


def test_health_answers_those_who_ask_for_the_head_alone(server):
    assert server.request("/health", method="HEAD")[0] == 200


@pytest.mark.parametrize("path", ["/v1/nothing", "/", "/page.js"])
def test_a_websocket_is_told_where_there_is_none(server, path):
    with pytest.raises(InvalidStatus) as refused:
        RealtimeClient(server, path)
    assert refused.value.response.status_code == 404
    assert path in json.loads(refused.value.response.body)["error"]["message"]


def test_who_asks_a_websocket_for_a_page_is_told_what_it_is(server):
    status, headers, body = server.request("/v1/realtime?model=ttt-tiny")
    assert status == 426 and headers["upgrade"] == "websocket"
    assert "/v1/realtime is a WebSocket" in json.loads(body)["error"]["message"]


def test_next_to_no_temperature_is_none(server):
    def text(**options) -> str:
        status, _, body = server.request("/v1/chat/completions", {**CHAT, **options})
        assert status == 200, body
        return json.loads(body)["choices"][0]["message"]["content"]

    assert text(temperature=1e-300, top_p=0.5) == text(temperature=0.0) == text()


def test_paths_and_models_that_there_are_not(server):
    status, error = server.error("/v1/audio/speech", {**SPEECH, "model": "gpt-4o"})
    assert status == 404 and error["code"] == "model_not_found"
    assert server.error("/../pyproject.toml")[0] in (400, 404)
    assert server.error("/%2e%2e/%2e%2e/app.py")[0] in (400, 404)


# ---- uploads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_audio"),
        (b"RIFF" + bytes(40), "invalid_audio"),
        (wav(tone(0.5))[:60], None),
        (wav(tone(0.5)[:1599]), "audio_too_short"),
        (wav(np.zeros((800, 9))), "too_many_channels"),
        (wav(np.zeros(16_000 * 3600), file_format="FLAC"), "audio_too_long"),  # an hour of silence in few bytes
        (wav(np.zeros(200_000), rate=192_001), "invalid_audio"),
        (wav(np.zeros(200), rate=100), "invalid_audio"),
        (b"#EXTM3U\nhttp://127.0.0.1:1/a.wav\n", "invalid_audio"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "invalid_audio"),
    ],
    ids=["empty", "header", "cut", "short", "channels", "hour", "rate", "slow", "playlist", "concat"],
)
def test_sound_that_cannot_be_used_is_refused_before_it_is_heard(server, content, code):
    assert len(content) < LIMITS.body_bytes * 3 // 4
    body, headers = form({"model": "ttt-tiny"}, {"file": content})
    for path, data, kwargs, param in (
        ("/v1/audio/transcriptions", body, {"headers": headers}, "file"),
        ("/v1/chat/completions", heard(content), {}, "messages[0].content[0].input_audio.data"),
    ):
        if code is None:  # a file that was cut off is read as far as it goes
            assert server.request(path, data, **kwargs)[0] in (200, 400)
            continue
        status, error = server.error(path, data, **kwargs)
        assert status == (413 if code == "audio_too_long" else 400) and error["code"] == code
        assert error["param"] == param


def test_small_files_that_last_for_hours_are_not_all_encoded(server):
    body = heard(wav(np.zeros(80_000), file_format="FLAC"))
    message = body["messages"][0]
    body["messages"] = [{**message, "content": 64 * message["content"]}]
    status, error = server.error("/v1/chat/completions", body)
    assert status == 400 and error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert 2048 < int(re.search(r"has (\d+) tokens or more", error["message"])[1]) < 2200  # half of them


def test_a_header_that_claims_more_than_there_is_costs_nothing(server):
    content = bytearray(wav(tone(0.5)))
    content[40:44] = (2**31 - 2).to_bytes(4, "little")
    body, headers = form({"model": "ttt-tiny"}, {"file": bytes(content)})
    assert server.request("/v1/audio/transcriptions", body, headers=headers)[0] in (200, 400, 413)


@pytest.mark.parametrize(
    "data",
    ["http://127.0.0.1:1/a.wav", "/etc/passwd", "file:///etc/passwd", str(QUESTION), "data:audio/wav;base64,AAAA"],
)
def test_no_path_or_address_in_a_request_is_read(server, data):
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    status, error = server.error("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [part]}]})
    assert status == 400 and error["code"] in ("invalid_base64", "invalid_audio")


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"model": "ttt-tiny"}, {}, "file"),
        ({"model": "ttt-tiny", "file": "/etc/passwd"}, {}, "file"),
        ({}, {"file": wav(tone(0.5))}, "model"),
        ({"model": "ttt-tiny", "response_format": "srt"}, {"file": wav(tone(0.5))}, "response_format"),
        ({"model": "ttt-tiny", "stream": "maybe"}, {"file": wav(tone(0.5))}, "stream"),
        ({"model": "ttt-tiny", "language": "english!"}, {"file": wav(tone(0.5))}, "language"),
        (
            {"model": "ttt-tiny", "timestamp_granularities[]": "word"},
            {"file": wav(tone(0.5))},
            "timestamp_granularities[]",
        ),
        ({"model": "ttt-tiny", "temperature": "hot"}, {"file": wav(tone(0.5))}, "temperature"),
    ],
)
def test_forms_that_are_wrong_are_refused(server, fields, files, param):
    body, headers = form(fields, files)
    status, error = server.error("/v1/audio/transcriptions", body, headers=headers)
    assert status == 400 and error["param"] == param


@pytest.mark.parametrize("charset", ["punycode", '"idna"', "undefined", "latin-1", "utf-7"])
def test_a_form_names_no_encoding_but_utf8(server, charset):
    body, headers = form({"model": "a" * 200_000}, {})
    headers["Content-Type"] += f"; charset={charset}"
    status, error = server.error("/v1/audio/transcriptions", body, headers=headers)
    assert status == 415 and error["code"] == "unsupported_content_type" and "send UTF-8" in error["message"]
    body, headers = form({"model": "ttt-tiny", "prompt": "grün"}, {"file": wav(tone(0.5))})
    headers["Content-Type"] += "; charset=UTF-8"
    assert server.request("/v1/audio/transcriptions", body, headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({f"f{number}": "a" for number in range(20)}, {}, None),
        ({}, {"file": b"a", "other": b"b"}, "file"),
    ],
)
def test_a_form_that_has_too_much_is_refused_with_a_code(server, fields, files, param):
    body, headers = form(fields, files)
    status, error = server.error("/v1/audio/transcriptions", body, headers=headers)
    assert status == 400 and error["code"] == "invalid_form" and error["param"] == param


@pytest.mark.parametrize(
    ("name", "told"), [("prompt", "send 4096 or fewer"), ("model", "at most 256 characters"), ("tone", "Leave it out")]
)
def test_a_field_of_a_form_that_is_far_too_long_is_refused_by_its_name(locked, name, told):
    body, headers = form({"model": "ttt-tiny", name: "a" * 1_100_000}, {"file": wav(tone(0.5))})
    headers["Authorization"] = f"Bearer {KEY}"
    status, error = locked.error("/v1/audio/transcriptions", body, headers=headers)
    assert status == 400 and error["param"] == name and told in error["message"]


def test_a_text_that_is_far_too_long_is_told_how_long_it_may_be(locked):
    body = {**SPEECH, "input": "a" * 1_100_000}
    status, error = locked.error("/v1/audio/speech", body, headers={"Authorization": f"Bearer {KEY}"})
    assert status == 400 and error["code"] == "too_long" and "send 4096 or fewer" in error["message"]


def test_bodies_have_a_size(server):
    large = {**SPEECH, "input": "a" * 700_000}
    status, error = server.error("/v1/audio/speech", large)
    assert status == 413 and error["code"] == "request_too_large"
    # The same without a length, as it comes.
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(45):
            connection.sendall(b"4000\r\n" + b"a" * 0x4000 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in connection.recv(65_536).split(b"\r\n")[0]


def test_a_body_without_end_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(10_000):
                connection.sendall(b"4000\r\n" + b"a" * 0x4000 + b"\r\n")


# ---- who may come in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://localhost"])
def test_pages_of_other_origins_are_kept_out(server, origin):
    headers = {"Origin": origin, "Content-Type": "application/json"}
    for path, data, method in (
        ("/v1/models", None, None),
        ("/v1/audio/speech", SPEECH, None),
        ("/v1/models", None, "OPTIONS"),
    ):
        status, error = server.error(path, data, headers=headers, method=method)
        assert status == 403 and error["code"] == "cross_origin"
    with pytest.raises(InvalidStatus) as refused:
        RealtimeClient(server, origin=origin)
    assert refused.value.response.status_code == 403


def test_the_servers_own_page_is_let_in_and_no_other_gets_leave(server):
    status, headers, _ = server.request("/v1/models", headers={"Origin": server.url})
    assert status == 200 and not [name for name in headers if name.lower().startswith("access-control")]
    with RealtimeClient(server, origin=server.url, subprotocols=["realtime"]) as client:
        assert client.next()["type"] == "session.created" and client.socket.subprotocol == "realtime"


def test_a_page_can_send_no_json_without_asking(server):
    body = json.dumps(SPEECH).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert server.error("/v1/audio/speech", body, headers={"Content-Type": kind})[0] == 415


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "a@127.0.0.1", "10.0.0.1", ""])
def test_a_name_that_somebody_points_here_is_none_of_the_servers(server, host):
    assert server.error("/v1/models", headers={"Host": host})[0] in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "[::1]:8000", "127.0.0.1"])
def test_names_of_this_machine_are(server, host):
    assert server.request("/v1/models", headers={"Host": host})[0] == 200


def test_a_key_is_asked_for_everywhere_but_where_it_is_not_needed(locked):
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
        status, error = locked.error(path)
        assert status == 401 and error["code"] == "missing_api_key"
        assert locked.error(path, headers={"Authorization": f"Bearer {KEY}x"})[1]["code"] == "invalid_api_key"
        assert locked.error(path, headers={"Authorization": "Bearer "})[0] == 401
        assert locked.error(path, headers={"Authorization": f"Basic {KEY}"})[0] == 401
    for key in (KEY, OTHER_KEY):
        assert locked.request("/v1/models", headers={"Authorization": f"Bearer {key}", "Host": "any.name"})[0] == 200
    assert locked.request("/health")[0] == locked.request("/")[0] == 200


def test_a_websocket_brings_its_key_in_a_header_or_as_browsers_do(locked):
    for options in (
        {},
        {"additional_headers": {"Authorization": "Bearer no"}},
        {"subprotocols": ["realtime", "openai-insecure-api-key.no"]},
    ):
        with pytest.raises(InvalidStatus) as refused:
            RealtimeClient(locked, **options)
        assert refused.value.response.status_code == 401
    protocols = ["realtime", f"openai-insecure-api-key.{KEY}"]
    for options in ({"additional_headers": {"Authorization": f"Bearer {KEY}"}}, {"subprotocols": protocols}):
        with RealtimeClient(locked, **options) as client:
            assert client.next()["type"] == "session.created"
    with pytest.raises(InvalidStatus) as refused:
        RealtimeClient(locked, "/v1/realtime?model=gpt", additional_headers={"Authorization": f"Bearer {KEY}"})
    assert refused.value.response.status_code == 404


# ---- status --------------------------------------------------------------------------------------------------------


def test_metrics_count_what_is_refused_and_what_fails(server, locked, monkeypatch):
    def count(running, path: str, status: int) -> float:
        text = running.request("/metrics", headers={"Authorization": f"Bearer {KEY}"})[2].decode()
        found = re.findall(rf'ttt_http_requests_total{{path="{path}",status="{status}"}} (\S+)', text)
        return sum(map(float, found))

    before = count(locked, "/v1/models", 401)
    locked.error("/v1/models")
    assert count(locked, "/v1/models", 401) == before + 1
    before = count(locked, "other", 401)
    locked.error("/v1/nothing")
    assert count(locked, "other", 401) == before + 1
    monkeypatch.setattr(server.service, "check_model", lambda name: 1 / 0)
    assert server.error("/v1/audio/speech", SPEECH)[0] == 500
    assert count(server, "/v1/audio/speech", 500) == 1


def test_metrics_count_what_happens(server):
    def figure(name: str) -> float:
        lines = server.request("/metrics")[2].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = {
        name: figure(name) for name in ("ttt_audio_codes_total", "ttt_first_audio_seconds_count", "ttt_finished_total")
    }
    assert server.request("/v1/audio/speech", SPEECH)[0] == 200
    wait_until(lambda: is_at_rest(server), "rest")
    assert figure("ttt_audio_codes_total") == before["ttt_audio_codes_total"] + 40
    assert figure("ttt_first_audio_seconds_count") == before["ttt_first_audio_seconds_count"] + 1
    assert figure("ttt_finished_total") == before["ttt_finished_total"] + 1
    assert figure("ttt_rows ") == figure("ttt_queued ") == 0 and figure("ttt_max_rows ") > 0
    assert figure('ttt_http_requests_total{path="/v1/audio/speech",status="200"}') >= 1


def test_the_page_its_files_and_the_description_of_the_endpoints(server):
    status, headers, body = server.request("/")
    assert (
        status == 200
        and b"<!doctype html>" in body.lower()
        and "default-src 'self'" in headers["content-security-policy"]
    )
    assert server.request("/docs")[2] == server.request("/docs.html")[2]
    assert server.request("/docs.html")[0] == server.request("/docs.js")[0] == 200
    paths = json.loads(server.request("/openapi.json")[2])["paths"]
    assert {"/v1/audio/speech", "/v1/audio/transcriptions", "/v1/chat/completions", "/v1/models", "/health"} <= set(
        paths
    )
    for page in ("/", "/docs.html", "/docs.js", "/docs.css"):
        status, headers, body = server.request(page)
        assert status == 200 and b"http://" not in body.replace(b"http://www.w3.org", b"")
        assert "unsafe" not in headers["content-security-policy"]
        assert not re.search(rb"<style|<script>|\sstyle=|\son\w+=", body)  # which that forbids


def test_the_description_of_the_endpoints_has_what_they_answer(server, locked):
    document = json.loads(server.request("/openapi.json")[2])
    sound, headers = form({"model": "ttt-tiny"}, {"file": wav(tone(0.5))})
    spoken = {**CHAT, "stream": True}
    for path, data, kwargs in (
        ("/v1/models", None, {}),
        ("/v1/models/ttt-tiny", None, {}),
        ("/v1/models/gpt", None, {}),
        ("/health", None, {}),
        ("/metrics", None, {}),
        ("/v1/audio/speech", SPEECH, {}),
        ("/v1/audio/speech", {**SPEECH, "stream_format": "sse", "response_format": "pcm"}, {}),
        ("/v1/audio/speech", {**SPEECH, "ttt": {"max_new_tokens": 1}}, {}),
        ("/v1/audio/speech", b"", {"headers": {"Content-Type": "text/plain"}}),
        ("/v1/audio/transcriptions", sound, {"headers": headers}),
        ("/v1/chat/completions", CHAT, {}),
        ("/v1/chat/completions", spoken, {}),
        ("/v1/chat/completions", {**CHAT, "n": 2}, {}),
        ("/v1/models", None, {"headers": {"Origin": "http://evil.example"}}),
    ):
        status, headers, _ = server.request(path, data, **kwargs)
        described = document["paths"]["/v1/models/{name}" if path.count("/") == 3 and data is None else path]
        (operation,) = described.values()
        assert headers["content-type"].partition(";")[0] in operation["responses"][str(status)]["content"], path
    schema = document["paths"]["/v1/audio/speech"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["input"]["maxLength"] == LIMITS.text_length
    assert schema["properties"]["response_format"]["enum"] == ["wav", "flac", "pcm"]
    assert "alloy" in schema["properties"]["voice"]["enum"]
    assert "HTTPValidationError" not in json.dumps(document) and document["security"] == []
    options = document["components"]["schemas"]["TttOptions"]["properties"]
    assert options["audio_top_k"]["anyOf"][0]["minimum"] == 1
    assert options["audio_top_p"]["anyOf"][0]["exclusiveMinimum"] == 0
    document = json.loads(locked.request("/openapi.json", headers={"Authorization": f"Bearer {KEY}"})[2])
    (scheme,) = document["security"]
    assert document["components"]["securitySchemes"][next(iter(scheme))] == {"type": "http", "scheme": "bearer"}


def test_health_tells_when_the_engine_is_gone_and_requests_are_told_so():
    processor = build_processor()
    with serve(build_model(processor), processor) as server:
        assert json.loads(server.request("/health")[2]) == {"status": "ok", "model": "ttt-tiny"}
        server.service.engine.close(drain=False, timeout=30)
        status, _, body = server.request("/health")
        assert status == 503 and json.loads(body)["status"] == "failed"
        assert server.error("/v1/audio/speech", SPEECH)[0] == 503
