"""Speaks the domain of ttt-tiny: training speech in shards, held-out speech as FLAC files with JSONL lists.

    python training_examples/ttt_tiny/build_speech.py --output_dir data/ttt_tiny

Needs eSpeak NG and Flite (`apt-get install libespeak-ng1 espeak-ng-data libflite1`). About 30,000 assistant sentences
and 55,000 questions and dictations took 27 minutes on two busy cores; `--evaluation_only` speaks the held-out lists
alone. A shard is written whole or not at all, so a killed run goes on where it stopped. Sentences, voices, speeds and
pitches are drawn from `--seed`; the synthesisers add noise of their own, so samples differ from run to run.
"""

import random
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import HfArgumentParser

from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.speech import speak_list, to_int16, write_shard
from training_examples.ttt_tiny.synthesis import (
    ASSISTANT_VOICE,
    TRAINED_VOICES,
    UNHEARD_NATURAL_VOICE,
    UNHEARD_VOICES,
    Delivery,
    random_delivery,
    speak,
)


@dataclass
class BuildArguments:
    output_dir: Path = field(default=Path("data/ttt_tiny"), metadata={"help": "Where the speech goes."})
    sequences: int = field(default=26_000, metadata={"help": "Random word sequences in the assistant's voice."})
    questions: int = field(default=40_000, metadata={"help": "Spoken questions in many voices."})
    dictations: int = field(default=15_000, metadata={"help": "Random word sequences in many voices, for recognition."})
    eval_items: int = field(default=300, metadata={"help": "Held-out items per evaluation list."})
    development_items: int = field(default=100, metadata={"help": "Held-out items per development list."})
    shard_size: int = field(default=500, metadata={"help": "Sentences per shard."})
    evaluation_only: bool = field(default=False, metadata={"help": "Speak the held-out lists, not the training data."})
    workers: int = field(default=2, metadata={"help": "Processes that speak side by side."})
    seed: int = field(default=0, metadata={"help": "Seed of every draw."})


def plan_training(args: BuildArguments) -> dict[str, list[dict]]:
    """Lists every training utterance: `assistant` rows (text, delivery), `questions` rows (with answer and kind)."""
    rng = random.Random(args.seed)
    items = domain.sample_items(rng, args.questions, held_out=False)
    questions = [
        {
            "text": item.question,
            "answer": item.answer,
            "kind": item.kind,
            **asdict(random_delivery(rng, TRAINED_VOICES)),
        }
        for item in items
    ]
    for words in domain.sample_sequences(rng, args.dictations, held_out=False, shortest=1, longest=7):
        questions.append(
            {"text": words, "answer": None, "kind": "dictation", **asdict(random_delivery(rng, TRAINED_VOICES))}
        )
    rng.shuffle(questions)
    answers = {item.answer for item in domain.fixed_items()} | {item.answer for item in items}
    sequences = domain.sample_sequences(rng, args.sequences, held_out=False, shortest=1, longest=9)
    texts = sorted(answers | set(sequences))
    rng.shuffle(texts)
    return {
        "questions": questions,
        "assistant": [{"text": text, **asdict(Delivery(ASSISTANT_VOICE))} for text in texts],
    }


