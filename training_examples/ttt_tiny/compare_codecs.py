"""Compare audio tokenizers for ttt-tiny: what judges understand of decoded speech, and what a small twin learns.

    python training_examples/ttt_tiny/compare_codecs.py --codecs runs/codec_400/tokenizer runs/codec_1000/tokenizer \
        --whisper base tiny.en

Codes are good if little is lost in them and if text foretells them. So for each codec the development list of texts to
read is encoded and decoded, its phonemes are read off the codes and off what the encoder knew before them, and a small
autoregressive model learns to read the assistant's texts aloud, for the same number of steps: its loss on held-out
texts is given in bits a second, so that code rates compare, and its own speech is listened to. Every codec's row is
kept as it is measured, so a killed run goes on with the next.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import set_seed

from modeling_ttt import TttForConditionalGeneration
from modeling_ttt.ttt_codec import TttCodecModel
from modeling_ttt.ttt_codec.configuration_ttt_codec import VOCODERS
from processing import TttDataCollator, TttProcessor
from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.figures import fingerprint, markdown_table, remember
from training_examples.evaluation.whisper_judge import WhisperJudge, count_word_errors
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny.codes import encode, load_codec
from training_examples.ttt_tiny.domain import is_held_out
from training_examples.ttt_tiny.phonemes import load_head, phoneme_error_rates, pronunciations
from training_examples.ttt_tiny.speech import read_audio, read_list, read_shard, to_int16
from training_examples.ttt_tiny.untrained import build_model
from training_examples.user_errors import run_command

LIST = "development_tts"
HEADER = [
    *("codes", "codes a second", "bits a second", "phoneme errors", "before the codes"),
    *("loss, bits a second", "accuracy"),
]


@dataclass
class ComparisonArguments:
    codecs: list[Path] = field(metadata={"help": "Folders of trained TttCodecModels."})
    whisper: list[str] = field(metadata={"help": "Whisper models for faster-whisper: folders or names."})
    data_dir: Path = field(default=Path("data/ttt_tiny"), metadata={"help": "Output of build_speech.py."})
    output_dir: Path = field(default=Path("runs/codecs"), metadata={"help": "Where rows and table go."})
    shards: int | None = field(default=None, metadata={"help": "Shards of the assistant's speech; all by default."})
    vocoder: str = field(
        default="griffin_lim",
        metadata={"help": "From mel to waveform: neural, where its stage has been trained.", "choices": [*VOCODERS]},
    )
    sentences: int = field(default=60, metadata={"help": "Held-out texts that are judged."})
    max_steps: int = field(default=600, metadata={"help": "Steps of the small twin."})
    batch_size: int = field(default=32, metadata={"help": "Texts a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak; 100 steps of warm-up, then linear to zero."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the small twin."})
    threads: int = threads_field()
    seed: int = field(default=0, metadata={"help": "Seed of weights and batches."})

    def __post_init__(self) -> None:
        check_least(self, shards=1, sentences=1, max_steps=1, batch_size=1, hidden_size=1)
        if len({folder.resolve() for folder in self.codecs}) < len(self.codecs):
            raise ValueError("`--codecs` names a folder twice; leave one of them out.")
        if len({Path(name).name for name in self.whisper}) < len(self.whisper):
            raise ValueError("`--whisper` has two models of one name, which is that of their columns; rename one.")


def write_example(processor: TttProcessor, text: str, codes: list[int]) -> dict[str, Any]:
    """Return one example of reading `text` aloud: `input_ids` and `labels`."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": processor.get_task("tts").system_prompt},
        {"role": "user", "content": [{"type": "text", "text": text}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": text}, {"type": "audio", "audio_codes": codes}],
        },
    ]
    return processor.build_conversation_example(messages)


def row_names(folders: Sequence[Path]) -> list[str]:
    """Return what the rows are called: the folder above each; if two have the same, with as much more as tells them."""
    paths = [folder.resolve() for folder in folders]
    names, parts = [path.parent.name for path in paths], 2
    while len(set(names)) < len(names):
        names, parts = ["/".join(path.parts[-parts:]) for path in paths], parts + 1
    return names


