"""A Realtime conversation: its items, what of them goes to the model, and their form on the wire. No connection, no
engine."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ApiError
from .sound import encode_base64
from .truncation import codes_heard, cut_answer

Role = Literal["user", "assistant", "system"]
MILLISECONDS_SPARE = 100  # how far a client may count beyond an answer's end


def new_id(prefix: str) -> str:
    """Return an id that was never used."""
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass
class Part:
    """
    A part of an item's content.

    Args:
        kind (`str`): as on the wire: `input_text`, `input_audio`, `output_text` or `output_audio`.
        text (`str`, *optional*): the text, or the transcript of audio.
        codes (`list[int]`, *optional*): of audio; `None` while it is still being encoded.
        pcm (`bytes`, *optional*): the user's audio as it came, PCM16 at 24 kHz; `None` once it is no longer kept.
    """

    kind: str
    text: str | None = None
    codes: list[int] | None = None
    pcm: bytes | None = None

    @property
    def is_audio(self) -> bool:
        """Whether it is sound."""
        return self.kind in ("input_audio", "output_audio")

    def wire(self, with_audio: bool = False) -> dict[str, Any]:
        """Return the part as clients read it; its audio where it is asked for and kept."""
        if not self.is_audio:
            return {"type": self.kind, "text": self.text or ""}
        audio = {"audio": encode_base64(self.pcm)} if with_audio and self.pcm is not None else {}
        return {"type": self.kind, "transcript": self.text} | audio


@dataclass
class Item:
    """
    A message of the conversation.

    Args:
        role (`str`): who it is from.
        parts (`list[Part]`): its content.
        status (`str`, *optional*, defaults to `"completed"`): `in_progress`, `completed` or `incomplete`.
        id (`str`, *optional*): a new one by default.
    """

    role: Role
    parts: list[Part]
    status: str = "completed"
    id: str = field(default_factory=lambda: new_id("item"))

    def wire(self, with_audio: bool = False) -> dict[str, Any]:
        """Return the item as clients read it."""
        return {
            "id": self.id,
            "object": "realtime.item",
            "type": "message",
            "status": self.status,
            "role": self.role,
            "content": [part.wire(with_audio) for part in self.parts],
        }

    def message(self) -> dict[str, Any] | None:
        """Return the item as the processor's chat template takes it, or `None` where it says nothing."""
        texts = [part.text for part in self.parts if part.text and part.kind != "input_audio"]
        content: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts]
        content += [{"type": "audio", "audio_codes": part.codes} for part in self.parts if part.codes]
        return {"role": self.role, "content": content} if content else None


class Conversation:
    """
    The items of a session, in order.

    Args:
        most_items (`int`): no more than this many.
        most_audio (`int`): bytes of users' audio that are kept, or the newest item's; the oldest goes first.
    """

    def __init__(self, most_items: int, most_audio: int):
        self.id = new_id("conv")
        self.items: list[Item] = []
        self.most_items, self.most_audio = most_items, most_audio

    def add(self, item: Item, after: str | None = None) -> str | None:
        """
        Add an item at the end, after another, or at the beginning (`"root"`).

        Returns:
            `str` or `None`: the id of the item before it.

        Raises:
            ApiError: if there is no such other item, the id is taken, or the conversation is full.
        """
        if len(self.items) >= self.most_items:
            raise ApiError(
                f"The conversation has {self.most_items} items, which is the most. Delete some, or begin anew.",
                code="conversation_full",
            )
        if any(other.id == item.id for other in self.items):
            raise ApiError(f"There is an item '{item.id}' already.", code="duplicate_item", param="item.id")
        position = len(self.items)
        if after == "root":
            position = 0
        elif after is not None:
            position = self._position(after, "previous_item_id") + 1
        self.items.insert(position, item)
        self._forget_audio(item)
        return self.items[position - 1].id if position else None

    def get(self, item_id: str, param: str = "item_id") -> Item:
        """
        Return an item.

        Raises:
            ApiError: if there is none.
        """
        return self.items[self._position(item_id, param)]

    def before(self, item_id: str) -> str | None:
        """Return the id of the item before another."""
        position = self._position(item_id, "item_id")
        return self.items[position - 1].id if position else None

    def delete(self, item_id: str) -> None:
        """
        Take an item out.

        Raises:
            ApiError: if there is none.
        """
        del self.items[self._position(item_id, "item_id")]

    def _position(self, item_id: str, param: str) -> int:
        for position, item in enumerate(self.items):
            if item.id == item_id:
                return position
        raise ApiError(f"There is no item '{item_id}'.", code="item_not_found", param=param)

    def _forget_audio(self, newest: Item) -> None:
        """Keep no more than there is room for, and in any case what was just added, which is still to be encoded."""
        kept = [(item, part) for item in self.items for part in item.parts if part.pcm is not None]
        total = sum(len(part.pcm or b"") for _, part in kept)
        for item, part in kept:
            if total <= self.most_audio:
                return
            if item is newest:
                continue
            total -= len(part.pcm or b"")
            part.pcm = None


