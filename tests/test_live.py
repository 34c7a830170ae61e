"""A conversation by microphone and loudspeaker, with neither: recorded frames go in, and what comes out is heard."""

import asyncio
import contextlib
import ctypes.util
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import soxr
from builders import build_model, build_processor
from serving import ANSWER, QUESTION, ROOT, SECONDS, serve, words_of
from test_serving_realtime import LONG
from websockets.asyncio.server import serve as serve_websocket

from modeling_ttt import TttForConditionalGeneration
from pipelines import ttt_live, ttt_talk
from pipelines.serving.live import LiveConversation, talk_here, talk_to
from pipelines.serving.sound import encode_base64, float_to_pcm
from processing import TttProcessor

TINY = ROOT / "model_cards" / "ttt-tiny"
RATE = 16_000  # of the microphone; the loudspeaker has 24,000
FRAME = 0.02  # seconds


class Room:
    """Where a conversation is held: what is said in it, frame by frame, what is heard, shown and reported."""

    def __init__(self, **options):
        self.texts: list[str] = []
        self.problems: list[str] = []
        self.heard: list[np.ndarray] = []
        self.events: list[dict] = []
        self.conversation = LiveConversation(self.texts.append, self.problems.append, input_rate=RATE, **options)
        self.receive, self.conversation.receive = self.conversation.receive, self.note

    def note(self, event: dict) -> None:
        self.events.append(event)
        self.receive(event)

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["type"] == kind]

    def frame(self, samples: np.ndarray) -> None:
        self.conversation.listen(samples)
        self.heard.append(self.conversation.play(int(FRAME * self.conversation.output_rate)))

    def say(self, recording=QUESTION) -> None:
        samples = soxr.resample(*soundfile.read(recording, dtype="float32"), RATE)
        for start in range(0, len(samples), int(FRAME * RATE)):
            self.frame(samples[start : start + int(FRAME * RATE)])

    def wait(self, condition) -> None:
        """Be silent, in real time, until something is so."""
        ends = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < ends and not self.problems, self.problems
            self.frame(np.zeros(int(FRAME * RATE), np.float32))
            time.sleep(FRAME)

    @contextlib.contextmanager
    def open(self, session):
        thread = threading.Thread(target=asyncio.run, args=(session,), daemon=True)
        thread.start()
        try:
            assert self.conversation.is_ready.wait(SECONDS)
            yield self
        finally:
            self.conversation.hang_up()
            thread.join(SECONDS)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def small():
    processor = build_processor()
    with serve(build_model(processor), processor) as running:
        yield running


@pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="the default model is not there")
@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "on a server"])
def test_a_spoken_question_is_answered_by_a_voice_that_is_understood(place):
    model = TttForConditionalGeneration.from_pretrained(TINY, dtype="float32").eval()
    with serve(model, TttProcessor.from_pretrained(TINY)) as server:
        room = Room()
        here = talk_here(room.conversation, server.service) if place == "here" else None
        with room.open(here or talk_to(room.conversation, f"{server.ws}/v1/realtime?model=ttt-tiny")):
            room.say()
            room.wait(lambda: room.of("response.done") and not room.conversation.is_answering)
    assert "".join(room.texts) == f"{ANSWER}\n" and not room.problems
    assert words_of(np.concatenate(room.heard) * 32768) == ANSWER


def test_who_speaks_stops_the_answer_and_what_was_heard_is_kept(small):
    room = Room(session={"instructions": "x", "ttt": LONG})
    with room.open(talk_here(room.conversation, small.service)):
        room.say()
        room.wait(lambda: any(frame.any() for frame in room.heard))
        room.wait(lambda: len(np.concatenate(room.heard).nonzero()[0]) > 12_000)
        room.say()
        room.wait(lambda: room.of("response.done") and room.of("conversation.item.truncated"))
        (truncated,) = room.of("conversation.item.truncated")
        done = room.of("response.done")[0]["response"]
        assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "turn_detected")
        last = max(index for index, frame in enumerate(room.heard) if frame.any())
        heard = sum(np.count_nonzero(frame) for frame in room.heard[: last + 1]) / 24
        assert 500 <= truncated["audio_end_ms"] <= heard + 20
        room.wait(lambda: len(room.of("response.created")) == 2 and any(f.any() for f in room.heard[last + 1 :]))
        assert room.conversation.is_answering
    assert not room.problems


def test_a_session_that_is_refused_says_why_and_ends(small):
    room = Room(session={"ttt": {"task": "sing"}})
    asyncio.run(asyncio.wait_for(talk_here(room.conversation, small.service), SECONDS))
    assert len(room.problems) == 1 and "sing" in room.problems[0] and not room.conversation.is_ready.is_set()
    with pytest.raises(OSError, match="refuses"):
        asyncio.run(talk_to(room.conversation, f"{small.ws}/v1/realtime?model=other"))
    with pytest.raises(OSError):
        asyncio.run(talk_to(room.conversation, "ws://127.0.0.1:9/v1/realtime"))


