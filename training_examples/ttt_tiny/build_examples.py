"""Turns the speech of build_speech.py into training examples for ttt-tiny: codes first, then token sequences.

    python training_examples/ttt_tiny/build_examples.py --model runs/tiny/initial

Every question is encoded clean and as if recorded somewhere (augmentation.py), every sentence of the assistant's from
several beginnings within a code, which all give other codes; dictations are also spliced of single words and, with
--aligner, of words cut out of all that is asked; with --quick_voices eSpeak NG and Flite, whose speech costs little,
say more; and sounds in which nobody speaks are made up. conversations.py says what becomes of them. Codes are kept
shard by shard (Parquet), so a killed run goes on where it stopped, and goes on with the shards that were spoken
meanwhile.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from tqdm import tqdm

from modeling_ttt.ttt_codec import TttCodecModel
from processing import TttProcessor
from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.figures import fingerprint
from training_examples.files import read_json, whole_file, write_json
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.alignment import cut_words
from training_examples.ttt_tiny.augmentation import NO_SPEECH, no_speech, record, splice, splice_at_random
from training_examples.ttt_tiny.codes import encode, load_codec
from training_examples.ttt_tiny.conversations import Messages, Mixture, MixtureArguments, Row, assistant, user
from training_examples.ttt_tiny.phonemes import load_head, pronunciations
from training_examples.ttt_tiny.speech import read_audio, read_list, read_rows, read_shard, to_int16
from training_examples.ttt_tiny.synthesis import SAMPLING_RATE, TRAINED_VOICES, random_delivery, speak
from training_examples.user_errors import run_command
from training_examples.workers import worker_pool

MANY_WORDS = 100  # a voice that says so many is spliced by itself
CUT_SHARD = 25_000  # splices of cut words that one process makes
QUICK_SHARD = 2_500  # what quick voices say that one process makes
QUICK_PITCHES = (0.78, 1.2)  # of their own: wider than for Kokoro, since they are few
CHUNK = 1_000  # of these, how many waveforms are held at a time
MOST_DRAWS = 1_000  # voices drawn in vain before it is said that nothing can be spliced


@dataclass
class ExampleArguments(MixtureArguments):
    model: Path = field(default=Path("runs/tiny/initial"), metadata={"help": "Folder with the processor."})
    data_dir: Path = field(default=Path("data/ttt_tiny"), metadata={"help": "Output of build_speech.py."})
    output_dir: Path = field(default=Path("data/ttt_tiny/examples"), metadata={"help": "Where the examples go."})
    recordings: int = field(default=2, metadata={"help": "How often a question is as if recorded somewhere."})
    speeds: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={
            "help": "LOW HIGH: how much faster the recorded versions are played, drawn anew for each; 0.87 1.15 makes "
            "other voices of the same, deeper ones of slower ones."
        },
    )
    shifts: int = field(
        default=3, metadata={"help": "How often a sentence of the assistant's begins elsewhere within its first code."}
    )
    splices: int = field(default=40, metadata={"help": "Dictations spliced of the words of each lone voice."})
    aligner: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of train_codec.py's stage `tokenizer` or `head`, of the model's audio tokenizer, by which "
            "words are cut out of sentences."
        },
    )
    cut_splices: int | None = field(
        default=None, metadata={"help": "Dictations spliced of such words, with --aligner (default: 20000)."}
    )
    cut_questions: int | None = field(
        default=None, metadata={"help": "Questions spliced of such words, with --aligner (default: 0)."}
    )
    quick_voices: int = field(
        default=0,
        metadata={"help": "Dictations and questions, half of each, that eSpeak NG's and Flite's voices say besides."},
    )
    sounds: int = field(default=1_500, metadata={"help": "Sounds in which nobody speaks."})
    workers: int = field(default=2, metadata={"help": "Processes side by side."})
    threads: int = threads_field()
    seed: int = field(default=0, metadata={"help": "Seed of recordings and mixture."})

    def __post_init__(self) -> None:
        for name in ("cut_splices", "cut_questions"):
            value = getattr(self, name)
            if value is not None and self.aligner is None:
                raise ValueError(f"`--{name}` {value} has no effect without `--aligner`; give both or neither")
        check_least(self, cut_splices=0, cut_questions=0, quick_voices=0, recordings=0, shifts=0, splices=0, sounds=0)
        check_least(self, workers=1)
        if len(self.speeds) != 2 or not 0.5 <= self.speeds[0] <= self.speeds[1] <= 2:
            given = " ".join(map(str, self.speeds))
            raise ValueError(f"`--speeds` {given}: give two numbers from 0.5 to 2, the lower one first")
        if self.speeds != [1.0, 1.0] and not self.recordings:
            raise ValueError(
                "`--speeds` has no effect with `--recordings 0`: it is the recorded versions that are played"
            )


def record_all(waves: list[np.ndarray], rate: int, seed: list[int]) -> list[np.ndarray]:
    """Return int16 waveforms as if recorded somewhere, each drawn from `seed` and its place; babble is the others."""
    speech = [wave / np.float32(32767) for wave in waves]
    return [
        to_int16(record(wave, rate, np.random.default_rng([*seed, place]), others=speech))
        for place, wave in enumerate(speech)
    ]


def play(waves: list[np.ndarray], rate: int, speeds: Sequence[float], seed: list[int]) -> list[np.ndarray]:
    """Return int16 waveforms played at speeds drawn between two from `seed`: pitch and vocal tract change with them."""
    low, high = speeds
    if low == high == 1:
        return waves
    drawn = np.random.default_rng(seed).uniform(low, high, len(waves))
    return [
        to_int16(np.clip(librosa.resample(wave / np.float32(32767), orig_sr=rate * speed, target_sr=rate), -1, 1))
        for wave, speed in zip(waves, drawn, strict=True)
    ]


def write_rows(target: Path, columns: dict[str, list]) -> Path:
    """Write columns as Parquet, whole or not at all."""
    with whole_file(target) as partial:
        pq.write_table(pa.table(columns), partial)
    return target


def shift_all(waves: list[np.ndarray], hop_length: int, seed: list[int]) -> list[np.ndarray]:
    """Return int16 waveforms after silence of a tenth to nine tenths of a code, drawn from `seed`."""
    starts = np.random.default_rng(seed).uniform(0.1, 0.9, len(waves)) * hop_length
    return [np.pad(wave, (int(start), 0)) for wave, start in zip(waves, starts, strict=True)]


def encode_shard(
    codec_dir: Path, shard: Path, target: Path, others: int, seed: list[int], speeds: Sequence[float] = (1.0, 1.0)
) -> Path:
    """
    Write the rows of one shard with their `codes`, and `other_codes`: other versions of the same speech, as if recorded
    somewhere at other `speeds` if it is asked, begun elsewhere within a code if it is the assistant's.
    """
    codec = load_codec(codec_dir)
    rate = codec.config.sampling_rate
    rows, waves = read_shard(shard, rate)
    columns = {key: [row[key] for row in rows] for key in rows[0]} | {"codes": encode(codec, waves)}
    versions = []
    for version in range(others):
        changed = (
            record_all(play(waves, rate, speeds, [*seed, version, 1]), rate, [*seed, version])
            if shard.name.startswith("questions")
            else shift_all(waves, codec.config.hop_length, [*seed, version])
        )
        versions.append(encode(codec, changed))
    columns["other_codes"] = [[version[row] for version in versions] for row in range(len(rows))]
    return write_rows(target, columns)


def lone_words(shards: list[Path], rate: int) -> list[dict[str, np.ndarray]]:
    """Return the single words of every voice and delivery that says some, as int16 waveforms."""
    voices: dict[tuple, dict[str, np.ndarray]] = {}
    for shard in shards:
        rows, waves = read_shard(shard, rate)
        for row, wave in zip(rows, waves, strict=True):
            if row["kind"] == "word":
                voices.setdefault((row["voice"], row["rate"], row["pitch"]), {})[row["text"]] = wave
    return [words for words in voices.values() if len(words) > 1]


def splice_dictations(words: dict[str, np.ndarray], count: int, rate: int, seed: list[int]) -> dict[str, np.ndarray]:
    """Return dictations that one voice's single words can be spliced to: mostly digits, and none that is held out."""
    rng, draw = np.random.default_rng(seed), random.Random(str(seed))
    known = sorted(words)
    digits = [word for word in known if word in domain.NUMBERS] or known
    texts = [domain.random_words(draw, 1, 6, known if draw.random() < 0.3 else digits) for _ in range(count)]
    texts = [text for text in texts if " " not in text or not domain.is_held_out(text)]
    return dict(splice_at_random(words, [text], rate, rng) for text in texts)


