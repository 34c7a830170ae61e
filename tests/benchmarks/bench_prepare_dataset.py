"""Speed of the data script: hours of audio per minute of one core, from FLAC files to training examples.

    python tests/benchmarks/bench_prepare_dataset.py            # speech of data/ttt_tiny/eval, else spoken by eSpeak NG
    python tests/benchmarks/bench_prepare_dataset.py --model MODEL --device cuda

Short clips are measured as they are and joined to longer recordings, for what an example costs beside its audio weighs
more on short ones. Time is that of the processor, so other work on the machine counts little; on a GPU, read the other
column. Loading the model is left out.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from datasets import disable_progress_bars
from transformers import HfArgumentParser

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from training_examples.preparation import preparing  # noqa: E402


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(default=str(ROOT / "model_cards" / "ttt-tiny"), metadata={"help": "TtT checkpoint."})
    speech: Path = field(
        default=Path("data/ttt_tiny/eval/spoken_qa_seen.jsonl"), metadata={"help": "List of `audio` and `question`."}
    )
    clips: int = field(default=300, metadata={"help": "Clips to use."})
    joined: list[int] = field(default_factory=lambda: [1, 5], metadata={"help": "Clips joined to one recording."})
    tasks: list[str] = field(default_factory=lambda: ["asr"], metadata={"help": "Tasks made of each recording."})
    batch_size: int = field(default=16, metadata={"help": "Recordings encoded at once."})
    device: str = field(default="cpu", metadata={"help": "Where audio is encoded."})
    threads: int = field(default=1, metadata={"help": "CPU threads."})


def read_clips(arguments: Arguments) -> list[tuple[np.ndarray, str]]:
    """Waveforms at 16 kHz with their words."""
    from training_examples.ttt_tiny import domain, speech, synthesis

    if arguments.speech.is_file():
        rows = [json.loads(line) for line in arguments.speech.read_text().splitlines()[: arguments.clips]]
        waves = [speech.read_audio(arguments.speech.parent, row["audio"], 16_000) for row in rows]
        texts = [row["question"] or row["answer"] for row in rows]
        return [(speech.to_int16(wave), text) for wave, text in zip(waves, texts, strict=True)]
    print(f"{arguments.speech} is not there: eSpeak NG speaks.")
    texts = [item.question for item in domain.fixed_items()][: arguments.clips]
    waves = [speech.to_int16(synthesis.speak(text, "espeak:en-us")) for text in texts]
    rate = synthesis.SAMPLING_RATE
    return [(speech.resample_int16(wave, rate, 16_000), text) for wave, text in zip(waves, texts, strict=True)]


def write_recordings(clips: list[tuple[np.ndarray, str]], joined: int, folder: Path) -> Path:
    rows = []
    for first in range(0, len(clips), joined):
        some = clips[first : first + joined]
        rows.append({"audio": f"{first}.flac", "text": " ".join(text for _, text in some)})
        soundfile.write(folder / f"{first}.flac", np.concatenate([samples for samples, _ in some]), 16_000)
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "list.jsonl"


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    spent = {"processor": 0.0, "clock": 0.0}
    finish = preparing.finish

    def timed(*shard):
        processor, clock = time.process_time(), time.perf_counter()
        report = finish(*shard)
        spent["processor"] += time.process_time() - processor
        spent["clock"] += time.perf_counter() - clock
        return report

    preparing.finish = timed
    clips = read_clips(arguments)
    print(f"{arguments.model}, {', '.join(arguments.tasks)}, {arguments.device}, {arguments.threads} thread(s)")
    print("seconds per recording | hours per minute of one core | hours per minute of the clock")
    for joined in [arguments.joined[0], *arguments.joined]:  # the first time warms up
        with tempfile.TemporaryDirectory() as folder:
            source = write_recordings(clips, joined, Path(folder))
            spent.update(dict.fromkeys(spent, 0.0))
            summary = preparing.prepare(
                preparing.PrepareArguments(
                    model=arguments.model,
                    output_dir=Path(folder) / "out",
                    source=[str(source)],
                    tasks=arguments.tasks,
                    batch_size=arguments.batch_size,
                    device=arguments.device,
                    streaming=True,
                )
            )
        hours = summary["audio_hours"]
        rates = [hours / (spent[name] / 60) for name in ("processor", "clock")]
        print(f"{hours * 3600 / summary['records']:.1f} | {rates[0]:.2f} | {rates[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
