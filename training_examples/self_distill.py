"""Let a checkpoint answer the prompts of prepared examples at a slow, good setting, and keep what it said well.

    python training_examples/self_distill.py --model runs/ttt --dataset data/chat --output_dir data/distilled \
        --generation audio_block_size=8 audio_steps_per_block=8 --recogniser base

A model's own codes are far more predictable than those of recorded speech, so training on them, from blocks that are
mostly masked (`--full_block_probability`), teaches it to say the same in few denoising steps (after dParallel, arXiv
2509.26488). An answer is kept where it ends by itself, its text is that of the example, and a recogniser reads its
speech right. The output is a folder of prepared examples, which train_ttt.py takes alone or in a mixture with others; a
run that was killed goes on with the first missing shard.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from modeling_ttt import TttForConditionalGeneration
from processing import TttProcessor, deinterleave
from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.figures import fingerprint
from training_examples.evaluation.listening import LANGUAGE_HELP, open_listener
from training_examples.evaluation.options import read_pairs
from training_examples.evaluation.text_forms import count_errors, spoken_form
from training_examples.preparation.examples import ShardReport
from training_examples.preparation.mixtures import load_mixture
from training_examples.preparation.records import RejectedError
from training_examples.preparation.shards import ShardFolder
from training_examples.preparation.sources import Chunk
from training_examples.threads import threads_field, use_threads
from training_examples.training.samples import Recogniser, answer_prompts, split_example
from training_examples.user_errors import run_command

FREE_ARGUMENTS = ("output_dir", "batch_size", "device", "threads")


@dataclass
class DistillArguments:
    model: str = field(metadata={"help": "Folder or Hub name of the TtT checkpoint that answers."})
    dataset: list[str] = field(metadata={"help": "Folders of prepared examples, whose prompts are answered."})
    output_dir: Path = field(metadata={"help": "Folder to write."})
    generation: list[str] = field(
        default_factory=list,
        metadata={"help": "OPTION=VALUE of `generate`, such as audio_block_size=8 audio_steps_per_block=8."},
    )
    recogniser: str | None = field(
        default=None,
        metadata={
            "help": "Who reads the speech: a faster-whisper folder or name (base), or transformers:NAME; without it, "
            "text decides."
        },
    )
    language: str = field(default="en", metadata={"help": LANGUAGE_HELP})
    max_word_error_rate: float = field(
        default=0.0, metadata={"help": "Keep answers whose speech is read with at most this rate of word errors."}
    )
    other_texts: bool = field(
        default=False, metadata={"help": "Keep answers whose text is not the example's, too: their speech decides."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "Answer examples of these tasks only."})
    max_records: int | None = field(default=None, metadata={"help": "Answer only so many examples."})
    split: str = field(default="train", metadata={"help": "Split to read and to write."})
    shard_size: int = field(default=512, metadata={"help": "Examples per shard."})
    batch_size: int = field(default=32, metadata={"help": "Answers written side by side."})
    device: str = field(default="cpu", metadata={"help": "Where the model runs."})
    threads: int = threads_field()
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code in the checkpoint to run."})

    def __post_init__(self) -> None:
        check_least(self, shard_size=1, batch_size=1, max_records=1, max_word_error_rate=0)

    def generation_options(self) -> dict[str, Any]:
        """Return the OPTION=VALUE items, each value read as JSON or, where it is none, as a string."""
        return read_pairs("generation", self.generation)


class Distiller:
    """
    Answers the prompts of examples and judges the answers.

    Args:
        model ([`TttForConditionalGeneration`]), processor ([`TttProcessor`]): who answers.
        recogniser (`Recogniser`, *optional*): who reads the speech.
        args (`DistillArguments`): what is kept, and how answers are written.
    """

    def __init__(
        self,
        model: TttForConditionalGeneration,
        processor: TttProcessor,
        recogniser: Recogniser | None,
        args: DistillArguments,
    ):
        self.model, self.processor, self.recogniser, self.args = model, processor, recogniser, args
        self.options = {"do_sample": False, **args.generation_options()}

    def __call__(self, chunk: Chunk) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the examples kept of a chunk, and its report in the form of `ShardReport`."""
        report = ShardReport(chunk)
        prompts: list[tuple[int, list[int], list[int]]] = []
        for number, record in enumerate(chunk.records):
            try:
                prompts.append((number, *split_example(record)))
            except RejectedError as error:
                report.reject(chunk.first_record + number, record["task"], error)
        prompts.sort(key=lambda prompt: len(prompt[1]))
        kept: dict[int, dict[str, Any]] = {}
        for start in range(0, len(prompts), self.args.batch_size):
            batch = prompts[start : start + self.args.batch_size]
            answers = self.answer([prompt for _, prompt, _ in batch])
            verdicts = self.judge([reference for _, _, reference in batch], answers)
            for (number, prompt, _), answer, verdict in zip(batch, answers, verdicts, strict=True):
                task = chunk.records[number]["task"]
                if verdict is not None:
                    report.reject(chunk.first_record + number, task, verdict)
                    continue
                ids = prompt + answer
                labels = [-100] * len(prompt) + answer
                kept[number] = {"input_ids": ids, "labels": labels, "length": len(ids), "task": task}
                codes = deinterleave(answer, self.processor.token_ids)[1]
                rate = self.processor.audio_format.frame_rate or 1.0
                seconds = len(codes) / self.processor.num_codebooks / rate
                report.accept(kept[number], self.processor.token_ids, seconds)
                report.audio_seconds += seconds
        return [kept[number] for number in sorted(kept)], vars(report)

    def answer(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return what the model writes after each prompt; where it ended by itself, with the end of its turn."""
        return answer_prompts(self.model, prompts, self.processor.token_ids.end_of_turn_token_id, **self.options)

    def form(self, text: str) -> str:
        """Return a text as it is compared."""
        return spoken_form(text, self.args.language)

    def judge(self, references: list[list[int]], answers: list[list[int]]) -> list[RejectedError | None]:
        """Say of each answer why it is not kept, or `None`."""
        processor = self.processor
        written = processor.post_process(answers, decode_audio=self.recogniser is not None)
        expected = processor.post_process(references, decode_audio=False)
        verdicts: list[RejectedError | None] = []
        for ids, answer, reference in zip(answers, written, expected, strict=True):
            verdict = None
            if processor.token_ids.end_of_turn_token_id not in ids:
                verdict = RejectedError("unfinished", "the answer did not end by itself")
            elif not len(answer["audio_codes"]):
                verdict = RejectedError("silent", "the answer has no speech")
            elif not self.args.other_texts and self.form(answer["text"]) != self.form(reference["text"]):
                verdict = RejectedError("text", f"said {answer['text']!r}, not {reference['text']!r}")
            verdicts.append(verdict)
        heard = [index for index, verdict in enumerate(verdicts) if verdict is None]
        if self.recogniser is None or not heard:
            return verdicts
        transcripts = self.recogniser.transcribe([written[i]["audio"] for i in heard], processor.sampling_rate)
        counts = count_errors([written[i]["text"] for i in heard], transcripts, self.args.language)
        for index, transcript, (errors, words) in zip(heard, transcripts, counts, strict=True):
            if not words:  # else nothing could be wrong with it
                reason = f"{written[index]['text']!r} holds no word of the language that `--language` names"
                verdicts[index] = RejectedError("language", f"{reason}, {self.args.language}")
            elif errors > self.args.max_word_error_rate * words:
                reason = f"{written[index]['text']!r} was heard as {transcript!r}"
                verdicts[index] = RejectedError("speech", reason)
        return verdicts


def prompts(args: DistillArguments) -> Dataset:
    """
    Return the examples to answer.

    Raises:
        ValueError: If there are none.
    """
    dataset = load_mixture(args.dataset, split=args.split)
    if args.tasks:
        dataset = dataset.filter(lambda task: task in args.tasks, input_columns="task")
    if args.max_records is not None:
        dataset = dataset.take(min(args.max_records, len(dataset)))
    if not len(dataset):
        raise ValueError(f"`--dataset` {args.dataset} has no examples of {args.tasks or 'any task'}.")
    return dataset


def chunks(dataset: Dataset, size: int, finished: Container[tuple[int, int]]) -> Iterator[Chunk]:
    """Yield the examples in chunks of `size`, without those that are finished."""
    for number, start in enumerate(range(0, len(dataset), size)):
        if (0, number) not in finished:
            yield Chunk(0, number, start, dataset.select(range(start, min(start + size, len(dataset)))).to_list())


def distill(args: DistillArguments, recogniser: Recogniser | None = None) -> dict[str, Any]:
    """
    Answer all prompts that are not answered yet; return the summary.

    Args:
        recogniser (`Recogniser`, *optional*): used in place of `--recogniser`.

    Raises:
        ValueError: If there is nothing to answer, no answer is kept, or a rate of errors is asked of no recogniser.
    """
    if recogniser is None and args.recogniser is None and args.max_word_error_rate:
        raise ValueError(
            f"`--max_word_error_rate` is {args.max_word_error_rate}, but nobody hears word errors: name a "
            "`--recogniser`, or leave it out."
        )
    threads = use_threads(args.threads)
    dataset = prompts(args)
    folder = ShardFolder(args.output_dir, args.split)
    settings = {f"--{f.name}": getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in FREE_ARGUMENTS}
    # A model that is trained on, or data that is made anew, has the same name.
    model_hash = fingerprint(args.model) if Path(args.model).is_dir() else args.model
    folder.begin({**settings, "model": model_hash, "number of examples": len(dataset)})
    if recogniser is None and args.recogniser is not None:
        recogniser = open_listener(args.recogniser, args.language, args.device, threads).open()
    trust: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    model = TttForConditionalGeneration.from_pretrained(args.model, dtype="auto", **trust).to(args.device).eval()
    processor = TttProcessor.from_pretrained(args.model, **trust)
    if processor.audio_tokenizer is not None:
        processor.audio_tokenizer.to(args.device)
    finished = folder.finished()
    kinds = Counter(row["kind"] for report in finished.values() for row in report["rejected"])
    distiller = Distiller(model, processor, recogniser, args)
    with tqdm(total=len(dataset), initial=sum(r["records"] for r in finished.values()), unit="answer") as bar:
        for chunk in chunks(dataset, args.shard_size, finished):
            examples, report = distiller(chunk)
            folder.write(chunk, examples, report)
            kinds.update(row["kind"] for row in report["rejected"])
            bar.set_postfix(kinds)
            bar.update(report["records"])
    summary = folder.summarise([" ".join(args.dataset)])
    if not summary["examples"]:
        raise ValueError(
            f"None of {len(dataset)} answers is kept ({summary['rejected_kinds']}); rejected-{args.split}.jsonl gives "
            "the reasons. Train --model longer, let it answer more carefully by --generation, or ask less of an "
            "answer: --max_word_error_rate, --other_texts."
        )
    return summary


def main() -> None:
    (args,) = ScriptParser(DistillArguments, __doc__).parse_args_into_dataclasses()
    print(json.dumps(distill(args), indent=2))


if __name__ == "__main__":
    run_command(main)