def encode_splices(codec_dir: Path, shards: list[Path], target: Path, count: int, seed: list[int]) -> Path:
    """Write spliced dictations, half of them as if recorded somewhere: `text`, `codes`."""
    codec = load_codec(codec_dir)
    rate, texts, waves = codec.config.sampling_rate, [], []
    for place, words in enumerate(lone_words(shards, rate)):
        for text, wave in splice_dictations(words, count, rate, [*seed, place]).items():
            texts.append(text)
            waves.append(to_int16(wave / 32767))
    waves[::2] = record_all(waves[::2], rate, seed)
    return write_rows(target, {"text": texts, "codes": encode(codec, waves)})


def words_of_voices(codec: TttCodecModel, aligner: Path, shards: list[Path]) -> list[list[tuple[str, np.ndarray]]]:
    """
    Return the words that are cut out of all sentences of the domain: those of each voice that says MANY_WORDS and more,
    those of all other voices together in the last list.
    """
    spellings, count = pronunciations()
    head = load_head(aligner, codec, count).eval()
    voices: dict[str, list[tuple[str, np.ndarray]]] = {}
    for shard in shards:
        for row, wave in zip(*read_shard(shard, codec.config.sampling_rate), strict=True):
            if row["kind"] != "other" and all(word in spellings for word in row["text"].split()):
                voices.setdefault(row["voice"], []).extend(cut_words(codec, head, wave, row["text"], spellings))
    few = [cut for cuts in voices.values() if len(cuts) < MANY_WORDS for cut in cuts]
    return [*(cuts for cuts in voices.values() if len(cuts) >= MANY_WORDS), *([few] if few else [])]


