"""The application: routes, errors in OpenAI's form, the page's files, the layer that guards them. How it is run is in
ttt_serve.py; anything that runs ASGI applications can run it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Mount

from . import http_chat, http_speech, http_status, http_transcriptions, realtime
from .errors import ApiError
from .http_support import error_response
from .schema import Wire
from .security import Guard, KeyRing
from .service import Service
from .wire_http import ChatRequest, SpeechRequest, TranscriptionFields

STATIC = Path(__file__).resolve().parent / "static"
SCHEMAS = "#/components/schemas/{model}"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
BODIES: dict[str, type[Wire]] = {"/v1/audio/speech": SpeechRequest, "/v1/chat/completions": ChatRequest}
logger = logging.getLogger(__name__)


def create_app(service: Service, api_keys: Iterable[str] = (), allowed_hosts: Iterable[str] = ()) -> FastAPI:
    """
    Return the application.

    Args:
        service (`Service`): what it serves; its engine is started.
        api_keys (`Iterable[str]`, *optional*): those that open it. Without any, it answers only to names of this
            machine, so bind it to a loopback address.
        allowed_hosts (`Iterable[str]`, *optional*): further names it answers to without keys.
    """
    app = FastAPI(title="Text-to-Talk", docs_url=None, redoc_url=None)
    app.state.service = service
    for module in (http_status, http_speech, http_transcriptions, http_chat, realtime):
        app.include_router(module.router)
    app.add_api_route("/docs", lambda: FileResponse(STATIC / "docs.html"), include_in_schema=False)
    app.mount("/", StaticFiles(directory=STATIC, html=True))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, keys=KeyRing(api_keys), limits=service.limits, allowed_hosts=allowed_hosts)
    app.add_middleware(Counting, service=service)  # around the guard: what that refuses is counted, too
    return app


class Counting:
    """Count requests by route and status."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        status = 499  # the client left before there was one

        async def counted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            status = 500 if status == 499 else status  # nothing was sent yet: it is told so further out
            raise
        finally:
            if scope["type"] == "http":
                path = getattr(scope.get("route"), "path", None) or "other"
                self.service.metrics.requests.labels(path, str(status)).inc()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code not in (404, 405):
        return error_response(ApiError(str(error.detail), error.status_code))
    # The page's files lie under all paths, so it is they that answer for paths and methods that no endpoint takes.
    path, taken = request.url.path, _methods(request)
    if not taken and error.status_code == 405 and not path.startswith("/v1/"):
        taken = ["GET", "HEAD"]
    if not taken:
        return error_response(ApiError(f"There is nothing at {path[:100]}.", 404))
    message = f"{path[:100]} does not take {request.method[:20]}; it takes {' and '.join(taken)}."
    response = error_response(ApiError(message, 405))
    response.headers["Allow"] = ", ".join(taken)
    return response


def _methods(request: Request) -> list[str]:
    """The methods that endpoints take at a path."""
    endpoints = [route for route in request.app.routes if not isinstance(route, Mount)]
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in endpoints)
    ]


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(ApiError("The request failed; the server's log has the reason.", 500, "internal_error"))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the HTTP endpoints; bodies are read by hand, so their schemas are put in here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version="1", routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for path, model in BODIES.items():
            schema = model.model_json_schema(ref_template=SCHEMAS)
            schemas.update(schema.pop("$defs", {}))
            content = {"application/json": {"schema": schema}}
            document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        form = TranscriptionFields.model_json_schema(ref_template=SCHEMAS)
        form["properties"]["file"] = {"type": "string", "format": "binary"}
        form["required"] = ["file", *form["required"]]
        body = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
        document["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"] = body
        app.openapi_schema = document
    return app.openapi_schema