def training_shards(args: ComparisonArguments) -> list[Path]:
    """
    Return the shards of the assistant's speech that the small twin learns from.

    Raises:
        FileNotFoundError: If there are none.
    """
    shards = sorted((args.data_dir / "speech").glob("assistant-*.safetensors"))[: args.shards]
    if not shards:
        raise FileNotFoundError(f"no assistant shards in {args.data_dir / 'speech'}: run build_speech.py first")
    return shards


def read_training(args: ComparisonArguments, codec: TttCodecModel) -> tuple[list[str], list[list[int]]]:
    """Return the assistant's texts that are not held out, and their codes."""
    texts: list[str] = []
    codes: list[list[int]] = []
    for shard in tqdm(training_shards(args), desc="encoding", unit="shard"):
        rows, waves = read_shard(shard, codec.config.sampling_rate)
        kept = [index for index, row in enumerate(rows) if not is_held_out(row["text"])]
        texts += [rows[index]["text"] for index in kept]
        codes += encode(codec, [waves[index] for index in kept])
    return texts, codes


def train_twin(
    args: ComparisonArguments, model: TttForConditionalGeneration, collator: TttDataCollator, examples: list[dict]
) -> None:
    """Train `model` on `examples` by next-token prediction, in batches of similar length."""
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    groups: list[list[dict]] = []
    size = min(args.batch_size, len(examples))
    model.train()
    for step in tqdm(range(args.max_steps), desc="small twin", unit="step"):
        if not groups:
            order = sorted(rng.sample(examples, len(examples)), key=lambda example: len(example["input_ids"]))
            groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
            rng.shuffle(groups)
        scale = min((step + 1) / 100, 1 - step / args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**collator(groups.pop())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out_loss(
    model: TttForConditionalGeneration, collator: TttDataCollator, examples: list[dict]
) -> tuple[float, float]:
    """Return the mean loss of a held-out code in bits, and how often the likeliest code is the right one."""
    nats, right, count = 0.0, 0, 0
    for start in range(0, len(examples), 16):
        batch = collator(examples[start : start + 16])
        labels = batch.pop("labels")[:, 1:]
        first = model.config.audio_code_id_start
        scored = (labels >= first) & (labels < first + model.config.num_audio_codes)
        logits = model(**batch).logits[:, :-1][scored].float()
        nats += torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum").item()
        right += int((logits.argmax(-1) == labels[scored]).sum())
        count += int(scored.sum())
    return nats / count / math.log(2), right / count


@torch.no_grad()
def say(model: TttForConditionalGeneration, processor: TttProcessor, texts: list[str]) -> list[np.ndarray]:
    """Return what `model` says when it is asked to read each text."""
    spoken: list[np.ndarray] = []
    for start in tqdm(range(0, len(texts), 20), desc="reading aloud"):
        inputs = processor(text=texts[start : start + 20], task="tts")
        sequences = model.generate(**inputs, do_sample=False)
        spoken += [answer["audio"] for answer in processor.post_process(sequences, inputs["input_ids"].shape[1])]
    return spoken


def word_errors(
    judges: dict[str, WhisperJudge], texts: list[str], waves: list[np.ndarray], rate: int
) -> dict[str, float]:
    """Return each judge's word error rate."""
    rates = {}
    for name, judge in judges.items():
        counts = count_word_errors(texts, judge.transcribe(waves, rate))
        rates[name] = sum(wrong for wrong, _ in counts) / sum(words for _, words in counts)
    return rates


def measure(args: ComparisonArguments, folder: Path | None, judges: dict[str, WhisperJudge]) -> dict[str, Any]:
    """Return the row of one codec; of the original speech if `folder` is None."""
    rows = read_list(args.data_dir / "eval", LIST, args.sentences)
    texts = [row["answer"] for row in rows]
    if folder is None:
        waves = [read_audio(args.data_dir / "eval", row["answer_audio"], 24_000) for row in rows]
        return {"decoded": word_errors(judges, texts, waves, 24_000)}
    set_seed(args.seed)
    codec = load_codec(folder)
    codec.config.vocoder = args.vocoder
    rate = codec.config.sampling_rate
    waves = [to_int16(read_audio(args.data_dir / "eval", row["answer_audio"], rate)) for row in rows]
    held_out_codes = encode(codec, waves)
    words, num_phonemes = pronunciations()
    known = [pair for pair in zip(texts, waves, strict=True) if all(word in words for word in pair[0].split())]
    of_codes, of_features = phoneme_error_rates(codec, load_head(folder, codec, num_phonemes), known, words)
    decoded = []
    with torch.no_grad():
        for codes in held_out_codes:
            decoded.append(codec.decode(torch.tensor([codes])).audio_values[0, 0].numpy())
    model, processor = build_model(codec, args.hidden_size, 3 * args.hidden_size, 4, 4)
    model.config.audio_objective = "autoregressive"
    collator = TttDataCollator(pad_token_id=model.config.pad_token_id)
    train_texts, train_codes = read_training(args, codec)
    examples = [write_example(processor, *pair) for pair in zip(train_texts, train_codes, strict=True)]
    train_twin(args, model, collator, examples)
    held_out = [write_example(processor, *pair) for pair in zip(texts, held_out_codes, strict=True)]
    bits, accuracy = held_out_loss(model, collator, held_out)
    return {
        "codes": codec.config.codebook_size,
        "codes_per_second": codec.config.frame_rate,
        "phoneme_error": of_codes,
        "phoneme_error_before_codes": of_features,
        "texts": len(train_texts),
        "loss": bits * codec.config.frame_rate,
        "accuracy": accuracy,
        "decoded": word_errors(judges, texts, decoded, rate),
        "said": word_errors(judges, texts, say(model, processor, texts), rate),
    }


def table(results: dict[str, dict[str, Any]], judges: list[str]) -> str:
    """Return all rows as a Markdown table."""
    header = ["codec", *HEADER, *(f"{kind}, {name} WER" for kind in ("decoded", "said by the twin") for name in judges)]
    lines: list[list[object]] = []
    for name, row in results.items():
        line: list[object] = [name]
        if "codes" in row:
            bits = math.log2(row["codes"]) * row["codes_per_second"]
            line += [row["codes"], row["codes_per_second"], f"{bits:.0f}"]
            line += [f"{100 * row[key]:.1f} %" for key in ("phoneme_error", "phoneme_error_before_codes")]
            line.append(f"{row['loss']:.1f}")
            line.append(f"{100 * row['accuracy']:.1f} %")
        else:
            line += [""] * len(HEADER)
        for kind in ("decoded", "said"):
            line += [f"{100 * row[kind][judge]:.1f} %" if kind in row else "" for judge in judges]
        lines.append(line)
    return markdown_table(header, lines)


def main() -> None:
    (args,) = ScriptParser(ComparisonArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    training_shards(args)  # what is missing is said before anything is heard
    judges = {Path(name).name: WhisperJudge(name, num_threads=torch.get_num_threads()) for name in args.whisper}
    names = list(judges)
    settings = {
        "steps": args.max_steps, "batch": args.batch_size, "rate": args.learning_rate, "width": args.hidden_size,
        "sentences": args.sentences, "shards": args.shards, "seed": args.seed, "judges": names,
        "vocoder": args.vocoder,
    }  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    for name, folder in [("original speech", None), *zip(row_names(args.codecs), args.codecs, strict=True)]:
        own = settings | ({"codec": fingerprint(folder)} if folder else {})
        path = args.output_dir / f"{name.replace(' ', '_').replace('/', '_')}.json"
        results[name] = remember(path, own, partial(measure, args, folder, judges))
        text = table(results, names)
        (args.output_dir / "codecs.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_command(main)
