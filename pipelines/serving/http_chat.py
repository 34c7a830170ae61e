"""POST /v1/chat/completions: a conversation in text and sound, answered in text or in both, whole or as it comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from .answers import Answer
from .conversation import check_texts, new_id
from .engine_requests import AudioDelta, Finished, Generation, TextDelta
from .errors import ApiError
from .http_support import (
    ANSWERING,
    EVENT_STREAM,
    OBJECT,
    TEXT,
    AnswerResponse,
    documented,
    read_body,
    service_of,
    sse,
    sse_errors,
    until_gone,
)
from .options import sampling
from .service import Service, failure
from .sound import SILENCE, WIRE_RATE, Resampler, decode_base64, decode_file, encode_base64, encode_file, float_to_pcm
from .wire_http import SPOKEN_FORMATS, AssistantMessage, AudioPart, ChatRequest, TextPart, UserMessage

router = APIRouter()
FINISH_REASONS = {"stop": "stop", "length": "length"}


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    responses=documented(*ANSWERING, kinds={"application/json": OBJECT, EVENT_STREAM: TEXT}),
)
async def chat(request: Request) -> Response:
    """Answer a conversation."""
    service, body = service_of(request), await read_body(request, ChatRequest)
    body.check()
    service.check_model(body.model)
    if len(body.messages) > service.limits.messages:
        message = f"'messages' has {len(body.messages)} items; send {service.limits.messages} or fewer."
        raise ApiError(message, code="too_long", param="messages")
    if body.messages[-1].role != "user":
        raise ApiError("The last of 'messages' must be the user's.", code="invalid_value", param="messages")
    if body.audio is not None:
        check_audio_format(body.audio.format, bool(body.stream))
    answer = Answering(service, body)
    generation = await until_gone(request, answer.submit())
    if body.stream:
        events = sse_errors(answer.stream(generation))
        return AnswerResponse(events, generation, service.limits.send_seconds, EVENT_STREAM)
    try:
        return JSONResponse(await until_gone(request, answer.whole(generation)))
    finally:
        generation.cancel()


def check_audio_format(name: str, stream: bool) -> None:
    """
    Refuse a format of spoken answers that is not written here.

    Raises:
        ApiError: naming those that are.
    """
    if name not in (SPOKEN_FORMATS if not stream else ("pcm16",)):
        what = "a stream has pcm16" if stream else f"use {', '.join(SPOKEN_FORMATS)}"
        message = f"Invalid value for 'audio.format': '{name[:100]}'; {what}."
        raise ApiError(message, code="unsupported_format", param="audio.format")


@dataclass
class Answering:
    """One request, from its messages to its answer."""

    service: Service
    body: ChatRequest

    def __post_init__(self) -> None:
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        self.audio_id, self.expires_at = self.service.answers.reserve()
        self.num_codes = 0  # of what was sent

    async def submit(self) -> Generation:
        """Hand the conversation to the engine."""
        body = self.body
        ids = await self.service.prompt(await self._messages())
        more = sampling(body.temperature, body.top_p)
        if (most := body.max_completion_tokens or body.max_tokens) is not None:
            more["max_new_tokens"] = most
        return self.service.submit(ids, body.ttt, more, with_audio=body.speaks, seed=body.seed, param="messages")

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """Return the whole answer."""
        texts: list[str] = []
        waveforms: list[np.ndarray] = []
        codes: list[int] = []
        async for event in self.service.events(generation):
            if isinstance(event, TextDelta):
                texts.append(event.text)
            elif isinstance(event, AudioDelta):
                waveforms.append(event.waveform)
                codes += event.codes
            elif isinstance(event, Finished):
                finished = event
        if (error := failure(finished)) is not None:
            raise error
        text = "".join(texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.body.audio is not None:
            samples = np.concatenate([SILENCE, *waveforms])
            resampled = Resampler(self.service.engine.sampling_rate, WIRE_RATE).push(samples, last=True)
            file_format = self.body.audio.format.removesuffix("16")
            content = await asyncio.to_thread(encode_file, resampled, WIRE_RATE, file_format)
            await self._keep(text, codes)
            audio = {"id": self.audio_id, "data": encode_base64(content), "transcript": text}
            message |= {"content": None, "audio": audio | {"expires_at": self.expires_at}}
        choice = {"index": 0, "message": message, "finish_reason": FINISH_REASONS[finished.reason], "logprobs": None}
        return self._object("chat.completion", [choice]) | {"usage": self._usage(generation, finished)}

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        """Yield the answer in chunks, as server-sent events."""
        resampler = Resampler(self.service.engine.sampling_rate, WIRE_RATE)
        speaks, texts, codes = self.body.speaks, [], []
        opening: dict[str, Any] = {"role": "assistant"}
        opening |= {"audio": {"id": self.audio_id}} if speaks else {"content": ""}
        yield self._chunk(opening)
        async for event in self.service.events(generation):
            if isinstance(event, TextDelta):
                texts.append(event.text)
                transcript = {"audio": {"id": self.audio_id, "transcript": event.text}}
                yield self._chunk(transcript if speaks else {"content": event.text})
            elif isinstance(event, AudioDelta):
                codes += event.codes
                if len(pcm := float_to_pcm(resampler.push(event.waveform))):
                    yield self._chunk({"audio": {"id": self.audio_id, "data": encode_base64(pcm)}})
            elif isinstance(event, Finished):
                finished = event
        if (error := failure(finished)) is not None:
            raise error
        if speaks:
            if len(pcm := float_to_pcm(resampler.push(SILENCE, last=True))):
                yield self._chunk({"audio": {"id": self.audio_id, "data": encode_base64(pcm)}})
            await self._keep("".join(texts), codes)
            yield self._chunk({"audio": {"id": self.audio_id, "expires_at": self.expires_at}})
        yield self._chunk({}, FINISH_REASONS[finished.reason])
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            took = self._usage(generation, finished)
            yield sse(self._object("chat.completion.chunk", []) | {"usage": took})
        yield sse("[DONE]")

    async def _keep(self, text: str, codes: list[int]) -> None:
        await self.service.answers.keep(Answer(self.audio_id, text, tuple(codes), self.expires_at))

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.service.model_name}
        return {**head, "choices": choices}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return sse(self._object("chat.completion.chunk", [choice]))

    async def _messages(self) -> list[dict[str, Any]]:
        """Return the conversation as the processor's chat template takes it, its audio as codes."""
        check_texts(self._texts(), self.service.limits.text_length)
        task = self.body.ttt.task
        has_audio = any(
            isinstance(part, AudioPart)
            for message in self.body.messages
            if isinstance(message, UserMessage) and not isinstance(message.content, str)
            for part in message.content
        )
        if task is not None:
            self.service.system_prompt(task, None, has_audio)  # refuses one that there is not, before sound is encoded
        asked = [await self._message(index) for index in range(len(self.body.messages))]
        written = [message for message in asked if message is not None]
        if written[0]["role"] == "system":
            if task is not None:
                message = "'ttt.task' chooses the system prompt, but 'messages' begins with one. Leave one of them out."
                raise ApiError(message, code="invalid_value", param="ttt.task")
            return written
        system = self.service.system_prompt(task, None, has_audio)
        return [{"role": "system", "content": system}, *written] if system else written

    def _texts(self) -> list[tuple[str, str | None]]:
        texts: list[tuple[str, str | None]] = []
        for index, message in enumerate(self.body.messages):
            where, content = f"messages[{index}].content", message.content
            if isinstance(content, list):
                texts += [(where, part.text) for part in content if isinstance(part, TextPart)]
            else:
                texts.append((where, content))
        return texts

    async def _message(self, index: int) -> dict[str, Any] | None:
        message, where = self.body.messages[index], f"messages[{index}]"
        if isinstance(message, AssistantMessage):
            return await self._answer(message, where)
        role = "user" if isinstance(message, UserMessage) else "system"
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        content = [await self._part(part, f"{where}.content[{position}]") for position, part in enumerate(parts)]
        if not any(part.get("text", "").strip() or part["type"] == "audio" for part in content):
            raise ApiError(f"'{where}.content' is empty.", code="invalid_value", param=f"{where}.content")
        return {"role": role, "content": content}

    async def _part(self, part: TextPart | AudioPart, where: str) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        param = f"{where}.input_audio.data"
        limits = self.service.limits
        content = decode_base64(part.input_audio.data, param, limits.body_bytes)
        samples, rate = await asyncio.to_thread(decode_file, content, limits, param)
        codes = await self.service.encode(samples, rate, param)
        self.num_codes += len(codes)
        most = self.service.engine.max_context
        if most is not None and self.num_codes > most:  # small files may last for hours: the rest is not encoded
            message = f"The sound in 'messages' has {self.num_codes} tokens or more; the model takes {most} in all."
            raise ApiError(message, code="context_length_exceeded", param="messages")
        return {"type": "audio", "audio_codes": codes}

    async def _answer(self, message: AssistantMessage, where: str) -> dict[str, Any] | None:
        """Return what the model said before: an answer by its id, or a text; `None` where it had nothing to say."""
        if message.audio is not None:
            answer = await self.service.answers.get(message.audio.id, f"{where}.audio.id")
            text, codes = answer.text, list(answer.codes)
        elif message.content is not None:
            parts = message.content
            text, codes = parts if isinstance(parts, str) else "".join(part.text for part in parts), []
        else:
            message_text = f"'{where}' has neither 'content' nor 'audio'."
            raise ApiError(message_text, code="invalid_value", param=f"{where}.content")
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text.strip() else []
        content += [{"type": "audio", "audio_codes": codes}] if codes else []
        return {"role": "assistant", "content": content} if content else None

    def _usage(self, generation: Generation, finished: Finished) -> dict[str, Any]:
        """What the answer took, in tokens."""
        took, heard = finished.usage, self.service.num_codes(generation.prompt)
        completion = took.text_tokens + took.audio_codes
        return {
            "prompt_tokens": took.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": took.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": took.cached_tokens, "audio_tokens": heard},
            "completion_tokens_details": {"text_tokens": took.text_tokens, "audio_tokens": took.audio_codes},
        }
