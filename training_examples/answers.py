"""Where an answer of `generate` ends: the one rule of all scripts that let a model answer. What they do with an answer
lives with them."""

from collections.abc import Mapping
from typing import Any


def read_turn(
    written: list[int], model: Any, end_of_turn: int, options: Mapping[str, Any] | None = None
) -> tuple[list[int], bool]:
    """
    Return what a row of `generate` holds without its padding, and whether it ended by itself.

    It did with the end of the turn, or with another of the call's `eos_token_id`: some checkpoints let an answer end
    with its last span. Such a span counts unless it was closed because `max_new_tokens` were written.

    Args:
        written (`list[int]`): ids after the prompt, padded on the right.
        model ([`TttForConditionalGeneration`]): who wrote them, or an adapter on it.
        end_of_turn (`int`): the id of `<|im_end|>`.
        options (`Mapping`, *optional*): what `generate` was told.
    """
    settings = vars(model.generation_config) | {k: v for k, v in (options or {}).items() if v is not None}
    eos = settings.get("eos_token_id")
    ends = {end_of_turn, *(eos if isinstance(eos, list | tuple) else [eos])}
    place = next((index for index, token in enumerate(written) if token in ends), None)
    if place is None:
        return written, False
    turn = written[: place + 1]
    return turn, turn[-1] == end_of_turn or len(turn) != settings.get("max_new_tokens")
