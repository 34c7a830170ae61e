"""One response of a Realtime session, from its prompt to `response.done`: what is sent, in which order, and what stays
in the conversation when it is interrupted."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .conversation import Item, Part, messages, new_id
from .engine_requests import AudioDelta, Finished, Generation, TextDelta
from .errors import ApiError
from .options import TttOptions
from .outbox import SlowReader
from .service import failure
from .sound import SAMPLE_BYTES, SILENCE, WIRE_RATE, Resampler, encode_base64, float_to_pcm, split_pcm
from .wire_realtime import ResponseParams

if TYPE_CHECKING:
    from .realtime import RealtimeSession

logger = logging.getLogger(__name__)
ROOM_FOR_ANSWER = 256  # tokens left free in the context, at least


@dataclass
class Response:
    """
    A response that is wanted, being written, or done.

    Args:
        session (`RealtimeSession`): that it belongs to.
        params (`ResponseParams`): where it differs from the session's settings.
        context (`list[Item]`): what it answers.
        in_conversation (`bool`): whether it becomes a part of the conversation.
    """

    session: RealtimeSession
    params: ResponseParams
    context: list[Item]
    in_conversation: bool
    id: str = field(default_factory=lambda: new_id("resp"))

    def __post_init__(self) -> None:
        settings = self.session.settings
        self.modalities = list(self.params.output_modalities or settings.output_modalities)
        self.speaks = "audio" in self.modalities
        self.most_tokens = self.params.max_output_tokens or settings.max_output_tokens
        output = self.params.audio.output if self.params.audio is not None else None
        self.voice = (output.voice if output is not None else None) or settings.voice
        self.options: TttOptions = settings.ttt.updated(self.params.ttt)
        self.codes: list[int] = []  # of its part, the same list until it is cut
        self.part = Part("output_audio" if self.speaks else "output_text", "", self.codes if self.speaks else None)
        self.item = Item("assistant", [self.part], "in_progress")
        self.is_open = False  # its item has been announced
        self.cancelled: str | None = None  # why
        self.heard_ms: float | None = None  # where the client cut it while it was being written
        self.generation: Generation | None = None
        self.finished: Finished | None = None
        self.prompt: list[int] = []
        self.done = asyncio.Event()
        self.resampler = Resampler(self.session.service.engine.sampling_rate, WIRE_RATE)

    def cancel(self, reason: str) -> None:
        """Stop it, and take back what was not sent. `response.done` follows with `reason`."""
        if self.cancelled is None:
            self.cancelled = reason
            self.session.outbox.drop(self.id)
            if self.generation is not None:
                self.generation.cancel()

    @property
    def sent_ms(self) -> float:
        """How much of its sound has been sent."""
        return self.session.outbox.sent[self.id] / WIRE_RATE * 1000

    async def run(self) -> None:
        """Write it. Whatever happens, `response.done` is sent."""
        self._send({"type": "response.created", "response": self.wire("in_progress")})
        error = None
        try:
            await self._generate()
            if self.finished is not None and self.cancelled is None:
                error = failure(self.finished)
        except ApiError as problem:
            error = problem
        except SlowReader:
            raise
        except Exception:
            logger.exception("a response failed")
            error = ApiError("The response failed; the server's log has the reason.", 500, "response_failed")
        finally:
            if self.generation is not None:
                self.generation.cancel()
        self._close(error)

    async def _generate(self) -> None:
        service = self.session.service
        await self.session.encoded(self.context)
        self.prompt = await self._prompt()
        if self.cancelled is not None:
            return
        more: dict[str, Any] = {}
        if self.most_tokens != "inf":  # a bound, which a smaller room for the answer keeps as well
            room = (service.engine.max_context or 2**31) - len(self.prompt)
            more["max_new_tokens"] = max(1, min(int(self.most_tokens), room))
        session = self.session.id if self.in_conversation else None
        self.generation = service.submit(self.prompt, self.options, more, session, with_audio=self.speaks)
        self._open()
        async for event in service.events(self.generation):
            if isinstance(event, Finished):
                self.finished = event
            elif self.cancelled is not None:
                continue
            elif isinstance(event, TextDelta):
                self.part.text = (self.part.text or "") + event.text
                kind = "response.output_audio_transcript.delta" if self.speaks else "response.output_text.delta"
                self._send(self._of_part(kind, delta=event.text))
            elif isinstance(event, AudioDelta):
                self.codes += event.codes
                await self._speak(float_to_pcm(self.resampler.push(event.waveform)))
        if self.speaks:
            await self._speak(float_to_pcm(self.resampler.push(SILENCE, last=True)))
            await self.session.outbox.sent_all(self.id)  # until then an interruption takes it back

    async def _speak(self, pcm: bytes) -> None:
        """Send sound in short pieces, no faster than the client takes them."""
        for piece in split_pcm(pcm):
            await self.session.outbox.room()
            if self.cancelled is not None:
                return
            event = self._of_part("response.output_audio.delta", delta=encode_base64(piece))
            self.session.outbox.put(event, self.id, len(piece) // SAMPLE_BYTES)

    async def _prompt(self) -> list[int]:
        """Return the ids of what it answers; where they are too many, the oldest items are left out."""
        service, settings = self.session.service, self.session.settings
        items = list(self.context)
        has_audio = any(part.kind == "input_audio" for item in items for part in item.parts)
        instructions = settings.instructions if self.params.instructions is None else self.params.instructions
        system: str | None = service.system_prompt(self.options.task, instructions, has_audio)
        if items and items[0].role == "system" and not instructions:
            system = None
        most = service.engine.max_context or 2**31
        room = min(ROOM_FOR_ANSWER, most // 2)
        while True:
            ids = await service.prompt(messages(items, system) or [{"role": "user", "content": ""}])
            oldest = next((index for index, item in enumerate(items[:-1]) if item.role != "system"), None)
            if len(ids) + room <= most or oldest is None or settings.truncation == "disabled":
                break
            del items[oldest]
        return ids

    def _open(self) -> None:
        """Announce its item."""
        before = self.session.conversation.add(self.item) if self.in_conversation else None
        self.is_open = True
        self._send(
            self._of_response("response.output_item.added", output_index=0, item=self.item.wire() | {"content": []})
        )
        if self.in_conversation:
            item = self.item.wire() | {"content": []}
            self._send({"type": "conversation.item.added", "previous_item_id": before, "item": item})
        empty = {"type": "audio", "transcript": ""} if self.speaks else {"type": "text", "text": ""}
        self._send(self._of_part("response.content_part.added", part=empty))

    def _close(self, error: ApiError | None) -> None:
        """Say what it came to, and keep of it what was sent."""
        length = self.finished is not None and self.finished.reason == "length"
        status = "failed" if error else "cancelled" if self.cancelled else "incomplete" if length else "completed"
        self.item.status = "completed" if status == "completed" else "incomplete"
        if self.speaks:
            limits = [self.sent_ms] if status in ("cancelled", "failed") else []
            limits += [] if self.heard_ms is None else [self.heard_ms]
            if limits:
                self.session.service.rhythm.cut(self.part, min(limits))
        if self.is_open:
            self._send_done()
        self._send({"type": "response.done", "response": self.wire(status, error)})

    def _send_done(self) -> None:
        text = self.part.text or ""
        if self.speaks:
            self._send(self._of_part("response.output_audio.done"))
            self._send(self._of_part("response.output_audio_transcript.done", transcript=text))
            part = {"type": "audio", "transcript": text}
        else:
            self._send(self._of_part("response.output_text.done", text=text))
            part = {"type": "text", "text": text}
        self._send(self._of_part("response.content_part.done", part=part))
        self._send(self._of_response("response.output_item.done", output_index=0, item=self.item.wire()))
        if self.in_conversation and self.item in self.session.conversation.items:  # the client may have deleted it
            before = self.session.conversation.before(self.item.id)
            self._send({"type": "conversation.item.done", "previous_item_id": before, "item": self.item.wire()})

    def wire(self, status: str, error: ApiError | None = None) -> dict[str, Any]:
        """Return the response as clients read it."""
        details: dict[str, Any] | None = None
        if error is not None:
            problem = {"type": error.kind, "code": error.code, "message": error.message}
            details = {"type": "failed", "error": problem}
        elif status == "cancelled":
            details = {"type": "cancelled", "reason": self.cancelled}
        elif status == "incomplete":
            details = {"type": "incomplete", "reason": "max_output_tokens"}
        return {
            "object": "realtime.response",
            "id": self.id,
            "status": status,
            "status_details": details,
            "output": [self.item.wire()] if self.is_open else [],
            "conversation_id": self.session.conversation.id if self.in_conversation else None,
            "output_modalities": self.modalities,
            "max_output_tokens": self.most_tokens,
            "audio": {"output": {"format": {"type": "audio/pcm", "rate": WIRE_RATE}, "voice": self.voice}},
            "usage": self._usage(),
            "metadata": self.params.metadata,
        }

    def _usage(self) -> dict[str, Any] | None:
        if self.finished is None:
            return None
        took = self.finished.usage
        heard = self.session.service.num_codes(self.prompt)
        output = took.text_tokens + took.audio_codes
        return {
            "total_tokens": took.prompt_tokens + output,
            "input_tokens": took.prompt_tokens,
            "output_tokens": output,
            "input_token_details": {
                "text_tokens": took.prompt_tokens - heard,
                "audio_tokens": heard,
                "image_tokens": 0,
                "cached_tokens": took.cached_tokens,
            },
            "output_token_details": {"text_tokens": took.text_tokens, "audio_tokens": took.audio_codes},
        }

    def _of_response(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "response_id": self.id, **more}

    def _of_part(self, kind: str, **more: Any) -> dict[str, Any]:
        where = {"item_id": self.item.id, "output_index": 0, "content_index": 0}
        return self._of_response(kind, **where, **more)

    def _send(self, event: dict[str, Any]) -> None:
        self.session.outbox.put(event)
