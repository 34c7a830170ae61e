"""Records to training examples: encodes their audio and writes token sequences, or says why a record gives none.
Which records there are is the business of sources.py, what they mean that of records.py."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from processing import TttProcessor, TttTokenIds
from processing.audio_codes_ttt import encode_waveforms
from processing.vocabulary_ttt import (
    BEGIN_OF_AUDIO,
    BEGIN_OF_LAST_AUDIO,
    CODE_FORMAT,
    END_OF_AUDIO,
    END_OF_LAST_AUDIO,
)
from training_examples.preparation.recordings import AudioLimits, load_recording, name_audio
from training_examples.preparation.records import Draft, RecordReader, RejectedError
from training_examples.preparation.sources import Chunk

COUNTS = ("examples", "rejected", "text_tokens", "audio_tokens", "scored_tokens", "audio_seconds")
Key = tuple[int, str]  # a record's position and the column of an audio in it


class ShardReport:
    """What became of the records of a chunk, in the form its file has."""

    def __init__(self, chunk: Chunk):
        self.tasks: dict[str, dict[str, float]] = {}
        self.rejected: list[dict[str, Any]] = []
        self.records, self.state = len(chunk.records), chunk.state
        self.audio_seconds = 0.0

    def reject(self, record: int, task: str, error: Exception) -> None:
        kind = getattr(error, "kind", "malformed")
        self.rejected.append({"record": record, "task": task, "kind": kind, "reason": str(error)})
        self._counts(task)["rejected"] += 1

    def accept(self, example: dict[str, Any], token_ids: TttTokenIds, seconds: float) -> None:
        """Count an example, which holds so many `seconds` of audio."""
        counts, ids = self._counts(example["task"]), np.array(example["input_ids"])
        counts["examples"] += 1
        is_audio = _is_audio(ids, token_ids)
        counts["text_tokens"] += int((~is_audio).sum())
        counts["audio_tokens"] += int(is_audio.sum())
        counts["scored_tokens"] += int((np.array(example["labels"]) != -100).sum())
        counts["audio_seconds"] += seconds

    def _counts(self, task: str) -> dict[str, float]:
        return self.tasks.setdefault(task, dict.fromkeys(COUNTS, 0))


@dataclass
class ExampleBuilder:
    """
    Makes the examples of a chunk of records.

    Args:
        processor (`TttProcessor`): with its audio tokenizer on the device to encode on; without one, records with audio
            are an error.
        reader (`RecordReader`): says what to make of each record.
        roots (`Sequence[Path]`): for each source, the folder that relative audio paths start from.
        max_length (`int`, *optional*, defaults to 2048): longer examples are rejected, in tokens.
        limits (`AudioLimits`, *optional*): audio beyond them is rejected.
        batch_size (`int`, *optional*, defaults to 16): audios encoded at once.
        sampling_rate (`int`, *optional*): of audio given as bare numbers, in Hz.
        seed (`int`, *optional*, defaults to 0): draws which utterances of a recording are spoken.
    """

    processor: TttProcessor
    reader: RecordReader
    roots: Sequence[Path]
    max_length: int = 2048
    limits: AudioLimits = AudioLimits()
    batch_size: int = 16
    sampling_rate: int | None = None
    seed: int = 0

    def __call__(self, chunk: Chunk) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """
        Return the examples of a chunk (`input_ids`, `labels`, `length`, `task`), and a report of what became of its
        records.
        """
        report = ShardReport(chunk)
        drafts: list[tuple[int, Draft]] = []
        for record, values in enumerate(chunk.records, chunk.first_record):
            for task, result in self.reader.drafts(values):
                if isinstance(result, Draft):
                    drafts.append((record, result))
                else:
                    report.reject(record, task, result)
        audios = {(record, column): audio for record, d in drafts for column, audio in d.audios.items()}
        codes, seconds = self._encode(audios, self.roots[chunk.source])

        encoded: list[tuple[int, Draft]] = []
        for record, draft in drafts:
            try:
                for column in draft.audios:
                    if isinstance(error := codes[record, column], RejectedError):
                        raise error
                for column, text in draft.spoken.items():
                    self.limits.check_speaking_rate(text, seconds[record, column])
            except RejectedError as error:
                report.reject(record, draft.task, name_audio(error, column, draft.audios[column]))
            else:
                encoded.append((record, draft))

        examples = []
        used: set[tuple[int, str]] = set()
        for members in self._examples_of(encoded, codes):
            keys = {(record, column) for record, draft in members for column in draft.audios}
            try:
                example = self._example(members, codes)
            except ValueError as error:  # what the processor refuses is the record's fault, too
                for record, draft in members:
                    report.reject(record, draft.task, error)
                continue
            examples.append(example)
            report.accept(example, self.processor.token_ids, sum(seconds[key] for key in keys))
            used |= keys
        report.audio_seconds = sum(seconds[key] for key in used)
        return examples, vars(report)

    # ------------------------------------------------------------------ audio

    def _encode(
        self, audios: dict[Key, Any], root: Path
    ) -> tuple[dict[Key, list[int] | RejectedError], dict[Key, float]]:
        """
        Return codes, or why there are none, and seconds of every audio. Batches hold audios of similar length; only a
        few batches of waveforms are in memory at once.
        """
        codes: dict[Key, list[int] | RejectedError] = {}
        seconds: dict[Key, float] = {}
        keys = list(audios)
        for start in range(0, len(keys), 8 * self.batch_size):
            waveforms = {}
            for key in keys[start : start + 8 * self.batch_size]:
                try:
                    waveforms[key] = self._load(audios[key], root)
                    seconds[key] = len(waveforms[key]) / self.processor.feature_extractor.sampling_rate
                except RejectedError as error:
                    codes[key] = error
            order = sorted(waveforms, key=lambda key: len(waveforms[key]))
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                codes.update(zip(batch, self._encode_batch([waveforms[key] for key in batch]), strict=True))
        return codes, seconds

    def _load(self, audio: Any, root: Path) -> np.ndarray:
        """Return a waveform at the audio tokenizer's rate that keeps the limits."""
        rate = self.processor.feature_extractor.sampling_rate
        waveform = load_recording(audio, root, rate, self.sampling_rate)
        self.limits.check(waveform, rate)
        return waveform

    def _encode_batch(self, waveforms: list[np.ndarray]) -> list[list[int] | RejectedError]:
        """
        Return the codes of a batch; one by one where the audio tokenizer fails on it (on audio too short for it, say).
        """
        if self.processor.audio_tokenizer is None:
            raise ValueError("The checkpoint has no audio tokenizer, which records with audio need.")
        try:
            rows = encode_waveforms(
                self.processor.audio_tokenizer, self.processor.feature_extractor, waveforms, self.batch_size
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"`--batch_size` is {self.batch_size}, too much for the device's memory; choose a smaller one."
            ) from error
        except torch.AcceleratorError:
            raise  # the device's fault, not the audio's
        except (ValueError, RuntimeError) as error:
            if len(waveforms) == 1:
                return [RejectedError("unreadable audio", f"the audio tokenizer fails on it: {error}")]
            return [result for waveform in waveforms for result in self._encode_batch([waveform])]
        return [row.tolist() for row in rows]

    # ------------------------------------------------------------------ token sequences

    def _examples_of(self, drafts: list[tuple[int, Draft]], codes: dict[Key, Any]) -> Iterator[list[tuple[int, Draft]]]:
        """
        Yield drafts that make one example together: utterances that follow each other in one recording, as many as fit
        into `max_length`; every other draft alone.
        """
        members: list[tuple[int, Draft]] = []
        size = 0
        for record, draft in drafts:
            if draft.group is None:
                yield [(record, draft)]
                continue
            (column,) = draft.audios
            length = max(len(codes[record, column]), len(self._tokenize(draft.document))) + 2
            follows = members and (members[-1][0] + 1, members[-1][1].group) == (record, draft.group)
            if members and not (follows and size + length <= self.max_length):
                yield members
                members, size = [], 0
            members.append((record, draft))
            size += length
        if members:
            yield members

    def _example(self, members: list[tuple[int, Draft]], codes: dict[Key, Any]) -> dict[str, Any]:
        """
        Return ids and labels of one example.

        Raises:
            ValueError: If it is too long, or its audio is not in spans as the model reads and writes them.
        """
        record, draft = members[0]
        if draft.messages is not None:
            example = self.processor.build_conversation_example(
                [{**turn, "content": fill(turn["content"], record, codes)} for turn in draft.messages]
            )
        else:
            if len(members) > 1:
                ids = self._tokenize(self._recording(members, codes))
            elif draft.audios:
                (column,) = draft.audios
                ids = self.processor.build_response(draft.document, codes[record, column])
            else:
                ids = self._tokenize(draft.document)
            example = {"input_ids": ids, "labels": list(ids)}
        length = len(example["input_ids"])
        if length > self.max_length:
            raise RejectedError("too long", f"{length} tokens, above `--max_length` {self.max_length}")
        check_spans(example["input_ids"], example["labels"], self.processor.token_ids)
        return {**example, "length": length, "task": draft.task}

    def _recording(self, members: list[tuple[int, Draft]], codes: dict[Key, Any]) -> str:
        """Return utterances as a document in the published form: each either written or spoken, at random."""
        spoken = [random.Random(f"{self.seed} {record}").random() < 0.5 for record, _ in members]
        last = max((index for index, is_spoken in enumerate(spoken) if is_spoken), default=None)
        pieces = []
        for index, (record, draft) in enumerate(members):
            if not spoken[index]:
                pieces.append(draft.document)
                continue
            (column,) = draft.audios
            begin, end = (BEGIN_OF_LAST_AUDIO, END_OF_LAST_AUDIO) if index == last else (BEGIN_OF_AUDIO, END_OF_AUDIO)
            pieces.append(begin + "".join(CODE_FORMAT.format(code) for code in codes[record, column]) + end)
        return " ".join(pieces)

    def _tokenize(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def fill(content: Any, record: int, codes: dict[Key, Any]) -> Any:
    """Return a turn's content with the codes of its audio parts."""
    if isinstance(content, str):
        return content
    return [
        {"type": "audio", "audio_codes": codes[record, part["audio"]]}
        if isinstance(part, dict) and part.get("type") == "audio"
        else part
        for part in content
    ]


def _is_audio(ids: np.ndarray, token_ids: TttTokenIds) -> np.ndarray:
    return (ids >= token_ids.audio_token_id_start) & (ids < token_ids.audio_token_id_end)


def check_spans(input_ids: Sequence[int], labels: Sequence[int], token_ids: TttTokenIds) -> None:
    """
    Raise a RejectedError unless every run of audio-side ids follows a begin token, holds codes alone, and ends with an
    end token where it is scored (the last one of the sequence may be cut off).
    """
    ids, scored = np.array(input_ids), np.array(labels) != -100
    audio = _is_audio(ids, token_ids)
    codes = audio & (ids >= token_ids.audio_code_id_start)
    codes &= ids < token_ids.audio_code_id_start + token_ids.num_audio_codes
    ends = np.isin(ids, (token_ids.end_of_audio_token_id, token_ids.end_of_last_audio_token_id))
    begins = np.isin(ids, (token_ids.begin_of_audio_token_id, token_ids.begin_of_last_audio_token_id))
    before = np.r_[False, (codes | begins)[:-1]]  # what may stand before an audio-side id
    after = np.r_[audio[1:], True]
    for wrong, reason in (
        (audio & ~codes & ~ends, "a mask or placeholder token"),
        (audio & ~before, "audio that follows neither a begin token nor a code"),
        (codes & scored & ~after, f"a span of an answer that does not end with {END_OF_AUDIO} or {END_OF_LAST_AUDIO}"),
    ):
        if wrong.any():
            raise RejectedError("bad span", f"{reason} at token {int(wrong.argmax())}")
