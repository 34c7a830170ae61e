"""Turn any speech or text dataset into tokenised training examples: `input_ids`, `labels`, `length` and `task`.

    python training_examples/prepare_dataset.py --model model_cards/ttt-tiny --output_dir data/questions \
        --source data/ttt_tiny/eval/spoken_qa_seen.jsonl --tasks spoken_chat asr --columns text=question

    python training_examples/prepare_dataset.py --model MODEL --output_dir data/published --data_config data_config.json

Records are read in chunks; each becomes one Parquet shard, so a run that was killed goes on with the first missing
shard when it is started again with the same arguments. A record that gives no example is listed with its reason in
`rejected-SPLIT.jsonl`, and `summary-SPLIT.json` tells hours, tokens and lengths. preparation/mixtures.py
reads the result.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from processing import TttProcessor
from training_examples.command_line import ScriptParser
from training_examples.preparation.examples import ExampleBuilder
from training_examples.preparation.layouts import LAYOUTS
from training_examples.preparation.recordings import AudioLimits
from training_examples.preparation.records import CONTINUATION, FIELDS, TASK_NAMES, RecordReader
from training_examples.preparation.shards import ShardFolder
from training_examples.preparation.sources import Chunk, Source, open_data_config, open_source
from training_examples.threads import threads_field, use_threads
from training_examples.user_errors import run_command
from training_examples.workers import worker_pool

MOST_RECORDS = 1000  # a shard, by default
SHARDS_PER_PROCESS = 4  # so that no process waits long for the last one, and a killed run loses little
SIZE_KEY = "records per shard"
# What may differ when a run is taken up again: it decides how fast the examples are made, not what they are.
FREE_ARGUMENTS = ("output_dir", "batch_size", "device", "num_proc", "threads")


@dataclass
class PrepareArguments:
    model: str = field(metadata={"help": "Folder or Hub name of the TtT checkpoint whose processor is used."})
    output_dir: Path = field(metadata={"help": "Folder to write."})
    source: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders, saved datasets or Hub names; all are read with the same tasks and columns."},
    )
    data_config: Path | None = field(
        default=None, metadata={"help": "Published form of a list of sources: JSON with `path` and `sample_ratio`."}
    )
    name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    layout: str | None = field(
        default=None,
        metadata={
            "help": f"Layout of a corpus: {', '.join(LAYOUTS)}. By default it is found by looking.",
            "choices": list(LAYOUTS),
        },
    )
    split: str = field(default="train", metadata={"help": "Split to read."})
    output_split: str = field(default="", metadata={"help": "Split to write; the one read by default."})
    streaming: bool = field(default=False, metadata={"help": "Read record by record instead of building a cache."})
    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"What to make of each record: {', '.join(TASK_NAMES)}. Without it, records must have a published "
            "form: `messages`, `conversations`, `prompt` and `response`, or `text`."
        },
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"FIELD=COLUMN, or TASK.FIELD=COLUMN for one task. Fields: {', '.join(FIELDS)} (default: a column "
            "of that name). `text` is what `audio` says, or what the user writes; `answer` the reply, caption or label."
        },
    )
    questions: list[str] = field(
        default_factory=list,
        metadata={"help": "TASK=INSTRUCTION before the audio, for captioning, emotion and scene."},
    )
    asr_speech: bool = field(
        default=True,
        metadata={"help": "Recognition answers with the heard codes after the text, as published; else text alone."},
    )
    min_audio_seconds: float = field(default=0.0, metadata={"help": "Shorter audio is rejected."})
    max_audio_seconds: float = field(default=30.0, metadata={"help": "Longer audio is rejected."})
    min_level: float = field(
        default=-60.0, metadata={"help": "Audio is rejected as silent whose loudest 50 ms stay below so many dB."}
    )
    max_clipping: float = field(
        default=0.05, metadata={"help": "Audio is rejected as clipped with a larger share of samples at full scale."}
    )
    min_speaking_rate: float = field(
        default=0.0, metadata={"help": "Speech with its text is rejected below so many characters a second; 0 is off."}
    )
    max_speaking_rate: float = field(
        default=0.0, metadata={"help": "Speech with its text is rejected above so many characters a second; 0 is off."}
    )
    max_length: int = field(default=2048, metadata={"help": "Longer examples are rejected, in tokens."})
    sampling_rate: int | None = field(default=None, metadata={"help": "Of audio given as bare numbers, Hz."})
    audio_root: Path | None = field(
        default=None, metadata={"help": "Where relative audio paths start; by default the folder of their file."}
    )
    max_records: int | None = field(default=None, metadata={"help": "Read only so many records of each source."})
    shard_size: int | None = field(
        default=None,
        metadata={
            "help": f"Records per shard, which is saved as soon as it is done; by default {MOST_RECORDS}, and fewer "
            "where that would leave processes without work."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Audios encoded at once."})
    device: str = field(default="cpu", metadata={"help": "Where audio is encoded; processes share the GPUs of `cuda`."})
    num_proc: int = field(default=1, metadata={"help": "Processes side by side."})
    threads: int = threads_field()
    seed: int = field(default=0, metadata={"help": "Seed of sampling and of the documents of continuation."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code in the checkpoint to run."})

    def __post_init__(self) -> None:
        if bool(self.source) == (self.data_config is not None):
            raise ValueError("Give either `--source` or `--data_config`.")
        for name in ("max_audio_seconds", "max_length", "shard_size", "batch_size", "num_proc"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be above 0.")
        for name in ("min_audio_seconds", "min_speaking_rate", "max_speaking_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"`--{name}` is {getattr(self, name)}; it must be at least 0.")
        for name in ("audio_seconds", "speaking_rate"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if most and least > most:
                raise ValueError(f"`--min_{name}` is {least:g}, above `--max_{name}` {most:g}.")
        if not 0 <= self.max_clipping <= 1:
            raise ValueError(f"`--max_clipping` is {self.max_clipping}; it is a share, from 0 to 1.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"`--device` is {self.device!r}, but PyTorch finds no GPU; use cpu.")
        self.output_split = self.output_split or self.split
        if not re.fullmatch(r"\w+", self.output_split):
            raise ValueError(f"`--output_split` is {self.output_split!r}; use letters, digits and underscores.")

    def pairs(self, name: str) -> dict[str, str]:
        """Return the KEY=VALUE items of an argument."""
        items = getattr(self, name)
        if not all("=" in item for item in items):
            raise ValueError(f"`--{name}` {' '.join(items)}: every item needs the form KEY=VALUE.")
        return dict(item.split("=", 1) for item in items)


def load_processor(args: PrepareArguments) -> TttProcessor:
    """
    Load the checkpoint's processor. Records in a published form hold codes already, so there the audio tokenizer may be
    missing.
    """
    try:
        return TttProcessor.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except OSError:
        if args.tasks:
            raise
        return TttProcessor.from_pretrained(args.model, load_audio_tokenizer=False)


def make_builder(args: PrepareArguments, processor: TttProcessor, roots: Sequence[Path]) -> ExampleBuilder:
    return ExampleBuilder(
        processor,
        RecordReader(processor, args.tasks, args.pairs("columns"), args.pairs("questions"), args.asr_speech),
        roots,
        max_length=args.max_length,
        limits=AudioLimits(
            args.min_audio_seconds,
            args.max_audio_seconds,
            args.min_level,
            args.max_clipping,
            args.min_speaking_rate,
            args.max_speaking_rate,
        ),
        batch_size=args.batch_size,
        sampling_rate=args.sampling_rate,
        seed=args.seed,
    )


def open_sources(args: PrepareArguments) -> list[Source]:
    if args.data_config is not None:
        sources = open_data_config(args.data_config, args.streaming, args.seed)
    else:
        options = (args.split, args.name, args.revision, args.streaming, args.layout)
        sources = [source for location in args.source for source in open_source(location, *options)]
    if args.max_records is not None:
        for source in sources:
            source.dataset = source.dataset.take(args.max_records)
    return sources


def fingerprint(processor: TttProcessor) -> str:
    """
    Return a short hash of everything that decides which ids a record gets: the processor's settings, text and audio
    tokenizer.
    """
    digest = hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    digest.update(processor.chat_template.encode())
    digest.update(processor.tokenizer.backend_tokenizer.to_str().encode())
    if processor.audio_tokenizer is not None:
        for name, value in processor.audio_tokenizer.state_dict().items():
            digest.update(name.encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def records_per_shard(args: PrepareArguments, sizes: Sequence[int | None]) -> int:
    """
    Return how many records a shard has: `--shard_size`, or as many as give each process some shards to do.

    Utterances that make a document together stay in one shard, so for continuation it is not made smaller.
    """
    if args.shard_size is not None:
        return args.shard_size
    total = sum(size or 0 for size in sizes)
    if None in sizes or CONTINUATION in args.tasks or not total:
        return MOST_RECORDS
    return min(MOST_RECORDS, math.ceil(total / (SHARDS_PER_PROCESS * args.num_proc)))


_work: tuple[ExampleBuilder, ShardFolder]


def start_worker(args: PrepareArguments, folder: ShardFolder, roots: Sequence[Path], ranks: Any, threads: int) -> None:
    """Ready a process: its threads, and the GPUs dealt out in turn."""
    global _work
    torch.set_num_threads(threads)
    device = f"cuda:{ranks.get() % torch.cuda.device_count()}" if args.device == "cuda" else args.device
    processor = load_processor(args)
    if processor.audio_tokenizer is not None:
        processor.audio_tokenizer.to(device)
    _work = make_builder(args, processor, roots), folder


def finish_in_worker(chunk: Chunk) -> dict[str, Any]:
    return finish(*_work, chunk)


def finish(builder: ExampleBuilder, folder: ShardFolder, chunk: Chunk) -> dict[str, Any]:
    """Make and write the shard of a chunk; return its report."""
    examples, report = builder(chunk)
    folder.write(chunk, examples, report)
    return report


def finish_all(
    args: PrepareArguments, folder: ShardFolder, roots: Sequence[Path], chunks: Iterable[Chunk]
) -> Iterator[dict[str, Any]]:
    """Yield the reports of the chunks, as they are finished by `num_proc` processes."""
    ranks = get_context("spawn").Queue()
    for rank in range(args.num_proc):
        ranks.put(rank)
    pool = worker_pool(args.num_proc, start_worker, (args, folder, roots, ranks, torch.get_num_threads()))
    try:
        pending: set[Future] = set()
        for chunk in chunks:
            pending.add(pool.submit(finish_in_worker, chunk))
            while len(pending) >= 2 * args.num_proc:  # hold no more records than the processes need
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (job.result() for job in done)
        yield from (job.result() for job in pending)
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(args: PrepareArguments) -> dict[str, Any]:
    """Make the shards that are missing; return the summary."""
    use_threads(args.threads, args.num_proc)
    processor = load_processor(args)
    sources = open_sources(args)
    builder = make_builder(args, processor, [args.audio_root or source.root for source in sources])
    for source in sources:
        builder.reader.check_columns(source.name, source.column_names)
    sizes = [source.num_records for source in sources]
    settings = {f"--{f.name}": getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in FREE_ARGUMENTS}
    folder = ShardFolder(args.output_dir, args.output_split)
    size = folder.arguments().get(SIZE_KEY) or records_per_shard(args, sizes)  # a run that goes on keeps its shards
    folder.begin({**settings, "number of records": sizes, "tokenizers": fingerprint(processor), SIZE_KEY: size})

    reports = folder.finished()
    states = [{chunk: r["state"] for (s, chunk), r in reports.items() if s == index} for index in range(len(sources))]
    chunks = (chunk for index, source in enumerate(sources) for chunk in source.chunks(index, size, states[index]))
    if args.num_proc == 1:
        if processor.audio_tokenizer is not None:
            processor.audio_tokenizer.to(args.device)
        new_reports: Iterable[dict[str, Any]] = (finish(builder, folder, chunk) for chunk in chunks)
    else:
        new_reports = finish_all(args, folder, builder.roots, chunks)
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    with tqdm(total=total, initial=sum(r["records"] for r in reports.values()), unit="record") as bar:
        rejected = sum(len(r["rejected"]) for r in reports.values())
        for report in new_reports:
            rejected += len(report["rejected"])
            bar.set_postfix(rejected=rejected)
            bar.update(report["records"])
    summary = folder.summarise([source.name for source in sources])
    if not summary["examples"]:
        raise ValueError(
            f"No record gave an example ({summary['rejected_kinds']}); rejected-*.jsonl gives the reasons."
        )
    return summary


def main() -> None:
    (args,) = ScriptParser(PrepareArguments, __doc__).parse_args_into_dataclasses()
    print(json.dumps(prepare(args), indent=2))


if __name__ == "__main__":
    run_command(main)
