"""What a conversation looks like: the tasks with their system prompts, the chat template, and the form of messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .vocabulary_ttt import (
    AUDIO_PLACEHOLDER,
    BEGIN_OF_AUDIO,
    BEGIN_OF_LAST_AUDIO,
    END_OF_LAST_AUDIO,
    END_OF_PROMPT_AUDIO,
    END_OF_TURN,
    START_OF_TURN,
)

PROMPT_AUDIO = BEGIN_OF_AUDIO + AUDIO_PLACEHOLDER + END_OF_PROMPT_AUDIO
RESPONSE_AUDIO = BEGIN_OF_LAST_AUDIO + AUDIO_PLACEHOLDER + END_OF_LAST_AUDIO

# Audio parts become placeholders; the processor writes the codes in, and interleaves those of an assistant's turn.
CHAT_TEMPLATE = f"""\
{{%- for message in messages -%}}
{{{{- '{START_OF_TURN}' + message['role'] + '\\n' -}}}}
{{%- if message['content'] is string -%}}
{{{{- message['content'] -}}}}
{{%- else -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'text' -%}}
{{{{- part['text'] -}}}}
{{%- elif part['type'] == 'audio' and message['role'] == 'assistant' -%}}
{{{{- '{RESPONSE_AUDIO}' -}}}}
{{%- elif part['type'] == 'audio' -%}}
{{{{- '{PROMPT_AUDIO}' -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- '{END_OF_TURN}\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '{START_OF_TURN}assistant\\n' -}}}}
{{%- endif -%}}
"""

_SPOKEN_CHAT_PROMPT = (
    "You are an audio-to-audio chat model. The user will provide you with an audio input. Your task is to respond in "
    "an interleaved format: generate 13 text tokens followed by 26 audio tokens, and repeat this pattern until the "
    "response is complete."
)


@dataclass(frozen=True)
class TttTask:
    """One task: the system prompt it is asked with, whether its user turn needs audio or text, and the text used where
    the user gives none."""

    system_prompt: str
    needs_audio: bool = False
    needs_text: bool = False
    default_text: str | None = None


# The prompts of asr, spoken_chat (and spoken_qa) and captioning are the published ones, to the letter; none was
# published for tts and text_chat.
TASKS: dict[str, TttTask] = {
    "spoken_chat": TttTask(_SPOKEN_CHAT_PROMPT, needs_audio=True),
    "spoken_qa": TttTask(_SPOKEN_CHAT_PROMPT, needs_audio=True),
    "asr": TttTask(
        "You are an Automatic Speech Recognition (ASR) model. The user will provide you with an audio input. Your task "
        "is to transcribe the audio into text and output the result in an interleaved format: generate 13 text tokens "
        "followed by 26 audio tokens, and repeat this pattern until the transcription is complete.",
        needs_audio=True,
    ),
    "captioning": TttTask(
        "You are a helpful audio model. The user will provide you with a text-based instruction and an audio input. "
        "Your task is to follow the instruction based on the audio and output the result in an interleaved format: "
        "generate 13 text tokens followed by 26 audio tokens, and repeat this pattern until the transcription is "
        "complete.",
        needs_audio=True,
        default_text="Describe this audio.",
    ),
    "tts": TttTask(
        "You are a Text-to-Speech (TTS) model. The user will provide you with a text input. Your task is to read the "
        "text aloud and output the result in an interleaved format: generate 13 text tokens followed by 26 audio "
        "tokens, and repeat this pattern until the text is complete.",
        needs_text=True,
    ),
    "text_chat": TttTask(
        "You are a text-to-audio chat model. The user will provide you with a text input. Your task is to respond in "
        "an interleaved format: generate 13 text tokens followed by 26 audio tokens, and repeat this pattern until the "
        "response is complete.",
        needs_text=True,
    ),
}


def default_system_prompts(text_chunk_size: int = 13, audio_chunk_size: int = 26) -> dict[str, str]:
    """System prompt by task; those that name the sizes of the chunks name these."""
    published, ours = (
        f"{text} text tokens followed by {audio} audio tokens"
        for text, audio in ((13, 26), (text_chunk_size, audio_chunk_size))
    )
    return {name: task.system_prompt.replace(published, ours) for name, task in TASKS.items()}


def check_messages(messages: Sequence[Any], name: str) -> None:
    """Raises a ValueError that says which message of the conversation `name` does not have the form of one."""
    if not messages:
        raise ValueError(f"{name} has no messages.")
    for position, message in enumerate(messages):
        where = f"message {position} of {name}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"{where} must be a mapping with `role` and `content`, got {message!r}.")
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"{where} has `content` {content!r}; it must be a string or a list of parts.")
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in ("text", "audio"):
                kind = repr(part.get("type")) if isinstance(part, dict) else f"none, {part!r}"
                raise ValueError(f"{where} has a part of type {kind}; it must be a mapping of type 'text' or 'audio'.")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"{where} has a text part without a string under `text`.")


def audio_parts(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The audio parts of a conversation, in order."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part["type"] == "audio")
