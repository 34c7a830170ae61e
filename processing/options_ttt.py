"""The options of `TttProcessor`'s call: which there are, which cannot be met. What they do is in processing_ttt.py."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from transformers.processing_utils import ProcessingKwargs, TextKwargs

# What a tokenizer's call can be asked for and a prompt with audio cannot give.
REFUSED_TEXT_KWARGS = (
    "add_special_tokens",
    "is_split_into_words",
    "return_overflowing_tokens",
    "return_token_type_ids",
    "stride",
    "text_pair",
    "text_pair_target",
    "text_target",
)


class TttAudioKwargs(TypedDict, total=False):
    """
    sampling_rate (`float`, *optional*): of samples that bring none of their own, Hz.
    """

    sampling_rate: float | None
    return_tensors: str | None


class TttProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    audio_kwargs: TttAudioKwargs


# Options by where they may stand. Those of images and videos, which `ProcessingKwargs` has too, are none.
NESTED_OPTIONS: dict[str, frozenset[str]] = {
    "text_kwargs": frozenset(TextKwargs.__annotations__),
    "audio_kwargs": frozenset(TttAudioKwargs.__annotations__),
}
NESTED_OPTIONS["common_kwargs"] = frozenset().union(*NESTED_OPTIONS.values())
FLAT_OPTIONS = {name for name in TttProcessorKwargs.__annotations__ if not name.endswith("_kwargs")}
OPTIONS = FLAT_OPTIONS.union(NESTED_OPTIONS, NESTED_OPTIONS["common_kwargs"])


def check_options(kwargs: Mapping[str, Any]) -> None:
    """
    Refuse options that there are not, or that cannot be met.

    Raises:
        TypeError: if there is no option of that name.
        ValueError: if it cannot be met.
        StrictDataclassFieldValidationError: if it has another type.
    """
    for name, value in kwargs.items():
        if name in ("images", "videos") and value is None:
            continue
        _check_name(name, OPTIONS, "")
        if name in NESTED_OPTIONS and not isinstance(value, Mapping):
            raise TypeError(f"`{name}` is {value!r}; it must be a mapping of options to values.")
        for key in value if name in NESTED_OPTIONS else ():
            _check_name(key, NESTED_OPTIONS[name], f" in `{name}`")
    text_kwargs = {**kwargs, **kwargs.get("text_kwargs", {})}
    for name in REFUSED_TEXT_KWARGS:
        if text_kwargs.get(name):
            raise ValueError(f"`{name}` is {text_kwargs[name]!r}, which a prompt with audio cannot give; leave it out.")
    known = NESTED_OPTIONS["text_kwargs"]
    validate_typed_dict(TextKwargs, {name: value for name, value in text_kwargs.items() if name in known})
    for name in ("max_length", "pad_to_multiple_of"):
        if text_kwargs.get(name) is not None and text_kwargs[name] < 1:
            raise ValueError(f"`{name}` is {text_kwargs[name]}; use an integer of at least 1.")


def check_spelling(kwargs: Iterable[str], known: Iterable[str]) -> None:
    """
    Refuse options that can only be misspelled ones of `known`, where others go on to parts that know them.

    Raises:
        TypeError: if there is such an option.
    """
    known = list(known)
    for name in kwargs:
        if name not in known and (close := difflib.get_close_matches(name, known, 1, cutoff=0.85)):
            raise TypeError(f"TttProcessor has no option `{name}`; did you mean `{close[0]}`?")


def _check_name(name: str, known: Iterable[str], where: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean `{close[0]}`?" if close else "."
        raise TypeError(f"TttProcessor has no option `{name}`{where}{meant}")


__all__ = ["TttProcessorKwargs", "check_options", "check_spelling"]
