"""Answers of chat completions that a later request may name by `audio.id`: bounded in time and number. A store that
replicas share is in ray_app.py."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from .conversation import new_id
from .errors import ApiError


@dataclass(frozen=True)
class Answer:
    """
    What was said.

    Args:
        id (`str`): under which it is kept.
        text (`str`): its text.
        codes (`tuple[int, ...]`): its speech.
        expires_at (`int`): seconds since 1970.
    """

    id: str
    text: str
    codes: tuple[int, ...]
    expires_at: int


class AnswerStore:
    """
    Keep answers for some time; of too many, the oldest goes first.

    Args:
        most (`int`): answers kept.
        seconds (`float`): how long each is.
        clock (`Callable[[], float]`, *optional*): seconds since 1970.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.time):
        self.most, self.seconds, self.clock = most, seconds, clock
        self._answers: OrderedDict[str, Answer] = OrderedDict()

    def reserve(self) -> tuple[str, int]:
        """Return the id an answer will have, and when it expires, before it is complete."""
        return new_id("audio"), int(self.clock() + self.seconds)

    async def keep(self, answer: Answer) -> None:
        """Keep an answer."""
        self._drop_expired()
        self._answers[answer.id] = answer
        while len(self._answers) > self.most:
            self._answers.popitem(last=False)

    async def find(self, answer_id: str) -> Answer | None:
        """Return an answer, or None if there is none, or none any more."""
        self._drop_expired()
        return self._answers.get(answer_id)

    async def get(self, answer_id: str, param: str) -> Answer:
        """
        Return an answer.

        Raises:
            ApiError: 404, if there is none, or none any more.
        """
        answer = await self.find(answer_id)
        if answer is None:
            message = (
                f"There is no answer '{answer_id[:100]}' here: it has expired, or another server gave it. Send its "
                "text as the message's content instead."
            )
            raise ApiError(message, 404, "audio_not_found", param)
        return answer

    def _drop_expired(self) -> None:
        now = self.clock()
        for answer_id in [key for key, answer in self._answers.items() if answer.expires_at <= now]:
            del self._answers[answer_id]
