"""Turn the speech of build_speech.py into training examples for ttt-tiny: codes first, then token sequences.

    python training_examples/ttt_tiny/build_examples.py --model runs/tiny/initial

Every question becomes a spoken question with its answer and a dictation; every assistant sentence a text to read
aloud; part of the questions are also asked in text, and part of the examples hold two turns. Codes are kept shard by
shard (Parquet), so a killed run goes on where it stopped.
"""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from modeling_ttt.ttt_codec import TttCodecModel
from processing import TttProcessor
from training_examples.files import whole_file
from training_examples.ttt_tiny.speech import read_audio, read_list, read_shard, to_int16
from training_examples.ttt_tiny.waveforms import augment, pad


@dataclass
class ExampleArguments:
    model: Path = field(default=Path("runs/tiny/initial"), metadata={"help": "Folder with the processor."})
    data_dir: Path = field(default=Path("data/ttt_tiny"), metadata={"help": "Output of build_speech.py."})
    output_dir: Path = field(default=Path("data/ttt_tiny/examples"), metadata={"help": "Where the examples go."})
    text_share: float = field(default=0.15, metadata={"help": "Share of the questions that are also asked in text."})
    two_turn_share: float = field(
        default=0.06, metadata={"help": "Examples of two turns, as a share of the questions."}
    )
    tts_copies: int = field(default=2, metadata={"help": "How often each assistant sentence occurs."})
    workers: int = field(default=2, metadata={"help": "Processes side by side."})
    seed: int = field(default=0, metadata={"help": "Seed of noise and mixture."})


@torch.no_grad()
def encode(codec: TttCodecModel, waves: list[np.ndarray], noisy: bool = False) -> list[list[int]]:
    """
    Return the codes of int16 waveforms, encoded in batches of similar length; `noisy` adds the augmentation of the
    training.
    """
    order = sorted(range(len(waves)), key=lambda index: len(waves[index]))
    codes: list[list[int]] = [[]] * len(waves)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch, lengths = pad([waves[row] for row in rows], codec.config.hop_length)
        mask = torch.arange(batch.shape[1]) < lengths[:, None]
        output = codec.encode(augment(batch) if noisy else batch, mask)
        for row, row_codes, row_mask in zip(rows, output.audio_codes[:, 0], output.audio_codes_mask, strict=True):
            codes[row] = row_codes[row_mask.bool()].tolist()
    return codes


def encode_shard(codec_dir: Path, shard: Path, target: Path, seed: int) -> Path:
    """Write the rows of one shard with their `codes` and, for questions, `noisy_codes`, as Parquet."""
    torch.set_num_threads(1)
    set_seed(seed)
    codec = TttCodecModel.from_pretrained(codec_dir).eval()
    rows, waves = read_shard(shard, codec.config.sampling_rate)
    columns = {key: [row[key] for row in rows] for key in rows[0]} | {"codes": encode(codec, waves)}
    if shard.name.startswith("questions"):
        columns["noisy_codes"] = encode(codec, waves, noisy=True)
    with whole_file(target) as partial:
        pq.write_table(pa.table(columns), partial)
    return target


def encode_all(args: ExampleArguments) -> dict[str, list[dict]]:
    """Encode every shard that is not yet encoded; return the rows by kind."""
    folder = args.output_dir / "codes"
    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted((args.data_dir / "speech").glob("*.safetensors"))
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = []
        for index, shard in enumerate(shards):
            target = folder / f"{shard.stem}.parquet"
            if not target.exists():
                jobs.append(pool.submit(encode_shard, args.model / "audio_tokenizer", shard, target, args.seed + index))
        for job in tqdm(jobs, desc="encoding", unit="shard"):
            job.result()
    rows: dict[str, list[dict]] = {"questions": [], "assistant": []}
    for shard in shards:
        rows[shard.stem.split("-")[0]] += pq.read_table(folder / f"{shard.stem}.parquet").to_pylist()
    return rows


