"""Conversations to token ids: audio parts read, codes written in place of placeholders, answers interleaved. The
wording of prompts lives in tasks_ttt.py, the order of text and codes in an answer in interleaving_ttt.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .audio_input_ttt import AUDIO_KEYS, RATE_KEYS, list_audio, load_waveform
from .interleaving_ttt import interleave
from .tasks_ttt import RESPONSE_AUDIO
from .vocabulary_ttt import AUDIO_PLACEHOLDER, END_OF_TURN, START_OF_TURN, TttTokenIds, to_list

# Transformers' `sanitize_control_tokens` puts this before what looks like a token and was written by a user.
MARK = "\U000f0000"
_PLACEHOLDER = re.compile(rf"(?<!{MARK}){re.escape(AUDIO_PLACEHOLDER)}")
_ANSWER = re.compile(
    rf"(?<={re.escape(START_OF_TURN)}assistant\n)(.*?)((?<!{MARK}){re.escape(END_OF_TURN)}|\Z)", re.DOTALL
)
CACHED_TEXTS, CACHED_LENGTH = 10_000, 1000


def read_audio_parts(
    parts: Sequence[tuple[Mapping[str, Any], str]],
    target_rate: int,
    audio: Any | None = None,
    sampling_rate: float | None = None,
) -> tuple[list[Any], dict[int, np.ndarray]]:
    """
    Read audio parts, in order, as their codes or as waveforms that are still to be encoded.

    Args:
        parts (`Sequence[tuple[Mapping, str]]`): audio parts of messages, and how errors call each.
        target_rate (`int`): of the waveforms, Hz.
        audio (`Any`, *optional*): taken in order by the parts that bring neither audio nor codes of their own.
        sampling_rate (`float`, *optional*): of samples that bring none of their own, Hz.

    Returns:
        `tuple`: the codes of each part, `None` where it has none yet; the waveforms of shape `(samples,)` of those, by
        position.

    Raises:
        ValueError: if there are more parts than audios or the reverse, or an audio cannot be used.
    """
    given = iter(list_audio(audio))
    codes: list[Any] = []
    waveforms: dict[int, np.ndarray] = {}
    for position, (part, name) in enumerate(parts):
        source: Any = part
        if all(part.get(key) is None for key in ("audio_codes", *AUDIO_KEYS)):
            try:
                source = next(given)
            except StopIteration:
                raise ValueError(
                    f"{name} has no audio; there are more audio parts than audios. Put each audio under its part's "
                    "`audio`, or pass one in `audio` for every part without."
                ) from None
        codes.append(source.get("audio_codes") if isinstance(source, Mapping) else None)
        if codes[-1] is None:
            rate = next((part[key] for key in RATE_KEYS if part.get(key) is not None), sampling_rate)
            waveforms[position] = load_waveform(source, target_rate, rate, name)
    left = sum(1 for _ in given)
    if left:
        raise ValueError(f"`audio` holds {left} more audios than there are audio parts without one of their own.")
    return codes, waveforms


@dataclass
class Encoding:
    """
    Token ids of a conversation.

    Args:
        ids (`list[int]`): token ids.
        scored (`list[bool]`): which of them an assistant wrote.
        offsets (`list[tuple[int, int]]`): where in the rendered text each stands; codes where their placeholder does.
    """

    ids: list[int] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)


class ConversationEncoder:
    """
    Turn rendered conversations into token ids.

    Answers are tokenised apart from what precedes them and interleaved with their codes, as in generation. Short texts
    are tokenised once: conversations share their system prompts and what stands between turns.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with the TtT tokens.
        token_ids (`TttTokenIds`): its vocabulary.
        text_chunk_size, audio_chunk_size (`int`): text tokens and codes of an answer's chunks.
    """

    def __init__(self, tokenizer: Any, token_ids: TttTokenIds, text_chunk_size: int, audio_chunk_size: int):
        self.tokenizer = tokenizer
        self.token_ids = token_ids
        self.text_chunk_size = text_chunk_size
        self.audio_chunk_size = audio_chunk_size
        self._cache: dict[str, list[int]] = {}

    def encode(
        self,
        rendered: str,
        codes: Iterator[Any],
        name: str,
        return_offsets: bool = False,
        sanitize_control_tokens: bool = False,
    ) -> Encoding:
        """
        Return the ids of a conversation.

        Args:
            rendered (`str`): what `apply_chat_template` renders, with a placeholder for each audio. An answer may also
                hold its audio in tokens, which then stay where they are.
            codes (`Iterator`): codes of every audio, taken in order.
            name (`str`): how errors call the conversation.
            return_offsets (`bool`, *optional*, defaults to `False`): give the ids' places in `rendered` too.
            sanitize_control_tokens (`bool`, *optional*, defaults to `False`):
                The text is marked as Transformers does: marked tokens are encoded as plain text.

        Raises:
            ValueError: if there are fewer audios than placeholders, a code is outside the codebook, an assistant's turn
                is not text and then at most one audio, or a character is half of one, as broken JSON has them.
        """
        try:
            rendered.encode()
        except UnicodeEncodeError as error:
            half = rendered[error.start]
            raise ValueError(f"{name} holds {half!r}, half of a surrogate pair and no character; remove it.") from None
        writer = _Writer(self, rendered, codes, name, return_offsets, sanitize_control_tokens)
        position = 0
        for match in _ANSWER.finditer(rendered):
            writer.write_prompt(position, match.start())
            writer.write_answer(match)
            position = match.end()
        writer.write_prompt(position, len(rendered))
        return writer.encoding

    def response(self, text: str, codes: Sequence[int]) -> list[int]:
        """Return the ids of an answer: its text and codes interleaved, then `<|im_end|>`."""
        text_ids, _ = self.tokenize(text)
        return interleave(
            text_ids, codes, self.token_ids, self.text_chunk_size, self.audio_chunk_size, end_of_turn=True
        )

    def tokenize(
        self, text: str, return_offsets: bool = False, sanitize_control_tokens: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text, nothing added, and where they stand in it."""
        if not text:
            return [], []
        if return_offsets or sanitize_control_tokens:
            options = {"return_offsets_mapping": True} if return_offsets else {"sanitize_control_tokens": True}
            output = self.tokenizer(text, add_special_tokens=False, **options)
            return output["input_ids"], output.get("offset_mapping", [])
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(text) <= CACHED_LENGTH:
                if len(self._cache) >= CACHED_TEXTS:
                    self._cache.clear()
                self._cache[text] = ids
        return ids, []