def test_a_connection_that_is_lost_is_told():
    async def hold() -> None:
        async def vanish(connection) -> None:
            connection.transport.abort()

        async with serve_websocket(vanish, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await talk_to(Room().conversation, f"ws://127.0.0.1:{port}/v1/realtime")

    with pytest.raises(OSError, match="was lost"):
        asyncio.run(asyncio.wait_for(hold(), SECONDS))


# ---- the conversation by itself ------------------------------------------------------------------------------------


def begun(**options) -> tuple[Room, list[dict]]:
    """A conversation whose server is this test, and what it is sent."""
    room, sent = Room(**options), []
    room.conversation.connect(sent.append)
    room.note({"type": "session.created"})
    room.note({"type": "session.updated"})
    sent.clear()
    return room, sent


def answer(room: Room, seconds: float, *, done: bool = True, item: str = "item_1") -> None:
    pcm = encode_base64(float_to_pcm(np.full(int(seconds * 24_000), 0.25, np.float32)))
    room.note({"type": "response.created", "response": {"id": "resp_1"}})
    room.note({"type": "response.output_item.added", "item": {"id": item}})
    room.note({"type": "response.output_audio.delta", "item_id": item, "delta": pcm})
    if done:
        room.note({"type": "response.output_audio.done", "item_id": item})
        room.note({"type": "response.done", "response": {"id": "resp_1", "status": "completed"}})


@pytest.mark.parametrize(("rate", "latency", "heard"), [(24_000, 0.0, 400), (48_000, 0.0, 400), (44_100, 0.15, 250)])
def test_the_server_is_told_what_was_heard_at_any_rate_and_latency(rate, latency, heard):
    room, sent = begun(output_rate=rate, output_latency=latency)
    answer(room, 1.0)
    played = room.conversation.play(int(0.4 * rate))
    assert np.abs(played[rate // 10 :] - 0.25).max() < 0.01
    room.note({"type": "input_audio_buffer.speech_started"})
    assert sent == [
        {"type": "conversation.item.truncate", "item_id": "item_1", "content_index": 0, "audio_end_ms": heard}
    ]
    assert not room.conversation.play(rate).any() and not room.conversation.is_answering
    room.note({"type": "input_audio_buffer.speech_started"})
    assert len(sent) == 1


def test_an_answer_is_played_whole_though_it_comes_slowly():
    room, _ = begun()
    answer(room, 0.1, done=False)
    assert not room.conversation.play(2400).any()  # too little to begin with
    answer(room, 0.2, done=False, item="item_2")
    room.note({"type": "response.output_audio.done", "item_id": "item_1"})
    assert np.count_nonzero(room.conversation.play(9600)) == 0.3 * 24_000  # one after the other
    pcm = encode_base64(float_to_pcm(np.full(4800, 0.25, np.float32)))
    room.note({"type": "response.output_audio.delta", "item_id": "item_2", "delta": pcm})
    assert not room.conversation.play(2400).any()  # it ran dry: now twice as much is waited for
    room.note({"type": "response.output_audio.delta", "item_id": "item_2", "delta": pcm})
    assert np.count_nonzero(room.conversation.play(12_000)) == 9600


@pytest.mark.parametrize("can_interrupt", [True, False])
def test_without_headphones_the_answer_is_not_listened_to(can_interrupt):
    room, sent = begun(can_interrupt=can_interrupt)
    answer(room, 0.5)
    noise = np.full(RATE // 2, 0.5, np.float32)
    room.conversation.listen(noise)
    assert (len({event["audio"] for event in sent}) > 1) == can_interrupt
    room.conversation.play(24_000)
    room.conversation.listen(noise)
    room.conversation.listen(noise)
    assert len({event["audio"] for event in sent}) > 1  # and afterwards it is listened again


# ---- the command ---------------------------------------------------------------------------------------------------


def test_threads_end_together_and_the_first_error_is_told():
    conversation = LiveConversation(print, print)
    hung_up = threading.Event()
    conversation.connect(lambda event: hung_up.set() if event is None else None)
    ended = []

    def microphone(_, stopped):
        raise OSError("it was unplugged")

    def loudspeaker(_, stopped):
        ended.append(stopped.wait(SECONDS))

    with pytest.raises(OSError, match="unplugged"):
        ttt_live.talk(conversation, lambda: ended.append(hung_up.wait(SECONDS)), microphone, loudspeaker)
    assert ended == [True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--live", "question.wav"], "files do not go with --live"),
        (["--live", "--text", "hi"], "--text does not go with --live"),
        (["--live", "--play"], "--play does not go with --live"),
        (["--live", "--steps", "0"], "--steps must be at least 1"),
        (["--live", "--url", "http://127.0.0.1:8000"], "ws://127.0.0.1:8000/v1/realtime"),
        (["--live", "--url", "ws://127.0.0.1/v1/realtime", "--model", "x"], "--model does not go with --url"),
        (["--live", "--url", "ws://127.0.0.1/v1/realtime", "--threads", "2"], "--threads does not go with --url"),
        (["--url", "ws://127.0.0.1/v1/realtime", "question.wav"], "--url goes with --live"),
        (["--no_interruption", "question.wav"], "--no_interruption goes with --live"),
    ],
)
def test_what_does_not_go_with_live_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        ttt_talk.main(arguments)
    assert leaving.value.code == 2 and message in capsys.readouterr().err


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert ttt_talk.main(["--live"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and 'pip install -c constraints.txt -e ".[live]"' in message


@pytest.mark.skipif(ctypes.util.find_library("portaudio") is None, reason="PortAudio is not installed")
def test_a_machine_without_a_sound_card_is_told_so():
    sounddevice = pytest.importorskip("sounddevice")
    if len(sounddevice.query_devices()):
        pytest.skip("there is a sound card")
    command = [sys.executable, "-m", "pipelines.ttt_talk", "--live"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "there is no microphone here" in done.stderr
