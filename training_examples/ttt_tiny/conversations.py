"""Which conversations ttt-tiny learns from: rows of encoded speech become messages of one, two and three turns, spoken
and typed. How speech becomes codes is the business of build_examples.py."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from training_examples.ttt_tiny import domain

Messages = list[dict]
Row = Mapping[str, Any]


@dataclass
class MixtureArguments:
    text_share: float = field(default=0.15, metadata={"help": "Share of the questions that are also asked in text."})
    turns_share: float = field(
        default=0.25, metadata={"help": "Conversations of two or three turns, as a share of the questions."}
    )
    not_heard_share: float = field(
        default=0.06, metadata={"help": "Share of the turns of such conversations in which nobody speaks."}
    )
    typed_share: float = field(default=0.4, metadata={"help": "Share of their other turns that are typed."})
    tts_copies: int = field(default=2, metadata={"help": "How often each assistant sentence is read aloud."})
    shifted_share: float = field(
        default=0.5, metadata={"help": "Share of the spoken answers that begin elsewhere within their first code."}
    )


def versions(row: Row) -> list[list[int]]:
    """Return the codes of all recordings of what the row says, the plain one first."""
    return [row["codes"], *row.get("other_codes", ())]


def user(row: Row, codes: Sequence[int] | None) -> dict:
    """Return a user's message: speech, or the row's text if `codes` is None."""
    part = {"type": "text", "text": row["text"]} if codes is None else {"type": "audio", "audio_codes": list(codes)}
    return {"role": "user", "content": [part]}


def assistant(text: str, codes: Sequence[int] | None) -> dict:
    """Return the assistant's message: text and, unless `codes` is None, speech."""
    content: list[dict] = [{"type": "text", "text": text}]
    if codes is not None:
        content.append({"type": "audio", "audio_codes": list(codes)})
    return {"role": "assistant", "content": content}


class Mixture:
    """
    Draws conversations from rows of encoded speech.

    Args:
        rows (`Mapping[str, Sequence[Row]]`): `assistant` (`text`, `codes`); `questions` (`text`, `answer`, `kind`,
            `codes`); *optionally* `spliced` (`text`, `codes`: dictations spliced of single words) and `sounds`
            (`codes`: nobody speaks). `other_codes`, where a row has some, are other versions of the same speech:
            questions as if recorded somewhere, the assistant's sentences begun elsewhere within their first code.
        args (`MixtureArguments`): how often each kind occurs.
        rng (`random.Random`): the source of chance.
    """

    def __init__(self, rows: Mapping[str, Sequence[Row]], args: MixtureArguments, rng: random.Random):
        self.rows, self.args, self.rng = rows, args, rng
        self.spoken = {row["text"]: versions(row) for row in rows["assistant"]}
        # While speech is still being made, some answers may be missing.
        self.questions = [row for row in rows["questions"] if row["answer"] in self.spoken]

    def conversations(self) -> list[tuple[str, Messages]]:
        """Return all conversations as (task, messages), with codes in place of audio, in random order."""
        found = [*self.single_turns(), *self.dictations(), *self.readings()]
        for _ in range(round(self.args.turns_share * len(self.questions))):
            found.append(("spoken_qa", self.several_turns(2 if self.rng.random() < 0.65 else 3)))
        self.rng.shuffle(found)
        return found

    def single_turns(self) -> list[tuple[str, Messages]]:
        """Return every question spoken, clean and recorded; some of them typed; every sound in which nobody speaks."""
        found = []
        for row in self.questions:
            found += [("spoken_qa", [user(row, codes), self.answer(row["answer"])]) for codes in versions(row)]
            if self.rng.random() < self.args.text_share:
                found.append(("text_chat", [user(row, None), self.answer(row["answer"])]))
        if domain.NOT_HEARD in self.spoken:
            for row in self.rows.get("sounds", ()):
                found.append(("spoken_qa", [user(row, row["codes"]), self.answer(domain.NOT_HEARD)]))
        return found

    def several_turns(self, turns: int) -> Messages:
        """Return independent turns, each spoken, typed, or a sound in which nobody speaks."""
        messages = []
        sounds = self.rows.get("sounds", ()) if domain.NOT_HEARD in self.spoken else ()
        for _ in range(turns):
            if sounds and self.rng.random() < self.args.not_heard_share:
                messages += [user({}, self.rng.choice(sounds)["codes"]), self.answer(domain.NOT_HEARD)]
                continue
            row = self.rng.choice(self.questions)
            typed = self.rng.random() < self.args.typed_share
            messages += [user(row, None if typed else self.rng.choice(versions(row))), self.answer(row["answer"])]
        return messages

    def dictations(self) -> list[tuple[str, Messages]]:
        """
        Return speech to take down: questions once, what is nothing but a dictation in all versions, and splices.
        Other people's sentences are left out: their words are none of the domain.
        """
        found = []
        for row in self.rows["questions"]:
            if row["kind"] == "other":
                continue
            heard = versions(row) if row["answer"] is None else [self.rng.choice(versions(row))]
            found += [("asr", [user(row, codes), assistant(row["text"], None)]) for codes in heard]
        for row in self.rows.get("spliced", ()):
            found.append(("asr", [user(row, row["codes"]), assistant(row["text"], None)]))
        return found

    def readings(self) -> list[tuple[str, Messages]]:
        """Return texts to read aloud, `tts_copies` times each: in all versions, one after the other."""
        return [
            ("tts", [user(row, None), assistant(row["text"], codes)])
            for row in self.rows["assistant"]
            for codes in islice(cycle(versions(row)), self.args.tts_copies)
        ]

    def answer(self, text: str) -> dict:
        """Return the assistant's message that says `text`."""
        plain, *shifted = self.spoken[text]
        other = shifted and self.rng.random() < self.args.shifted_share
        return assistant(text, self.rng.choice(shifted) if other else plain)
