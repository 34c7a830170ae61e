"""POST /v1/audio/transcriptions: what is said in an uploaded file, as text, whole or as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from .conversation import check_texts
from .engine_requests import Finished, Generation, TextDelta
from .errors import ApiError
from .http_support import (
    ANSWERING,
    EVENT_STREAM,
    OBJECT,
    TEXT,
    AnswerResponse,
    documented,
    service_of,
    sse,
    sse_errors,
    until_gone,
)
from .options import TttOptions, sampling
from .schema import shorten, validate
from .service import Service, failure
from .sound import decode_file
from .wire_http import TranscriptionFields

router = APIRouter()
MOST_FIELDS = 16
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every form that is malformed


@router.post(
    "/v1/audio/transcriptions",
    response_class=Response,
    responses=documented(*ANSWERING, kinds={"application/json": OBJECT, "text/plain": TEXT, EVENT_STREAM: TEXT}),
)
async def transcriptions(request: Request) -> Response:
    """Write down what is said."""
    service = service_of(request)
    fields, content = await _read_form(request, service.limits.body_bytes)
    service.check_model(fields.model)
    check_texts([("prompt", fields.prompt)], service.limits.text_length)
    samples, rate = await asyncio.to_thread(decode_file, content, service.limits, "file")
    seconds = len(samples) / rate

    async def submit() -> Generation:
        codes = await service.encode(samples, rate, "file")
        user: list[dict[str, Any]] = [{"type": "text", "text": fields.prompt}] if fields.prompt else []
        user.append({"type": "audio", "audio_codes": codes})
        system = service.system_prompt("asr", None, has_audio=True)
        messages = [{"role": "system", "content": system}] if system else []
        ids = await service.prompt([*messages, {"role": "user", "content": user}])
        more = sampling(fields.temperature, None)
        return service.submit(ids, TttOptions(), more, with_audio=False, param="file")

    async def transcribe() -> str:
        return "".join([piece async for piece in _texts(service, await submit())])

    if fields.stream:
        generation = await until_gone(request, submit())
        events = sse_errors(_events(service, generation, seconds))
        return AnswerResponse(events, generation, service.limits.send_seconds, EVENT_STREAM)
    text = (await until_gone(request, transcribe())).strip()
    if fields.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    return JSONResponse({"text": text, "usage": _usage(seconds)})


async def _read_form(request: Request, most_bytes: int) -> tuple[TranscriptionFields, bytes]:
    """
    Return the fields of a form, and its file. Its encoding is checked first: Python has some that take minutes. A field
    may be as large as the whole, which is bounded: one that is too long is refused by its name.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise ApiError("Send the file as multipart/form-data.", 415, "unsupported_content_type")
    if (charset := options.get(b"charset", b"utf-8").decode("latin-1")).lower() not in ("utf-8", "utf8"):
        message = f"Forms in '{shorten(charset)}' are not read; send UTF-8."
        raise ApiError(message, 415, "unsupported_content_type")
    try:
        async with request.form(max_files=1, max_fields=MOST_FIELDS, max_part_size=most_bytes) as form:
            return await _read(list(form.multi_items()))
    except HTTPException as error:  # how Starlette tells of a form that is malformed or has too much
        param = "file" if "files" in error.detail else None
        raise ApiError(f"The form cannot be read: {shorten(error.detail)}.", code="invalid_form", param=param) from None


async def _read(items: list[tuple[str, Any]]) -> tuple[TranscriptionFields, bytes]:
    """Return the fields of a form, and its file."""
    content = None
    fields: dict[str, Any] = {}
    for name, value in items:
        if name in fields or (name == "file" and content is not None):
            raise ApiError(f"'{name[:100]}' is given twice.", code="invalid_value", param=name[:100])
        if isinstance(value, UploadFile):
            if name != "file":
                raise ApiError(
                    f"Unknown file: '{name[:100]}'; send it as 'file'.", code="unknown_parameter", param=name
                )
            content = await value.read()
        elif name == "file":
            raise ApiError("'file' must be an upload, with a file name.", code="invalid_value", param="file")
        else:
            fields[name] = _typed(name, value)
    if content is None:
        raise ApiError("Missing required parameter: 'file'.", code="missing_required_parameter", param="file")
    return validate(TranscriptionFields, fields), content


def _typed(name: str, value: str) -> Any:
    """Return a field of a form, in which all is text, as what it stands for."""
    if name == "stream" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if name == "temperature":
        try:
            return float(value)
        except ValueError:
            return value
    return value


async def _texts(service: Service, generation: Generation) -> AsyncIterator[str]:
    """Yield the text as it comes."""
    async for event in service.events(generation):
        if isinstance(event, TextDelta):
            yield event.text
        elif isinstance(event, Finished) and (error := failure(event)) is not None:
            raise error


async def _events(service: Service, generation: Generation, seconds: float) -> AsyncIterator[bytes]:
    pieces: list[str] = []
    async for piece in _texts(service, generation):
        pieces.append(piece)
        yield sse({"type": "transcript.text.delta", "delta": piece})
    yield sse({"type": "transcript.text.done", "text": "".join(pieces).strip(), "usage": _usage(seconds)})


def _usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(seconds, 3)}
