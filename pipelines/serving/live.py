"""A spoken conversation between a microphone and a loudspeaker: a client of the Realtime protocol, of a service in this
process or of a server. The devices themselves are ttt_live.py's, in the folder above."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .sound import SILENCE, WIRE_RATE, Resampler, decode_base64, encode_base64, float_to_pcm, pcm_to_float

if TYPE_CHECKING:
    from .service import Service

SENT_SAMPLES = WIRE_RATE // 25  # of the microphone, in one event: 40 ms
MESSAGE_BYTES = 8 * 1024 * 1024
ECHO_SECONDS = 0.3  # that a room sounds on after the loudspeaker
FIRST_WAIT, MOST_WAIT = 0.2, 1.6  # seconds of an answer that are there before it is played, and again where it ran dry


@dataclass
class Answer:
    """One answer on its way to the loudspeaker: what has come of it, what was played, in samples of the loudspeaker."""

    item_id: str
    resampler: Resampler
    pieces: deque[np.ndarray] = field(default_factory=deque)
    held: int = 0
    played: int = 0
    is_complete: bool = False
    is_flowing: bool = False  # enough of it is there

    def add(self, samples: np.ndarray, last: bool = False) -> None:
        """Take the next samples at `WIRE_RATE`."""
        samples = self.resampler.push(samples, last)
        if len(samples):
            self.pieces.append(samples)
            self.held += len(samples)
        self.is_complete = self.is_complete or last

    def take(self, count: int) -> np.ndarray:
        """Return the next samples, `count` or fewer."""
        taken: list[np.ndarray] = []
        while count and self.pieces:
            piece = self.pieces.popleft()
            if len(piece) > count:
                self.pieces.appendleft(piece[count:])
            taken.append(piece[:count])
            count -= len(taken[-1])
        samples = np.concatenate([SILENCE, *taken])
        self.held -= len(samples)
        self.played += len(samples)
        return samples


class LiveConversation:
    """
    A hands-free conversation. What the microphone hears goes out, turns are found by the server, answers are played as
    they come; who speaks meanwhile stops the answer, and the conversation then holds what was heard of it.

    `listen` and `play` are for the devices' threads, `receive` for whoever has the connection. None of them waits.

    Args:
        show (`Callable[[str], None]`): takes the text of answers as it comes; a line feed ends one.
        report (`Callable[[str], None]`): takes what went wrong, in words.
        input_rate (`int`, *optional*, defaults to 24000): of the microphone, Hz.
        output_rate (`int`, *optional*, defaults to 24000): of the loudspeaker, Hz.
        output_latency (`float`, *optional*, defaults to 0.0): seconds from `play` to the ear.
        can_interrupt (`bool`, *optional*, defaults to `True`):
            Listen while an answer is played. It takes headphones, or a microphone that does not hear the loudspeaker.
        session (`Mapping`, *optional*): further settings of the Realtime session, such as `{"ttt": {"task": "asr"}}`.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        report: Callable[[str], None],
        *,
        input_rate: int = WIRE_RATE,
        output_rate: int = WIRE_RATE,
        output_latency: float = 0.0,
        can_interrupt: bool = True,
        session: Mapping[str, Any] | None = None,
    ):
        self.show, self.report = show, report
        self.output_rate, self.output_latency, self.can_interrupt = output_rate, output_latency, can_interrupt
        self.session = dict(session or {})
        self.is_ready = threading.Event()  # the session has begun, and listens
        self.input_rate = input_rate
        self._microphone = Resampler(input_rate, WIRE_RATE)
        self._recorded = SILENCE  # not sent yet
        self._deaf = 0  # samples of the microphone that are not to be heard
        self._lock = threading.Lock()
        self._answers: deque[Answer] = deque()  # that are to be played
        self._writing: str | None = None  # the response that is being written
        self._wait = FIRST_WAIT
        self._send: Callable[[dict[str, Any] | None], None] | None = None

    # ---- for the devices ---------------------------------------------------------------------------------------------

    def listen(self, samples: np.ndarray) -> None:
        """Take what the microphone recorded, float32 of shape `(samples,)`, full scale 1."""
        if not self.is_ready.is_set():
            return
        if not self.can_interrupt and self.is_answering:
            self._deaf = len(samples) + int((self.output_latency + ECHO_SECONDS) * self.input_rate)
        if self._deaf > 0:
            self._deaf -= len(samples)
            samples = np.zeros_like(samples)
        recorded = np.concatenate([self._recorded, self._microphone.push(samples)])
        while len(recorded) >= SENT_SAMPLES:
            pcm = float_to_pcm(recorded[:SENT_SAMPLES])
            self.send({"type": "input_audio_buffer.append", "audio": encode_base64(pcm)})
            recorded = recorded[SENT_SAMPLES:]
        self._recorded = recorded

    def play(self, count: int) -> np.ndarray:
        """Return what the loudspeaker is to play next, float32 of shape `(count,)`, silence where there is nothing."""
        samples = np.zeros(count, dtype=np.float32)
        filled = 0
        with self._lock:
            while filled < count and self._answers:
                answer = self._answers[0]
                if not answer.held and answer.is_complete:
                    self._answers.popleft()
                    continue
                enough = self._wait * self.output_rate
                answer.is_flowing = answer.is_flowing or answer.is_complete or answer.held >= enough
                if not answer.is_flowing:
                    break
                taken = answer.take(count - filled)
                samples[filled : filled + len(taken)] = taken
                filled += len(taken)
                if not answer.held and not answer.is_complete:  # it ran dry: what follows is slow to come
                    answer.is_flowing = False
                    self._wait = min(MOST_WAIT, 2 * self._wait)
        return samples

    @property
    def is_answering(self) -> bool:
        """Whether an answer is being written or played."""
        with self._lock:
            return self._writing is not None or any(answer.held for answer in self._answers)

    # ---- for the connection ------------------------------------------------------------------------------------------

    def connect(self, send: Callable[[dict[str, Any] | None], None]) -> None:
        """Send events by this from now on; None asks it to hang up."""
        self._send = send

    def send(self, event: dict[str, Any] | None) -> None:
        """Send an event, where there is a connection."""
        if self._send is not None:
            self._send(event)

    def hang_up(self) -> None:
        """End the session."""
        self.is_ready.clear()
        self.send(None)

    def receive(self, event: Mapping[str, Any]) -> None:
        """Take an event of the server. Those that mean nothing here are passed over."""
        handler = getattr(self, "_on_" + event["type"].replace(".", "_"), None)
        if handler is not None:
            handler(event)

    def _on_session_created(self, event: Mapping[str, Any]) -> None:
        turns = {"input": {"turn_detection": {"type": "server_vad"}}}
        settings = {"type": "realtime", "output_modalities": ["audio"], "audio": turns, **self.session}
        self.send({"type": "session.update", "session": settings})

    def _on_session_updated(self, event: Mapping[str, Any]) -> None:
        self.is_ready.set()

    def _on_error(self, event: Mapping[str, Any]) -> None:
        self.report(event["error"]["message"])
        if not self.is_ready.is_set():  # the settings were refused
            self.hang_up()

    def _on_input_audio_buffer_speech_started(self, event: Mapping[str, Any]) -> None:
        """The user speaks. What is being played stops, and the conversation keeps what was heard."""
        with self._lock:
            stopped, self._answers = self._answers, deque()
        for answer in stopped:
            if answer.held or not answer.is_complete:
                heard = max(0.0, answer.played / self.output_rate - self.output_latency)
                where = {"item_id": answer.item_id, "content_index": 0, "audio_end_ms": int(1000 * heard)}
                self.send({"type": "conversation.item.truncate", **where})

    def _on_response_created(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._writing = event["response"]["id"]

    def _on_response_output_item_added(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._answers.append(Answer(event["item"]["id"], Resampler(WIRE_RATE, self.output_rate)))

    def _on_response_output_audio_transcript_delta(self, event: Mapping[str, Any]) -> None:
        self.show(event["delta"])

    def _on_response_output_audio_delta(self, event: Mapping[str, Any]) -> None:
        samples = pcm_to_float(decode_base64(event["delta"], "delta", MESSAGE_BYTES))
        with self._lock:
            for answer in self._answers:  # one that was stopped is there no more
                if answer.item_id == event["item_id"]:
                    answer.add(samples)

    def _on_response_output_audio_done(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            for answer in self._answers:
                if answer.item_id == event["item_id"]:
                    answer.add(SILENCE, last=True)

    def _on_response_done(self, event: Mapping[str, Any]) -> None:
        response = event["response"]
        with self._lock:
            if self._writing == response["id"]:
                self._writing = None
        self.show("\n")
        if response["status"] == "failed":
            self.report(response["status_details"]["error"]["message"])


class _Client:
    """What a `RealtimeSession` sees of a client in its own process, in place of a WebSocket."""

    def __init__(self, conversation: LiveConversation):
        self.conversation, self.events = conversation, _events_of(conversation)

    async def receive(self) -> dict[str, Any]:
        event = await self.events.get()
        if event is None:
            return {"type": "websocket.disconnect", "code": 1000}
        return {"type": "websocket.receive", "text": json.dumps(event)}

    async def send_text(self, text: str) -> None:
        self.conversation.receive(json.loads(text))

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self.events.put_nowait(None)


async def talk_here(conversation: LiveConversation, service: Service) -> None:
    """Hold a conversation with a service in this process, until one of them ends it."""
    from .realtime import RealtimeSession

    await RealtimeSession(service, _Client(conversation)).run()  # type: ignore[arg-type]


async def talk_to(conversation: LiveConversation, url: str, api_key: str | None = None) -> None:
    """
    Hold a conversation with a server, until one of them ends it.

    Args:
        conversation (`LiveConversation`): what is said and heard.
        url (`str`): of its Realtime endpoint, `ws://...` or `wss://...`.
        api_key (`str`, *optional*): that it demands.

    Raises:
        OSError: if it cannot be reached, refuses, or the connection is lost.
    """
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed, ConnectionClosedError, WebSocketException

    events = _events_of(conversation)
    hung_up = asyncio.Event()
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        async with connect(url, additional_headers=headers, max_size=MESSAGE_BYTES, compression=None) as socket:

            async def write() -> None:
                with contextlib.suppress(ConnectionClosed):  # which ends the reading below, too
                    while (event := await events.get()) is not None:
                        await socket.send(json.dumps(event))
                    hung_up.set()
                    await socket.close()

            writing = asyncio.create_task(write())
            try:
                async for message in socket:
                    conversation.receive(json.loads(message))
            except ConnectionClosedError as error:
                if not hung_up.is_set():
                    raise OSError(f"the connection to {url} was lost: {error}") from error
            finally:
                writing.cancel()
    except WebSocketException as error:
        raise OSError(f"{url} refuses: {error}") from error


def _events_of(conversation: LiveConversation) -> asyncio.Queue[dict[str, Any] | None]:
    """Connect a conversation to a queue of this thread's event loop."""
    events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def send(event: dict[str, Any] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is no connection any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    conversation.connect(send)
    return events


__all__ = ["LiveConversation", "talk_here", "talk_to"]
