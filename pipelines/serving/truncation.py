"""What of an answer was heard: its codes and its text, cut alike. Pure functions of ids."""

from __future__ import annotations

import math
from collections.abc import Sequence


def codes_heard(audio_ms: float, code_rate: float, codes_per_frame: int = 1) -> int:
    """
    Return how many codes are whole within a time.

    Args:
        audio_ms (`float`): how much of the answer was played, milliseconds.
        code_rate (`float`): codes a second, of all codebooks together.
        codes_per_frame (`int`, *optional*, defaults to 1): whole frames are counted.
    """
    frames = math.floor(max(audio_ms, 0.0) / 1000.0 * code_rate / codes_per_frame + 1e-6)
    return frames * codes_per_frame


def cut_answer(
    text_ids: Sequence[int],
    codes: Sequence[int],
    num_codes: int,
    text_chunk_size: int = 13,
    audio_chunk_size: int = 26,
) -> tuple[list[int], list[int]]:
    """
    Cut an answer after some of its codes, and its text by the rhythm in which it was written: `text_chunk_size` text
    tokens to `audio_chunk_size` codes.

    Args:
        text_ids (`Sequence[int]` of shape `(text,)`): text tokens of the whole answer.
        codes (`Sequence[int]` of shape `(codes,)`): its codes.
        num_codes (`int`): how many of them stay.
        text_chunk_size, audio_chunk_size (`int`, *optional*, default to 13 and 26): the rhythm.

    Returns:
        `tuple[list[int], list[int]]`: text tokens and codes that stay; all of them where no code goes.
    """
    if num_codes >= len(codes):
        return list(text_ids), list(codes)
    num_text = math.ceil(num_codes * text_chunk_size / audio_chunk_size)
    return list(text_ids[:num_text]), list(codes[:num_codes])
