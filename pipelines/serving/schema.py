"""Reading what clients send: one strict base for all wire formats, which refuses unknown fields by name, and JSON to
objects of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from .errors import ApiError

Model = TypeVar("Model", bound="Wire")
LONGEST_QUOTE = 100  # characters of a client's words in an error


class Wire(BaseModel):
    """A part of a request. Unknown fields, and values of another type, are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def parse_json(content: str | bytes) -> dict[str, Any]:
    """
    Read a JSON object.

    Raises:
        ApiError: if it is none, is nested too deeply, or holds what JSON has no word for.
    """
    try:
        data = from_json(content, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise ApiError(f"This is no JSON: {shorten(str(error))}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError("The JSON must be an object.", code="invalid_json")
    return data


def validate(model: type[Model], data: Mapping[str, Any]) -> Model:
    """
    Return an object of a wire format.

    Raises:
        ApiError: naming the first field that is unknown, missing or wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)[0], data) from None


def invalid(problem: Mapping[str, Any], data: Any) -> ApiError:
    """Return the error for what pydantic found in `data`."""
    param = _path(problem["loc"], data)
    if problem["type"] == "extra_forbidden":
        return ApiError(f"Unknown parameter: '{param}'. Leave it out.", code="unknown_parameter", param=param)
    if problem["type"] == "missing":
        return ApiError(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    reason = problem["msg"].removeprefix("Value error, ")
    return ApiError(f"Invalid value for '{param}': {shorten(reason, 400)}.", code="invalid_value", param=param)


def shorten(text: str, length: int = LONGEST_QUOTE) -> str:
    """Return a text, or its beginning where it is longer than `length` characters, without its full stop."""
    text = text.rstrip(".")
    return text if len(text) <= length else f"{text[:length]}..."


def _path(location: tuple[Any, ...], data: Any) -> str:
    """Return where a problem lies, as in `session.audio.input`, without pydantic's names for the branches of unions."""
    path = ""
    for index, part in enumerate(location):
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif index + 1 < len(location):
            continue
        part = shorten(str(part)) if isinstance(part, str) else part
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
