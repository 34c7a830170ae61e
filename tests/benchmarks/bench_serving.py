"""Throughput and first audio of the engine: many callers at once, beside the same requests served one at a time.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_serving.py
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_serving.py --callers 16 --profile
    python tests/benchmarks/bench_serving.py --url http://127.0.0.1:8000      # a running ttt-serve

Every caller asks, listens to the end and asks again, until all requests are answered. Tokens are text and codes. Wall
time depends on what else the machine does; the time that the process itself had on the CPU depends on that less, and
the ratios least. With `--url` the seconds of speech are counted, and nothing is served one at a time.
"""

import cProfile
import itertools
import json
import pstats
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from modeling_ttt import TttForConditionalGeneration  # noqa: E402
from pipelines.serving import AudioDelta, Engine, GenerationRequest  # noqa: E402
from processing import TttProcessor  # noqa: E402

LINES = ["good morning", "three plus four is seven", "the opposite of hot is cold", "monday comes after sunday"]


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(default=str(ROOT / "model_cards" / "ttt-tiny"), metadata={"help": "Folder or Hub name."})
    callers: list[int] = field(default_factory=lambda: [1, 4, 8, 16], metadata={"help": "Callers at once."})
    requests: int = field(default=32, metadata={"help": "Requests of each run."})
    max_rows: int = field(default=16, metadata={"help": "Rows of the engine."})
    max_new_tokens: int = field(default=120, metadata={"help": "Of each answer, at most."})
    threads: int = field(default=1, metadata={"help": "CPU threads of PyTorch."})
    device: str = field(default="cpu", metadata={"help": "Where the model runs."})
    url: str | None = field(default=None, metadata={"help": "Measure a server through HTTP instead."})
    profile: bool = field(default=False, metadata={"help": "Print where the decoding loop spends its time."})


@dataclass
class Answer:
    """Of one request: tokens (or seconds of speech), seconds to the first audio."""

    amount: float
    first_audio: float | None


def run_callers(number: int, callers: int, ask: Callable[[int], Answer]) -> tuple[list[Answer], float, float]:
    """Have `callers` threads ask `number` times in all; answers, wall seconds, CPU seconds of this process."""
    answers: list[Answer] = []
    left = iter(range(number))
    lock = threading.Lock()

    def call() -> None:
        while True:
            with lock:
                which = next(left, None)
            if which is None:
                return
            answers.append(ask(which))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    start, start_cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - start, time.process_time() - start_cpu


def ask_engine(engine: Engine, prompts: list[torch.Tensor], max_new_tokens: int) -> Callable[[int], Answer]:
    def ask(which: int) -> Answer:
        start, first = time.perf_counter(), None
        request = GenerationRequest(prompts[which % len(prompts)], {"max_new_tokens": max_new_tokens})
        for event in engine.submit(request):
            if isinstance(event, AudioDelta) and event.waveform.size and first is None:
                first = time.perf_counter() - start
        return Answer(len(event.token_ids), first)

    return ask


def ask_server(url: str) -> Callable[[int], Answer]:
    def ask(which: int) -> Answer:
        body = {"input": LINES[which % len(LINES)], "model": "ttt-tiny", "voice": "alloy", "response_format": "pcm"}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/audio/speech", json.dumps(body).encode(), headers)
        start, first, size = time.perf_counter(), None, 0
        with urllib.request.urlopen(request) as response:
            while piece := response.read1(65536):
                first = time.perf_counter() - start if first is None else first
                size += len(piece)
        return Answer(size / 2 / 24_000, first)  # 16-bit samples at 24 kHz

    return ask


def describe(name: str, answers: list[Answer], wall: float, cpu: float) -> None:
    amount = sum(answer.amount for answer in answers)
    firsts = [answer.first_audio for answer in answers if answer.first_audio is not None] or [float("nan")]
    median, late = np.percentile(firsts, [50, 95])
    print(
        f"{name:20} {len(answers):4} answers {amount:8.0f} {wall:7.1f} s {amount / wall:8.1f} /s "
        f"{amount / cpu:8.1f} /CPU s first audio {median:6.2f} s median {late:6.2f} s 95th",
        flush=True,
    )


def load(arguments: Arguments) -> tuple[TttForConditionalGeneration, TttProcessor, list[torch.Tensor]]:
    model = TttForConditionalGeneration.from_pretrained(arguments.model).eval().to(arguments.device)
    processor = TttProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    prompts = [processor(text=line, task="tts")["input_ids"] for line in LINES]
    prompts.append(processor(audio=str(ROOT / "tests" / "fixtures" / "question.wav"))["input_ids"])
    return model, processor, prompts


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.url is not None:
        for callers in arguments.callers:
            answers, wall, _ = run_callers(arguments.requests, callers, ask_server(arguments.url))
            describe(f"{callers} callers, HTTP", answers, wall, wall)
        return
    torch.set_num_threads(arguments.threads)
    model, processor, prompts = load(arguments)
    rates: dict[tuple[int, int], tuple[float, float]] = {}
    for callers, rows in itertools.product(arguments.callers, (1, arguments.max_rows)):
        if callers == 1 and rows != 1:
            continue  # one caller has one row either way
        engine = Engine(model, processor, max_rows=rows)
        profile = cProfile.Profile()
        if arguments.profile and rows > 1:
            loop = engine._run
            engine._thread = threading.Thread(target=lambda loop=loop, profile=profile: profile.runcall(loop))
        with engine:
            ask = ask_engine(engine, prompts, arguments.max_new_tokens)
            ask(0)
            before = engine.stats()
            answers, wall, cpu = run_callers(arguments.requests, callers, ask)
            after = engine.stats()
        describe(f"{callers} callers, {rows} rows", answers, wall, cpu)
        forwards = after.forwards - before.forwards
        print(
            f"    {forwards} forwards, {(after.token_positions - before.token_positions) / forwards:.1f} positions each"
        )
        tokens = sum(answer.amount for answer in answers)
        rates[callers, rows] = tokens / wall, tokens / cpu
        if arguments.profile and rows > 1:
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    for (callers, rows), (by_wall, by_cpu) in rates.items():
        for name, other in (("one caller", (1, 1)), ("one at a time", (callers, 1))):
            if rows > 1 and other in rates:
                wall_rate, cpu_rate = rates[other]
                print(f"{callers} callers, {name}: {by_wall / wall_rate:.2f} by wall, {by_cpu / cpu_rate:.2f} by CPU")


if __name__ == "__main__":
    main()
