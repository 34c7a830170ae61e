"""The order of text and audio in a response, as pure functions of token ids: interleaving, its inverse, the cut of the
last span used in training. Nothing here needs a model, a tokenizer or PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from .vocabulary_ttt import TttTokenIds, to_list


def interleave(
    text_ids: Sequence[int],
    codes: Sequence[int],
    token_ids: TttTokenIds,
    text_chunk_size: int = 13,
    audio_chunk_size: int = 26,
    end_of_turn: bool = False,
) -> list[int]:
    """Writes a response: `text_chunk_size` text tokens, a span of `audio_chunk_size` codes, text again, and so on; when
    the text runs out, one last span with all remaining codes.

    The last span is the only one opened by `<|begin_of_quad|>`, and it is written whenever there are codes, so a
    listener can rely on it: after it no text and no audio follows. Hence, when the audio is short for its text, a
    span is written between two chunks of text only while it leaves at least one code for the last span; the rest of
    the text then stands before the last span. Without codes the response is the text alone; without text it is the
    last span alone. `deinterleave` is the exact inverse for any chunk sizes.

    Args:
        text_ids: text tokens, none of them structural or audio-side.
        codes: audio codes, 0 .. num_audio_codes - 1.
        end_of_turn: append `<|im_end|>`.

    Returns:
        Token ids.

    Raises:
        ValueError: a chunk size below 1, a text id that is not text, or a code outside the codebook.
    """
    if text_chunk_size < 1 or audio_chunk_size < 1:
        raise ValueError(
            "`text_chunk_size` and `audio_chunk_size` must be at least 1, "
            f"got {text_chunk_size} and {audio_chunk_size}."
        )
    text_ids = to_list(text_ids)
    structural = token_ids.structural
    for position, token_id in enumerate(text_ids):
        if token_id >= token_ids.audio_token_id_start or token_id in structural:
            raise ValueError(
                f"text_ids: id {token_id} at position {position} is an audio or structural token, not text. "
                "Pass the text of the response alone; begin, end and code tokens are added here."
            )
    code_ids = token_ids.codes_to_ids(codes)

    ids: list[int] = []
    text_position = code_position = 0
    while text_position < len(text_ids):
        ids += text_ids[text_position : text_position + text_chunk_size]
        text_position += text_chunk_size
        if text_position < len(text_ids) and len(code_ids) - code_position > audio_chunk_size:
            ids.append(token_ids.begin_of_audio_token_id)
            ids += code_ids[code_position : code_position + audio_chunk_size]
            ids.append(token_ids.end_of_audio_token_id)
            code_position += audio_chunk_size
    if code_position < len(code_ids):
        ids.append(token_ids.begin_of_last_audio_token_id)
        ids += code_ids[code_position:]
        ids.append(token_ids.end_of_last_audio_token_id)
    if end_of_turn:
        ids.append(token_ids.end_of_turn_token_id)
    return ids


def whole_frames(codes: Sequence[int], codes_per_frame: int) -> int:
    """How many of `codes` make up whole frames."""
    return len(codes) // codes_per_frame * codes_per_frame


def deinterleave(ids: Sequence[int], token_ids: TttTokenIds, codes_per_frame: int = 1) -> tuple[list[int], list[int]]:
    """Separates a response into its text tokens and its audio codes; the inverse of `interleave`.

    Reads up to the first `<|im_end|>`. A response cut off anywhere is read as far as it goes: an unfinished span gives
    the codes it holds, mask tokens are skipped. Where a span ends within a frame, that frame is left out, so that the
    next span begins with a new one.

    Args:
        codes_per_frame: of an audio tokenizer with several codebooks.

    Returns:
        Text token ids; codes 0 .. num_audio_codes - 1.
    """
    text_ids: list[int] = []
    codes: list[int] = []
    structural = token_ids.structural
    for token_id in to_list(ids):
        if token_id == token_ids.end_of_turn_token_id:
            break
        if token_ids.is_code(token_id):
            codes.append(token_id - token_ids.audio_code_id_start)
        elif token_id != token_ids.mask_token_id:
            del codes[whole_frames(codes, codes_per_frame) :]
            if token_id < token_ids.audio_token_id_start and token_id not in structural:
                text_ids.append(token_id)
    return text_ids, codes[: whole_frames(codes, codes_per_frame)]


def last_span_bounds(ids: Sequence[int], token_ids: TttTokenIds, start: int = 0) -> tuple[int, int] | None:
    """Where the codes of the last `<|begin_of_quad|>` span at or after `start` lie.

    Returns:
        First position and end (exclusive) of the codes, or None where there is no such span.
    """
    for position in range(len(ids) - 1, start - 1, -1):
        if ids[position] == token_ids.begin_of_last_audio_token_id:
            end = position + 1
            while end < len(ids) and token_ids.is_code(ids[end]):
                end += 1
            return position + 1, end
    return None


def truncated_span_range(num_codes: int) -> tuple[int, int] | None:
    """How many codes stochastic span truncation may keep of a span of `num_codes`: the smallest and the largest number,
    each equally likely, from max(30 %, 5) to 90 %. None for spans of 10 codes or fewer, which stay whole."""
    if num_codes <= 10:
        return None
    return max(num_codes * 3 // 10, 5), num_codes * 9 // 10