def draw_dictations(known: Sequence[str], count: int, rng: np.random.Generator) -> list[Row]:
    """Return texts of one to eight words, drawn alike, whatever sentences say most; none that is held out."""
    texts = [" ".join(rng.choice(known, rng.integers(1, 9))) for _ in range(count)]
    return [{"text": text} for text in texts if " " not in text or not domain.is_held_out(text)]


def draw_questions(asked: Sequence[Row], known: Sequence[str], count: int, rng: np.random.Generator) -> list[Row]:
    """Return questions that are asked in training, of known words alone; each kind as often as any other."""
    kinds: dict[str, list[Row]] = {}
    for row in asked:
        if row["answer"] is not None and row["kind"] != "other" and set(row["text"].split()) <= set(known):
            kinds.setdefault(row["kind"], []).append({key: row[key] for key in ("text", "answer", "kind")})
    if not kinds:
        return []
    drawn = [kinds[str(kind)] for kind in rng.choice(sorted(kinds), count)]
    return [rows[rng.integers(len(rows))] for rows in drawn]


def repeat_questions(texts: Iterable[str], rng: np.random.Generator) -> list[Row]:
    """Return requests to repeat those texts that are lists of 1 to 5 content words; none that is held out."""
    content = set(domain.CONTENT)
    found: list[Row] = []
    for text in sorted(set(texts)):
        question = str(rng.choice(domain.REPEAT_OPENINGS)) + text
        if len(text.split()) <= 5 and content.issuperset(text.split()) and not domain.is_held_out(question):
            found.append({"text": question, "answer": text, "kind": "repeat"})
    return found