@dataclass(frozen=True)
class Rhythm:
    """
    How text and codes go together in answers, and how long a code lasts.

    Args:
        text_chunk_size, audio_chunk_size (`int`): text tokens and codes of an answer's chunks.
        code_rate (`float`): codes a second, of all codebooks together.
        codes_per_frame (`int`): codebooks.
        tokenize (`Callable`): text to ids.
        detokenize (`Callable`): ids to text.
    """

    text_chunk_size: int
    audio_chunk_size: int
    code_rate: float
    codes_per_frame: int
    tokenize: Callable[[str], list[int]]
    detokenize: Callable[[list[int]], str]

    @classmethod
    def of(cls, processor: Any) -> Rhythm:
        """Return that of a processor."""
        audio_format = processor.audio_format
        tokenizer = processor.tokenizer
        return cls(
            processor.text_chunk_size,
            processor.audio_chunk_size,
            audio_format.frame_rate * audio_format.num_codebooks,
            audio_format.num_codebooks,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )

    def milliseconds(self, part: Part) -> int:
        """Return how long an answer's audio lasts."""
        return round(len(part.codes or []) / self.code_rate * 1000)

    def cut(self, part: Part, audio_end_ms: float) -> None:
        """Cut an answer's audio, and its text alike, to what was played."""
        codes, text = part.codes or [], part.text or ""
        num_codes = codes_heard(audio_end_ms, self.code_rate, self.codes_per_frame)
        if num_codes < len(codes):
            sizes = self.text_chunk_size, self.audio_chunk_size
            text_ids, part.codes = cut_answer(self.tokenize(text), codes, num_codes, *sizes)
            part.text = self.detokenize(text_ids).rstrip("\ufffd")

    def truncate(self, item: Item, content_index: int, audio_end_ms: int) -> None:
        """
        Cut an item to what the user heard.

        Raises:
            ApiError: if it is no spoken answer, or was not that long.
        """
        self.check(item, content_index)
        part = item.parts[content_index]
        length = self.milliseconds(part)
        if audio_end_ms > length + MILLISECONDS_SPARE:
            raise ApiError(
                f"The audio of item '{item.id}' lasts {length} ms and cannot be cut at {audio_end_ms} ms.",
                code="invalid_value",
                param="audio_end_ms",
            )
        self.cut(part, audio_end_ms)

    def check(self, item: Item, content_index: int) -> None:
        """
        Refuse to cut what is no spoken answer.

        Raises:
            ApiError: if it is none.
        """
        if item.role != "assistant" or content_index >= len(item.parts) or not item.parts[content_index].is_audio:
            message = f"Item '{item.id}' has no audio of the assistant at content_index {content_index}."
            raise ApiError(message, code="invalid_item", param="item_id")


def messages(items: Iterable[Item], system: str | None) -> list[dict[str, Any]]:
    """
    Return items as a conversation for the processor's chat template.

    Args:
        items (`Iterable[Item]`): in order.
        system (`str`, *optional*): the system turn; an empty one leaves it out. A system item at the beginning takes
            the place of one that is `None`.
    """
    written = [message for item in items if (message := item.message()) is not None]
    return [{"role": "system", "content": system}, *written] if system else written


def check_texts(texts: Iterable[tuple[str, str | None]], longest: int) -> None:
    """
    Refuse texts that are too long.

    Args:
        texts (`Iterable[tuple[str, str]]`): where each stands, and what it is.
        longest (`int`): characters.

    Raises:
        ApiError: naming the first that is too long.
    """
    for param, text in texts:
        if text is not None and len(text) > longest:
            raise ApiError(
                f"'{param}' has {len(text)} characters; send {longest} or fewer.", code="too_long", param=param
            )


__all__ = ["Conversation", "Item", "Part", "Rhythm", "check_texts", "messages", "new_id"]
