"""The client's events and the settings of a Realtime session, as OpenAI's clients write them. What has no meaning here
is refused by name; what clients send by habit is taken with the values that mean nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .conversation import Item, Part, Role, new_id
from .errors import ApiError
from .options import Speed, TttOptions, Voice
from .schema import Text, Wire, nothing
from .sound import WIRE_RATE


def number_or_inf(value: Any) -> Any:
    """
    Take a number of tokens, or the word for any number.

    Raises:
        ValueError: for anything else.
    """
    if value is not None and value != "inf" and type(value) is not int:
        raise ValueError('use a whole number of tokens, or "inf"')
    return value


Id = Annotated[str, Field(min_length=1, max_length=64)]
Name = Annotated[str, Field(max_length=256)]
Modalities = Annotated[list[Literal["audio", "text"]], Field(min_length=1, max_length=1)]
MostTokens = Annotated[Annotated[int, Field(ge=1, le=100_000)] | Literal["inf"] | None, BeforeValidator(number_or_inf)]
EmptyList = Annotated[list[Any], BeforeValidator(nothing)] | None
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Milliseconds = Annotated[int, Field(ge=0, le=3_600_000)]
# How long a silence ends a turn where a client leaves it to the server's understanding of speech.
EAGERNESS = {"low": 1000, "medium": 500, "auto": 500, "high": 300}


class PcmFormat(Wire):
    """Sound as it is sent: PCM16, little-endian, mono, 24 kHz."""

    type: Literal["audio/pcm"]
    rate: Literal[24000] = 24000  # WIRE_RATE


class Transcription(Wire):
    """That what the user says is to be written down. The model does it itself, whatever model is named."""

    model: Name | None = None
    language: Annotated[str, Field(max_length=35)] | None = None
    prompt: Text | None = None


class ServerVad(Wire):
    """Turns found by Silero VAD."""

    type: Literal["server_vad"] = "server_vad"
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=5000)] = 300
    silence_duration_ms: Annotated[int, Field(ge=32, le=10_000)] = 500
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: Annotated[int, Field(ge=1000, le=600_000)] | None = None


class SemanticVad(Wire):
    """The same, where the length of the silence is told in words. openai-agents asks for it by default."""

    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True

    def as_server_vad(self) -> ServerVad:
        """Return what it comes to here."""
        return ServerVad(
            silence_duration_ms=EAGERNESS[self.eagerness],
            create_response=self.create_response,
            interrupt_response=self.interrupt_response,
        )


TurnDetection = Annotated[ServerVad | SemanticVad, Field(discriminator="type")]


class AudioInput(Wire):
    """What the user's sound is, and what is done with it."""

    format: PcmFormat | None = None
    noise_reduction: None = None
    transcription: Transcription | None = None
    turn_detection: TurnDetection | None = None


class AudioOutput(Wire):
    """What the answer's sound is."""

    format: PcmFormat | None = None
    voice: Voice | None = None
    speed: Speed | None = None


class Audio(Wire):
    """Both directions."""

    input: AudioInput | None = None
    output: AudioOutput | None = None


class SessionUpdate(Wire):
    """The settings a `session.update` changes: those it names."""

    type: Literal["realtime"] = "realtime"
    model: Name | None = None  # clients repeat the name of a model of OpenAI's; the session's own stays
    instructions: Text | None = None
    output_modalities: Modalities | None = None
    max_output_tokens: MostTokens = None
    audio: Audio | None = None
    tools: EmptyList = None
    tool_choice: Literal["auto", "none"] | None = None
    tracing: Literal["auto"] | dict[str, Any] | None = None  # openai-agents asks for it by default; nothing is traced
    truncation: Literal["auto", "disabled"] | None = None
    include: EmptyList = None
    ttt: TttOptions | None = None


class Content(Wire):
    """A part of an item that a client writes."""

    type: Literal["input_text", "input_audio", "output_text", "output_audio", "text", "audio"]
    text: Text | None = None
    audio: str | None = None
    transcript: Text | None = None


class ItemIn(Wire):
    """An item that a client writes."""

    type: Literal["message"]
    role: Role
    content: Annotated[list[Content], Field(min_length=1, max_length=64)]
    id: Id | None = None
    object: Literal["realtime.item"] | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None  # the last is completed with this event

    def item(self, param: str) -> Item:
        """
        Return the item; its audio is still to be decoded.

        Raises:
            ApiError: if a part is none of its role's, is empty, or has fields of another kind of part.
        """
        parts = [self._part(content, f"{param}.content[{index}]") for index, content in enumerate(self.content)]
        status = "incomplete" if self.status == "incomplete" else "completed"
        return Item(self.role, parts, status, self.id or new_id("item"))

    def _part(self, content: Content, param: str) -> Part:
        answers = self.role == "assistant"
        kinds = {"text": "output_text" if answers else "input_text", "audio": "output_audio"}
        kind = kinds.get(content.type, content.type) if answers else content.type.replace("text", "input_text", 1)
        kind = kind.replace("input_input_", "input_")
        allowed = {"user": ("input_text", "input_audio"), "system": ("input_text",)}
        if kind not in allowed.get(self.role, ("output_text", "output_audio")):
            message = f"A message of role '{self.role}' has no part of type '{content.type}'."
            raise ApiError(message, code="invalid_value", param=f"{param}.type")
        taken = {"input_audio": ("audio", "transcript"), "output_audio": ("transcript", "audio")}.get(kind, ("text",))
        for name in ("text", "audio", "transcript"):
            where, is_given = f"{param}.{name}", getattr(content, name) is not None
            if name == taken[0] and not is_given:
                message = f"Missing required parameter: '{where}'."
                raise ApiError(message, code="missing_required_parameter", param=where)
            if is_given and name not in taken:
                message = f"Unknown parameter: '{where}'. A part of type '{content.type}' has none; leave it out."
                raise ApiError(message, code="unknown_parameter", param=where)
        return Part(kind, content.transcript if kind.endswith("audio") else content.text)