class _Writer:
    """Writes one conversation; texts are given by where they stand in the rendered one."""

    def __init__(
        self,
        encoder: ConversationEncoder,
        rendered: str,
        codes: Iterator[Any],
        name: str,
        return_offsets: bool,
        sanitize_control_tokens: bool,
    ):
        self.encoder, self.rendered, self.codes, self.name = encoder, rendered, codes, name
        self.return_offsets, self.sanitize_control_tokens = return_offsets, sanitize_control_tokens
        self.encoding = Encoding()

    def write_prompt(self, start: int, end: int) -> None:
        for match in _PLACEHOLDER.finditer(self.rendered, start, end):
            self._append(*self._tokenize(start, match.start()), scored=False)
            code_ids = self.encoder.token_ids.codes_to_ids(self._next_codes(), self.name)
            self._append(code_ids, [match.span()] * len(code_ids), scored=False)
            start = match.end()
        self._append(*self._tokenize(start, end), scored=False)

    def write_answer(self, match: re.Match[str]) -> None:
        start, end = match.span(1)
        text_end = end - len(RESPONSE_AUDIO) if self.rendered.endswith(RESPONSE_AUDIO, start, end) else end
        if _PLACEHOLDER.search(self.rendered, start, text_end):
            raise ValueError(f"{self.name}: an assistant's turn holds its text and then at most one audio.")
        ids, offsets = self._tokenize(start, text_end)
        if text_end < end:
            encoder, text_offsets = self.encoder, iter(offsets)
            sizes = encoder.text_chunk_size, encoder.audio_chunk_size
            ids = interleave(ids, self._next_codes(), encoder.token_ids, *sizes)
            if self.return_offsets:
                is_text = encoder.token_ids.is_text
                offsets = [next(text_offsets) if is_text(token_id) else (text_end, end) for token_id in ids]
        self._append(ids, offsets, scored=True)
        if match.group(2):
            self._append([self.encoder.token_ids.end_of_turn_token_id], [match.span(2)], scored=True)

    def _tokenize(self, start: int, end: int) -> tuple[list[int], list[tuple[int, int]]]:
        text = self.rendered[start:end]
        ids, offsets = self.encoder.tokenize(text, self.return_offsets, self.sanitize_control_tokens)
        return ids, [(start + first, start + last) for first, last in offsets]

    def _append(self, ids: list[int], offsets: list[tuple[int, int]], scored: bool) -> None:
        self.encoding.ids.extend(ids)
        self.encoding.scored.extend([scored] * len(ids))
        if self.return_offsets:
            self.encoding.offsets.extend(offsets)

    def _next_codes(self) -> list[int]:
        row = next(self.codes, None)
        if row is None:
            raise ValueError(
                f"{self.name} has more `{AUDIO_PLACEHOLDER}` placeholders (audio parts) than there are audios. "
                "Pass one audio for each."
            )
        return to_list(row)


def check_all_used(codes: Iterator[Any], name: str) -> None:
    """Raise a ValueError where audios are left that no placeholder of `name` took."""
    left = sum(1 for _ in codes)
    if left:
        raise ValueError(
            f"There are {left} more audios than audio parts (`{AUDIO_PLACEHOLDER}` placeholders) in `{name}`. "
            "Add a part for each, or pass `task` to have the prompt built around them."
        )
