"""Throughput and first audio of the engine: many callers at once, beside the same requests served one at a time.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_serving.py
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_serving.py --callers 16 --profile
    python tests/benchmarks/bench_serving.py --url http://127.0.0.1:8000      # a running ttt-serve
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_serving.py --callers 4 --soak 30          # minutes
    python tests/benchmarks/bench_serving.py --callers 4 --soak 30 --url http://127.0.0.1:8000 --pid PID

Every caller asks, listens to the end and asks again, until all requests are answered. Tokens are text and codes. Wall
time depends on what else the machine does; the time that the process itself had on the CPU does less, and the ratios
least. First audio by CPU is what it would take on one idle core. With `--url` the seconds of speech are counted, and
nothing is served one at a time. `--soak` asks for as many minutes and prints the memory of the process, this one's or
that of `--pid`, as time goes by.
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
import psutil
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
    soak: float | None = field(default=None, metadata={"help": "Minutes of asking, to see whether memory grows."})
    pid: int | None = field(default=None, metadata={"help": "The server's process, whose memory --soak looks at."})
    profile: bool = field(default=False, metadata={"help": "Print where the decoding loop spends its time."})


@dataclass
class Answer:
    """Of one request: tokens (or seconds of speech), seconds to the first audio, by wall time and by CPU time."""

    amount: float
    first_audio: float | None
    first_audio_cpu: float | None = None


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


def ask_engine(
    engine: Engine, prompts: list[torch.Tensor], max_new_tokens: int, sessions: bool = False
) -> Callable[[int], Answer]:
    """Ask an engine; with `sessions`, in conversations that take turns, whose caches are kept."""

    def ask(which: int) -> Answer:
        start, start_cpu, first, first_cpu = time.perf_counter(), time.process_time(), None, None
        session = str(which % 16) if sessions else None
        options = {"max_new_tokens": max_new_tokens}
        request = GenerationRequest(prompts[which % len(prompts)], options, session=session)
        for event in engine.submit(request):
            if isinstance(event, AudioDelta) and event.waveform.size and first is None:
                first, first_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        return Answer(len(event.token_ids), first, first_cpu)

    return ask


def ask_server(url: str) -> Callable[[int], Answer]:
    """Ask a server to read a line aloud."""

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


def soak(arguments: Arguments, ask: Callable[[int], Answer]) -> None:
    """Have the callers ask for some minutes; print what memory the process holds as time goes by."""
    process, minutes, callers = psutil.Process(arguments.pid), arguments.soak or 0.0, arguments.callers[0]
    ends, failures, asked = time.monotonic() + 60 * minutes, [], itertools.count()
    done: list[Answer] = []

    def call() -> None:
        try:
            while time.monotonic() < ends:
                done.append(ask(next(asked)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    sizes: list[float] = []
    interval = max(5.0, 3 * minutes)  # seconds, so that there are twenty lines
    while any(thread.is_alive() for thread in threads):
        sizes.append(process.memory_info().rss / 2**20)
        left = (ends - time.monotonic()) / 60
        print(
            f"{minutes - left:6.1f} min {len(done):6} answers {sizes[-1]:8.0f} MiB {process.num_threads():4} threads",
            flush=True,
        )
        for thread in threads:
            thread.join(interval / callers)
    if failures:
        raise failures[0]
    warm = sizes[len(sizes) // 5 :]
    print(f"{len(done)} answers: {warm[0]:.0f} MiB when warm, {max(warm):.0f} at most, {warm[-1]:.0f} at the end")


def describe(name: str, answers: list[Answer], wall: float, cpu: float) -> None:
    amount = sum(answer.amount for answer in answers)
    speed = f"{amount / wall:8.1f} /s {amount / cpu:8.1f} /CPU s"
    print(f"{name:20} {len(answers):4} answers {amount:8.0f} {wall:7.1f} s {speed}")
    times = [answer.first_audio for answer in answers], [answer.first_audio_cpu for answer in answers]
    for kind, firsts in zip(("wall", "CPU"), times, strict=True):
        if known := [seconds for seconds in firsts if seconds is not None]:
            median, late = np.percentile(known, [50, 95])
            print(f"    first audio after {median:.2f} s (median), {late:.2f} s (95th) by {kind}", flush=True)


def seconds_of(thread: threading.Thread) -> float:
    """How long a thread of this process has been on the CPU."""
    (found,) = (one for one in psutil.Process().threads() if one.id == thread.native_id)
    return found.user_time + found.system_time


def load(arguments: Arguments) -> tuple[TttForConditionalGeneration, TttProcessor, list[torch.Tensor]]:
    model = TttForConditionalGeneration.from_pretrained(arguments.model).eval().to(arguments.device)
    processor = TttProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    prompts = [processor(text=line, task="tts")["input_ids"] for line in LINES]
    prompts.append(processor(audio=str(ROOT / "tests" / "fixtures" / "question.wav"))["input_ids"])
    return model, processor, prompts


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if arguments.url is not None:
        if arguments.soak is not None:
            soak(arguments, ask_server(arguments.url))
            return
        for callers in arguments.callers:
            answers, wall, _ = run_callers(arguments.requests, callers, ask_server(arguments.url))
            describe(f"{callers} callers, HTTP", answers, wall, wall)
        return
    torch.set_num_threads(arguments.threads)
    model, processor, prompts = load(arguments)
    if arguments.soak is not None:
        with Engine(model, processor, max_rows=arguments.max_rows) as engine:
            soak(arguments, ask_engine(engine, prompts, arguments.max_new_tokens, sessions=True))
        return
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
            threads = [engine._thread, engine._answers._thread]
            starts = [seconds_of(thread) for thread in threads]
            answers, wall, cpu = run_callers(arguments.requests, callers, ask)
            after = engine.stats()
            spent = [seconds_of(thread) - start for thread, start in zip(threads, starts, strict=True)]
        describe(f"{callers} callers, {rows} rows", answers, wall, cpu)
        forwards = after.forwards - before.forwards
        print(
            f"    {forwards} forwards, {(after.token_positions - before.token_positions) / forwards:.1f} positions each"
        )
        tokens = sum(answer.amount for answer in answers)
        loop, codec = (1000 * seconds / tokens for seconds in spent)
        print(f"    CPU of a token: {loop:.2f} ms in the decoding loop, {codec:.2f} ms for text and speech of it")
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
