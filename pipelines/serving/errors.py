"""What went wrong, in the form OpenAI's clients read: a status, and `{"error": {message, type, code, param}}`."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """
    A request that is refused, or an answer that failed.

    Args:
        message (`str`): what is wrong, and what to do.
        status (`int`, *optional*, defaults to 400): of an HTTP answer.
        code (`str`, *optional*): for programs.
        param (`str`, *optional*): the field that is wrong.
        retry_after (`float`, *optional*): seconds after which another try makes sense.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the body of an HTTP answer; a Realtime `error` event has the same under `error`."""
        return {"error": {"message": self.message, "type": self.kind, "code": self.code, "param": self.param}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status in (408, 413):  # whose body may go on
            headers["Connection"] = "close"
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def overloaded(retry_after: float) -> ApiError:
    """Return what a client is told whose request finds the queue full."""
    message = "The server is busy and its queue is full. Try again later."
    return ApiError(message, 429, "server_overloaded", retry_after=retry_after)


def draining() -> ApiError:
    """Return what a client is told who comes while the server stops."""
    return ApiError("The server is shutting down.", 503, "server_shutting_down", retry_after=5.0)
