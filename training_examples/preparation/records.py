"""Records to conversations and documents: what each task takes from a record's columns, and the published forms
(`messages`, `conversations`, `text`). Audio stays as the source has it; nothing here encodes or tokenises."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of tasks and fields are asked for before PyTorch is loaded
    from processing import TttProcessor
    from processing.tasks_ttt import TttTask

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PUBLISHED_COLUMNS = ("messages", "conversations", "prompt", "text")
CONTINUATION = "continuation"
PUBLISHED = "published"
_CODE = re.compile(r"<\|audio_(\d+)\|>")
_TOKEN_LIKE = re.compile(r"<\|\w+\|>")


class RejectedError(ValueError):
    """A record that gives no example, for a reason of one of a few kinds (counted in the summary)."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Recipe:
    """What a task takes from a record: the fields that `text` and `audio` of the user's turn and text (`answer`) and
    `speech` of the answer come from. `prompt` is the processor's task whose system prompt it has. Tasks with a
    `question` put it, or the record's own `instruction`, before the audio."""

    prompt: str
    text: str | None = None
    audio: str | None = None
    answer: str = "answer"
    speech: str = "answer_audio"
    speech_needed: bool = False
    question: str | None = None


# Classification is an instruction on audio, as captioning is, and has its published system prompt.
RECIPES = {
    "asr": Recipe("asr", audio="audio", answer="text", speech="audio"),
    "tts": Recipe("tts", text="text", answer="text", speech="audio", speech_needed=True),
    "spoken_chat": Recipe("spoken_chat", audio="audio"),
    "spoken_qa": Recipe("spoken_qa", audio="audio"),
    "text_chat": Recipe("text_chat", text="text"),
    "captioning": Recipe("captioning", audio="audio", question="Describe this audio."),
    "emotion": Recipe("captioning", audio="audio", question="Which emotion does the speaker express?"),
    "scene": Recipe("captioning", audio="audio", question="Where was this audio recorded?"),
}
TASK_NAMES = (*RECIPES, CONTINUATION)


def recipe_of(name: str, task: "TttTask") -> Recipe:
    """Return what a task of the processor's own takes: what its requests need, and an answer, spoken where there is
    speech. One that needs neither audio nor text is asked in text."""
    question = task.default_text if task.needs_audio else None
    reads_text = question is None and (task.needs_text or not task.needs_audio)
    return Recipe(
        name, text="text" if reads_text else None, audio="audio" if task.needs_audio else None, question=question
    )


FIELDS = ("audio", "text", "answer", "answer_audio", "instruction", "group")


@dataclass
class Draft:
    """
    An example before its audio is encoded. `audios` holds the audio as the source has it, by column.

    Either a conversation (`messages`, whose audio parts name a column), a `document` in the published form, or one
    utterance of a recording (its text in `document`, its only audio); records of one recording share `group`. `spoken`
    has the text of an audio where it is known.
    """

    task: str
    messages: list[dict[str, Any]] | None = None
    document: str = ""
    audios: dict[str, Any] = field(default_factory=dict)
    group: Any = None
    spoken: dict[str, str] = field(default_factory=dict)


