"""What the HTTP endpoints share: bodies read and checked, answers that stop when their reader leaves, server-sent
events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from .engine_requests import Generation
from .errors import ApiError
from .schema import Model, parse_json, validate
from .service import Service

Result = TypeVar("Result")
EVENT_STREAM = "text/event-stream"
ANY_REQUEST = (400, 401, 403, 408, 413, 500)  # errors that do not depend on the endpoint
ANSWERING = (404, 415, 429, 503)  # those of endpoints that generate
OBJECT, TEXT, BINARY = {"type": "object"}, {"type": "string"}, {"type": "string", "format": "binary"}  # schemas
logger = logging.getLogger(__name__)


class Problem(BaseModel):
    """What went wrong: for people, by its kind, for programs, and the field of the request that is wrong."""

    message: str
    type: str
    code: str | None
    param: str | None


class ErrorBody(BaseModel):
    """The body of every error; see errors.py."""

    error: Problem


def documented(*statuses: int, kinds: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """
    Return what `responses` of a route tells: the errors that it may answer, and the forms of its answer.

    Args:
        statuses (`int`): beside those that every request may get.
        kinds (`dict`, *optional*): schemas of the answer, by content type.
    """
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
        for status in sorted({*statuses, *ANY_REQUEST})
    }
    if kinds is not None:
        content = {kind: {"schema": schema} for kind, schema in kinds.items()}
        described[200] = {"description": "The answer.", "content": content}
    return described


class AnswerResponse(StreamingResponse):
    """
    An answer that is sent while it is generated. Whatever ends it (its end, an error, a client that leaves, or takes
    nothing for `seconds`), its generation ends, too. An error after the first piece (see `first_of`) comes too late for
    a status; the response then breaks off without its proper end, which clients notice.

    Args:
        content (`AsyncIterator[bytes]`): pieces of the body.
        generation (`Generation`): what they come from.
        seconds (`float`): how long a client may take nothing.
        media_type (`str`): of the body.
    """

    def __init__(self, content: AsyncIterator[bytes], generation: Generation, seconds: float, media_type: str):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type=media_type, headers=headers)
        self.generation, self.seconds = generation, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the answer."""

        async def send_in_time(message: Any) -> None:
            try:
                async with asyncio.timeout(self.seconds):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            await super().__call__(scope, receive, send_in_time)
        except ClientDisconnect:
            logger.info("a client left before its answer was complete")
        except ApiError as error:
            logger.warning("an answer broke off: %s", error.message)
        finally:
            self.generation.cancel()


def service_of(request: Request) -> Service:
    """Return the service behind an application."""
    return request.app.state.service


def error_response(error: ApiError) -> Response:
    """Return an error as OpenAI's clients read it."""
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def read_body(request: Request, model: type[Model]) -> Model:
    """
    Read a JSON body.

    Raises:
        ApiError: if it is none, or does not have the form. A page of another origin can only send other types of
            content, so the type must be JSON's.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("Send JSON, with 'Content-Type: application/json'.", 415, "unsupported_content_type")
    return validate(model, parse_json(await request.body()))


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """
    Do work while the client waits for it; cancel it when the client has left.

    Raises:
        ClientDisconnect: if it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def first_of(pieces: AsyncIterator[Result]) -> AsyncIterator[Result]:
    """
    Wait for the first of some pieces, so that an error before it has a status of its own; return all of them.

    Raises:
        Exception: whatever comes instead of the first piece.
    """
    first = await anext(pieces)

    async def all_pieces() -> AsyncIterator[Result]:
        yield first
        async for piece in pieces:
            yield piece

    return all_pieces()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(data: dict[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


async def sse_errors(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield events; an error, which comes too late for a status, is the last of them."""
    try:
        async for event in events:
            yield event
    except ApiError as error:
        yield sse(error.body())
