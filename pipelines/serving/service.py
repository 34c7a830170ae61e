"""What all endpoints share: the engine, the processor and the limits; prompts from messages, answers from prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .answers import AnswerStore
from .conversation import Rhythm
from .engine import Engine
from .engine_requests import EngineClosed, Generation, GenerationRequest, Overloaded
from .errors import ApiError, draining, overloaded
from .limits import Limits
from .metrics import Metrics
from .options import TttOptions
from .vad import WINDOW, SpeechDetector, silero_probability

ANSWER_SECONDS = 300.0  # the longest an answer may take, queueing included


@dataclass
class Service:
    """
    One model, served.

    Args:
        engine (`Engine`): started.
        processor (`TttProcessor`): the model's.
        model_name (`str`): under which clients ask for it.
        limits (`Limits`, *optional*): on what clients send.
    """

    engine: Engine
    processor: Any
    model_name: str
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.metrics = Metrics(self.engine)
        self.answers = AnswerStore(self.limits.answers, self.limits.answer_seconds)
        self.rhythm = Rhythm.of(self.processor)
        self.sessions: set[Any] = set()  # open Realtime sessions
        self.is_draining = False

    def warm_up(self) -> None:
        """Answer once, and look for speech once, so that no caller waits for what is only done once."""
        features = self.processor(text="hello", task="text_chat")
        rate = self.engine.input_sampling_rate
        codes = self.engine.encode_audio(np.zeros(rate, np.float32), rate).result()
        self.engine.submit(GenerationRequest(features["input_ids"], {"max_new_tokens": 64})).result()
        self.engine.decode_audio(codes[:1]).result()
        SpeechDetector(silero_probability()).push(np.zeros(4 * WINDOW, np.float32))

    def drain(self) -> None:
        """Take in no more requests. What is being answered is finished; Realtime sessions then say goodbye."""
        self.is_draining = True
        for session in self.sessions:
            session.leave()

    def check_model(self, name: str) -> None:
        """
        Refuse a model that is not served.

        Raises:
            ApiError: 404, as OpenAI's.
        """
        if name != self.model_name:
            message = f"The model '{name[:100]}' does not exist; this server has '{self.model_name}'."
            raise ApiError(message, 404, "model_not_found", "model")

    def system_prompt(
        self, task: str | None, instructions: str | None, has_audio: bool, param: str = "ttt.task"
    ) -> str:
        """
        Return the system turn of a conversation: the client's instructions, or else the task's prompt.

        Args:
            task (`str`, *optional*): one of the processor's; by default a conversation, spoken or typed.
            instructions (`str`, *optional*): the client's.
            has_audio (`bool`): whether there is sound in the conversation.
            param (`str`, *optional*): how errors call the task.

        Raises:
            ApiError: if there is no such task, or it is about sound and there is none.
        """
        try:
            default = "spoken_chat" if has_audio else "text_chat"
            settings = self.processor.get_task(default if task is None else task)
        except ValueError as error:
            raise ApiError(str(error), code="invalid_value", param=param) from None
        if settings.needs_audio and not has_audio:
            raise ApiError(f"The task '{task}' needs sound.", code="invalid_value", param=param)
        return instructions or settings.system_prompt

    async def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """
        Return the ids of a conversation whose audio is codes. What looks like a token in its texts is plain text.

        Raises:
            ApiError: if it is none.
        """

        def render() -> list[int]:
            features = self.processor.apply_chat_template(
                list(messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                sanitize_control_tokens=True,
            )
            return features["input_ids"][0].tolist()

        try:
            return await asyncio.to_thread(render)
        except ValueError as error:
            raise ApiError(str(error), code="invalid_value") from None

    async def encode(self, samples: np.ndarray, rate: int, param: str) -> list[int]:
        """
        Return the codes of float32 samples of shape `(samples,)`.

        Raises:
            ApiError: if they cannot be encoded, now or ever.
        """
        try:
            return await asyncio.wrap_future(self.engine.encode_audio(samples, rate))
        except Overloaded as error:
            raise overloaded(error.retry_after) from None
        except EngineClosed:
            raise draining() from None
        except ValueError as error:
            raise ApiError(f"'{param}': {error}", code="invalid_audio", param=param) from None

    def submit(
        self,
        input_ids: list[int],
        options: TttOptions,
        more: dict[str, Any] | None = None,
        session: str | None = None,
        with_audio: bool = True,
        seed: int | None = None,
        param: str | None = None,
    ) -> Generation:
        """
        Hand a prompt to the engine.

        Args:
            input_ids (`list[int]`): the prompt.
            options (`TttOptions`): of generation.
            more (`dict`, *optional*): further options of `generate`, which stand behind those.
            session (`str`, *optional*): whose cache it continues.
            with_audio (`bool`, *optional*, defaults to `True`): otherwise the answer is text alone.
            seed (`int`, *optional*): where the options have none.
            param (`str`, *optional*): the field of the request that is to be shorter where it is too long.

        Raises:
            ApiError: if the queue is full, the server stops, or the prompt or an option cannot be used.
        """
        if self.is_draining:
            raise draining()
        generate_options = {**(more or {}), **options.generate_options()}
        self._check_length(len(input_ids), generate_options.get("max_new_tokens"), param)
        try:
            return self.engine.submit(
                GenerationRequest(
                    input_ids,
                    options=generate_options,
                    seed=seed if options.seed is None else options.seed,
                    deadline=ANSWER_SECONDS,
                    session=session,
                    modalities=("text", "audio") if with_audio else ("text",),
                )
            )
        except Overloaded as error:
            raise overloaded(error.retry_after) from None
        except EngineClosed:
            raise draining() from None
        except (ValueError, TypeError) as error:
            raise ApiError(str(error), code="invalid_value") from None

    def _check_length(self, prompt: int, answer: int | None, param: str | None) -> None:
        """Refuse what is longer than the model's context, in the words of the protocol."""
        most = self.engine.max_context
        if most is None or prompt + (answer or 1) <= most:
            return
        message = f"The request has {prompt} tokens; the model takes {most}, its answer included."
        if prompt < most:
            both = f"{prompt} tokens and its answer may have {answer}"
            message = f"The request has {both}; the model takes {most} together."
        raise ApiError(message, code="context_length_exceeded", param=param)

    def num_codes(self, ids: Sequence[int]) -> int:
        """Return how many of some ids are audio codes."""
        return sum(map(self.processor.token_ids.is_code, ids))

    async def events(self, generation: Generation) -> AsyncIterator[Any]:
        """Yield the events of an answer, counted; whoever leaves early cancels it."""
        watch = self.metrics.watch(self.engine.sampling_rate)
        try:
            async for event in generation:
                watch.see(event)
                yield event
        finally:
            generation.cancel()
            watch.end()


def failure(finished: Any) -> ApiError | None:
    """Return what a client is told of an answer that ended otherwise than it should; `None` where it is well."""
    if finished.reason in ("stop", "length"):
        return None
    if finished.reason == "deadline":
        return ApiError(f"The answer took longer than {ANSWER_SECONDS:g} s.", 503, "deadline_exceeded", retry_after=5.0)
    if finished.reason == "cancelled":
        return draining()
    return ApiError("The answer failed; the server's log has the reason.", 500, "generation_failed")
