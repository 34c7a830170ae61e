"""From sources to a folder of shards: which are missing, and the processes that make them. What a shard holds lives in
examples.py, how it is written in shards.py."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from processing import TttProcessor
from training_examples.preparation.arguments import MOST_RECORDS, PrepareArguments
from training_examples.preparation.examples import ExampleBuilder
from training_examples.preparation.recordings import AudioLimits
from training_examples.preparation.records import CONTINUATION, RecordReader
from training_examples.preparation.shards import ShardFolder
from training_examples.preparation.sources import Chunk, Source, open_data_config, open_source
from training_examples.workers import worker_pool

SHARDS_PER_PROCESS = 4  # so that no process waits long for the last one, and a killed run loses little
SIZE_KEY = "records per shard"
# What may differ when a run is taken up again: it decides how fast the examples are made, not what they are.
FREE_ARGUMENTS = ("output_dir", "batch_size", "device", "num_proc", "threads")


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
    """
    Make the shards that are missing; return the summary.

    Raises:
        ValueError: If there is no such device, or no record gives an example.
    """
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"`--device` is {args.device!r}, but PyTorch finds no GPU; use cpu.")
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
