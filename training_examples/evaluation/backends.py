"""Who answers: what is asked and answered in an evaluation, and a TtT model in this process.

Other people's models behind an address are in openai_backend.py.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

import modeling_ttt  # noqa: F401  (registers the models, so that no remote code is needed)
import processing  # noqa: F401
from modeling_ttt.generation_config_ttt import SURE_RULES
from pipelines import TttAudioToAudioPipeline
from pipelines.ttt_talk import base_model
from training_examples.answers import read_turn
from training_examples.evaluation.figures import fingerprint

NO_AUDIO = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Turn:
    """What a user says in one turn: `audio` in any form that the processor takes, `text`, or both."""

    audio: Any = None
    text: str | None = None


@dataclass(frozen=True)
class Sample:
    """
    One item of an evaluation.

    Args:
        id (`str`): its name, by which rows are found again.
        turns (`tuple` of [`Turn`]): the user's turns; the last one's answer is scored.
        references (`tuple` of `str`): right answers, any of which will do.
        kind (`str`, *optional*): the group it is counted in.
        details (`Mapping`, *optional*): what else goes into its row, JSON alone.
        problem (`str`, *optional*): why it cannot be asked, if it cannot: its recording is not there.
    """

    id: str
    turns: tuple[Turn, ...]
    references: tuple[str, ...] = ()
    kind: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass
class Answer:
    """
    What was answered to the last turn.

    Args:
        text (`str`): what was written.
        audio (`np.ndarray` of shape `(samples,)`): what was said, empty without speech.
        sampling_rate (`int`): of the audio, Hz.
        seconds (`float`): its share of the time that its batch took, from recordings to waveforms.
        codes, forwards (`int`, *optional*): audio codes written and forwards of the backbone, where they are known.
        speech_steps (`int`, *optional*): the forwards that wrote speech: denoising steps, or codes and end tokens one
            by one.
        ended (`bool`, *optional*): whether the turn ended by itself and no span ran into its limit.
        earlier (`list[str]`, *optional*): what was written in the turns before.
    """

    text: str
    audio: np.ndarray = field(default_factory=lambda: NO_AUDIO)
    sampling_rate: int = 16_000
    seconds: float = math.nan
    codes: int | None = None
    forwards: int | None = None
    ended: bool | None = None
    speech_steps: int | None = None
    earlier: list[str] = field(default_factory=list)


class Backend(Protocol):
    """Whoever answers samples: its name in reports, and in `settings` all that its answers depend on, JSON alone."""

    name: str
    settings: Mapping[str, Any]

    def answer(self, samples: Sequence[Sample], task: str) -> Sequence[Answer | Exception]:
        """Answer samples of one of the processor's tasks as one batch. Where samples fail by themselves, each of these
        has its error in the place of its answer; what is raised is the whole batch's."""
        ...