class ItemReference(Wire):
    """An item of the conversation, by its id."""

    type: Literal["item_reference"]
    id: Id


class ResponseParams(Wire):
    """What one response is to be, where it differs from the session's settings."""

    conversation: Literal["auto", "none"] | None = None
    instructions: Text | None = None
    input: (
        Annotated[list[Annotated[ItemIn | ItemReference, Field(discriminator="type")]], Field(max_length=256)] | None
    ) = None
    output_modalities: Modalities | None = None
    max_output_tokens: MostTokens = None
    metadata: Metadata | None = None
    audio: Audio | None = None
    tools: EmptyList = None
    tool_choice: Literal["auto", "none"] | None = None
    ttt: TttOptions | None = None


class ClientEvent(Wire):
    """What all events have."""

    type: str
    event_id: Annotated[str, Field(max_length=512)] | None = None


class SessionUpdateEvent(ClientEvent):
    """`session.update`"""

    session: SessionUpdate


class AppendEvent(ClientEvent):
    """`input_audio_buffer.append`"""

    audio: str


class PlainEvent(ClientEvent):
    """`input_audio_buffer.commit`, `input_audio_buffer.clear`"""


class ItemCreateEvent(ClientEvent):
    """`conversation.item.create`"""

    item: ItemIn
    previous_item_id: Id | None = None


class ItemEvent(ClientEvent):
    """`conversation.item.delete`, `conversation.item.retrieve`"""

    item_id: Id


class ItemTruncateEvent(ClientEvent):
    """`conversation.item.truncate`"""

    item_id: Id
    content_index: Annotated[int, Field(ge=0)]
    audio_end_ms: Milliseconds


class ResponseCreateEvent(ClientEvent):
    """`response.create`"""

    response: ResponseParams | None = None


class ResponseCancelEvent(ClientEvent):
    """`response.cancel`"""

    response_id: Id | None = None


CLIENT_EVENTS: dict[str, type[ClientEvent]] = {
    "session.update": SessionUpdateEvent,
    "input_audio_buffer.append": AppendEvent,
    "input_audio_buffer.commit": PlainEvent,
    "input_audio_buffer.clear": PlainEvent,
    "conversation.item.create": ItemCreateEvent,
    "conversation.item.delete": ItemEvent,
    "conversation.item.retrieve": ItemEvent,
    "conversation.item.truncate": ItemTruncateEvent,
    "response.create": ResponseCreateEvent,
    "response.cancel": ResponseCancelEvent,
}


class Settings:
    """
    The settings of a session, as they are in force.

    Args:
        model (`str`): the one that is served.
    """

    def __init__(self, model: str):
        self.model = model
        self.instructions: str = ""
        self.output_modalities: list[str] = ["audio"]
        self.max_output_tokens: int | str = "inf"
        self.transcription: Transcription | None = None
        self.turn_detection: ServerVad | SemanticVad | None = ServerVad()
        self.voice: Voice = "default"
        self.truncation = "auto"
        self.ttt = TttOptions()

    @property
    def vad(self) -> ServerVad | None:
        """How turns are found; `None` where the client commits them."""
        found = self.turn_detection
        return found.as_server_vad() if isinstance(found, SemanticVad) else found

    def update(self, changes: SessionUpdate) -> None:
        """Take what a `session.update` names."""
        audio = changes.audio or Audio()
        named = changes.model_fields_set
        if "instructions" in named:
            self.instructions = changes.instructions or ""
        if changes.output_modalities is not None:
            self.output_modalities = list(changes.output_modalities)
        if "max_output_tokens" in named:
            self.max_output_tokens = changes.max_output_tokens or "inf"
        if changes.truncation is not None:
            self.truncation = changes.truncation
        if audio.output is not None and audio.output.voice is not None:
            self.voice = audio.output.voice
        if audio.input is not None and "transcription" in audio.input.model_fields_set:
            self.transcription = audio.input.transcription
        if audio.input is not None and "turn_detection" in audio.input.model_fields_set:
            self.turn_detection = audio.input.turn_detection
        self.ttt = self.ttt.updated(changes.ttt)

    def wire(self, session_id: str, expires_at: int) -> dict[str, Any]:
        """Return the session as clients read it."""
        sound = {"type": "audio/pcm", "rate": WIRE_RATE}
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": self.model,
            "instructions": self.instructions,
            "output_modalities": self.output_modalities,
            "max_output_tokens": self.max_output_tokens,
            "audio": {
                "input": {
                    "format": sound,
                    "noise_reduction": None,
                    "transcription": self.transcription.model_dump() if self.transcription is not None else None,
                    "turn_detection": self.turn_detection.model_dump() if self.turn_detection is not None else None,
                },
                "output": {"format": sound, "voice": self.voice, "speed": 1.0},
            },
            "tools": [],
            "tool_choice": "auto",
            "tracing": None,
            "truncation": self.truncation,
            "include": None,
            "expires_at": expires_at,
            "ttt": self.ttt.model_dump(exclude_none=True),
        }
