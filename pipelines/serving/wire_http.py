"""The bodies of HTTP requests, as OpenAI's clients write them. A field that has no meaning here is refused by name;
those that clients send by habit are listed with the only values that mean nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from .errors import ApiError
from .options import Speed, TttOptions, Voice
from .schema import Text, Wire, nothing
from .sound import FORMATS_WRITTEN

SPOKEN_FORMATS = ("wav", "flac", "pcm16")  # of chats: OpenAI's name for bare PCM is another one there than in speech
Name = Annotated[str, Field(max_length=256)]
Tokens = Annotated[int, Field(ge=1, le=100_000)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0)]
TopP = Annotated[float, Field(gt=0.0, le=1.0)]
# Another is refused by the endpoint, which says so with a code of its own.
Format = Annotated[Name, Field(json_schema_extra={"enum": list(FORMATS_WRITTEN)})]
ChatFormat = Annotated[Name, Field(json_schema_extra={"enum": list(SPOKEN_FORMATS)})]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Zero = Annotated[float, Field(ge=0.0, le=0.0)]
EmptyList = Annotated[list[Any], BeforeValidator(nothing)]


class SpeechRequest(Wire):
    """The body of `POST /v1/audio/speech`."""

    input: Text
    model: Name
    voice: Voice = "default"
    response_format: Format = "wav"
    stream_format: Literal["audio", "sse"] = "audio"
    speed: Speed | None = None
    ttt: TttOptions = Field(default_factory=TttOptions)


class TextPart(Wire):
    """A text in a message."""

    type: Literal["text"]
    text: Text


class InputAudio(Wire):
    """A sound file in base64."""

    data: str
    format: Literal["wav", "flac", "mp3", "ogg"]


class AudioPart(Wire):
    """Sound in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class EarlierAudio(Wire):
    """An earlier answer, by its id."""

    id: Name


class SystemMessage(Wire):
    """How the model is to answer."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Field(max_length=64)]
    name: Name | None = None


class UserMessage(Wire):
    """What the user says or writes."""

    role: Literal["user"]
    content: Text | Annotated[list[Part], Field(max_length=64)]
    name: Name | None = None


class AssistantMessage(Wire):
    """What the model answered before: a text, or an answer of this server by `audio.id`. Fields that an answer of this
    server has, and which are empty in it, may stay."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=64)] | None = None
    audio: EarlierAudio | None = None
    name: Name | None = None
    refusal: None = None
    annotations: EmptyList | None = None
    tool_calls: EmptyList | None = None
    function_call: None = None

    @field_validator("audio", mode="before")
    @classmethod
    def _only_its_id(cls, audio: Any) -> Any:
        """An answer may be sent back as it came, with its data and transcript."""
        known = {"id", "data", "transcript", "expires_at"}
        return {"id": audio["id"]} if isinstance(audio, dict) and "id" in audio and set(audio) <= known else audio


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class AudioOutput(Wire):
    """What a spoken answer is to sound like."""

    voice: Voice
    format: ChatFormat


class StreamOptions(Wire):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Wire):
    """The one form of an answer's text that there is."""

    type: Literal["text"]


class ChatRequest(Wire):
    """The body of `POST /v1/chat/completions`. From `frequency_penalty` on: what clients send by habit, with the values
    that mean nothing."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=2)] | None = None
    audio: AudioOutput | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    user: Name | None = None
    ttt: TttOptions = Field(default_factory=TttOptions)
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    service_tier: Literal["auto", "default"] | None = None
    stop: EmptyList | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    tools: EmptyList | None = None

    @property
    def speaks(self) -> bool:
        """Whether the answer is spoken, too."""
        return self.modalities is not None and "audio" in self.modalities

    def check(self) -> None:
        """
        Check what no field tells alone.

        Raises:
            ApiError: if fields do not go together.
        """
        if self.speaks and self.audio is None:
            raise ApiError(
                "Missing required parameter: 'audio', with 'voice' and 'format', where 'modalities' has \"audio\".",
                code="missing_required_parameter",
                param="audio",
            )
        if self.audio is not None and not self.speaks:
            message = "'audio' is given, but 'modalities' has no \"audio\". Add it there, or leave 'audio' out."
            raise ApiError(message, code="invalid_value", param="modalities")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(
                "'max_tokens' is the older name of 'max_completion_tokens'; send one of them.",
                code="invalid_value",
                param="max_tokens",
            )
        for name, ours in (
            ("max_tokens", "max_new_tokens"),
            ("max_completion_tokens", "max_new_tokens"),
            ("seed", "seed"),
        ):
            if getattr(self, name) is not None and getattr(self.ttt, ours) is not None:
                message = f"'{name}' and 'ttt.{ours}' are two names of one option; send one of them."
                raise ApiError(message, code="invalid_value", param=f"ttt.{ours}")
        if self.stream_options is not None and not self.stream:
            raise ApiError("'stream_options' goes with 'stream'.", code="invalid_value", param="stream_options")


class TranscriptionFields(Wire):
    """The fields of `POST /v1/audio/transcriptions` beside the file."""

    model: Name
    response_format: Literal["json", "text"] = "json"
    prompt: Text | None = None
    language: Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]+)*$", max_length=35)] | None = None
    stream: bool = False
    temperature: Temperature | None = None
