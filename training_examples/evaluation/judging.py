"""A language model that judges open answers through an OpenAI-compatible address. Reports have its prompts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training_examples.evaluation.measuring import Measured, of_scorer
from training_examples.evaluation.openai_backend import chat
from training_examples.evaluation.rows import Row, Run

RATE_PROMPT = """You judge the answer of a voice assistant. Rate how helpful, relevant and correct it is for the
question, from 1 (useless) to {highest} (perfect). Spelling and punctuation do not matter: it was spoken.{reference}

Question: {question}
Answer: {answer}

Reply with the number alone."""
AGREE_PROMPT = """You judge whether an answer is right. It was spoken, so spelling and punctuation do not matter, nor do
more words than needed.

Question: {question}
Right answer: {reference}
Given answer: {answer}

Reply with yes or no alone."""


@dataclass(frozen=True)
class Judgement:
    """
    What a judge is asked of every answer.

    Args:
        prompt (`str`): with `{question}`, `{answer}`, `{reference}` and, for ratings, `{highest}`.
        highest (`int`): the best rating; 1 for yes or no.
        title (`str`): of its figure.
    """

    prompt: str
    highest: int
    title: str

    def fill(self, row: Row, answer: str) -> str:
        """Return the prompt for an answer to one row."""
        reference = " or ".join(row["references"])
        if self.highest > 1:
            reference = f"\nA good answer would be: {reference}" if reference else ""
        question = row.get("question") or row.get("asked") or "(spoken, not written down)"
        return self.prompt.format(question=question, answer=answer, reference=reference, highest=self.highest)

    def read(self, reply: str) -> float | None:
        """Return the rating of a reply, None where there is none."""
        if self.highest == 1:
            found = re.search(r"\b(yes|no)\b", reply.lower())
            return None if found is None else float(found[1] == "yes")
        number = re.search(r"\d+(?:\.\d+)?", reply)
        value = None if number is None else float(number[0])
        return value if value is not None and 0 <= value <= self.highest else None


class Judge:
    """A language model at an address, with what it is asked."""

    def __init__(self, address: str, model: str, api_key: str | None, judgement: Judgement):
        self.address, self.model, self.api_key, self.judgement = address, model, api_key, judgement
        self.settings: Mapping[str, Any] = {"address": address, "model": model, "prompt": judgement.prompt}

    def measure(
        self, run: Run, kind: str | None = None, heard: Mapping[str, str] | None = None, by: str = ""
    ) -> list[Measured]:
        """
        Return the mean rating of a run's answers in points of 100; what was judged before is remembered.

        Args:
            run ([`Run`]): whose answers.
            kind (`str`, *optional*): of which rows; all by default.
            heard (`Mapping[str, str]`, *optional*): what a recogniser heard, by id; the written answers by default.
            by (`str`, *optional*): the recogniser's name.
        """

        def rate(row: Row) -> dict[str, Any]:
            return self._rate(row, row["text"] if heard is None else heard[row["id"]])

        def asked(row: Row) -> str:
            return self.judgement.fill(row, row["text"] if heard is None else heard[row["id"]])

        ratings = run.remember(f"judged-{by or 'text'}", {**self.settings, "by": by}, rate, kind, asked)
        rated = {name: entry["rating"] for name, entry in ratings.items() if entry["rating"] is not None}
        if not rated:
            return []
        unread = len(ratings) - len(rated)
        of = f"speech, by {by}" if by else "text"
        place = "/".join(["judged", *(["speech", by] if by else []), *([kind] if kind else [])])
        title = f"{kind + ', ' if kind else ''}{self.judgement.title}, judged by {self.model}, of 100, {of}"
        return [
            of_scorer(
                place,
                title,
                "mean_rating",
                list(rated),
                list(rated.values()),
                [""] * len(rated),
                {"highest": float(self.judgement.highest)},
                f"{unread} replies held no rating" if unread else "",
            )
        ]

    def _rate(self, row: Row, answer: str) -> dict[str, Any]:
        if "error" in row or not answer.strip():
            return {"rating": 0.0, "reply": "no answer"}
        messages = [{"role": "user", "content": self.judgement.fill(row, answer)}]
        message = chat(self.address, {"model": self.model, "messages": messages, "temperature": 0}, self.api_key)
        reply = message.get("content") or ""
        return {"rating": self.judgement.read(reply), "reply": reply}