class RecordReader:
    """
    Turns records into drafts.

    Args:
        processor (`TttProcessor`): knows the system prompts and which strings are tokens.
        tasks (`Sequence[str]`): of `TASK_NAMES` or the processor's own; empty for records in a published form.
        columns (`Mapping[str, str]`, *optional*): column by field (`FIELDS`) or `task.field`; a field's own name where
            none is given.
        questions (`Mapping[str, str]`, *optional*): instruction by task, replacing the recipes' own.
        asr_speech (`bool`, *optional*, defaults to `True`): answer speech recognition with the heard codes after the
            text, as published.
    """

    def __init__(
        self,
        processor: "TttProcessor",
        tasks: Sequence[str] = (),
        columns: Mapping[str, str] | None = None,
        questions: Mapping[str, str] | None = None,
        asr_speech: bool = True,
    ):
        self.processor = processor
        self.tasks = tuple(tasks)
        self.columns = dict(columns or {})
        self.questions = dict(questions or {})
        self.asr_speech = asr_speech
        self.tokens = set(processor.tokenizer.get_added_vocab())
        own = [name for name in processor.tasks if name not in RECIPES]
        self.recipes = RECIPES | {name: recipe_of(name, processor.get_task(name)) for name in own}
        for task in self.tasks:
            if task not in self.recipes and task != CONTINUATION:
                names = ", ".join((*TASK_NAMES, *own))
                raise ValueError(f"`--tasks`: there is no task {task!r}; choose from {names}.")
        for name in self.columns:
            task, _, field_name = name.rpartition(".")
            if field_name not in FIELDS or (task and task not in self.tasks):
                raise ValueError(
                    f"`--columns` {name}=...: give FIELD=COLUMN or TASK.FIELD=COLUMN with a field of "
                    f"{', '.join(FIELDS)} and one of the chosen tasks."
                )
        for task in self.questions:
            if task not in self.tasks or task == CONTINUATION or self.recipes[task].question is None:
                raise ValueError(f"`--questions` {task}=...: this is none of the chosen tasks that ask a question.")

    def check_columns(self, source: str, available: Sequence[str]) -> None:
        """Raise a ValueError that names a column which is needed and not there."""
        if not self.tasks:
            if not set(PUBLISHED_COLUMNS) & set(available):
                raise ValueError(
                    f"{source} has the columns {', '.join(available)}. Without `--tasks` it needs one of "
                    f"{', '.join(PUBLISHED_COLUMNS)}."
                )
            if "audio" in available and not {"messages", "conversations", "prompt"} & set(available):
                raise ValueError(f"{source} has audio with its text: say with `--tasks` what to make of them.")
            return
        for task in self.tasks:
            named = {key.rpartition(".")[2] for key in self.columns if key.rpartition(".")[0] in ("", task)}
            for name in sorted(self._needed(task) | (named & self._used(task))):
                if self._column(task, name) not in available:
                    raise ValueError(
                        f"The task {task!r} reads `{name}` from the column `{self._column(task, name)}`, but {source} "
                        f"has {', '.join(available)}. Name the right one with `--columns {name}=COLUMN`."
                    )

    def drafts(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Draft | RejectedError]]:
        """Yield for each task its name, and the draft or why there is none."""
        for task in self.tasks or (PUBLISHED,):
            try:
                draft = self._published(record) if task == PUBLISHED else self._draft(record, task)
                yield draft.task, draft
            except RejectedError as error:
                yield task, error

    # ------------------------------------------------------------------ tasks

    def _used(self, task: str) -> set[str]:
        if task == CONTINUATION:
            return {"text", "audio", "group"}
        recipe = self.recipes[task]
        instruction = "instruction" if recipe.question is not None else None
        return {n for n in (recipe.text, recipe.audio, recipe.answer, recipe.speech, instruction) if n is not None}

    def _needed(self, task: str) -> set[str]:
        if task == CONTINUATION:
            return {"text", "audio"}
        optional = set() if self.recipes[task].speech_needed else {"answer_audio"}
        return self._used(task) - optional - {"instruction"}

    def _column(self, task: str, name: str) -> str:
        return self.columns.get(f"{task}.{name}") or self.columns.get(name) or name

    def _draft(self, record: Mapping[str, Any], task: str) -> Draft:
        draft = Draft(task)
        if task == CONTINUATION:
            draft.document = self._text(record, task, "text")
            draft.group = record.get(self._column(task, "group"))
            draft.spoken[self._add_audio(draft, record, "audio")] = draft.document
            return draft
        recipe = self.recipes[task]
        heard = self._add_audio(draft, record, recipe.audio) if recipe.audio else None
        text = None
        if recipe.question is not None:
            given = record.get(self._column(task, "instruction"))
            question = self.questions.get(task, recipe.question)
            text = question if given is None else self._text(record, task, "instruction")
        elif recipe.text is not None:
            text = self._text(record, task, recipe.text)
        said = self._text(record, task, recipe.answer)
        answer: list[dict[str, Any]] = [{"type": "text", "text": said}]
        speech = recipe.speech if task != "asr" or self.asr_speech else None
        if speech and (recipe.speech_needed or record.get(self._column(task, speech)) is not None):
            answer.append({"type": "audio", "audio": self._add_audio(draft, record, speech)})
        if self._column(task, recipe.speech) in draft.audios and (speech or task == "asr"):
            draft.spoken[self._column(task, recipe.speech)] = said
        request = self.processor.build_messages(recipe.prompt, text=text, audio=heard)
        draft.messages = [*request, {"role": "assistant", "content": answer}]
        return draft

    def _add_audio(self, draft: Draft, record: Mapping[str, Any], name: str) -> str:
        """Put a field's audio into the draft; return its column."""
        column = self._column(draft.task, name)
        if record.get(column) is None:
            raise RejectedError("no audio", f"`{column}` is empty")
        draft.audios[column] = record[column]
        return column

    def _text(self, record: Mapping[str, Any], task: str, name: str) -> str:
        value = record.get(self._column(task, name))
        if not isinstance(value, str) or not value.strip():
            raise RejectedError("no text", f"`{self._column(task, name)}` is {value!r}, not a text")
        for token in _TOKEN_LIKE.findall(value):
            if token in self.tokens:
                raise RejectedError("token in text", f"`{self._column(task, name)}` holds the token {token}")
        return value.strip()

    # ------------------------------------------------------------------ published forms

    def _published(self, record: Mapping[str, Any]) -> Draft:
        task = record.get("task")
        for column in ("messages", "conversations"):
            if record.get(column) is not None:
                draft = Draft(task or "conversation")
                draft.messages = [self._message(m, draft, column) for m in _parsed(record[column], column)]
                if not draft.messages:
                    raise RejectedError("malformed", f"`{column}` is empty")
                if draft.messages[-1]["role"] != "assistant":
                    raise RejectedError("malformed", f"`{column}` ends with the {draft.messages[-1]['role']}")
                return draft
        if record.get("prompt") is not None and record.get("response") is not None:
            pairs = (("user", record["prompt"]), ("assistant", record["response"]))
            draft = Draft(task or "conversation")
            draft.messages = [self._message({"role": role, "content": text}, draft, role) for role, text in pairs]
            return draft
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise RejectedError("malformed", f"none of {', '.join(PUBLISHED_COLUMNS)} holds anything")
        self._check_codes(text, "text")
        return Draft(task or "document", document=text)

    def _message(self, message: Any, draft: Draft, column: str) -> dict[str, Any]:
        """
        Return one turn, whose content is a string with `<|audio_N|>` tokens or a list of parts with audio to encode.
        """
        if not isinstance(message, Mapping):
            raise RejectedError("malformed", f"`{column}` holds {message!r}, not a turn")
        role = message.get("role") or message.get("from")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if role not in ROLES:
            raise RejectedError("malformed", f"`{column}` has a turn of {role!r}; known are {', '.join(ROLES)}")
        if isinstance(content, str):
            self._check_codes(content, column)
            return {"role": ROLES[role], "content": content}
        if not isinstance(content, list):
            raise RejectedError("malformed", f"`{column}` has a turn whose content is {content!r}")
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "audio":
                parts.append(part)  # the processor checks its form
                continue
            audio = next((part[key] for key in ("audio", "path", "url") if part.get(key) is not None), None)
            if audio is None:
                raise RejectedError("no audio", f"`{column}` has an audio part without `audio`, `path` or `url`")
            parts.append({"type": "audio", "audio": f"{column} {len(draft.audios)}"})
            draft.audios[parts[-1]["audio"]] = audio
        return {"role": ROLES[role], "content": parts}

    def _check_codes(self, text: str, column: str) -> None:
        """Reject codes beyond the codebook, which are no tokens: the tokenizer would read them as text."""
        number = max(map(int, _CODE.findall(text)), default=0)
        if number >= self.processor.token_ids.num_audio_codes:
            raise RejectedError(
                "unknown code",
                f"`{column}` holds <|audio_{number}|>, but the codebook has {self.processor.token_ids.num_audio_codes} "
                "codes",
            )


def _parsed(value: Any, column: str) -> list[Any]:
    """Return turns, which Parquet files may hold as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RejectedError("malformed", f"`{column}` is text that is not JSON ({error})") from error
    if not isinstance(value, list):
        raise RejectedError("malformed", f"`{column}` is {value!r}, not a list of turns")
    return value
