"""The order of text and audio in a response, in token ids: interleaving and its inverse, whole or piece by piece.
Nothing here needs a model, a tokenizer or PyTorch."""

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
    """
    Write a response: `text_chunk_size` text tokens, a span of `audio_chunk_size` codes, text again, and so on; when the
    text runs out, one last span with all remaining codes.

    The last span is the only one opened by `<|begin_of_quad|>`, and it is written whenever there are codes, so a
    listener can rely on it: after it no text and no audio follows. Hence, when the audio is short for its text, a
    span is written between two chunks of text only while it leaves at least one code for the last span; the rest of
    the text then stands before the last span. Without codes the response is the text alone; without text it is the
    last span alone. `deinterleave` is the exact inverse for any chunk sizes.

    Args:
        text_ids (`Sequence[int]` of shape `(text,)`): text tokens, none of them structural or audio-side.
        codes (`Sequence[int]` of shape `(codes,)`): 0 to num_audio_codes - 1.
        token_ids (`TttTokenIds`): the vocabulary.
        text_chunk_size (`int`, *optional*, defaults to 13): text tokens between two spans.
        audio_chunk_size (`int`, *optional*, defaults to 26): codes of a span.
        end_of_turn (`bool`, *optional*, defaults to `False`): append `<|im_end|>`.

    Returns:
        `list[int]`: token ids.

    Raises:
        ValueError: if a chunk size is below 1, a text id is not text, or a code is outside the codebook.
    """
    if text_chunk_size < 1 or audio_chunk_size < 1:
        raise ValueError(
            "`text_chunk_size` and `audio_chunk_size` must be at least 1, "
            f"got {text_chunk_size} and {audio_chunk_size}."
        )
    text_ids = to_list(text_ids)
    for position, token_id in enumerate(text_ids):
        if not token_ids.is_text(token_id):
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


class Deinterleaver:
    """
    Separate a response into its text tokens and its audio codes as it comes, in pieces of any size.

    Reads up to the first `<|im_end|>`. Mask tokens are skipped. Where a span ends within a frame, that frame is left
    out, so that the next span begins with a new one.

    Args:
        token_ids (`TttTokenIds`): the vocabulary.
        codes_per_frame (`int`, *optional*, defaults to 1): of an audio tokenizer with several codebooks.
    """

    def __init__(self, token_ids: TttTokenIds, codes_per_frame: int = 1):
        self.token_ids = token_ids
        self.codes_per_frame = codes_per_frame
        self.ended = False
        self._begun: list[int] = []  # codes of a frame that is not complete

    def push(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """
        Take the next ids of the response.

        Args:
            ids (`Sequence[int]` of shape `(length,)`): token ids.

        Returns:
            `tuple[list[int], list[int]]`: text token ids; codes of the frames that are now complete.
        """
        text_ids: list[int] = []
        codes = self._begun
        for token_id in [] if self.ended else to_list(ids):
            if self.token_ids.is_code(token_id):
                codes.append(token_id - self.token_ids.audio_code_id_start)
            elif token_id != self.token_ids.mask_token_id:
                del codes[self._whole_frames(codes) :]
                if token_id == self.token_ids.end_of_turn_token_id:
                    self.ended = True
                    break
                if self.token_ids.is_text(token_id):
                    text_ids.append(token_id)
        end = self._whole_frames(codes)
        self._begun = codes[end:]
        return text_ids, codes[:end]

    def _whole_frames(self, codes: Sequence[int]) -> int:
        return len(codes) // self.codes_per_frame * self.codes_per_frame


def deinterleave(ids: Sequence[int], token_ids: TttTokenIds, codes_per_frame: int = 1) -> tuple[list[int], list[int]]:
    """
    Separate a whole response into its text tokens and its audio codes; the inverse of `interleave`.

    A response cut off anywhere is read as far as it goes: an unfinished span gives the whole frames it holds. See
    `Deinterleaver`.

    Args:
        ids (`Sequence[int]` of shape `(length,)`): token ids.
        token_ids (`TttTokenIds`): the vocabulary.
        codes_per_frame (`int`, *optional*, defaults to 1): of an audio tokenizer with several codebooks.

    Returns:
        `tuple[list[int], list[int]]`: text token ids; codes, 0 to num_audio_codes - 1.
    """
    return Deinterleaver(token_ids, codes_per_frame).push(ids)
