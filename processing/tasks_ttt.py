"""What a conversation looks like: the tasks with their system prompts, the chat template, and the form of messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .audio_input_ttt import AUDIO_KEYS, RATE_KEYS, shorten
from .vocabulary_ttt import (
    AUDIO_PLACEHOLDER,
    BEGIN_OF_AUDIO,
    BEGIN_OF_LAST_AUDIO,
    END_OF_LAST_AUDIO,
    END_OF_PROMPT_AUDIO,
    END_OF_TURN,
    START_OF_TURN,
)

ROLES = ("system", "user", "assistant")
PART_KEYS = {"text": ("type", "text"), "audio": ("type", "audio_codes", *AUDIO_KEYS, *RATE_KEYS)}
PROMPT_AUDIO = BEGIN_OF_AUDIO + AUDIO_PLACEHOLDER + END_OF_PROMPT_AUDIO
RESPONSE_AUDIO = BEGIN_OF_LAST_AUDIO + AUDIO_PLACEHOLDER + END_OF_LAST_AUDIO

# Audio parts become placeholders; the processor writes the codes in, and interleaves those of an assistant's turn.
CHAT_TEMPLATE = f"""\
{{%- macro write(content, audio) -%}}
{{%- if content is string -%}}
{{{{- content -}}}}
{{%- else -%}}
{{%- for part in content -%}}
{{%- if part['type'] == 'text' -%}}
{{{{- part['text'] -}}}}
{{%- elif part['type'] == 'audio' -%}}
{{{{- audio -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- '{END_OF_TURN}' -}}}}
{{%- endmacro -%}}
{{%- for message in messages -%}}
{{{{- '{START_OF_TURN}' + message['role'] + '\\n' -}}}}
{{%- if message['role'] == 'assistant' -%}}
{{%- generation -%}}
{{{{- write(message['content'], '{RESPONSE_AUDIO}') -}}}}
{{%- endgeneration -%}}
{{%- else -%}}
{{{{- write(message['content'], '{PROMPT_AUDIO}') -}}}}
{{%- endif -%}}
{{{{- '\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '{START_OF_TURN}assistant\\n' -}}}}
{{%- endif -%}}
"""


@dataclass(frozen=True)
class TttTask:
    """
    What a model is asked for: the one place that knows what a task needs.

    Args:
        system_prompt (`str`): what the task is asked with; an empty one leaves the system turn out.
        needs_audio (`bool`, *optional*, defaults to `False`): a request is refused without audio.
        needs_text (`bool`, *optional*, defaults to `False`): a request is refused without text.
        default_text (`str`, *optional*): the text of a request that brings none.
    """

    system_prompt: str
    needs_audio: bool = False
    needs_text: bool = False
    default_text: str | None = None

    @property
    def takes_text_alone(self) -> bool:
        """Whether a request is a text and never audio, so that a bare string is the text, not the name of a file."""
        return self.needs_text and not self.needs_audio


def default_tasks(text_chunk_size: int = 13, audio_chunk_size: int = 26) -> dict[str, TttTask]:
    """
    Return the tasks every processor has, by name. With the published chunk sizes, the prompts of asr, spoken_chat (and
    spoken_qa) and captioning are the published ones, to the letter; none was published for tts and text_chat.

    Args:
        text_chunk_size, audio_chunk_size (`int`, *optional*, default to 13 and 26): what the prompts say of the format.
    """
    chunks = f"generate {text_chunk_size} text tokens followed by {audio_chunk_size} audio tokens, and repeat this"
    spoken_chat = TttTask(
        "You are an audio-to-audio chat model. The user will provide you with an audio input. Your task is to respond "
        f"in an interleaved format: {chunks} pattern until the response is complete.",
        needs_audio=True,
    )
    return {
        "spoken_chat": spoken_chat,
        "spoken_qa": spoken_chat,
        "asr": TttTask(
            "You are an Automatic Speech Recognition (ASR) model. The user will provide you with an audio input. Your "
            f"task is to transcribe the audio into text and output the result in an interleaved format: {chunks} "
            "pattern until the transcription is complete.",
            needs_audio=True,
        ),
        "captioning": TttTask(
            "You are a helpful audio model. The user will provide you with a text-based instruction and an audio "
            "input. Your task is to follow the instruction based on the audio and output the result in an interleaved "
            f"format: {chunks} pattern until the transcription is complete.",
            needs_audio=True,
            default_text="Describe this audio.",
        ),
        "tts": TttTask(
            "You are a Text-to-Speech (TTS) model. The user will provide you with a text input. Your task is to read "
            f"the text aloud and output the result in an interleaved format: {chunks} pattern until the text is "
            "complete.",
            needs_text=True,
        ),
        "text_chat": TttTask(
            "You are a text-to-audio chat model. The user will provide you with a text input. Your task is to respond "
            f"in an interleaved format: {chunks} pattern until the response is complete.",
            needs_text=True,
        ),
    }


TASKS = default_tasks()


def resolve_task(name: str, settings: Any, default: TttTask | None = None) -> TttTask:
    """
    Return a task from the form it has in a processor's settings.

    Args:
        name (`str`): how errors call it.
        settings (`str` or `Mapping`): a system prompt, or arguments of `TttTask`.
        default (`TttTask`, *optional*): the task of that name, of which only what is given is replaced.

    Raises:
        ValueError: if the settings are neither, or hold what `TttTask` does not know or a value of another type.
    """
    given = {"system_prompt": settings} if isinstance(settings, str) else settings
    known = {field.name for field in dataclasses.fields(TttTask)}
    if not isinstance(given, Mapping) or not set(given) <= known:
        raise ValueError(
            f"`system_prompts` has {shorten(settings)} for the task {name!r}; give a string, or a mapping with "
            f"{', '.join(f'`{field}`' for field in sorted(known))}."
        )
    for field, value in given.items():
        kind, what = (bool, "True or False") if field.startswith("needs_") else (str, "a string")
        if not isinstance(value, kind) and not (field == "default_text" and value is None):
            raise ValueError(f"`{field}` of the task {name!r} is {shorten(value)}; it must be {what}.")
    return dataclasses.replace(default or TttTask(""), **given)


def check_messages(
    messages: Sequence[Any], name: str, template: str | None = None, allow_placeholders: bool = True
) -> None:
    """
    Check that a conversation has the form of one.

    Args:
        messages (`Sequence`): mappings with `role` and `content`, a string or a list of parts.
        name (`str`): how errors call the conversation.
        template (`str`, *optional*): the chat template; ours knows `ROLES` alone, another may know others.
        allow_placeholders (`bool`, *optional*, defaults to `True`): whether a text may hold `<|audio|>`.

    Raises:
        ValueError: naming the first message that is not one, and what is wrong with it.
    """
    if not messages:
        raise ValueError(f"{name} has no messages.")
    for position, message in enumerate(messages):
        where = f"message {position} of {name}"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"{where} must be a mapping with `role` and `content`, got {shorten(message)}.")
        if not isinstance(message["role"], str):
            raise ValueError(f"{where} has `role` {shorten(message['role'])}; it must be a string, such as 'user'.")
        if message["role"] not in ROLES and template == CHAT_TEMPLATE:
            raise ValueError(
                f"{where} has `role` {shorten(message['role'])}; use {', '.join(map(repr, ROLES))}, or a chat template "
                "of your own that knows it."
            )
        content = message["content"]
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"{where} has `content` {shorten(content)}; it must be a string or a list of parts.")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            _check_part(part, where)
            if not allow_placeholders and AUDIO_PLACEHOLDER in part.get("text", ""):
                raise ValueError(f"{where} has `{AUDIO_PLACEHOLDER}` in a text. Write audio as a part.")
        audio_positions = [index for index, part in enumerate(parts) if part["type"] == "audio"]
        if message["role"] == "assistant" and audio_positions not in ([], [len(parts) - 1]):
            raise ValueError(f"{where}: an assistant's turn holds its text and then at most one audio.")


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, Mapping) or part.get("type") not in PART_KEYS:
        kind = repr(part.get("type")) if isinstance(part, Mapping) else f"none, {shorten(part)}"
        raise ValueError(f"{where} has a part of type {kind}; it must be a mapping of type 'text' or 'audio'.")
    known = PART_KEYS[part["type"]]
    unknown = [key for key in part if key not in known]
    if unknown:
        raise ValueError(
            f"{where} has {'an' if part['type'] == 'audio' else 'a'} {part['type']} part with `{unknown[0]}`; it may "
            f"have {', '.join(f'`{key}`' for key in known[1:])}."
        )
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where} has a text part without a string under `text`.")


def audio_parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the audio parts of a conversation, in order."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part["type"] == "audio")


def name_audio_parts(
    conversations: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> list[tuple[Mapping[str, Any], str]]:
    """Return the audio parts of all conversations, in order, and how errors call each."""
    return [
        (part, f"audio part {index} of {name}")
        for messages, name in zip(conversations, names, strict=True)
        for index, part in enumerate(audio_parts(messages))
    ]


def replace_audio_parts(
    messages: Sequence[Mapping[str, Any]], parts: Iterator[dict[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return a conversation with the next of `parts` in place of each of its audio parts."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [part if part["type"] == "text" else next(parts) for part in message["content"]]}
        for message in messages
    ]
