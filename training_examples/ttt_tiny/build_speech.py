"""Speaks the domain of ttt-tiny: training speech in shards, held-out speech as FLAC files with JSONL lists.

    KOKORO_DIR=data/voices/kokoro python training_examples/ttt_tiny/build_speech.py --output_dir data/ttt_tiny

Needs Kokoro-82M (see README.md beside this file), `onnxruntime`, and eSpeak NG and Flite (`apt-get install
libespeak-ng1 espeak-ng-data libflite1`). The development lists are spoken first, which training needs; then the
training shards, in an order in which everything spoken so far is a balanced set at any time: training may begin before
the end; last the evaluation lists (`--evaluation_only` speaks the held-out lists alone). A shard is written whole or
not at all, so a killed run goes on where it stopped. Sentences, voices, speeds and pitches are drawn from `--seed`; the
synthesisers add noise of their own, so samples differ from run to run.
"""

import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from training_examples.command_line import ScriptParser, check_least
from training_examples.files import write_text
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny import domain, other_sentences
from training_examples.ttt_tiny.augmentation import NO_SPEECH
from training_examples.ttt_tiny.speech import pair_turns, read_list, speak_list, speak_row, to_int16, write_shard
from training_examples.ttt_tiny.synthesis import (
    ASSISTANT_VOICE,
    UNHEARD_NATURAL_VOICE,
    UNHEARD_VOICES,
    Delivery,
    random_delivery,
)
from training_examples.user_errors import run_command
from training_examples.workers import worker_pool

DIGITS = domain.NUMBERS[:10]
# What one voice says word by word, so that strings and sums can be spliced of it; some other words come with them.
LONE_WORDS, OTHER_LONE_WORDS = [*DIGITS, "plus", "minus"], 3