def encode_cut_splices(
    codec_dir: Path,
    aligner: Path,
    shards: list[Path],
    target: Path,
    count: int,
    questions: bool,
    seed: list[int],
    spoken: Sequence[Path] = (),
) -> Path:
    """
    Write dictations, or questions with their answers, spliced of words cut out of sentences, half of them as if
    recorded somewhere: `text`, `codes`, and `answer` and `kind` of questions. The lists of words in `spoken`, shards of
    the assistant's, are asked to be repeated, too.

    Raises:
        ValueError: If no word could be cut out.
    """
    codec = load_codec(codec_dir)
    rate, rng = codec.config.sampling_rate, np.random.default_rng(seed)
    pools = words_of_voices(codec, aligner, shards)
    if not pools:
        raise ValueError(f"no word could be cut out of the sentences by the head in {aligner}: is it trained?")
    asked: list[Row] = []
    if questions:
        asked += [row for shard in shards for row in read_rows(shard)]
        asked += repeat_questions((row["text"] for shard in spoken for row in read_rows(shard)), rng)
    shares = np.array([len(pool) for pool in pools]) / sum(map(len, pools))
    rows: list[Row] = []
    while len(rows) < count:
        found: list[Row] = []
        waves: list[np.ndarray] = []
        for _ in range(MOST_DRAWS):
            by_word: dict[str, list[np.ndarray]] = {}
            for word, wave in pools[rng.choice(len(pools), p=shares)]:
                by_word.setdefault(word, []).append(wave)
            # One draw of a voice serves for some sentences.
            many, known = min(50, count - len(rows) - len(found)), sorted(by_word)
            for row in draw_questions(asked, known, many, rng) if questions else draw_dictations(known, many, rng):
                pieces = [by_word[word][rng.integers(len(by_word[word]))] / 32767 for word in row["text"].split()]
                found.append(row)
                waves.append(to_int16(splice(pieces, rate, float(rng.uniform(0.0, 0.12)))))
            if len(rows) + len(found) == count or len(found) >= CHUNK:
                break
        if not found:
            raise ValueError(f"no question can be spliced of the words cut out by the head in {aligner}")
        waves[::2] = record_all(waves[::2], rate, [*seed, len(rows)])
        rows += [{**row, "codes": codes} for row, codes in zip(found, encode(codec, waves), strict=True)]
    return write_rows(target, {key: [row[key] for row in rows] for key in rows[0]})


def encode_quick_voices(
    codec_dir: Path, shards: list[Path], target: Path, count: int, questions: bool, seed: list[int]
) -> Path:
    """
    Write dictations, or questions that `shards` ask with their answers, said by a voice of Flite in 7 of 10 and else of
    eSpeak NG, half of them as if recorded somewhere: `text`, `codes`, and `answer` and `kind` of questions.
    """
    codec = load_codec(codec_dir)
    rate, rng, draw = codec.config.sampling_rate, np.random.default_rng(seed), random.Random(str(seed))
    voices = [[voice for voice in TRAINED_VOICES if voice.startswith(engine)] for engine in ("flite", "espeak")]
    asked = [row for shard in shards for row in read_rows(shard)] if questions else []
    known = domain.vocabulary()
    rows: list[Row] = []
    while len(rows) < count:
        many = min(CHUNK, count - len(rows))
        if questions:
            found = draw_questions(asked, known, many, rng)
        else:
            texts = [
                domain.random_words(draw, 1, 8, domain.CONTENT if draw.random() < 0.6 else None) for _ in range(many)
            ]
            found = [{"text": text} for text in texts if " " not in text or not domain.is_held_out(text)]
        if not found:
            raise ValueError(f"{shards[0].parent} asks no question whose words are all of the domain")
        waves = []
        for row in found:
            delivery = random_delivery(draw, voices[0] if draw.random() < 0.7 else voices[1])
            spoken = speak(row["text"], replace(delivery, pitch=round(draw.uniform(*QUICK_PITCHES), 3)))
            waves.append(to_int16(librosa.resample(spoken, orig_sr=SAMPLING_RATE, target_sr=rate)))
        waves[::2] = record_all(waves[::2], rate, [*seed, len(rows)])
        rows += [{**row, "codes": codes} for row, codes in zip(found, encode(codec, waves), strict=True)]
    return write_rows(target, {key: [row[key] for row in rows] for key in rows[0]})


