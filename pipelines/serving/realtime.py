"""/v1/realtime: one session on a WebSocket, in the GA form of OpenAI's protocol. What clients may send is in
wire_realtime.py, how one response comes about in realtime_response.py."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from .conversation import MILLISECONDS_SPARE, Conversation, Item, Part, check_texts, messages, new_id
from .engine_requests import Finished, TextDelta
from .errors import ApiError, draining
from .limits import RateLimit
from .options import TttOptions
from .outbox import Outbox, SlowReader
from .realtime_input import InputBuffer, Turn
from .realtime_response import Response
from .schema import parse_json, shorten, validate
from .security import deny
from .service import Service, failure
from .sound import SAMPLE_BYTES, SHORTEST_MS, WIRE_RATE, check_length, decode_base64, pcm_to_float
from .vad import silero_probability
from .wire_realtime import (
    CLIENT_EVENTS,
    AppendEvent,
    ClientEvent,
    ItemCreateEvent,
    ItemEvent,
    ItemReference,
    ItemTruncateEvent,
    PlainEvent,
    ResponseCancelEvent,
    ResponseCreateEvent,
    ResponseParams,
    SessionUpdateEvent,
    Settings,
)

router = APIRouter()
logger = logging.getLogger(__name__)
SUBPROTOCOL = "realtime"  # what browsers ask for
CLOSE_SECONDS = 2.0
MOST_ASIDE = 4  # responses outside the conversation at once
VAD_THREADS = ThreadPoolExecutor(2, thread_name_prefix="vad")


@router.websocket("/v1/realtime")
async def realtime(socket: WebSocket) -> None:
    """Open a session."""
    service: Service = socket.app.state.service
    try:
        if service.is_draining:
            raise draining()
        for name in socket.query_params:
            if name != "model":
                name = shorten(name)
                message = f"Unknown parameter: '{name}'. The address takes 'model' alone."
                raise ApiError(message, code="unknown_parameter", param=name)
        if (model := socket.query_params.get("model")) is not None:
            service.check_model(model)
        if len(service.sessions) >= service.limits.sessions:
            raise ApiError("There are too many sessions.", 429, "too_many_sessions", retry_after=10.0)
    except ApiError as error:
        await deny(dict(socket.scope), socket.receive, socket.send, error)
        return
    session = RealtimeSession(service, socket)
    service.sessions.add(session)  # before anything is waited for: another handshake counts it
    service.metrics.open_sessions.set(len(service.sessions))
    try:
        await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", []) else None)
        await session.run()
    finally:
        service.sessions.discard(session)
        service.metrics.open_sessions.set(len(service.sessions))


class RealtimeSession:
    """
    One client's session: its settings, its conversation, its input buffer and its responses.

    Args:
        service (`Service`): what it stands on.
        socket (`WebSocket`): accepted.
    """

    def __init__(self, service: Service, socket: WebSocket):
        limits = service.limits
        self.service, self.socket = service, socket
        self.id = new_id("sess")
        self.expires_at = int(time.time() + limits.session_seconds)
        self.settings = Settings(service.model_name)
        self.conversation = Conversation(limits.messages, limits.kept_audio_bytes)
        self.outbox = Outbox(socket.send_text, limits.outbox_bytes, limits.send_seconds)
        self.buffer = InputBuffer(limits.audio_seconds, VAD_THREADS, silero_probability)
        self.buffer.configure(self.settings.vad)
        self.response: Response | None = None  # the one in the conversation that is being written
        self._is_leaving = asyncio.Event()
        self._aside: list[Response] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._encodings: dict[str, asyncio.Task[None]] = {}  # by item
        self._turn_item: str | None = None  # the id that was announced for what is in the buffer
        self._idle: asyncio.TimerHandle | None = None
        self._messages = RateLimit(limits.messages_per_second, limits.messages_per_second)
        self._seconds = RateLimit(limits.audio_rate, 2 * limits.audio_seconds)
        self._handlers: dict[str, Callable[..., Any]] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
            "conversation.item.create": self._create_item,
            "conversation.item.delete": self._delete_item,
            "conversation.item.retrieve": self._retrieve_item,
            "conversation.item.truncate": self._truncate_item,
            "response.create": self._create_response,
            "response.cancel": self._cancel_response,
        }

    # ---- the connection ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the client until it leaves, is silent for too long, reads too slowly, or the server stops."""
        session = self.settings.wire(self.id, self.expires_at)
        self.outbox.put({"type": "session.created", "session": session})
        sending = asyncio.create_task(self.outbox.run())
        tasks = [sending, asyncio.create_task(self._read()), asyncio.create_task(self._leave())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            code, reason = self._outcome(next(task for task in tasks if task.done()))
            if code and not sending.done():
                async with asyncio.timeout(self.service.limits.send_seconds):
                    await self.outbox.empty()
            if code:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self.socket.close(code, reason)
        except (TimeoutError, RuntimeError, WebSocketDisconnect):
            pass  # there is nobody to say goodbye to
        finally:
            await self._end(tasks)

    def _outcome(self, task: asyncio.Task[Any]) -> tuple[int, str]:
        """Return how to close the connection; 0 where the client has closed it."""
        error = task.exception()
        if isinstance(error, SlowReader):
            logger.info("session %s: its client reads too slowly", self.id)
            return 1008, "the client reads too slowly"
        if error is not None and not isinstance(error, (WebSocketDisconnect, RuntimeError, OSError)):
            logger.error("session %s ended by an error", self.id, exc_info=error)
            return 1011, "internal error"
        return (0, "") if error is not None else task.result()

    async def _end(self, tasks: list[asyncio.Task[Any]]) -> None:
        for response in self._running:
            response.cancel("client_cancelled")
        if self._idle is not None:
            self._idle.cancel()
        for task in (*tasks, *self._tasks):
            task.cancel()
        try:
            await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
        finally:  # also where the server does not wait for that
            self.service.engine.forget(self.id)

    async def _read(self) -> tuple[int, str]:
        """Take events until there are to be no more; return why, as a code and a reason to close with."""
        clock = asyncio.get_running_loop().time
        ends = clock() + self.service.limits.session_seconds
        while (now := clock()) < ends:
            try:
                async with asyncio.timeout_at(min(now + self.service.limits.idle_seconds, ends)):
                    message = await self.socket.receive()
            except TimeoutError:
                if self._running and clock() < ends:  # who waits for an answer is not idle
                    continue
                break
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            await asyncio.sleep(self._messages.take(1.0))
            await self.outbox.room()
            await self._handle(message.get("text"))
        code = "session_expired" if clock() >= ends else "session_idle"
        self._error(ApiError(f"The session ends: {code.replace('_', ' ')}.", code=code), None)
        return 1001, code

    async def _handle(self, text: str | None) -> None:
        """Do what one event asks. Whatever is wrong with it, the connection stays."""
        event_id = None
        try:
            if text is None:
                raise ApiError("Send events as text, not as bytes.", code="invalid_json")
            data = parse_json(text)
            event_id = data.get("event_id") if isinstance(data.get("event_id"), str) else None
            kind = data.get("type")
            if not isinstance(kind, str) or kind not in CLIENT_EVENTS:
                known = ", ".join(CLIENT_EVENTS)
                message = f"There is no event of type {shorten(repr(kind))}; there are {known}."
                raise ApiError(message, code="invalid_value", param="type")
            if (doing := self._handlers[kind](validate(CLIENT_EVENTS[kind], data))) is not None:
                await doing
        except ApiError as error:
            self._error(error, event_id)
        except (SlowReader, WebSocketDisconnect):
            raise
        except Exception:
            logger.exception("session %s: an event failed", self.id)
            self._error(ApiError("The event failed; the server's log has the reason.", 500, "internal_error"), event_id)

    def _error(self, error: ApiError, event_id: str | None) -> None:
        self.service.metrics.errors.labels(error.code or error.kind).inc()
        short = None if event_id is None else event_id[:512]
        self.outbox.put({"type": "error", "error": error.body()["error"] | {"event_id": short}})

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, (SlowReader, ApiError)):  # who waits for it reads an ApiError
            logger.error("session %s: a task failed", self.id, exc_info=error)

    def leave(self) -> None:
        """Take no more requests, finish the answer that is being written, and say goodbye."""
        self._is_leaving.set()

    async def _leave(self) -> tuple[int, str]:
        """Wait until the session is to end and nothing is being written; return why, as `_read` does."""
        await self._is_leaving.wait()
        while running := self._running:
            await running[0].done.wait()
        self._error(draining(), None)
        return 1001, "the server is shutting down"

    # ---- settings ----------------------------------------------------------------------------------------------------

    def _update(self, event: SessionUpdateEvent) -> None:
        changes = event.session
        heard = None if changes.audio is None or changes.audio.input is None else changes.audio.input.transcription
        texts = [("session.instructions", changes.instructions)]
        if heard is not None:
            texts.append(("session.audio.input.transcription.prompt", heard.prompt))
        check_texts(texts, self.service.limits.text_length)
        if changes.ttt is not None:
            # Refuses a task that there is not.
            self.service.system_prompt(changes.ttt.task, None, True, "session.ttt.task")
        idle_before = self._idle_ms
        self.settings.update(changes)
        self.buffer.configure(self.settings.vad)
        if self._idle is not None and self._idle_ms != idle_before:
            self._rest_since(self._idle.when() - (idle_before or 0) / 1000)
        self.outbox.put({"type": "session.updated", "session": self.settings.wire(self.id, self.expires_at)})

    # ---- what the user says ------------------------------------------------------------------------------------------

    async def _append(self, event: AppendEvent) -> None:
        pcm = decode_base64(event.audio, "audio", self.service.limits.message_bytes)
        if len(pcm) % SAMPLE_BYTES:
            raise ApiError("'audio' has half a sample; PCM16 has two bytes each.", code="invalid_audio", param="audio")
        if not self.buffer.has_room(pcm):
            seconds = self.service.limits.audio_seconds
            raise ApiError(
                f"The input buffer would hold more than {seconds:g} s. Commit or clear it first.",
                code="input_audio_buffer_full",
                param="audio",
            )
        await asyncio.sleep(self._seconds.take(len(pcm) / SAMPLE_BYTES / WIRE_RATE))
        for turn in await self.buffer.append(pcm):
            try:
                if turn.started:
                    self._turn_began(turn)
                else:
                    await self._turn_ended(turn)
            except ApiError as error:  # the turns after it are there none the less
                self._error(error, event.event_id)

    def _turn_began(self, turn: Turn) -> None:
        vad = self.settings.vad
        self._turn_item = item_id = new_id("item")
        self._stop_idling()
        started = {"audio_start_ms": turn.milliseconds, "item_id": item_id}
        self.outbox.put({"type": "input_audio_buffer.speech_started", **started})
        if vad is not None and vad.interrupt_response and self.response is not None:
            self.response.cancel("turn_detected")

    async def _turn_ended(self, turn: Turn) -> None:
        vad = self.settings.vad
        item_id = self._take_turn_item()
        stopped = {"audio_end_ms": turn.milliseconds, "item_id": item_id}
        self.outbox.put({"type": "input_audio_buffer.speech_stopped", **stopped})
        self._commit_turn(turn.pcm, item_id)
        if vad is not None and vad.create_response:
            await self._respond(ResponseParams())

    def _commit(self, event: PlainEvent) -> None:
        if self.buffer.milliseconds < SHORTEST_MS:
            raise ApiError(
                f"The input buffer holds {self.buffer.milliseconds:.0f} ms of audio; a commit takes "
                f"{SHORTEST_MS} ms or more.",
                code="input_audio_buffer_commit_empty",
            )
        self._commit_turn(self.buffer.take(), self._take_turn_item())

    def _take_turn_item(self) -> str:
        """Return the id that was announced for what is in the buffer, once; a new one where none was."""
        item_id, self._turn_item = self._turn_item, None
        return item_id or new_id("item")

    def _commit_turn(self, pcm: bytes, item_id: str) -> None:
        item = Item("user", [Part("input_audio", None, None, pcm)], "completed", item_id)
        before = self.conversation.add(item)
        committed = {"previous_item_id": before, "item_id": item.id}
        self.outbox.put({"type": "input_audio_buffer.committed", **committed})
        self._announce(item, before)
        self._encode(item)
        if self.settings.transcription is not None:
            self._spawn(self._transcribe(item, self.settings.transcription.prompt))

    def _clear(self, event: PlainEvent) -> None:
        self.buffer.clear()
        self._turn_item = None
        self.outbox.put({"type": "input_audio_buffer.cleared"})

    def _encode(self, item: Item) -> asyncio.Task[None]:
        """Turn the audio of an item into codes, while the client goes on."""

        async def encode() -> None:
            for part in item.parts:
                if part.kind == "input_audio" and part.codes is None:
                    if part.pcm is None:
                        message = f"The audio of item '{item.id}' was not encoded in time and is gone. Delete the item."
                        raise ApiError(message, code="invalid_audio")
                    samples = pcm_to_float(part.pcm)
                    part.codes = await self.service.encode(samples, WIRE_RATE, "audio")

        self._encodings[item.id] = task = self._spawn(encode())
        return task

    async def encoded(self, items: Iterable[Item]) -> None:
        """
        Wait until the audio of items is codes.

        Raises:
            ApiError: if that of one cannot be.
        """
        for item in items:
            task = self._encodings.get(item.id)
            if task is not None and task.done() and not task.cancelled() and task.exception() is not None:
                task = self._encode(item)  # it failed before, perhaps since the server was busy
            if task is not None:
                await asyncio.shield(task)
                self._encodings.pop(item.id, None)

    async def _transcribe(self, item: Item, prompt: str | None) -> None:
        """Write down what the user said, as the task asr does."""
        part = item.parts[0]
        seconds = len(part.pcm or b"") / SAMPLE_BYTES / WIRE_RATE
        kind = "conversation.item.input_audio_transcription"
        where = {"item_id": item.id, "content_index": 0}
        texts: list[str] = []
        try:
            await self.encoded([item])
            asked = Item("user", [*([Part("input_text", prompt)] if prompt else []), part])
            ids = await self.service.prompt(messages([asked], self.service.system_prompt("asr", None, True)))
            generation = self.service.submit(ids, TttOptions(), with_audio=False)
            async for event in self.service.events(generation):
                if isinstance(event, TextDelta):
                    texts.append(event.text)
                    self.outbox.put({"type": f"{kind}.delta", **where, "delta": event.text})
                elif isinstance(event, Finished) and (error := failure(event)) is not None:
                    raise error
        except ApiError as error:
            problem = {"type": error.kind, "code": error.code, "message": error.message, "param": error.param}
            self.outbox.put({"type": f"{kind}.failed", **where, "error": problem})
            return
        part.text = "".join(texts).strip()
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        self.outbox.put({"type": f"{kind}.completed", **where, "transcript": part.text, "usage": usage})

    # ---- items -------------------------------------------------------------------------------------------------------

    def _announce(self, item: Item, before: str | None) -> None:
        for kind in ("conversation.item.added", "conversation.item.done"):
            self.outbox.put({"type": kind, "previous_item_id": before, "item": item.wire()})

    def _create_item(self, event: ItemCreateEvent) -> None:
        item = self._read_item(event.item, "item")
        before = self.conversation.add(item, event.previous_item_id)
        self._encode(item)
        self._announce(item, before)

    def _read_item(self, given: Any, param: str) -> Item:
        """Return an item a client wrote, with its audio decoded."""
        limits = self.service.limits
        item = given.item(param)
        check_texts([(f"{param}.content", part.text) for part in item.parts], limits.text_length)
        for index, content in enumerate(given.content):
            part = item.parts[index]
            if part.kind == "input_audio":
                where = f"{param}.content[{index}].audio"
                part.pcm = decode_base64(content.audio, where, int(limits.audio_seconds * WIRE_RATE) * SAMPLE_BYTES)
                if len(part.pcm) % SAMPLE_BYTES:
                    raise ApiError(f"'{where}' is no PCM16.", code="invalid_audio", param=where)
                check_length(len(part.pcm) // SAMPLE_BYTES, WIRE_RATE, where)
        return item

    def _delete_item(self, event: ItemEvent) -> None:
        response = self.response
        if response is not None and response.cancelled is None and event.item_id == response.item.id:
            message = "The item is being written. Cancel its response first."
            raise ApiError(message, code="item_in_progress", param="item_id")
        self.conversation.delete(event.item_id)
        self._encodings.pop(event.item_id, None)
        self.outbox.put({"type": "conversation.item.deleted", "item_id": event.item_id})

    def _retrieve_item(self, event: ItemEvent) -> None:
        item = self.conversation.get(event.item_id)
        self.outbox.put({"type": "conversation.item.retrieved", "item": item.wire(with_audio=True)})

    def _truncate_item(self, event: ItemTruncateEvent) -> None:
        item = self.conversation.get(event.item_id)
        response = self.response
        if response is not None and item is response.item:  # it is cut once it is complete
            self.service.rhythm.check(item, event.content_index)
            if event.audio_end_ms > response.sent_ms + MILLISECONDS_SPARE:
                message = f"{response.sent_ms:.0f} ms of the audio have been sent; it cannot be cut beyond."
                raise ApiError(message, code="invalid_value", param="audio_end_ms")
            response.heard_ms = event.audio_end_ms
        else:
            self.service.rhythm.truncate(item, event.content_index, event.audio_end_ms)
        where = {"item_id": item.id, "content_index": event.content_index, "audio_end_ms": event.audio_end_ms}
        self.outbox.put({"type": "conversation.item.truncated", **where})

    # ---- responses ---------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> list[Response]:
        """The responses that are being written."""
        return [response for response in (self.response, *self._aside) if response is not None]

    async def _create_response(self, event: ResponseCreateEvent) -> None:
        await self._respond(event.response or ResponseParams())

    async def _respond(self, params: ResponseParams) -> None:
        """Have a response written."""
        if self._is_leaving.is_set():
            raise draining()
        check_texts([("response.instructions", params.instructions)], self.service.limits.text_length)
        if params.audio is not None and params.audio.input is not None:
            message = "Unknown parameter: 'response.audio.input'. It belongs to the session."
            raise ApiError(message, code="unknown_parameter", param="response.audio.input")
        if params.ttt is not None:
            # Refuses a task that there is not.
            self.service.system_prompt(params.ttt.task, None, True, "response.ttt.task")
        in_conversation = params.conversation != "none"
        if in_conversation and self.response is not None and self.response.cancelled is None:
            raise ApiError(
                f"The response '{self.response.id}' is being written. Wait for its end, or cancel it.",
                code="conversation_already_has_active_response",
            )
        if not in_conversation and len(self._aside) >= MOST_ASIDE:
            message = f"{MOST_ASIDE} responses outside the conversation are being written. Wait for one."
            raise ApiError(message, 429, "too_many_responses")
        context = list(self.conversation.items) if params.input is None else self._context(params.input)
        if in_conversation:
            self._stop_idling()
            previous, response = self.response, Response(self, params, context, True)
            self.response = response
            self._spawn(self._write(response, previous))
        else:
            response = Response(self, params, context, False)
            self._aside.append(response)
            self._spawn(self._write(response, None))

    def _context(self, given: list[Any]) -> list[Item]:
        """Return the items a response is to answer instead of the conversation."""
        items = []
        for index, entry in enumerate(given):
            if isinstance(entry, ItemReference):
                items.append(self.conversation.get(entry.id, f"response.input[{index}].id"))
            else:
                items.append(self._read_item(entry, f"response.input[{index}]"))
                self._encode(items[-1])
        return items

    async def _write(self, response: Response, previous: Response | None) -> None:
        try:
            if previous is not None:  # it was cancelled, and is about to say so
                await previous.done.wait()
            await response.run()
        finally:
            response.done.set()
            if self.response is response:
                self.response = None
                self._start_idling(response)
            if response in self._aside:
                self._aside.remove(response)

    def _cancel_response(self, event: ResponseCancelEvent) -> None:
        chosen = [response for response in self._running if event.response_id in (None, response.id)]
        chosen = [response for response in chosen if response.cancelled is None]
        if not chosen or (event.response_id is None and chosen[0] is not self.response):
            message = "There is no response to cancel."
            raise ApiError(
                message, code="response_cancel_not_active", param="response_id" if event.response_id else None
            )
        chosen[0].cancel("client_cancelled")

    # ---- a user who says nothing -------------------------------------------------------------------------------------

    @property
    def _idle_ms(self) -> int | None:
        vad = self.settings.vad
        return None if vad is None else vad.idle_timeout_ms

    def _start_idling(self, response: Response) -> None:
        """Speak first where the user is silent for as long as the session says, counted from the answer's end."""
        if self._idle_ms is None or response.cancelled is not None:
            return
        self._rest_since(asyncio.get_running_loop().time() + response.sent_ms / 1000)

    def _rest_since(self, moment: float) -> None:
        """Wait anew for a user who is silent since a moment of the loop's clock, where the settings ask for it."""
        self._stop_idling()
        if self._idle_ms is not None:
            ends = moment + self._idle_ms / 1000
            self._idle = asyncio.get_running_loop().call_at(ends, lambda: self._spawn(self._idled()))

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    async def _idled(self) -> None:
        self._idle = None
        if self.buffer.hears_speech:  # it began while the answer was still being written
            return
        end = self.buffer.end
        item_id = new_id("item")
        start = end - int(self.buffer.milliseconds)
        where = {"audio_start_ms": start, "audio_end_ms": end, "item_id": item_id}
        self.outbox.put({"type": "input_audio_buffer.timeout_triggered", **where})
        try:
            if self.buffer.milliseconds >= SHORTEST_MS:
                self._commit_turn(self.buffer.take(), item_id)
            await self._respond(ResponseParams())
        except ApiError as error:
            self._error(error, None)


__all__ = ["ClientEvent", "RealtimeSession", "router"]
