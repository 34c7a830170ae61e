"""Seconds of a training pass and of a spoken answer of ttt-tiny by number of threads, and the number that the training
scripts choose.

    python tests/benchmarks/bench_threads.py
    python tests/benchmarks/bench_threads.py --busy 1                        # another process keeps a core busy
    GOMP_SPINCOUNT=1000 python tests/benchmarks/bench_threads.py --busy 1    # as ttt-talk and ttt-serve set it

Threads that share their cores with other processes wait for each other. The numbers of threads take turns. The training
pass is a forward and a backward one over 16 spoken questions of 2 s with spoken answers of 2.5 s; their codes are
random. The answer is that to tests/fixtures/question.wav, 1.8 s of speech.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))

from modeling_ttt import TttForConditionalGeneration  # noqa: E402
from pipelines import TttAudioToAudioPipeline  # noqa: E402
from processing import TttDataCollator, TttProcessor  # noqa: E402
from training_examples.threads import choose_threads, load_average, usable_cores  # noqa: E402

ROOT = Path(__file__).parents[2]
QUESTION = str(ROOT / "tests" / "fixtures" / "question.wav")


@dataclass
class Arguments:
    """What to measure."""

    model: Path = field(default=ROOT / "model_cards" / "ttt-tiny", metadata={"help": "Folder of the model."})
    examples: int = field(default=16, metadata={"help": "Examples of the training pass."})
    threads: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of threads; by default 1 to all cores."}
    )
    busy: int = field(default=0, metadata={"help": "Processes that keep a core busy meanwhile."})
    repeats: int = field(default=5, metadata={"help": "Timed passes with each number of threads."})


def draw_batch(processor: TttProcessor, number: int) -> dict[str, torch.Tensor]:
    """A batch of spoken questions and answers of one length."""
    rng, codes = random.Random(0), processor.token_ids.num_audio_codes
    heard, spoken = ([[rng.randrange(codes) for _ in range(length)] for _ in range(number)] for length in (25, 31))
    examples = [
        processor.build_example("seven plus eight is fifteen", answer, task="spoken_qa", audio_codes=question)
        for question, answer in zip(heard, spoken, strict=True)
    ]
    return TttDataCollator(processor)(examples)


@contextmanager
def neighbours(number: int):
    """Keep as many cores busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def take_turns(work: Callable[[], object], counts: list[int], repeats: int) -> None:
    """Print how long some work takes with each number of threads."""
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    work()  # warm up
    for _ in range(repeats):
        for count in counts:
            torch.set_num_threads(count)
            start = time.perf_counter()
            work()
            seconds[count].append(time.perf_counter() - start)
    for count in counts:
        times = sorted(seconds[count])
        print(f"{count:4} thread(s): {times[0]:.2f} to {times[-1]:.2f} s, median {times[len(times) // 2]:.2f} s")


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    os.environ.pop("OMP_NUM_THREADS", None)  # it would be the choice
    chosen, reason = choose_threads()
    processor = TttProcessor.from_pretrained(arguments.model)
    model = TttForConditionalGeneration.from_pretrained(arguments.model, dtype="float32")
    pipe = TttAudioToAudioPipeline(model=model, processor=processor, device="cpu")
    batch = draw_batch(processor, arguments.examples)
    counts = arguments.threads or list(range(1, round(usable_cores()) + 1))
    print(f"{os.cpu_count()} cores, load {load_average():.1f}; GOMP_SPINCOUNT {os.environ.get('GOMP_SPINCOUNT', '-')}")
    with neighbours(arguments.busy):
        print(f"a training pass over {' x '.join(map(str, batch['input_ids'].shape))} tokens")
        model.train()
        take_turns(lambda: model(**batch).loss.backward(), counts, arguments.repeats)
        print("a spoken answer")
        model.eval()
        take_turns(lambda: pipe(QUESTION), counts, arguments.repeats)
    print(f"the training scripts choose {chosen}: {reason}")


if __name__ == "__main__":
    main()