def encode_sounds(codec_dir: Path, shard: Path, target: Path, count: int, seed: list[int]) -> Path:
    """Write sounds in which nobody speaks, of half a second to five: `kind`, `codes`. Babble is made of `shard`."""
    codec = load_codec(codec_dir)
    rate = codec.config.sampling_rate
    speech = [wave / np.float32(32767) for wave in read_shard(shard, rate)[1]]
    kinds, waves = [NO_SPEECH[index % len(NO_SPEECH)] for index in range(count)], []
    for place, kind in enumerate(kinds):
        rng = np.random.default_rng([*seed, place])
        waves.append(to_int16(no_speech(kind, int(rng.uniform(0.5, 5.0) * rate), rate, rng, speech)))
    return write_rows(target, {"kind": kinds, "codes": encode(codec, waves)})


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """
    Keep beside the codes what they are made of.

    Raises:
        ValueError: If codes that are there were made of something else, which is named: old and new would be mixed.
    """
    file = folder / "settings.json"
    before = read_json(file) if file.exists() else {}
    changed = [
        f"`{name}` was {before[name]} and is {value}"
        for name, value in settings.items()
        if before.get(name, value) != value
    ]
    if changed:
        raise ValueError(f"The codes in {folder} were made otherwise: {'; '.join(changed)}. Give another --output_dir.")
    write_json(file, before | settings)


def encode_all(args: ExampleArguments, threads: int = 1) -> dict[str, list[dict]]:
    """Encode what is not yet encoded; return the rows of `assistant`, `questions`, `spliced` and `sounds`."""
    folder, codec = args.output_dir / "codes", args.model / "audio_tokenizer"
    shards = sorted((args.data_dir / "speech").glob("*.safetensors"))
    heard = [shard for shard in shards if shard.name.startswith("questions")]
    if not heard or len(heard) == len(shards):
        raise SystemExit(f"no shards of both kinds in {args.data_dir / 'speech'}: run build_speech.py first")
    settings = {name: getattr(args, name) for name in ("recordings", "shifts", "splices", "sounds", "seed")}
    settings["speeds"] = list(args.speeds)
    settings["audio tokenizer"] = fingerprint(codec)
    if args.aligner is not None:
        load_head(args.aligner, load_codec(codec), pronunciations()[1])  # what does not fit is refused at once
        # Only some of the codes are made with it, and they may be made later.
        settings["aligner"] = fingerprint(args.aligner)
    begin(folder, settings)
    jobs: list[tuple[Path, Callable[..., Path], tuple]] = []
    for index, shard in enumerate(shards):
        target = folder / f"{shard.stem}.parquet"
        others = args.recordings if shard in heard else args.shifts
        jobs.append((target, encode_shard, (codec, shard, target, others, [args.seed, index], args.speeds)))
    # Splices want all words of a voice: they are made anew when there are more shards.
    splices, sounds = folder / f"spliced-{len(heard):04d}.parquet", folder / "sounds-0000.parquet"
    jobs.append((splices, encode_splices, (codec, heard, splices, args.splices, [args.seed, 10**6])))
    if args.aligner is not None:
        splices_of_cuts = 20_000 if args.cut_splices is None else args.cut_splices
        for kind, count in (("spliced", splices_of_cuts), ("questions", args.cut_questions or 0)):
            for start in range(0, count, CUT_SHARD):
                most = min(CUT_SHARD, count - start)
                cuts = folder / f"{kind}-cut-{len(heard):04d}-{start // CUT_SHARD:02d}-{most}.parquet"
                seed = [args.seed, 10**6 + 2, int(kind == "questions"), start]
                spoken = [shard for shard in shards if shard not in heard]
                cut = codec, args.aligner, heard, cuts, most, kind == "questions", seed, spoken
                jobs.append((cuts, encode_cut_splices, cut))
    half = args.quick_voices // 2
    for kind, count in (("spliced", args.quick_voices - half), ("questions", half)):
        for start in range(0, count, QUICK_SHARD):
            most = min(QUICK_SHARD, count - start)
            said = folder / f"{kind}-quick-{start // QUICK_SHARD:03d}-{most}.parquet"
            seed = [args.seed, 10**6 + 3, int(kind == "questions"), start]
            jobs.append((said, encode_quick_voices, (codec, heard, said, most, kind == "questions", seed)))
    jobs.append((sounds, encode_sounds, (codec, heard[0], sounds, args.sounds, [args.seed, 10**6 + 1])))
    with worker_pool(args.workers, torch.set_num_threads, (threads,)) as pool:
        running: list[Future] = [pool.submit(job, *rest) for target, job, rest in jobs if not target.exists()]
        for future in tqdm(running, desc="encoding", unit="shard"):
            future.result()
    rows: dict[str, list[dict]] = {"questions": [], "assistant": [], "spliced": [], "sounds": []}
    for target, _, _ in jobs:
        rows[target.stem.split("-")[0]] += pq.read_table(target).to_pylist()
    return rows


