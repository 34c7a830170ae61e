"""Measure what the study needs once: what every arm costs, alone on the machine and one answer at a time, and how the
judges hear the recorded answers, as they are and through the audio tokenizer. run_study.py calls it at the end.

    python training_examples/study/measure_once.py --study runs/study --recogniser whisper:base

Writes once/once-SPLIT.json. Seconds depend on the machine, so all of them are taken in one process, arm after arm.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import torch

from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.backends import Answer, Sample, TttBackend
from training_examples.evaluation.listening import open_listener
from training_examples.evaluation.rows import EvaluationError, Listener, Run
from training_examples.files import write_json
from training_examples.study.arms import ARMS, setting_name
from training_examples.study.counting import count_speech
from training_examples.study.lists import LISTS, SPLITS, choose_lists, hash_lists, list_path
from training_examples.study.samples import read_samples
from training_examples.threads import threads_field, use_threads
from training_examples.user_errors import run_command


@dataclass
class OnceArguments:
    study: Path = field(metadata={"help": "Output of run_study.py."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Arms whose cost is measured."})
    seed: int = field(default=0, metadata={"help": "Of the runs that answer."})
    data_dir: Path = field(default=Path("data/ttt_tiny/eval"), metadata={"help": "Folder of the held-out lists."})
    split: str = field(default="evaluation", metadata={"help": "Which lists.", "choices": SPLITS})
    lists: list[str] = field(default_factory=list, metadata={"help": "Which of them; all of the split by default."})
    recogniser: list[str] = field(default_factory=list, metadata={"help": "Who listens, see evaluate_model.py."})
    limit: int = field(default=60, metadata={"help": "Recordings of each list that are listened to."})
    cost_rows: int = field(default=8, metadata={"help": "Answers that the cost of a setting is measured on."})
    device: str = field(default="cpu", metadata={"help": "Where the models answer."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, limit=1, cost_rows=1)


class Recordings:
    """
    Answers with what was recorded.

    Args:
        codec (`TttBackend`, *optional*): the model through whose audio tokenizer the recordings go.
    """

    def __init__(self, codec: TttBackend | None = None):
        self.codec, self.name = codec, "through the audio tokenizer" if codec else "recordings"
        self.settings: Mapping[str, Any] = {"codec": codec.settings["model"] if codec else None}

    def answer(self, samples: Sequence[Sample], task: str) -> list[Answer]:
        """Return the references with their recordings."""
        answers = []
        for sample in samples:
            wave, rate = soundfile.read(sample.details["answer_audio"], dtype="float32")
            if self.codec is not None:
                processor = self.codec.processor
                (wave,) = processor.decode_audio(processor.encode_audio([wave], rate))
                rate = processor.sampling_rate
            answers.append(Answer(sample.references[0], wave, rate))
        return answers


@torch.no_grad()
def cost_of(backend: TttBackend, samples: Sequence[Sample], task: str) -> list[dict[str, float]]:
    """
    Answer samples one by one; return for each how many `seconds` the model took, without its audio tokenizer, for how
    many seconds of speech (`duration`) and `codes`, in how many `forwards` over how many token `positions`.
    """
    rate = backend.processor.audio_format.frame_rate * backend.processor.num_codebooks
    costs = []
    for sample in [samples[0], *samples]:  # the first once more: it warms up
        inputs = backend.pipe.ensure_tensor_on_device(**backend.pipe.preprocess([backend.messages(sample, task)]))
        prompt = inputs["input_ids"].shape[1]
        begin = time.perf_counter()
        output = backend.pipe.model.generate(**inputs, **backend.generation, return_dict_in_generate=True)
        sequences = output.sequences.cpu()  # a GPU has ended only then
        seconds = time.perf_counter() - begin
        codes = len(backend.processor.post_process(sequences, prompt, decode_audio=False)[0]["audio_codes"])
        written = sequences.shape[1] - prompt
        forwards, positions = getattr(output, "num_forwards", None), getattr(output, "num_token_positions", None)
        if forwards is None:  # left to right, every token takes a forward, and the first one that of the prompt
            forwards, positions = written, prompt + written - 1
        costs.append({"seconds": seconds, "duration": codes / rate, "codes": codes})
        costs[-1] |= {"forwards": forwards, "positions": positions}
    return costs[1:]


def measure_cost(args: OnceArguments) -> dict[str, Any]:
    """Return the cost of reading texts aloud, by arm and setting."""
    found: dict[str, Any] = {}
    samples = read_samples(args.data_dir, args.split, "tts", args.cost_rows)
    for name in args.arms:
        backend = TttBackend(str(args.study / f"{name}-{args.seed}" / "train"), args.device)
        for setting in ARMS[name].settings:
            costs = cost_of(backend.with_generation(**setting), samples, "tts")
            found.setdefault(name, {})[setting_name(setting)] = costs
            print(f"{name} {setting_name(setting)}: {costs[0]}", flush=True)
    return found


def measure_recordings(args: OnceArguments, names: Sequence[str], listeners: Sequence[Listener]) -> dict[str, Any]:
    """Return what the recorded answers count, as they are and through the audio tokenizer, by list."""
    codec = TttBackend(str(args.study / f"{args.arms[0]}-{args.seed}" / "train"), args.device)
    found: dict[str, Any] = {}
    for backend in (Recordings(), Recordings(codec)):
        for name in names:
            samples = read_samples(args.data_dir, args.split, name, args.limit)
            if not LISTS[name].spoken or not all(sample.details["answer_audio"] for sample in samples):
                continue
            title = f"{list_path(args.data_dir, args.split, name).stem}-{'codec' if backend.codec else 'original'}"
            run = Run(args.study / "recordings", title, LISTS[name].task, samples, backend.settings)
            rows = run.answer(backend, 16)
            if failed := [row for row in rows if "error" in row]:
                raise EvaluationError(f"{len(failed)} recordings cannot be read, the first: {failed[0]['error']}")
            heard = {listener.name: run.listen(listener) for listener in listeners}
            found.setdefault(backend.name, {})[name] = count_speech(rows, LISTS[name].task, heard)
    return found


def main() -> None:
    (args,) = ScriptParser(OnceArguments, __doc__).parse_args_into_dataclasses()
    threads = use_threads(args.threads)
    listeners = [open_listener(name, device=args.device, threads=threads) for name in args.recogniser]
    names = choose_lists(args.data_dir, args.split, args.lists)
    content = {
        "split": args.split,
        "lists": hash_lists(args.data_dir, args.split, names, args.limit),
        "threads": threads,
        "device": args.device,
        "cost": measure_cost(args) if "tts" in names else {},
        "recordings": measure_recordings(args, names, listeners),
    }
    write_json(args.study / "once" / f"once-{args.split}.json", content)


if __name__ == "__main__":
    run_command(main)
