"""A model that answers the held-out lists of ttt-tiny, and what is measured of its answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import modeling_ttt  # noqa: F401  (registers the models, so that no remote code is needed)
import processing  # noqa: F401
from training_examples.evaluation.figures import Figure, fingerprint, normalized, share
from training_examples.evaluation.recognisers import SAMPLING_RATE, Recognizer, word_error_rate
from training_examples.ttt_tiny.speech import read_audio, read_list

PROCESSOR_TASKS = {"spoken_qa": "spoken_qa", "asr": "asr", "tts": "tts", "text_qa": "text_chat"}


@dataclass(frozen=True)
class HeldOutLists:
    """The held-out lists of a folder, those of evaluation or those on which choices are made (`"development"`)."""

    folder: Path
    split: str = "evaluation"

    def name(self, name: str) -> str:
        """Return what a list, or a part measured on it, is called in this split."""
        return name if self.split == "evaluation" else f"{self.split}_{name}"

    def fingerprint(self, *names: str) -> str:
        """Return a short hash of lists."""
        return fingerprint(*(self.folder / f"{self.name(name)}.jsonl" for name in names))

    def read(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the rows of a list, the first `limit` of them."""
        return read_list(self.folder, self.name(name), limit)


class Talker:
    """
    A model folder that answers rows of held-out lists.

    Args:
        folder (`str`): folder of the model, or of an adapter.
        lists (`HeldOutLists`): where the rows' recordings are.
        other (`Talker`, *optional*): whose processor is used instead of the folder's own.
        device (`str`, *optional*, defaults to `"cpu"`): where the model runs.
        max_new_tokens (`int`, *optional*): limit of an answer, the model's own by default.
    """

    def __init__(
        self,
        folder: str,
        lists: HeldOutLists,
        other: "Talker | None" = None,
        device: str = "cpu",
        max_new_tokens: int | None = None,
    ):
        self.folder, self.lists, self.device, self.max_new_tokens = folder, lists, device, max_new_tokens
        self.fingerprint: str = fingerprint(folder) + (f" with {other.fingerprint}" if other else "")
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.processor: Any = other.processor if other else AutoProcessor.from_pretrained(folder)
        self.processor.audio_tokenizer.to(device)

    def answer(self, rows: Sequence[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
        """
        Answer `rows`, all of one task, as one batch.

        Returns:
            `list[dict]`: what `TttProcessor.post_process` gives for each row, and under `ended` whether its speech
            ended by itself.
        """
        task = PROCESSOR_TASKS[rows[0]["task"]]
        if rows[0]["audio"] is None:
            text = [row["question"] or row["answer"] for row in rows]
            inputs = self.processor(text=text, task=task)
        else:
            audio = [read_audio(self.lists.folder, row["audio"], SAMPLING_RATE) for row in rows]
            inputs = self.processor(audio=audio, sampling_rate=SAMPLING_RATE, task=task)
        prompt_length = inputs["input_ids"].shape[1]
        if self.max_new_tokens is not None:
            options = options | {"max_new_tokens": self.max_new_tokens}
        sequences = self.model.generate(**inputs.to(self.device), do_sample=False, **options)
        answers = self.processor.post_process(sequences, prompt_length)
        for ids, answer in zip(sequences[:, prompt_length:].tolist(), answers, strict=True):
            answer["ended"] = self.has_ended(ids, len(answer["audio_codes"]))
        return answers

    def has_ended(self, ids: list[int], num_codes: int) -> bool:
        """Return whether an answer ended its turn after at least one code and no span ran into its limit."""
        limit = getattr(self.model.generation_config, "max_audio_codes_per_span", math.inf)
        return self.processor.token_ids.end_of_turn_token_id in ids and 0 < num_codes < limit


def measure_list(
    talker: Talker,
    name: str,
    limit: int | None,
    batch_size: int,
    recognizer: Recognizer | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """
    Answer a list's first `limit` rows in batches; with `recognizer`, also listen to the answers.

    Args:
        options (`dict`): generation options.

    Returns:
        `dict`: under `rows`, per row `id`, `kind`, `expected`, `text`, `ended`, `seconds` of speech and
            `heard` (None if not listened to).
    """
    rows = talker.lists.read(name, limit)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["question"] + rows[index]["answer"]))
    answers: list[dict[str, Any]] = [{} for _ in rows]
    title = " ".join([Path(talker.folder).name, name, *(f"{key}={value}" for key, value in options.items())])
    for start in tqdm(range(0, len(rows), batch_size), desc=title):
        chosen = order[start : start + batch_size]
        for index, answer in zip(chosen, talker.answer([rows[i] for i in chosen], **options), strict=True):
            answers[index] = answer
    heard: list[str | None] = [None] * len(rows)
    if recognizer is not None:
        heard = list(recognizer.transcribe([answer["audio"] for answer in answers], progress=True))
    return {
        "rows": [
            {
                "id": row["id"],
                "kind": row["kind"],
                "expected": normalized(row["answer"]),
                "text": normalized(answer["text"]),
                "ended": answer["ended"],
                "seconds": len(answer["audio"]) / SAMPLING_RATE,
                "heard": words,
            }
            for row, answer, words in zip(rows, answers, heard, strict=True)
        ]
    }


def figures_of_list(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """
    Return exact answers and word error rate of the text of `measure_list`'s rows; where they were listened to, the word
    error rates of the speech too, and how often it ended.
    """
    figures = {
        "exact": share(row["text"] == row["expected"] for row in rows),
        "wer": Figure(word_error_rate([row["expected"] for row in rows], [row["text"] for row in rows]), len(rows)),
    }
    if rows[0]["heard"] is not None:
        figures["ended"] = share(row["ended"] for row in rows)
        # Against the model's own text: a wrong answer that is said well is no fault of the speech.
        own, heard = [row["text"] for row in rows], [row["heard"] for row in rows]
        figures["speech_wer"] = Figure(word_error_rate(own, heard) if any(own) else math.nan, len(rows))
        figures["spoken_wer"] = Figure(word_error_rate([row["expected"] for row in rows], heard), len(rows))
    return figures
