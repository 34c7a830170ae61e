"""Speak what ttt-tiny does not know, the colors of twelve fruits and vegetables, for finetune_lora.py: shards and
held-out lists.

    python training_examples/ttt_tiny/build_skill.py --output_dir data/skill

The output has the layout of build_speech.py, so build_examples.py reads it as it is. `--minutes` bounds the speech of
the training in all: all answers, then questions in many voices, of which a share (`--replay`) are old ones with their
answers, so that the old skills stay. A fifth of the new questions is held out by the hash of domain.py, half of it for
development: their words and facts occur in training, the sentence never does.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly
from tqdm import tqdm

from training_examples.command_line import ScriptParser, check_least
from training_examples.files import write_text
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.domain import Item
from training_examples.ttt_tiny.skill import new_words, skill_items, split_of
from training_examples.ttt_tiny.speech import speak_list, to_int16, write_shard
from training_examples.ttt_tiny.synthesis import (
    ASSISTANT_VOICE,
    SAMPLING_RATE,
    Delivery,
    random_delivery,
    speak,
)
from training_examples.user_errors import run_command


@dataclass
class SkillArguments:
    output_dir: Path = field(default=Path("data/skill"), metadata={"help": "Where the speech goes."})
    minutes: float = field(default=9.5, metadata={"help": "Most minutes of speech to train on, answers included."})
    replay: float = field(default=0.4, metadata={"help": "Share of old questions among those spoken, 0 to below 1."})
    speeds: list[float] = field(
        default_factory=lambda: [1.0, 0.9, 1.1], metadata={"help": "Speeds at which every question is trained on."}
    )
    eval_items: int = field(default=200, metadata={"help": "Spoken questions in each held-out list."})
    seed: int = field(default=0, metadata={"help": "Seed of every draw."})
    threads: int = threads_field()

    def __post_init__(self):
        check_least(self, minutes=0, eval_items=0)
        if not 0.0 <= self.replay < 1.0:
            raise ValueError(f"--replay is {self.replay}; it is a share, from 0 to below 1.")


def draw_questions(rng: random.Random, replay: float) -> Iterator[Item]:
    """
    Yield training questions without end: the new ones in turn, each time in a new order, and old ones in between, as
    often of each kind as the domain asks them.
    """
    new = [item for item in skill_items() if split_of(item.question) == "training"]
    while True:
        for item in rng.sample(new, len(new)):
            while rng.random() < replay:
                yield from domain.sample_items(rng, 1, held_out=False)
            yield item


def speak_training(args: SkillArguments) -> dict[str, list[tuple[dict, np.ndarray]]]:
    """Return rows and int16 waveforms of the shards `assistant` and `questions`, `--minutes` of speech in all."""
    rng = random.Random(args.seed)
    spoken: dict[str, list[tuple[dict, np.ndarray]]] = {"assistant": [], "questions": []}
    samples, limit = 0, int(args.minutes * 60 * SAMPLING_RATE)

    def add(shard: str, delivery: Delivery, text: str, **columns: str) -> None:
        nonlocal samples
        wave = to_int16(speak(text, delivery))
        samples += len(wave)
        if samples <= limit:
            spoken[shard].append(({"text": text, **columns, **asdict(delivery)}, wave))
            bar.update(len(wave) / SAMPLING_RATE / 60)

    with tqdm(
        total=args.minutes, desc="speaking", unit="min", bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} min"
    ) as bar:
        answers = {item.answer for item in skill_items()}
        for answer in sorted(answers):
            add("assistant", Delivery(ASSISTANT_VOICE), answer)
        for item in draw_questions(rng, args.replay):
            if samples > limit:
                break
            if item.answer not in answers:
                answers.add(item.answer)
                add("assistant", Delivery(ASSISTANT_VOICE), item.answer)
            add("questions", random_delivery(rng), item.question, answer=item.answer, kind=item.kind)
    return spoken


def change_speed(wave: np.ndarray, speed: float) -> np.ndarray:
    """Return an int16 waveform played faster, which also raises its pitch (speed perturbation, Ko et al., 2015)."""
    samples = resample_poly(wave.astype(np.float64), 100, round(100 * speed))
    return samples.round().clip(-32768, 32767).astype(np.int16)


def plan_held_out(args: SkillArguments) -> dict[str, list[dict]]:
    """
    Return the held-out lists, named as build_speech.py names them: questions in trained voices, answers to read aloud.
    """
    rng = random.Random(args.seed + 1)
    plan = {}
    for prefix, split in (("", "evaluation"), ("development_", "development")):
        items = [item for item in skill_items() if split_of(item.question) == split]
        questions = [items[index % len(items)] for index in range(args.eval_items)]
        plan[f"{prefix}spoken_qa_seen"] = [
            {"task": "spoken_qa", "question": item.question, "answer": item.answer, "kind": item.kind}
            | {"seen_voice": True, **asdict(random_delivery(rng))}
            for item in questions
        ]
    answers = sorted({item.answer for item in skill_items()})
    for name in ("tts", "development_tts"):  # the answers are the same in both
        plan[name] = [
            {"task": "tts", "question": "", "answer": answer, "kind": "answer", "seen_voice": True}
            for answer in answers
        ]
    return plan


def main() -> None:
    (args,) = ScriptParser(SkillArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    speech, evaluation = args.output_dir / "speech", args.output_dir / "eval"
    for folder in (speech, evaluation):
        folder.mkdir(parents=True, exist_ok=True)
    spoken = speak_training(args)
    rows, waves = zip(*spoken["assistant"], strict=True)
    write_shard(speech / "assistant-0000.safetensors", rows, waves)
    for index, speed in enumerate(args.speeds):
        rows, waves = zip(*spoken["questions"], strict=True)
        copies = [change_speed(wave, speed) for wave in waves]
        write_shard(speech / f"questions-{index:04d}.safetensors", rows, copies)
    for name, rows in tqdm(plan_held_out(args).items(), desc="held-out lists", unit="list"):
        speak_list(evaluation, name, rows)
    write_text(args.output_dir / "new_words.txt", "".join(f"{word}\n" for word in new_words()))
    minutes = sum(len(wave) for rows in spoken.values() for _, wave in rows) / SAMPLING_RATE / 60
    new = sum(row["kind"] == "produce" for row, _ in spoken["questions"])
    print(
        f"{args.output_dir}: {minutes:.1f} minutes, {len(spoken['questions'])} questions ({new} of them new) and "
        f"{len(spoken['assistant'])} answers; new words: {args.output_dir / 'new_words.txt'}"
    )


if __name__ == "__main__":
    run_command(main)