def plan_evaluation(args: BuildArguments) -> dict[str, list[dict]]:
    """Lists the held-out items: none of their sentences is in the training plan.

    The evaluation lists give the figures that are published. Choices (of a checkpoint, of decoding options) are made on
    the `development_*` lists, drawn from a seed of their own: none shares a sentence with the evaluation list it
    stands for. The held-out questions are too few to be disjoint from all evaluation lists at once.
    """
    rng = random.Random(args.seed + 1)
    heard = {"seen": TRAINED_VOICES, "unheard": UNHEARD_VOICES, "unheard_natural": [UNHEARD_NATURAL_VOICE]}
    plan: dict[str, list[dict]] = {}
    for name, voices in heard.items():
        plan[f"spoken_qa_{name}"] = _spoken_questions(rng, args.eval_items, voices)
        plan[f"asr_{name}"] = _dictations(rng, args.eval_items, voices)
    plan["text_qa"] = [
        {"task": "text_qa", "question": item.question, "answer": item.answer, "kind": item.kind, "seen_voice": True}
        for item in domain.sample_items(rng, args.eval_items, held_out=True)
    ]
    plan["tts"] = _texts_to_read(rng, args.eval_items)
    # Answers whose text the audio tokenizer never heard: train_codec.py leaves out every held-out sentence.
    answers = sorted({item.answer for item in domain.fixed_items() if domain.is_held_out(item.answer)})
    repeats = domain.sample_sequences(rng, args.eval_items - len(answers), held_out=True, shortest=2, longest=5)
    plan["codec_answers"] = [
        {"task": "codec", "question": "", "answer": text, "kind": "answer", "seen_voice": True}
        for text in [*answers, *repeats[: args.eval_items // 10]]
    ]

    rng = random.Random(args.seed + 2)
    taken = {name: {row["question"] or row["answer"] for row in rows} for name, rows in plan.items()}
    count = args.development_items
    plan["development_spoken_qa_seen"] = _spoken_questions(rng, count, TRAINED_VOICES, taken["spoken_qa_seen"])
    plan["development_asr_seen"] = _dictations(rng, count, TRAINED_VOICES, taken["asr_seen"])
    plan["development_tts"] = _texts_to_read(rng, count, taken["tts"])
    return plan


def _spoken_questions(
    rng: random.Random, count: int, voices: Sequence[str], excluded: Collection[str] = ()
) -> list[dict]:
    return [
        {"task": "spoken_qa", "question": item.question, "answer": item.answer, "kind": item.kind}
        | {"seen_voice": voices == TRAINED_VOICES, **asdict(random_delivery(rng, voices))}
        for item in domain.sample_items(rng, count, held_out=True, excluded=excluded)
    ]


def _dictations(rng: random.Random, count: int, voices: Sequence[str], excluded: Collection[str] = ()) -> list[dict]:
    """Two thirds questions of the domain, one third random word sequences."""
    questions = domain.sample_items(rng, count * 2 // 3, held_out=True, excluded=excluded)
    sequences = domain.sample_sequences(rng, count - len(questions), held_out=True, longest=6, excluded=excluded)
    sentences = [*(("question", item.question) for item in questions), *(("random", words) for words in sequences)]
    return [
        {"task": "asr", "question": "", "answer": text, "kind": kind}
        | {"seen_voice": voices == TRAINED_VOICES, **asdict(random_delivery(rng, voices))}
        for kind, text in sentences
    ]


def _texts_to_read(rng: random.Random, count: int, excluded: Collection[str] = ()) -> list[dict]:
    return [
        {"task": "tts", "question": "", "answer": words, "kind": "random", "seen_voice": True}
        for words in domain.sample_sequences(rng, count, held_out=True, excluded=excluded)
    ]


def speak_shard(path: Path, rows: list[dict]) -> Path:
    """Speak `rows` into one shard."""
    waves = [to_int16(speak(row["text"], Delivery(row["voice"], row["rate"], row["pitch"]))) for row in rows]
    write_shard(path, rows, waves)
    return path


def main() -> None:
    (args,) = HfArgumentParser(BuildArguments).parse_args_into_dataclasses()
    speech, evaluation = args.output_dir / "speech", args.output_dir / "eval"
    for folder in (speech, evaluation):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for name, rows in ({} if args.evaluation_only else plan_training(args)).items():
        for index in range(0, len(rows), args.shard_size):
            jobs.append(
                (
                    index,
                    speech / f"{name}-{index // args.shard_size:04d}.safetensors",
                    rows[index : index + args.shard_size],
                )
            )
    jobs.sort(key=lambda job: job[0])  # both kinds grow together, so training may begin before all is spoken
    with ProcessPoolExecutor(args.workers) as pool:
        pending = [pool.submit(speak_shard, path, rows) for _, path, rows in jobs if not path.exists()]
        lists = [pool.submit(speak_list, evaluation, name, rows) for name, rows in plan_evaluation(args).items()]
        for job in tqdm(pending + lists, desc="speaking", unit="shard"):
            job.result()
    (args.output_dir / "README.txt").write_text("Made by training_examples/ttt_tiny/build_speech.py; see its help.\n")


if __name__ == "__main__":
    main()
