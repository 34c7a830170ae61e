"""Who may talk to the server: API keys, pages of other origins, names that are not the server's, bodies that are too
large or never end. One ASGI layer around the application; nothing behind it needs to know."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import ApiError
from .limits import Limits

KEY_VARIABLE = "TTT_SERVE_API_KEY"
SHORTEST_KEY = 16
OPEN_PATHS = ("/health",)  # for load balancers, which have no key; so are the page's files, which are public
GUARDED_PREFIXES = ("/v1", "/metrics", "/openapi.json")
KEY_SUBPROTOCOL = "openai-insecure-api-key."  # how browsers send a key, which cannot set headers of a WebSocket
DISCARD_SECONDS = 5.0  # for the rest of a body that is refused
BODY_SECONDS = 60.0  # for a whole request to arrive
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
        "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
}


def is_loopback(host: str) -> bool:
    """Return whether an address or name is this machine's own and no other's."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_api_keys(file: str | os.PathLike | None, environment: dict[str, str] | None = None) -> list[str]:
    """
    Return the keys that open the server: the lines of a file, or else the environment variable `TTT_SERVE_API_KEY`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it has no key, or one that is too short or is no plain text.
    """
    if file is not None:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not keys:
            raise ValueError(f"{file} holds no key; write one a line")
    else:
        value = (os.environ if environment is None else environment).get(KEY_VARIABLE, "").strip()
        keys = [value] if value else []
    for key in keys:
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"an API key has {SHORTEST_KEY} or more letters, digits and signs, without spaces. Make one with: "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
    return keys


class KeyRing:
    """
    Compare keys in a time that does not tell how much of one was right.

    Args:
        keys (`Iterable[str]`): those that open; with none, everyone may come in.
    """

    def __init__(self, keys: Iterable[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def opens(self, key: str) -> bool:
        """Return whether a key is one of them."""
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class Guard:
    """
    The layer around the application.

    Args:
        app: an ASGI application.
        keys (`KeyRing`): who may use it. Without keys it is for this machine alone, and the `Host` of a request must be
            one of its names, so that no page gets in by pointing a name of its own here.
        limits (`Limits`): for the size of bodies.
        allowed_hosts (`Iterable[str]`, *optional*): further names of this server.
    """

    def __init__(self, app: Any, keys: KeyRing, limits: Limits, allowed_hosts: Iterable[str] = ()):
        self.app, self.keys, self.limits = app, keys, limits
        self.allowed_hosts = {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        try:
            self._check_host(headers)
            self._check_origin(headers)
            self._check_key(scope, headers)
            if scope["type"] == "http":
                receive = self._bounded(headers, receive)
        except ApiError as error:
            if scope["type"] == "http":
                await discard(receive, None, self.limits.body_bytes)
            await deny(scope, receive, send, error)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_encoded(HEADERS)]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check_host(self, headers: dict[str, str]) -> None:
        host = urlsplit(f"//{headers.get('host', '')}").hostname if _is_netloc(headers.get("host", "")) else None
        if host is None:
            raise ApiError("The header Host is missing or no name.", code="invalid_host")
        if not self.keys and not is_loopback(host) and host not in self.allowed_hosts:
            message = (
                f"This server does not go by the name '{host[:100]}'. Use localhost, or start it with --allowed_host."
            )
            raise ApiError(message, 403, "invalid_host")

    def _check_origin(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        parts = urlsplit(origin) if _is_netloc(origin.partition("://")[2]) else None
        if parts is None or parts.scheme not in ("http", "https") or parts.netloc.lower() != headers["host"].lower():
            raise ApiError("Pages of other origins may not talk to this server.", 403, "cross_origin")

    def _check_key(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        path = scope["path"]
        if not self.keys or path in OPEN_PATHS or not path.startswith(GUARDED_PREFIXES):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        offered = [key.strip()] if scheme.lower() == "bearer" else []
        for protocol in scope.get("subprotocols", []):
            if protocol.startswith(KEY_SUBPROTOCOL):
                offered.append(protocol.removeprefix(KEY_SUBPROTOCOL))
        if not offered:
            raise ApiError("No API key. Send 'Authorization: Bearer KEY'.", 401, "missing_api_key")
        if not self.keys.opens(offered[0]):
            raise ApiError("Incorrect API key.", 401, "invalid_api_key")

    def _bounded(self, headers: dict[str, str], receive: Any) -> Any:
        """Count the body as it comes, whatever its header says, and wait for it no longer than `BODY_SECONDS`."""
        most = self.limits.body_bytes
        too_large = ApiError(f"The request has more than {most} bytes.", 413, "request_too_large")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > most:
            raise too_large
        loop = asyncio.get_running_loop()
        deadline = loop.time() + BODY_SECONDS
        size, complete = 0, False

        async def bounded() -> dict[str, Any]:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError("The request did not arrive in time.", 408, "request_timeout") from None
            size += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if size > most:
                await discard(receive, message, most)
                raise too_large
            return message

        return bounded


async def discard(receive: Any, message: dict[str, Any] | None, most: int) -> None:
    """
    Take in what is left of a body that is refused, and forget it: a client that is still sending would not read why.

    Args:
        receive: of the request.
        message (`dict`, *optional*): the last that was received.
        most (`int`): bytes after which a client is cut off while it sends.
    """
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while most > 0 and (message is None or message.get("more_body", False)):
                message = await receive()
                most -= len(message.get("body", b""))
    except TimeoutError:
        pass


async def deny(scope: dict[str, Any], receive: Any, send: Any, error: ApiError) -> None:
    """Answer a request, or the opening of a WebSocket, with an error."""
    body = json.dumps(error.body()).encode()
    headers = _encoded({"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers()})
    prefix = "websocket." if scope["type"] == "websocket" else ""
    if prefix:
        await receive()
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})
            return
    await send({"type": f"{prefix}http.response.start", "status": error.status, "headers": headers})
    await send({"type": f"{prefix}http.response.body", "body": body})


def _headers(scope: dict[str, Any]) -> dict[str, str]:
    """Headers by name; of one that comes twice, all values, which is none that is allowed where it matters."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def _is_netloc(text: str) -> bool:
    """Whether this is a host with at most a port: nothing that parsers could take apart in two ways."""
    if not text or any(sign in text for sign in "/\\@?#, \t"):
        return False
    try:
        parts = urlsplit(f"//{text}")
        return bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError:
        return False