@dataclass
class BuildArguments:
    output_dir: Path = field(default=Path("data/ttt_tiny"), metadata={"help": "Where the speech goes."})
    assistant: int = field(default=20_000, metadata={"help": "Texts in the assistant's voice, fixed answers included."})
    questions: int = field(default=12_500, metadata={"help": "Spoken questions of the domain in many voices."})
    dictations: int = field(default=5_250, metadata={"help": "Random word sequences in many voices, for recognition."})
    digits: int = field(default=1_500, metadata={"help": "Strings of digits in many voices."})
    words: int = field(default=2_250, metadata={"help": "Words said alone: digits, signs and 3 others in each voice."})
    others: int = field(default=3_500, metadata={"help": "Sentences outside the domain in many voices."})
    eval_items: int = field(default=300, metadata={"help": "Held-out items per evaluation list."})
    development_items: int = field(default=100, metadata={"help": "Held-out items per development list."})
    shard_size: int = field(default=250, metadata={"help": "Sentences per shard."})
    evaluation_only: bool = field(default=False, metadata={"help": "Speak the held-out lists, not the training data."})
    workers: int = field(default=1, metadata={"help": "Processes that speak side by side, one thread each."})
    seed: int = field(default=0, metadata={"help": "Seed of every draw."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, assistant=0, questions=0, dictations=0, digits=0, words=0, others=0)
        check_least(self, eval_items=0, development_items=0, shard_size=1, workers=1)


def plan_training(args: BuildArguments) -> dict[str, list[dict]]:
    """
    List every training utterance in the order of speaking.

    Returns:
        `dict[str, list[dict]]`: `questions`, rows with `text`, `answer` (None where there is only something to
            recognise), `kind` and the delivery's fields; and `assistant`, rows with `text` and the delivery's: the
            answers of the domain first, then those of the requests to repeat, then lists of content words and
            recombined answers.
    """
    rng = random.Random(args.seed)
    items = domain.sample_items(rng, args.questions, held_out=False)
    heard: list[tuple[str, str, str | None]] = [(item.kind, item.question, item.answer) for item in items]
    heard += [("dictation", text, None) for text in _random_dictations(rng, args.dictations, held_out=False)]
    heard += [("digits", text, None) for text in _digit_strings(rng, args.digits, held_out=False)]
    known = {item.question for item in domain.fixed_items()}
    others = other_sentences.sample_sentences(rng, args.others, unseen_patterns=False, held_out=False, excluded=known)
    heard += [("other", text, domain.NOT_KNOWN) for text in others]
    questions = [
        {"text": text, "answer": answer, "kind": kind, **asdict(random_delivery(rng, kind=kind))}
        for kind, text, answer in heard
    ]
    questions += _lone_words(rng, args.words)
    rng.shuffle(questions)
    return {
        "questions": questions,
        "assistant": [
            {"text": text, **asdict(Delivery(ASSISTANT_VOICE))} for text in _assistant_texts(rng, args.assistant, items)
        ],
    }


def _lone_words(rng: random.Random, count: int) -> list[dict]:
    """Return single words, group after group in one voice and delivery."""
    others = [word for word in domain.vocabulary() if word not in LONE_WORDS]
    rows: list[dict] = []
    while len(rows) < count:
        delivery = asdict(replace(random_delivery(rng), phrasing="statement"))
        for text in [*LONE_WORDS, *rng.sample(others, OTHER_LONE_WORDS)]:
            rows.append({"text": text, "answer": None, "kind": "word", **delivery})
    return rows[:count]


def _assistant_texts(rng: random.Random, count: int, asked: Sequence[domain.Item]) -> list[str]:
    fixed = {item.answer for item in domain.fixed_items()} | {domain.NOT_HEARD, domain.NOT_KNOWN}
    repeated = {item.answer for item in asked} - fixed
    groups = [sorted(fixed), sorted(repeated)]
    rest: dict[str, None] = {}
    while len(rest) < count - len(fixed) - len(repeated):
        draw = rng.random()
        if draw < 0.75:
            text = domain.random_words(rng, 1, 9, domain.CONTENT)
        elif draw < 0.85:
            text = domain.random_words(rng, 2, 8, DIGITS)
        else:
            text = domain.recombined_answer(rng)
        if not domain.is_held_out(text) and text not in fixed | repeated:
            rest[text] = None
    for group in groups:
        rng.shuffle(group)
    return [*groups[0], *groups[1], *rest]


def _random_dictations(
    rng: random.Random, count: int, held_out: bool, excluded: Collection[str] = (), longest: int = 7
) -> list[str]:
    """Return two thirds sequences of any words of the domain, one third of content words, of 2 words at least."""
    content = count // 3
    texts = domain.sample_sequences(rng, count - content, held_out, 2, longest, excluded)
    return texts + domain.sample_sequences(rng, content, held_out, 2, longest, excluded, domain.CONTENT)


def _digit_strings(rng: random.Random, count: int, held_out: bool, excluded: Collection[str] = ()) -> list[str]:
    return domain.sample_sequences(rng, count, held_out, 2, 7, excluded, words=DIGITS)


def plan_evaluation(args: BuildArguments) -> dict[str, list[dict]]:
    """
    List the held-out items, the development lists first: none of their sentences is in the training plan.

    The evaluation lists give the figures that are published. Choices (of a checkpoint, of decoding options) are made on
    the `development_*` lists, drawn from a seed of their own: none shares a sentence with the evaluation list it
    stands for. The held-out questions are too few to be disjoint from all evaluation lists at once. The voices never
    heard occur in the evaluation lists alone.
    """
    rng = random.Random(args.seed + 1)
    # Trained voices ask as often as in training, so that the figures weigh the engines alike.
    heard = {"seen": None, "unheard": UNHEARD_VOICES, "unheard_natural": (UNHEARD_NATURAL_VOICE,)}
    plan: dict[str, list[dict]] = {}
    for name, voices in heard.items():
        plan[f"spoken_qa_{name}"] = _spoken_questions(rng, args.eval_items, voices)
        plan[f"asr_{name}"] = _dictations(rng, args.eval_items, voices)
    plan["other_seen"] = _others(rng, args.eval_items, None, unseen_patterns=False)
    plan["other_unheard"] = _others(rng, args.eval_items, UNHEARD_VOICES, unseen_patterns=True)
    plan["text_qa"] = [
        {"task": "text_qa", "question": item.question, "answer": item.answer, "kind": item.kind, "seen_voice": True}
        for item in domain.sample_items(rng, args.eval_items, held_out=True)
    ]
    plan["tts"] = _texts_to_read(rng, args.eval_items)
    # Answers whose text the audio tokenizer never heard: train_codec.py leaves out every held-out sentence.
    answers = sorted({item.answer for item in domain.fixed_items() if domain.is_held_out(item.answer)})
    lists = domain.sample_sequences(rng, max(args.eval_items - len(answers), 0), True, 2, 5, words=domain.CONTENT)
    plan["codec_answers"] = [
        {"task": "codec", "question": "", "answer": text, "kind": "answer", "seen_voice": True}
        for text in [*answers, *lists[: args.eval_items // 10]]
    ]

    rng = random.Random(args.seed + 2)
    taken = {name: {row["question"] or row["answer"] for row in rows} for name, rows in plan.items()}
    count = args.development_items
    return {
        "development_spoken_qa_seen": _spoken_questions(rng, count, None, taken["spoken_qa_seen"]),
        "development_asr_seen": _dictations(rng, count, None, taken["asr_seen"]),
        "development_other_seen": _others(rng, count, None, False, taken["other_seen"]),
        "development_tts": _texts_to_read(rng, count, taken["tts"]),
        "development_not_heard": _sounds(args.seed + 4, count),
        **plan,
        "not_heard": _sounds(args.seed + 3, args.eval_items),
    }


def _spoken_questions(
    rng: random.Random, count: int, voices: Sequence[str] | None, excluded: Collection[str] = ()
) -> list[dict]:
    return [
        {"task": "spoken_qa", "question": item.question, "answer": item.answer, "kind": item.kind}
        | {"seen_voice": voices is None, **asdict(random_delivery(rng, voices))}
        for item in domain.sample_items(rng, count, held_out=True, excluded=excluded)
    ]


def _dictations(
    rng: random.Random, count: int, voices: Sequence[str] | None, excluded: Collection[str] = ()
) -> list[dict]:
    """Return one third questions of the domain, one half random word sequences, one sixth strings of digits."""
    questions = [item.question for item in domain.sample_items(rng, count // 3, held_out=True, excluded=excluded)]
    sequences = _random_dictations(rng, count // 2, True, excluded, longest=6)
    digits = _digit_strings(rng, count - len(questions) - len(sequences), True, excluded)
    return [
        {"task": "asr", "question": "", "answer": text, "kind": kind}
        | {"seen_voice": voices is None, **asdict(random_delivery(rng, voices, kind))}
        for kind, texts in (("question", questions), ("dictation", sequences), ("digits", digits))
        for text in texts
    ]


def _others(
    rng: random.Random, count: int, voices: Sequence[str] | None, unseen_patterns: bool, excluded: Collection[str] = ()
) -> list[dict]:
    """Return sentences outside the domain. Those of training patterns are held out by the hash of their text."""
    known = {item.question for item in domain.fixed_items()} | set(excluded)
    sentences = other_sentences.sample_sentences(rng, count, unseen_patterns, held_out=True, excluded=known)
    return [
        {"task": "spoken_qa", "question": text, "answer": domain.NOT_KNOWN, "kind": "other"}
        | {"seen_voice": voices is None, **asdict(random_delivery(rng, voices))}
        for text in sentences
    ]


def _sounds(seed: int, count: int) -> list[dict]:
    """Return sounds in which nobody speaks, of every kind equally often; training draws no seeds as large."""
    rng = random.Random(seed)
    return [
        {"task": "spoken_qa", "question": "", "answer": domain.NOT_HEARD, "kind": NO_SPEECH[index % len(NO_SPEECH)]}
        | {"seen_voice": False, "sound_seed": rng.getrandbits(62) + 2**32, "seconds": round(rng.uniform(0.5, 5.0), 2)}
        for index in range(count)
    ]


def _texts_to_read(rng: random.Random, count: int, excluded: Collection[str] = ()) -> list[dict]:
    sequences = domain.sample_sequences(rng, count, held_out=True, excluded=excluded, words=domain.CONTENT)
    return [{"task": "tts", "question": "", "answer": text, "kind": "random", "seen_voice": True} for text in sequences]


def speak_shard(path: Path, rows: list[dict]) -> Path:
    """Speak `rows` into one shard."""
    write_shard(path, rows, [to_int16(speak_row(row)) for row in rows])
    return path


def training_jobs(args: BuildArguments) -> Iterator[tuple[Path, list[dict]]]:
    """Return the shards that are still to be spoken; both kinds grow together."""
    shards = []
    for name, rows in plan_training(args).items():
        for start in range(0, len(rows), args.shard_size):
            path = args.output_dir / "speech" / f"{name}-{start // args.shard_size:04d}.safetensors"
            shards.append((start / len(rows), path, rows[start : start + args.shard_size]))
    for _, path, rows in sorted(shards, key=lambda shard: shard[:2]):
        if not path.exists():
            yield path, rows


def main() -> None:
    (args,) = ScriptParser(BuildArguments, __doc__).parse_args_into_dataclasses()
    threads = use_threads(args.threads, args.workers)
    for folder in ("speech", "eval"):
        (args.output_dir / folder).mkdir(parents=True, exist_ok=True)
    with worker_pool(args.workers, torch.set_num_threads, (threads,)) as pool:
        lists = list(plan_evaluation(args).items())
        needed = [name.startswith("development_") for name, _ in lists].count(True)
        jobs = [pool.submit(speak_list, args.output_dir / "eval", name, rows) for name, rows in lists[:needed]]
        if not args.evaluation_only:
            jobs += [pool.submit(speak_shard, path, rows) for path, rows in training_jobs(args)]
        jobs += [pool.submit(speak_list, args.output_dir / "eval", name, rows) for name, rows in lists[needed:]]
        for job in tqdm(jobs, desc="speaking", unit="shard", smoothing=0.02):
            job.result()
    for prefix, count in (("", args.eval_items), ("development_", args.development_items)):
        rows = read_list(args.output_dir / "eval", f"{prefix}spoken_qa_seen")
        lines = [json.dumps(row) + "\n" for row in pair_turns(rows, count, args.seed)]
        write_text(args.output_dir / "eval" / f"{prefix}two_turns.jsonl", "".join(lines))
    (args.output_dir / "README.txt").write_text("Made by training_examples/ttt_tiny/build_speech.py; see its help.\n")


if __name__ == "__main__":
    run_command(main)