class TttBackend:
    """
    A TtT model through the pipeline's own preparation, `generate` and `post_process`, in batches.

    Args:
        model (`str`): folder or Hub name of the model, or of an adapter.
        device (`str`, *optional*, defaults to `"cpu"`): where it runs.
        dtype (`str`, *optional*, defaults to `"float32"`): of its weights.
        generation (`Mapping`, *optional*): options of `generate`. Text is greedy unless they say otherwise; None takes
            off what the checkpoint sets.
        processor_of (`TttBackend`, *optional*): whose processor, and so whose audio tokenizer, is used instead.
        trust_remote_code (`bool`, *optional*, defaults to `False`): allow code in the checkpoint to run.

    Raises:
        ValueError: If `generate` would refuse the options, whatever is asked.
    """

    def __init__(
        self,
        model: str,
        device: str = "cpu",
        dtype: str = "float32",
        generation: Mapping[str, Any] | None = None,
        processor_of: "TttBackend | None" = None,
        trust_remote_code: bool = False,
    ):
        options = {"trust_remote_code": trust_remote_code}
        loaded = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype), **options).eval()
        base = base_model(model)  # an adapter has no processor of its own
        processor = processor_of.pipe.processor if processor_of else AutoProcessor.from_pretrained(base, **options)
        self.pipe: TttAudioToAudioPipeline = TttAudioToAudioPipeline(
            model=loaded, processor=processor, device=torch.device(device)
        )
        self.generation: dict[str, Any] = {"do_sample": False, **(generation or {})}
        folders = [model, *([base] if base != model and Path(base).is_dir() else [])]
        hashed = fingerprint(*folders) if Path(model).is_dir() else getattr(loaded.config, "_commit_hash", None)
        self.name = str(model)
        self.settings: Mapping[str, Any] = {
            "model": hashed or str(model),
            "processor_of": processor_of.settings["model"] if processor_of else None,
            "dtype": dtype,
            "generation": self.generation,
        }
        self._check_generation()

    def _check_generation(self) -> None:
        with self.options_unset():
            try:
                self.pipe._check_options(self.generation)
            except ValueError as error:
                raise ValueError(f"`generation`: {error}") from error

    def with_generation(self, **generation: Any) -> "TttBackend":
        """Return the same model with other options of `generate`."""
        other = object.__new__(type(self))
        other.__dict__ = self.__dict__ | {"generation": {"do_sample": False, **generation}}
        other.settings = {**self.settings, "generation": other.generation}
        other._check_generation()
        return other

    @property
    def processor(self) -> Any:
        """The model's [`TttProcessor`]."""
        return self.pipe.processor

    def _resolved(self) -> Any:
        """Return the generation config that a call of `generate` with these options has."""
        with self.options_unset():
            return self.pipe.model._prepare_generation_config(None, **self.generation)[0]

    def decoding(self) -> dict[str, Any]:
        """Return how `generate` denoises with these options: block, steps, rules and order."""
        config = self._resolved()
        names = ("audio_block_size", "audio_steps_per_block", *SURE_RULES, "audio_order_bias")
        return {name: getattr(config, name) for name in names}

    def _span_limit(self) -> float:
        """Return at how many codes a span is closed. The autoregressive twin knows no such limit."""
        if self.pipe.model.config.audio_objective == "autoregressive":
            return math.inf
        return self._resolved().max_audio_codes_per_span

    @contextmanager
    def options_unset(self) -> Iterator[None]:
        """Within, a checkpoint's settings of the options that are None count as unset, so that None means none."""
        config = self.pipe.model.generation_config
        kept = {name: getattr(config, name, None) for name, value in self.generation.items() if value is None}
        for name in kept:
            setattr(config, name, None)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(config, name, value)

    def system_prompt(self, task: str) -> str:
        """Return what a task is asked with."""
        return self.processor.get_task(task).system_prompt

    def messages(self, sample: Sample, task: str) -> list[dict[str, Any]]:
        """Return the conversation up to the first turn. A typed turn of a spoken task is asked as text is."""
        turn = sample.turns[0]
        if turn.audio is None and not self.processor.get_task(task).takes_text_alone:
            task = "text_chat"
        return self.processor.build_messages(task, text=turn.text, audio=turn.audio)

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], task: str) -> list[Answer]:
        """
        Answer samples turn by turn, each turn of all of them as one batch. The model hears its own earlier answers.

        Raises:
            ValueError: If the samples differ in their number of turns, or one cannot be asked.
        """
        if len({len(sample.turns) for sample in samples}) != 1:
            raise ValueError("samples of one batch must have the same number of turns")
        begin = time.perf_counter()
        conversations = [self.messages(sample, task) for sample in samples]
        earlier: list[list[str]] = [[] for _ in samples]
        answers = self._generate(conversations)
        for place in range(1, len(samples[0].turns)):
            for sample, conversation, answer, texts in zip(samples, conversations, answers, earlier, strict=True):
                texts.append(answer["text"])
                conversation += [_assistant(answer), _user(sample.turns[place])]
            answers = self._generate(conversations)
        seconds = (time.perf_counter() - begin) / len(samples)
        return [
            Answer(
                answer["text"],
                answer["audio"],
                answer["sampling_rate"],
                seconds,
                len(answer["audio_codes"]),
                answer["forwards"],
                answer["ended"],
                answer["speech_steps"],
                texts,
            )
            for answer, texts in zip(answers, earlier, strict=True)
        ]

    def _generate(self, conversations: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        inputs = self.pipe.ensure_tensor_on_device(**self.pipe.preprocess(conversations))
        end = self.processor.token_ids.end_of_turn_token_id
        prompt_length = inputs["input_ids"].shape[1]
        with self.options_unset():
            output = self.pipe.model.generate(**inputs, **self.generation, return_dict_in_generate=True)
            rows = output.sequences[:, prompt_length:].tolist()
            turns = [read_turn(row, self.pipe.model, end, self.generation) for row in rows]
        answers = self.processor.post_process(output.sequences, prompt_length)
        limit, is_code = self._span_limit(), self.processor.token_ids.is_code
        forwards = getattr(output, "forwards_per_row", None)
        steps = getattr(output, "denoising_steps_per_row", None)
        config = self.pipe.model.config
        speech = range(config.audio_token_id_start, config.audio_token_id_end)
        for index, ((turn, ended), answer) in enumerate(zip(turns, answers, strict=True)):
            spans = [len(list(run)) for of_codes, run in groupby(turn, is_code) if of_codes]
            answer["ended"] = ended and max(spans, default=0) < limit
            # Left to right, every token takes a forward.
            answer["forwards"] = len(turn) if forwards is None else int(forwards[index])
            codes = sum(token in speech for token in turn)
            answer["speech_steps"] = codes if steps is None else int(steps[index])
        return answers


def _user(turn: Turn) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if turn.text:
        content.append({"type": "text", "text": turn.text})
    if turn.audio is not None:
        audio = turn.audio if isinstance(turn.audio, Mapping) else {"audio": turn.audio}
        content.append({"type": "audio", **audio})
    return {"role": "user", "content": content}


def _assistant(answer: Mapping[str, Any]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": answer["text"]}]
    if len(answer["audio_codes"]):
        content.append({"type": "audio", "audio_codes": answer["audio_codes"]})
    return {"role": "assistant", "content": content}