def mixture(rows: dict[str, list[dict]], args: ExampleArguments) -> list[tuple[str, list[dict]]]:
    """Return all conversations as (task, messages), with codes in place of audio, in random order."""
    rng = random.Random(args.seed)
    spoken = {row["text"]: row["codes"] for row in rows["assistant"]}
    questions = [row for row in rows["questions"] if row["answer"] is not None]

    def turn(content: list[dict], text: str, speech: list[int] | None) -> list[dict]:
        answer: list[dict] = [{"type": "text", "text": text}]
        if speech is not None:
            answer.append({"type": "audio", "audio_codes": speech})
        return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    def audio(row: dict, key: str) -> list[dict]:
        return [{"type": "audio", "audio_codes": row[key]}]

    conversations = []
    for row in questions:
        for key in ("codes", "noisy_codes"):
            conversations.append(("spoken_qa", turn(audio(row, key), row["answer"], spoken[row["answer"]])))
        if rng.random() < args.text_share:
            text = [{"type": "text", "text": row["text"]}]
            conversations.append(("text_chat", turn(text, row["answer"], spoken[row["answer"]])))
        if rng.random() < args.two_turn_share:
            turns = [turn(audio(r, "codes"), r["answer"], spoken[r["answer"]]) for r in (row, rng.choice(questions))]
            conversations.append(("spoken_qa", turns[0] + turns[1]))
    for row in rows["questions"]:
        conversations.append(("asr", turn(audio(row, rng.choice(("codes", "noisy_codes"))), row["text"], None)))
    for row in rows["assistant"]:
        text = [{"type": "text", "text": row["text"]}]
        conversations += [("tts", turn(text, row["text"], row["codes"]))] * args.tts_copies
    rng.shuffle(conversations)
    return conversations


def held_out(args: ExampleArguments, codec: TttCodecModel) -> list[tuple[str, list[dict]]]:
    """Return the held-out spoken questions (trained voices) and texts to read, for the loss during training."""
    folder = args.data_dir / "eval"
    conversations = []

    def read(path: str) -> np.ndarray:
        return to_int16(read_audio(folder, path, codec.config.sampling_rate))

    for name, task in (("spoken_qa_seen", "spoken_qa"), ("tts", "tts")):
        lines = read_list(folder, name)
        speech = encode(codec, [read(row["answer_audio"]) for row in lines])
        if task == "tts":
            contents = [[{"type": "text", "text": row["answer"]}] for row in lines]
        else:
            heard = encode(codec, [read(row["audio"]) for row in lines])
            contents = [[{"type": "audio", "audio_codes": codes}] for codes in heard]
        for row, content, codes in zip(lines, contents, speech, strict=True):
            answer = [{"type": "text", "text": row["answer"]}, {"type": "audio", "audio_codes": codes}]
            conversations.append(
                (task, [{"role": "user", "content": content}, {"role": "assistant", "content": answer}])
            )
    return conversations


def write_examples(processor: TttProcessor, conversations: list[tuple[str, list[dict]]]) -> Dataset:
    """Return all conversations as token ids: `input_ids`, `labels`, `length`, `task`."""

    def write(task: str, messages: list[dict]) -> dict:
        system = {"role": "system", "content": processor.get_task(task).system_prompt}
        example = processor.build_conversation_example([system, *messages])
        return {**example, "length": len(example["input_ids"]), "task": task}

    return Dataset.from_list([write(*conversation) for conversation in tqdm(conversations, desc="writing examples")])


def main() -> None:
    (args,) = HfArgumentParser(ExampleArguments).parse_args_into_dataclasses()
    processor = TttProcessor.from_pretrained(args.model)
    torch.set_num_threads(1)
    rows = encode_all(args)
    conversations = mixture(rows, args)
    print(f"{len(conversations)} conversations from {sum(map(len, rows.values()))} sentences")
    train = write_examples(processor, conversations)
    evaluation = write_examples(processor, held_out(args, processor.audio_tokenizer.eval()))
    DatasetDict({"train": train, "eval": evaluation}).save_to_disk(str(args.output_dir / "dataset"))
    lengths = np.array(train["length"])
    print(
        f"{len(train)} examples, {lengths.sum() / 1e6:.1f} M tokens, mean {lengths.mean():.0f}, longest {lengths.max()}"
    )


if __name__ == "__main__":
    main()
