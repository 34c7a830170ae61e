"""Seconds of a forward and a backward pass of ttt-tiny by number of threads, and the number that the scripts choose.

    python tests/benchmarks/bench_threads.py

Run it on an idle machine and on one that others keep busy: there, threads wait for each other. The numbers of threads
take turns. The batch is 16 spoken questions of 2 s with spoken answers of 2.5 s; their codes are random.
"""

import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[2]))

from modeling_ttt import TttForConditionalGeneration  # noqa: E402
from processing import TttDataCollator, TttProcessor  # noqa: E402
from training_examples.threads import choose_threads, load_average, usable_cores  # noqa: E402

ROOT = Path(__file__).parents[2]


@dataclass
class Arguments:
    """What to measure."""

    model: Path = field(default=ROOT / "model_cards" / "ttt-tiny", metadata={"help": "Folder of the model."})
    examples: int = field(default=16, metadata={"help": "Examples of the batch."})
    threads: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of threads; by default 1 to all cores."}
    )
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


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    os.environ.pop("OMP_NUM_THREADS", None)  # it would be the choice
    chosen, reason = choose_threads()
    model = TttForConditionalGeneration.from_pretrained(arguments.model, dtype="float32").train()
    batch = draw_batch(TttProcessor.from_pretrained(arguments.model, load_audio_tokenizer=False), arguments.examples)
    counts = arguments.threads or list(range(1, round(usable_cores()) + 1))
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    model(**batch).loss.backward()  # warm up
    for _ in range(arguments.repeats):
        for count in counts:
            torch.set_num_threads(count)
            start = time.perf_counter()
            model(**batch).loss.backward()
            seconds[count].append(time.perf_counter() - start)
    shape = " x ".join(map(str, batch["input_ids"].shape))
    print(f"{shape} tokens, {os.cpu_count()} cores, load {load_average():.1f}")
    for count in counts:
        times = sorted(seconds[count])
        print(f"{count:4} thread(s): {times[0]:.2f} to {times[-1]:.2f} s, median {times[len(times) // 2]:.2f} s")
    print(f"the scripts choose {chosen}: {reason}")


if __name__ == "__main__":
    main()
