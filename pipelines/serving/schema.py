"""Reading what clients send: one strict base for all wire formats, which refuses unknown fields by name, and JSON to
objects of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from .errors import ApiError

Model = TypeVar("Model", bound="Wire")
LONGEST_QUOTE = 100  # characters of a client's words in an error
LONGEST_TEXT = 2**25  # more than a request holds; `Limits.text_length` is what is taken, and told
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]


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


def nothing(value: Any) -> Any:
    """
    Take an empty list: the value of a field that clients send by habit.

    Raises:
        ValueError: for anything else.
    """
    if value != []:
        raise ValueError("this server has nothing of the kind; leave it out")
    return value


def validate(model: type[Model], data: Mapping[str, Any]) -> Model:
    """
    Return an object of a wire format.

    Raises:
        ApiError: naming the first field that is unknown, missing or wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid(_telling(error.errors(include_url=False, include_input=False), data), data) from None


def invalid(problem: Mapping[str, Any], data: Any) -> ApiError:
    """Return the error for what pydantic found in `data`."""
    param = _path(problem["loc"], data)
    if problem["type"] == "extra_forbidden":
        return ApiError(f"Unknown parameter: '{param}'. Leave it out.", code="unknown_parameter", param=param)
    if problem["type"] == "missing":
        return ApiError(f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param)
    reason = problem["msg"].removeprefix("Value error, ")
    return ApiError(f"Invalid value for '{param}': {shorten(reason, 400)}.", code="invalid_value", param=param)


def _telling(problems: Sequence[Mapping[str, Any]], data: Any) -> Mapping[str, Any]:
    """Return the first problem; of a text or parts, that of the one which was sent."""
    first, place = problems[0], _path(problems[0]["loc"], data)
    others = [problem for problem in problems[1:] if _path(problem["loc"], data).startswith(place)]
    if first["type"] != "string_type" or not others:
        return first
    if any(problem["type"] != "list_type" for problem in others):
        return next(problem for problem in others if problem["type"] != "list_type")
    return {**first, "msg": "Input should be a text or a list of parts"}


def shorten(text: str, length: int = LONGEST_QUOTE) -> str:
    """Return a text, or its beginning where it is longer than `length` characters, without its full stop."""
    text = text.rstrip(".")
    return text if len(text) <= length else f"{text[:length]}..."


def _path(location: tuple[Any, ...], data: Any) -> str:
    """Return where a problem lies, as in `session.audio.input`, without pydantic's names for the branches of unions."""
    path, tagged = "", False
    for index, part in enumerate(location):
        if not tagged and isinstance(data, Mapping) and data.get("type") == part and index + 1 < len(location):
            tagged = True  # the branch that `type` has chosen, not the field of that name
            continue
        if isinstance(data, Mapping) and part in data:
            data, tagged = data[part], False
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif index + 1 < len(location) or not isinstance(data, Mapping):
            continue
        part = shorten(str(part)) if isinstance(part, str) else part
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
