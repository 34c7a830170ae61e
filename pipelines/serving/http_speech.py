"""POST /v1/audio/speech: a text read aloud, sent while it is spoken."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from .conversation import check_texts
from .engine_requests import AudioDelta, Finished, Generation
from .errors import ApiError
from .http_support import (
    ANSWERING,
    BINARY,
    EVENT_STREAM,
    TEXT,
    AnswerResponse,
    documented,
    first_of,
    read_body,
    service_of,
    sse,
    sse_errors,
    until_gone,
)
from .service import Service, failure
from .sound import FORMATS_WRITTEN, SILENCE, WIRE_RATE, FileStream, Resampler, encode_base64
from .wire_http import SpeechRequest

router = APIRouter()


@router.post(
    "/v1/audio/speech",
    response_class=Response,
    responses=documented(
        *ANSWERING, 422, kinds={**dict.fromkeys(FORMATS_WRITTEN.values(), BINARY), EVENT_STREAM: TEXT}
    ),
)
async def speech(request: Request) -> Response:
    """Read a text aloud."""
    service, body = service_of(request), await read_body(request, SpeechRequest)
    service.check_model(body.model)
    check_format(body.response_format, "response_format")
    check_texts([("input", body.input)], service.limits.text_length)
    if not body.input.strip():
        raise ApiError("'input' is empty.", code="invalid_value", param="input")
    task = "tts" if body.ttt.task is None else body.ttt.task
    system = service.system_prompt(task, None, has_audio=False)
    messages = [{"role": "system", "content": system}] if system else []
    ids = await service.prompt([*messages, {"role": "user", "content": [{"type": "text", "text": body.input}]}])
    generation = service.submit(ids, body.ttt, param="input")
    write = _events if body.stream_format == "sse" else _file
    try:
        pieces = await until_gone(request, first_of(write(service, generation, body.response_format)))
    except BaseException:
        generation.cancel()
        raise
    if body.stream_format == "sse":
        return AnswerResponse(sse_errors(pieces), generation, service.limits.send_seconds, EVENT_STREAM)
    return AnswerResponse(pieces, generation, service.limits.send_seconds, FORMATS_WRITTEN[body.response_format])


def check_format(name: str, param: str) -> None:
    """
    Refuse a format that is not written here.

    Raises:
        ApiError: naming those that are.
    """
    if name not in FORMATS_WRITTEN:
        message = f"Invalid value for '{param}': '{name[:100]}'; use {', '.join(FORMATS_WRITTEN)}."
        raise ApiError(message, code="unsupported_format", param=param)


async def _file(service: Service, generation: Generation, file_format: str) -> AsyncIterator[bytes]:
    """Yield a sound file. Where the answer breaks off later, so does the response, without its proper end."""
    file, is_silent = FileStream(WIRE_RATE, file_format), True
    resampler = Resampler(service.engine.sampling_rate, WIRE_RATE)
    async for event in service.events(generation):
        if isinstance(event, AudioDelta) and len(event.waveform):
            is_silent = False
            if piece := file.push(resampler.push(event.waveform)):
                yield piece
        elif isinstance(event, Finished):
            if (error := failure(event) or (without_speech() if is_silent else None)) is not None:
                raise error
            yield file.push(resampler.push(SILENCE, last=True)) + file.flush()


async def _events(service: Service, generation: Generation, file_format: str) -> AsyncIterator[bytes]:
    """Yield the same as server-sent events, and then what it took."""
    file, is_silent = FileStream(WIRE_RATE, file_format), True
    resampler = Resampler(service.engine.sampling_rate, WIRE_RATE)

    def delta(content: bytes) -> bytes:
        return sse({"type": "speech.audio.delta", "audio": encode_base64(content)}) if content else b""

    async for event in service.events(generation):
        if isinstance(event, AudioDelta) and len(event.waveform):
            is_silent = False
            if piece := delta(file.push(resampler.push(event.waveform))):
                yield piece
        elif isinstance(event, Finished):
            if (error := failure(event) or (without_speech() if is_silent else None)) is not None:
                raise error
            yield delta(file.push(resampler.push(SILENCE, last=True)) + file.flush())
            yield sse({"type": "speech.audio.done", "usage": usage(event)})


def without_speech() -> ApiError:
    """Return what a client is told of an answer that has text alone."""
    message = "The model gave no speech. Allow it more 'ttt.max_new_tokens', or change 'input'."
    return ApiError(message, 422, "no_speech", "input")


def usage(finished: Finished) -> dict[str, int]:
    """Return what an answer took, in tokens."""
    output = finished.usage.text_tokens + finished.usage.audio_codes
    total = finished.usage.prompt_tokens + output
    return {"input_tokens": finished.usage.prompt_tokens, "output_tokens": output, "total_tokens": total}
