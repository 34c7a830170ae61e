"""Conversations to token ids: templates rendered, audio parts read, codes written in place of placeholders. The wording
of prompts lives in tasks_ttt.py, the order of text and codes in an answer in interleaving_ttt.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from .audio_input_ttt import is_single_audio, load_waveform
from .interleaving_ttt import interleave
from .tasks_ttt import RESPONSE_AUDIO, audio_parts
from .vocabulary_ttt import AUDIO_PLACEHOLDER, END_OF_TURN, START_OF_TURN, TttTokenIds, to_list

_RESPONSE = re.compile(rf"(?<={re.escape(START_OF_TURN)}assistant\n)(.*?)({re.escape(END_OF_TURN)}|\Z)", re.DOTALL)


def render(
    messages: Sequence[dict[str, Any]], chat_template: str, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """One conversation as text, a placeholder for each audio: templates see that a part is audio, not the audio."""
    bare = [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [p if p["type"] == "text" else {"type": "audio"} for p in message["content"]]}
        for message in messages
    ]
    rendered, _ = render_jinja_template(
        conversations=[bare], chat_template=chat_template, add_generation_prompt=add_generation_prompt, **variables
    )
    return rendered[0]


def read_audio_parts(
    conversations: Sequence[Sequence[dict[str, Any]]],
    names: Sequence[str],
    target_rate: int,
    audio: Any | None = None,
    sampling_rate: int | None = None,
) -> tuple[list[Any], dict[int, np.ndarray]]:
    """Every audio part of `conversations` in order, as its codes or as a waveform that is still to be encoded.

    Args:
        names: how errors call the conversations.
        target_rate: of the waveforms, Hz.
        audio: taken in order by the parts that bring neither audio nor codes of their own.
        sampling_rate: of arrays that bring none of their own, Hz.

    Returns:
        The codes of each part, None where it has none yet; the waveforms (samples,) of those, by their position.

    Raises:
        ValueError: more parts than audios or the reverse, or an audio that cannot be used.
    """
    given = iter([] if audio is None else [audio] if is_single_audio(audio) else list(audio))
    codes: list[Any] = []
    waveforms: dict[int, np.ndarray] = {}
    for messages, name in zip(conversations, names, strict=True):
        for index, part in enumerate(audio_parts(messages)):
            if part.get("audio_codes") is None:
                where = f"audio part {index} of {name}"
                waveforms[len(codes)] = _load_part(part, given, target_rate, sampling_rate, where)
            codes.append(part.get("audio_codes"))
    left = sum(1 for _ in given)
    if left:
        raise ValueError(f"`audio` holds {left} more audios than there are audio parts without one of their own.")
    return codes, waveforms


def _load_part(
    part: dict[str, Any], given: Iterator[Any], target_rate: int, sampling_rate: int | None, name: str
) -> np.ndarray:
    source = next((part[key] for key in ("audio", "path", "url") if part.get(key) is not None), None)
    if source is None:
        source = part if part.get("array") is not None else next(given, None)
    if source is None:
        raise ValueError(
            f"{name} has no audio; there are more audio parts than audios. Put each audio under its part's "
            "`audio`, or pass one in `audio` for every part without."
        )
    return load_waveform(source, target_rate, part.get("sampling_rate") or sampling_rate, name)


@dataclass(frozen=True)
class ConversationEncoder:
    """Rendered conversations to token ids.

    Answers are tokenised apart from what precedes them and interleaved with their codes, as in generation.
    """

    tokenizer: Any
    token_ids: TttTokenIds
    text_chunk_size: int
    audio_chunk_size: int

    def encode(self, rendered: str, codes: Iterator[Any], name: str) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them an assistant wrote.

        Args:
            rendered: what `render` gives.
            codes: codes of every audio, taken in order.
            name: how errors call the conversation.

        Raises:
            ValueError: fewer audios than placeholders, a code outside the codebook, or an assistant's turn that is not
                text and then at most one audio.
        """
        ids: list[int] = []
        scored: list[bool] = []

        def append(new: list[int], is_response: bool) -> None:
            ids.extend(new)
            scored.extend([is_response] * len(new))

        position = 0
        for match in _RESPONSE.finditer(rendered):
            append(self._prompt_text(rendered[position : match.start()], codes, name), False)
            append(self._response_text(match.group(1), bool(match.group(2)), codes, name), True)
            position = match.end()
        append(self._prompt_text(rendered[position:], codes, name), False)
        return ids, scored

    def response(self, text: str, codes: Sequence[int], ends: bool) -> list[int]:
        """Ids of an answer: text and codes interleaved, then `<|im_end|>` where it `ends`."""
        return interleave(
            self.tokenize(text), codes, self.token_ids, self.text_chunk_size, self.audio_chunk_size, end_of_turn=ends
        )

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _prompt_text(self, text: str, codes: Iterator[Any], name: str) -> list[int]:
        pieces = text.split(AUDIO_PLACEHOLDER)
        ids = self.tokenize(pieces[0])
        for piece in pieces[1:]:
            ids += self.token_ids.codes_to_ids(_next_codes(codes, name), name)
            ids += self.tokenize(piece)
        return ids

    def _response_text(self, text: str, ends: bool, codes: Iterator[Any], name: str) -> list[int]:
        spoken = text.endswith(RESPONSE_AUDIO)
        text = text.removesuffix(RESPONSE_AUDIO)
        if AUDIO_PLACEHOLDER in text:
            raise ValueError(f"{name}: an assistant's turn holds its text and then at most one audio.")
        return self.response(text, _next_codes(codes, name) if spoken else [], ends)


def _next_codes(codes: Iterator[Any], name: str) -> list[int]:
    row = next(codes, None)
    if row is None:
        raise ValueError(
            f"{name} has more `{AUDIO_PLACEHOLDER}` placeholders (audio parts) than there are audios. "
            "Pass one audio for each."
        )
    return to_list(row)


def check_all_used(codes: Iterator[Any], name: str) -> None:
    """Raises a ValueError where audios are left that no placeholder of `name` took."""
    left = sum(1 for _ in codes)
    if left:
        raise ValueError(
            f"There are {left} more audios than audio parts (`{AUDIO_PLACEHOLDER}` placeholders) in `{name}`. "
            "Add a part for each, or pass `task` to have the prompt built around them."
        )
