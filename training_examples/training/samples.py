"""Hearing a model learn: every so many steps it answers a few held-out examples, in text and speech. What it said goes
to the run's folder and to TensorBoard; nothing of the training depends on it."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from processing import TttProcessor, deinterleave
from processing.vocabulary_ttt import END_OF_TURN, START_OF_TURN
from training_examples.answers import read_turn
from training_examples.evaluation.text_forms import count_errors
from training_examples.files import write_text
from training_examples.preparation.records import RejectedError

FOLDER = "samples"
LOOKED_AT = 2_000  # examples among which those to answer are chosen


class Recogniser(Protocol):
    """Whatever reads speech."""

    def transcribe(self, waveforms: Sequence[np.ndarray], sampling_rate: int) -> list[str]:
        """Return one transcript for each mono waveform of shape `(samples,)`."""
        ...


def split_example(example: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens of an example before its last scored part, and that part: the prompt and the answer."""
    labels = np.array(example["labels"])
    scored = np.flatnonzero(labels != -100)
    if not len(scored):
        raise RejectedError("unscored", "nothing of it is scored")
    gaps = np.flatnonzero(np.diff(scored) > 1)
    start = int(scored[gaps[-1] + 1] if len(gaps) else scored[0])
    return example["input_ids"][:start], example["input_ids"][start : int(scored[-1]) + 1]