def held_out(args: ExampleArguments, codec: TttCodecModel) -> list[tuple[str, Messages]]:
    """Return the development lists of spoken questions and of texts to read, for the loss during training."""
    folder = args.data_dir / "eval"
    conversations = []

    def read(path: str) -> np.ndarray:
        return to_int16(read_audio(folder, path, codec.config.sampling_rate))

    for name, task in (("development_spoken_qa_seen", "spoken_qa"), ("development_tts", "tts")):
        rows = read_list(folder, name)
        speech = encode(codec, [read(row["answer_audio"]) for row in rows])
        heard = encode(codec, [read(row["audio"]) for row in rows]) if task == "spoken_qa" else [[] for _ in rows]
        for row, question, answer in zip(rows, heard, speech, strict=True):
            asked = user({"text": row["answer"]}, question or None)
            conversations.append((task, [asked, assistant(row["answer"], answer)]))
    return conversations


def write_examples(processor: TttProcessor, conversations: list[tuple[str, Messages]]) -> Dataset:
    """Return all conversations as token ids: `input_ids`, `labels`, `length`, `task`."""

    def write(task: str, messages: Messages) -> dict:
        system = {"role": "system", "content": processor.get_task(task).system_prompt}
        example = processor.build_conversation_example([system, *messages])
        return {**example, "length": len(example["input_ids"]), "task": task}

    return Dataset.from_list([write(*conversation) for conversation in tqdm(conversations, desc="writing examples")])


def main() -> None:
    (args,) = ScriptParser(ExampleArguments, __doc__).parse_args_into_dataclasses()
    processor = TttProcessor.from_pretrained(args.model)
    threads = use_threads(args.threads, args.workers)
    rows = encode_all(args, threads)
    conversations = Mixture(rows, args, random.Random(args.seed)).conversations()
    print(f"{len(conversations)} conversations from {sum(map(len, rows.values()))} sentences")
    train = write_examples(processor, conversations)
    evaluation = write_examples(processor, held_out(args, processor.audio_tokenizer.eval()))
    DatasetDict({"train": train, "eval": evaluation}).save_to_disk(str(args.output_dir / "dataset"))
    lengths = np.array(train["length"])
    print(
        f"{len(train)} examples, {lengths.sum() / 1e6:.1f} M tokens, mean {lengths.mean():.0f}, longest {lengths.max()}"
    )


if __name__ == "__main__":
    run_command(main)
