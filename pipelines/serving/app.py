"""The application: routes, errors in OpenAI's form, the page's files, the layer that guards them. How it is run is in
ttt_serve.py; anything that runs ASGI applications can run it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Mount, Route, WebSocketRoute

from . import http_chat, http_speech, http_status, http_transcriptions, realtime
from .errors import ApiError
from .http_support import error_response
from .schema import LONGEST_TEXT, Wire
from .security import Guard, KeyRing, deny
from .service import Service
from .wire_http import ChatRequest, SpeechRequest, TranscriptionFields

STATIC = Path(__file__).resolve().parent / "static"
ENDPOINTS = (http_status, http_speech, http_transcriptions, http_chat, realtime)
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
    for module in ENDPOINTS:
        app.include_router(module.router)
    app.add_api_route("/docs", lambda: FileResponse(STATIC / "docs.html"), include_in_schema=False)
    app.add_api_websocket_route("/{path:path}", _no_socket)
    app.mount("/", StaticFiles(directory=STATIC, html=True))
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    keys = KeyRing(api_keys)
    app.openapi = lambda: _openapi(app, bool(keys))  # type: ignore[method-assign]
    app.add_middleware(Guard, keys=keys, limits=service.limits, allowed_hosts=allowed_hosts)
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
                self.service.metrics.requests.labels(_path(scope), str(status)).inc()


def _path(scope: dict[str, Any]) -> str:
    """The path of the endpoint that a request is for, whether it came there or was refused on its way."""
    routes = (route for module in ENDPOINTS for route in module.router.routes if isinstance(route, Route))
    return next((route.path for route in routes if route.matches(scope)[0] is not Match.NONE), "other")


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
    if not taken and any(path == route.path for route in realtime.router.routes if isinstance(route, WebSocketRoute)):
        message = f"{path} is a WebSocket: open it as ws:// or wss://. A proxy on the way must pass upgrades through."
        response = error_response(ApiError(message, 426, "upgrade_required"))
        response.headers["Upgrade"] = "websocket"
        return response
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


async def _no_socket(socket: WebSocket) -> None:
    error = ApiError(f"There is no WebSocket at {socket.url.path[:100]}; there is one at /v1/realtime.", 404)
    await deny(dict(socket.scope), socket.receive, socket.send, error)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(ApiError("The request failed; the server's log has the reason.", 500, "internal_error"))


def _openapi(app: FastAPI, has_keys: bool) -> dict[str, Any]:
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
        # FastAPI's own error is none of ours: a name is always a text.
        document["paths"]["/v1/models/{name}"]["get"]["responses"].pop("422")
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}] if has_keys else []
        app.openapi_schema = _with_limit(document, app.state.service.limits.text_length)
    return app.openapi_schema


def _with_limit(schema: Any, length: int) -> Any:
    """Return a schema in which texts are as long as they may be here."""
    if isinstance(schema, list):
        return [_with_limit(part, length) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = {"maxLength": length} if schema.get("maxLength") == LONGEST_TEXT else {}
    return {name: _with_limit(part, length) for name, part in schema.items()} | bounded