def what_was_asked(prompt: Sequence[int], processor: TttProcessor) -> str:
    """
    Return what the last turn of a prompt asks: its text, and how long its speech is, whose words no prompt holds; of a
    document, all its text.

    Args:
        prompt (`Sequence[int]`): token ids, up to where the answer begins.
        processor (`TttProcessor`): whose vocabulary and frames they are in.
    """
    tokenizer, turn = processor.tokenizer, list(prompt)
    start, end = tokenizer.convert_tokens_to_ids([START_OF_TURN, END_OF_TURN])
    starts = [index for index, token in enumerate(turn) if token == start]
    if len(starts) > 1:  # the last one is the answer's
        turn = turn[starts[-2] + 1 : starts[-1]]
        turn = turn[: turn.index(end)] if end in turn else turn
    ids, codes = deinterleave([token for token in turn if token != end], processor.token_ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    text = text.partition("\n")[2] if len(starts) > 1 else text  # without the line of the role
    seconds = len(codes) / processor.num_codebooks / (processor.audio_format.frame_rate or 1.0)
    return " ".join([*([text.strip()] if text.strip() else []), *([f"(spoken, {seconds:.1f} s)"] if codes else [])])


def answer_prompts(model: Any, prompts: list[list[int]], end_of_turn: int, **options: Any) -> list[list[int]]:
    """
    Return what the model writes after each prompt. An answer that ended by itself (`read_turn`) has the end of its
    turn, as in training, also where the model stops before it.

    Args:
        model ([`TttForConditionalGeneration`]): in eval mode, or an adapter on it.
        prompts (`list[list[int]]`): token ids; padded on the left for a batch.
        end_of_turn (`int`): the id of `<|im_end|>`.
        options: of `generate`.
    """
    flipped = [torch.tensor(prompt[::-1]) for prompt in prompts]
    ids = pad_sequence(flipped, batch_first=True, padding_value=-1).flip(1)  # padded on the left
    mask = (ids >= 0).long()
    written = model.generate(
        input_ids=ids.clamp(min=0).to(model.device), attention_mask=mask.to(model.device), **options
    )
    answers = []
    for row in written[:, ids.shape[1] :].tolist():
        turn, ended = read_turn(row, model, end_of_turn, options)
        answers.append([*turn, end_of_turn] if ended and turn[-1] != end_of_turn else turn)
    return answers


def choose_examples(dataset: Iterable[dict[str, Any]], count: int, longest: int) -> list[dict[str, Any]]:
    """
    Return the first examples of each task in turn, up to `count`, of those of at most `longest` tokens.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for example in islice(dataset, LOOKED_AT):
        if len(example["input_ids"]) <= longest and any(label != -100 for label in example["labels"]):
            by_task.setdefault(str(example.get("task")), []).append(example)
    ranks = max(map(len, by_task.values()), default=0)
    in_turn = [rows[rank] for rank in range(ranks) for rows in by_task.values() if rank < len(rows)]
    return in_turn[:count]


class Samples(TrainerCallback):
    """
    Answers a few examples every `every` steps and after the last.

    `samples/step-000100.jsonl` has what was asked (of speech, how long it is), expected, answered and, with a
    recogniser, heard;
    `samples/step-000100-0.wav` the speech of its first line, and `samples/expected-0.wav` that of the example itself.
    TensorBoard, where it is one of the reporters, gets the same under its audio and text tabs, and the word errors of
    the transcripts against the answers' own text. Random numbers are put back, so that a run learns the same with and
    without it. The first process answers, and the others wait for it at the next step.

    Args:
        processor (`TttProcessor`): with its audio tokenizer, or without, and then there are no waveforms.
        examples (`list[dict]`): what is answered, from `choose_examples`.
        every (`int`): steps between two times.
        folder (`Path`): of the run.
        recogniser (`Recogniser`, *optional*): reads the speech.
        seed (`int`, *optional*, defaults to 0): of what is drawn.
        language (`str`, *optional*, defaults to `"en"`): what is spoken, by which errors are counted.
    """

    def __init__(
        self,
        processor: TttProcessor,
        examples: list[dict[str, Any]],
        every: int,
        folder: Path,
        recogniser: Recogniser | None = None,
        seed: int = 0,
        language: str = "en",
    ):
        self.processor, self.every, self.folder = processor, every, folder / FOLDER
        self.recogniser, self.seed, self.language = recogniser, seed, language
        self.tasks = [example.get("task") for example in examples]
        self.prompts, self.references = map(list, zip(*map(split_example, examples), strict=True))
        self.expected = processor.post_process(self.references, decode_audio=processor.audio_tokenizer is not None)
        self.finish: Callable[[], None] = lambda: None
        self.callbacks: list[Any] = []

    def attach_to(self, trainer: Trainer, finish: Callable[[], None] = lambda: None) -> None:
        """Have the trainer call it; `finish` is called after every answering, whose time is none of the training."""
        self.callbacks, self.finish = trainer.callback_handler.callbacks, finish
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            if args.process_index == 0:
                self.write(state.global_step, self.answer(model))
            self.finish()

    @property
    def writer(self) -> Any:
        """TensorBoard's writer, or `None` where it is not one of the reporters."""
        boards = [callback for callback in self.callbacks if isinstance(callback, TensorBoardCallback)]
        return boards[0].tb_writer if boards else None

    @torch.no_grad()
    def answer(self, model: Any) -> list[dict[str, Any]]:
        """Return for each example what was asked, expected, answered and heard, with the waveform under `audio`."""
        was_training = model.training
        longest = max(len(prompt) for prompt in self.prompts)
        room = model.config.text_config.max_position_embeddings - longest
        wanted = 32 + 3 * max(len(reference) for reference in self.references) // 2
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            end = self.processor.token_ids.end_of_turn_token_id
            answers = answer_prompts(model, self.prompts, end, do_sample=False, max_new_tokens=min(wanted, room))
        model.train(was_training)
        said = self.processor.post_process(answers, decode_audio=self.processor.audio_tokenizer is not None)
        rows = []
        for index, answer in enumerate(said):
            rows.append(
                {
                    "task": self.tasks[index],
                    "asked": what_was_asked(self.prompts[index], self.processor),
                    "expected": self.expected[index]["text"],
                    "answered": answer["text"],
                    "ended": end in answers[index],
                    "codes": len(answer["audio_codes"]),
                    "audio": answer["audio"],
                }
            )
        spoken = [row for row in rows if row["audio"] is not None and len(row["audio"])]
        if self.recogniser is not None and spoken:
            heard = self.recogniser.transcribe([row["audio"] for row in spoken], self.processor.sampling_rate)
            for row, text in zip(spoken, heard, strict=True):
                row["heard"] = text
        return rows

    def write(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write what was answered to the folder, the screen and TensorBoard."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rate, writer = self.processor.sampling_rate, self.writer
        lines = []
        for index, row in enumerate(rows):
            audio, expected = row.pop("audio"), self.expected[index]["audio"]
            target = self.folder / f"expected-{index}.wav"
            if expected is not None and len(expected) and not target.exists():
                soundfile.write(target, expected, rate)
                if writer is not None:
                    writer.add_audio(f"{FOLDER}/{index}/expected", expected[None], step, rate)
            if audio is not None and len(audio):
                row["seconds"] = round(len(audio) / rate, 2)
                soundfile.write(self.folder / f"step-{step:06d}-{index}.wav", audio, rate)
                if writer is not None:
                    writer.add_audio(f"{FOLDER}/{index}/answered", audio[None], step, rate)
            heard = f" (heard as {row['heard']!r})" if "heard" in row else ""
            lines.append(f"{row['expected']!r} came as {row['answered']!r}{heard}")
            if writer is not None:
                writer.add_text(f"{FOLDER}/{index}", lines[-1], step)
        if writer is not None and (errors := word_error_rate(rows, self.language)) is not None:
            writer.add_scalar(f"{FOLDER}/word_error_rate", errors, step)
        text = "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.folder / f"step-{step:06d}.jsonl", text)
        print("\n".join([f"step {step}: answers to held-out examples", *(f"  {line}" for line in lines)]), flush=True)


def word_error_rate(rows: list[dict[str, Any]], language: str = "en") -> float | None:
    """Return the errors of what was heard against the text of the same answers, or `None` if nothing was heard."""
    heard = [row for row in rows if row.get("heard") is not None and row["answered"].strip()]
    if not heard:
        return None
    counts = count_errors([row["answered"] for row in heard], [row["heard"] for row in heard], language)
    words = sum(total for _, total in counts)
    return sum(errors for errors, _ in counts) / words if words else None


def latest_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that a run wrote last, none if it wrote none."""
    files = sorted((folder / FOLDER).glob("step-*.jsonl"))
    return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()] if files else []
