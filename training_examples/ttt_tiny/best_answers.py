"""Let ttt-tiny read texts aloud at several settings, keep of each what its codes say most clearly, and learn from that.

    python training_examples/ttt_tiny/best_answers.py --model runs/tiny/ttt --dataset data/ttt_tiny/examples/dataset \
        --aligner runs/codec/tokenizer --output_dir data/ttt_tiny/best

`../self_distill.py` keeps or drops one answer by what a recogniser hears. Here the phoneme head, which trains with the
audio tokenizer, reads the codes themselves, thousands a second and without a waveform, so that the best of several
answers can be chosen: the one that makes the text's phonemes likeliest (CTC, Graves et al., 2006). All that the
assistant says in `--dataset` is read, and new random sequences; the chosen speech takes the place of the recorded one
in the examples. With `--recorded true` what was recorded is among the answers to choose from. No recogniser that judges
the model has a part in it, unless one is named: with `--recogniser` the likeliest answers are decoded, and the first of
them that is heard without an error is taken, or the one with the fewest. Several processes share the texts by `--part`,
and train_ttt.py takes the folders of all of them.
"""

import random
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from rapidfuzz.distance import Levenshtein
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modeling_ttt import TttForConditionalGeneration
from modeling_ttt.generation_config_ttt import SURE_RULES
from modeling_ttt.ttt_codec import TttCodecModel
from processing import TttProcessor, deinterleave
from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.listening import Listener, open_listener
from training_examples.evaluation.text_forms import count_errors
from training_examples.preparation.mixtures import load_mixture
from training_examples.threads import threads_field, use_threads
from training_examples.training.samples import answer_prompts, split_example
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.conversations import assistant, user
from training_examples.ttt_tiny.phonemes import PhonemeHead, load_head, most_likely, pronunciations
from training_examples.user_errors import run_command

ANSWERED = ("tts", "spoken_qa", "text_chat")  # the tasks whose answers are spoken
SCORED_AT_ONCE = 256


@dataclass
class BestArguments:
    model: str = field(metadata={"help": "Folder of the checkpoint that reads aloud."})
    dataset: str = field(metadata={"help": "Output of build_examples.py."})
    aligner: Path = field(
        metadata={"help": "Folder of train_codec.py's stage `tokenizer` or `head`, of the model's audio tokenizer."}
    )
    output_dir: Path = field(metadata={"help": "Folder to write: a DatasetDict with the split `train`."})
    settings: list[str] = field(
        default_factory=lambda: ["8:8:0.03", "26:26:0.03", "13:13:0.03", "8:8:0"],
        metadata={"help": "CODES:STEPS:ORDER_BIAS of a block, of each of which there is an answer."},
    )
    new_texts: int = field(default=12_000, metadata={"help": "New random sequences that are read aloud, too."})
    max_texts: int | None = field(default=None, metadata={"help": "Read only so many texts of the dataset."})
    keep: float = field(default=0.8, metadata={"help": "Share of the texts that is kept, the clearest first."})
    recorded: bool = field(
        default=False,
        metadata={"help": "Choose among the dataset's own speech of a text as well: recordings, from all beginnings."},
    )
    recogniser: str | None = field(
        default=None,
        metadata={
            "help": "Who listens to the answers before one is chosen: a faster-whisper folder or name (tiny.en), or "
            "transformers:NAME. Name it where the model is measured by it."
        },
    )
    listen_to: int | None = field(
        default=None,
        metadata={"help": "How many answers to a text --recogniser hears at most, likeliest first (default: 8)."},
    )
    keep_unspoken: bool = field(
        default=False,
        metadata={
            "help": "Write the dataset's examples whose answers are not spoken, such as dictations, too, so that the "
            "output can be trained on alone."
        },
    )
    part: str = field(default="0:1", metadata={"help": "PART:PARTS, which of the texts this process reads."})
    batch_size: int = field(default=64, metadata={"help": "Texts read side by side."})
    device: str = field(default="cpu", metadata={"help": "Where the model runs."})
    seed: int = field(default=0, metadata={"help": "Of the new texts."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, new_texts=0, max_texts=0, listen_to=1, batch_size=1)
        if self.listen_to is not None and self.recogniser is None:
            raise ValueError(
                f"`--listen_to` {self.listen_to} has no effect without `--recogniser`; give both or neither"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(f"`--keep` is {self.keep}; it is a share, above 0 and at most 1")
        if not self.settings:
            raise ValueError("`--settings` is empty: name at least one CODES:STEPS:ORDER_BIAS")
        self.generation = [read_setting(setting) for setting in self.settings]
        try:
            self.first, self.parts = map(int, self.part.split(":"))
        except ValueError:
            raise ValueError(f"`--part` {self.part!r}: the form is PART:PARTS, such as 0:2 and 1:2") from None
        if not 0 <= self.first < self.parts:
            raise ValueError(f"`--part` {self.part}: the first number must be below the second")


def read_setting(setting: str) -> dict[str, Any]:
    """
    Return options of `generate` for `CODES:STEPS:ORDER_BIAS`.

    Raises:
        ValueError: If it has another form.
    """
    try:
        size, steps, bias = setting.split(":")
        return {
            "audio_block_size": int(size),
            "audio_steps_per_block": int(steps),
            "audio_order_bias": float(bias),
            **dict.fromkeys(SURE_RULES),
        }
    except ValueError:
        raise ValueError(f"`--settings` {setting!r}: the form is CODES:STEPS:ORDER_BIAS, such as 8:8:0.03") from None


class Reader:
    """
    Reads aloud, and says how clearly.

    Args:
        model ([`TttForConditionalGeneration`]), processor ([`TttProcessor`]): who reads.
        head (`PhonemeHead`), codec (`TttCodecModel`): who judges the codes.
        spellings (`dict`): phonemes of every word, from `pronunciations`.
        batch_size (`int`): texts side by side.
    """

    def __init__(
        self,
        model: TttForConditionalGeneration,
        processor: TttProcessor,
        head: PhonemeHead,
        codec: TttCodecModel,
        spellings: dict[str, list[int]],
        batch_size: int,
    ):
        self.model, self.processor, self.head, self.codec = model, processor, head, codec
        self.spellings, self.batch_size = spellings, batch_size
        self.end = processor.token_ids.end_of_turn_token_id

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of the request to read a text."""
        system = {"role": "system", "content": self.processor.get_task("tts").system_prompt}
        messages = [system, user({"text": text}, None), assistant(text, [0])]
        return split_example(self.processor.build_conversation_example(messages))[0]

    def parts(self, answer: Sequence[int]) -> tuple[str, list[int]]:
        """Return the text and the codes of an answer."""
        ids, codes = deinterleave([token for token in answer if token != self.end], self.processor.token_ids)
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), list(codes)

    def read(self, texts: Sequence[str], options: dict[str, Any], title: str) -> list[list[int] | None]:
        """Return the tokens of each answer, or None where it has another text, no speech or no end."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        answers: list[list[int] | None] = [None] * len(texts)
        for start in tqdm(range(0, len(order), self.batch_size), desc=title, unit="batch"):
            places = order[start : start + self.batch_size]
            prompts = [self.prompt(texts[place]) for place in places]
            for place, answer in zip(
                places, answer_prompts(self.model, prompts, self.end, do_sample=False, **options), strict=True
            ):
                text, codes = self.parts(answer)
                if answer[-1:] == [self.end] and codes and text == texts[place]:
                    answers[place] = answer
        return answers

    @torch.no_grad()
    def judge(self, texts: Sequence[str], codes: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """
        Return how unlikely the codes make each text, in nats a phoneme, and the share of its phonemes that the head
        reads otherwise. Both are infinite where there are too few codes.
        """
        losses, errors = np.full(len(texts), np.inf), np.full(len(texts), np.inf)
        device = next(self.head.parameters()).device
        order = sorted(range(len(texts)), key=lambda index: len(codes[index]))
        for start in range(0, len(order), SCORED_AT_ONCE):
            places = [place for place in order[start : start + SCORED_AT_ONCE] if len(codes[place])]
            if not places:
                continue
            said = [[phoneme for word in texts[place].split() for phoneme in self.spellings[word]] for place in places]
            # Each row by its own length: what follows a row's end would be seen by its last positions.
            logs = [self._log_probs(torch.tensor(codes[place], device=device)) for place in places]
            lengths = torch.tensor([len(log) for log in logs])
            loss = functional.ctc_loss(
                pad_sequence(logs).cpu(), torch.tensor(sum(said, [])), lengths,
                torch.tensor([len(s) for s in said]), reduction="none",
            )  # fmt: skip
            for place, value, log, phonemes in zip(places, loss.tolist(), logs, said, strict=True):
                losses[place] = value / len(phonemes)
                errors[place] = Levenshtein.distance(most_likely(log), phonemes) / len(phonemes)
        return losses, errors

    def _log_probs(self, codes: torch.Tensor) -> torch.Tensor:
        grid = self.codec.quantizer.to_grid(codes[None])
        features = grid.new_zeros(1, len(codes) * self.head.positions, self.head.proj_features.in_features)
        return self.head(features, grid)[0][:, 0]


@dataclass(frozen=True, order=True)
class Candidate:
    """An answer to a text: nats a phoneme, the share of phonemes read otherwise, its tokens."""

    loss: float
    error: float
    answer: tuple[int, ...]


def choose(
    reader: Reader,
    texts: Sequence[str],
    generation: Sequence[dict[str, Any]],
    names: Sequence[str],
    keep: float,
    recorded: Mapping[str, Collection[tuple[int, ...]]] | None = None,
    listener: Listener | None = None,
    listen_to: int = 8,
) -> dict[str, list[int]]:
    """
    Read texts at every setting; return the tokens of the clearest answer to each, without the least clear texts.

    Args:
        reader (`Reader`): who reads, and says how clearly.
        texts (`Sequence[str]`): what is read.
        generation (`Sequence[dict]`), names (`Sequence[str]`): options of `generate`, and how they are called.
        keep (`float`): the share of the texts that is kept.
        recorded (`Mapping[str, Collection[tuple[int, ...]]]`, *optional*): answers to choose from besides, by text.
        listener (`Listener`, *optional*): a recogniser that decides first, the likelihood of the phonemes then.
        listen_to (`int`, *optional*, defaults to 8): how many answers to a text it hears at most.

    Raises:
        ValueError: If no text is read at any setting.
    """
    found: dict[str, set[Candidate]] = defaultdict(set)

    def judge(name: str, said: list[tuple[str, list[int]]]) -> None:
        losses, errors = reader.judge([text for text, _ in said], [reader.parts(answer)[1] for _, answer in said])
        better = 0
        for (text, answer), loss, error in zip(said, losses, errors, strict=True):
            if np.isfinite(loss):
                better += not found[text] or loss < min(found[text]).loss
                found[text].add(Candidate(float(loss), float(error), tuple(answer)))
        there = len({text for text, _ in said})
        print(
            f"{name}: {there} of {len(texts)} texts, {otherwise(errors)}; {better} times the clearest yet", flush=True
        )

    if recorded is not None:
        judge("recorded", [(text, list(answer)) for text in texts for answer in recorded.get(text, ())])
    for name, options in zip(names, generation, strict=True):
        begin = time.monotonic()
        answers = reader.read(texts, options, name)
        judge(name, [(text, answer) for text, answer in zip(texts, answers, strict=True) if answer is not None])
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    ordered = {text: sorted(candidates) for text, candidates in found.items() if candidates}
    if not ordered:
        raise ValueError(f"none of {len(texts)} texts is read as it stands: is --model trained?")
    wrong = dict.fromkeys(ordered, 0.0)
    best = {text: candidates[0] for text, candidates in ordered.items()}
    if listener is not None:
        best, wrong = listen(reader, listener, {text: several[:listen_to] for text, several in ordered.items()})
    ranked = sorted(best, key=lambda text: (wrong[text], best[text].loss))[: max(1, round(keep * len(texts)))]
    print(
        f"the clearest of each: {otherwise([said.error for said in best.values()])}; {len(ranked)} of {len(texts)} "
        f"texts kept, {otherwise([best[text].error for text in ranked])}",
        flush=True,
    )
    return {text: list(best[text].answer) for text in ranked}


def listen(
    reader: Reader, listener: Listener, candidates: Mapping[str, Sequence[Candidate]]
) -> tuple[dict[str, Candidate], dict[str, float]]:
    """
    Decode the answers to each text, in their order, until a recogniser hears one without an error.

    Returns:
        `tuple[dict[str, Candidate], dict[str, float]]`: of each text the answer with the fewest errors, the first of
            several, and its errors a word.
    """
    recogniser, codec = listener.open(), reader.processor.audio_tokenizer
    best: dict[str, Candidate] = {}
    wrong: dict[str, float] = {}
    first: dict[str, float] = {}
    for place in range(max(map(len, candidates.values()))):
        left = [text for text in candidates if wrong.get(text) != 0.0 and place < len(candidates[text])]
        for start in tqdm(range(0, len(left), reader.batch_size), desc=f"listening, answer {place + 1}", unit="batch"):
            heard = left[start : start + reader.batch_size]
            waves = []
            for text in heard:
                codes = torch.tensor(reader.parts(candidates[text][place].answer)[1], device=codec.device)
                with torch.no_grad():
                    waves.append(codec.decode(codes[None]).audio_values[0, 0].float().cpu().numpy())
            transcripts = recogniser.transcribe(waves, codec.config.sampling_rate)
            for text, (errors, words) in zip(heard, count_errors(heard, transcripts, "en"), strict=True):
                rate = errors / max(words, 1)
                first.setdefault(text, rate)
                if rate < wrong.get(text, np.inf):
                    best[text], wrong[text] = candidates[text][place], rate
    sure = [np.mean([rates[text] == 0 for text in candidates]) for rates in (first, wrong)]
    print(
        f"heard without an error: {100 * sure[0]:.1f} % of the texts in the likeliest answer, {100 * sure[1]:.1f} % in "
        "the one chosen",
        flush=True,
    )
    return best, wrong


def otherwise(errors: Sequence[float] | np.ndarray) -> str:
    """Return shares of phonemes that are read otherwise, in words."""
    finite = np.array(errors)[np.isfinite(errors)]
    return f"{100 * finite.mean():.2f} % of the phonemes otherwise" if len(finite) else "no phonemes to be read"


def example_of(prompt: list[int], answer: list[int], task: str) -> dict[str, Any]:
    """Return an example of which the answer alone is scored."""
    ids = [*prompt, *answer]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + answer, "length": len(ids), "task": task}


def main() -> None:
    (args,) = ScriptParser(BestArguments, __doc__).parse_args_into_dataclasses()
    threads = use_threads(args.threads)
    listener = None if args.recogniser is None else open_listener(args.recogniser, threads=threads)
    processor = TttProcessor.from_pretrained(args.model)
    model = TttForConditionalGeneration.from_pretrained(args.model).to(args.device).eval()
    spellings, count = pronunciations()
    codec = TttCodecModel.from_pretrained(args.aligner).eval()
    head = load_head(args.aligner, processor.audio_tokenizer or codec, count).eval()
    reader = Reader(model, processor, head, codec, spellings, args.batch_size)
    answered: dict[str, list[tuple[list[int], str]]] = defaultdict(list)
    recorded: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    said: dict[bytes, str] = {}  # by the tokens of an answer that are no codes: answers with one text share them
    codes = range(processor.token_ids.audio_code_id_start, processor.token_ids.audio_token_id_end)
    unspoken: list[dict[str, Any]] = []
    for record in tqdm(load_mixture([args.dataset]), desc="looking", unit="example"):
        if record["task"] not in ANSWERED and not args.keep_unspoken:
            continue
        prompt, reference = split_example(record)
        tokens = np.array(reference)
        is_code = (tokens >= codes.start) & (tokens < codes.stop)
        if args.keep_unspoken and not is_code.any():
            unspoken.append(dict(record))
        if record["task"] not in ANSWERED:
            continue
        key = tokens[~is_code].tobytes()
        if key not in said:
            said[key] = reader.parts(reference)[0]
        text = said[key]
        if is_code.any() and text and all(word in spellings for word in text.split()):
            answered[text].append((prompt, record["task"]))
            recorded[text].add(tuple(reference))
    known = sorted(answered)
    rng = random.Random(args.seed)
    rng.shuffle(known)
    known = known[: args.max_texts]
    half = args.new_texts // 2
    new = domain.sample_sequences(rng, half, False, 2, 8, answered, domain.CONTENT)
    new += domain.sample_sequences(rng, args.new_texts - half, False, 2, 8, answered)
    texts = [*known, *(text for text in dict.fromkeys(new) if all(word in spellings for word in text.split()))]
    texts = texts[args.first :: args.parts]
    said_before = recorded if args.recorded else None
    chosen = choose(
        reader, texts, args.generation, args.settings, args.keep, said_before, listener, args.listen_to or 8
    )
    examples = []
    for text, answer in chosen.items():
        examples += [example_of(prompt, answer, task) for prompt, task in answered.get(text, [])]
        if text not in answered:
            examples.append(example_of(reader.prompt(text), answer, "tts"))
    examples += unspoken[args.first :: args.parts]
    rng.shuffle(examples)
    DatasetDict({"train": Dataset.from_list(examples)}).save_to_disk(str(args.output_dir))
    print(f"{len(examples)} examples, {sum(example['length'] for example in examples) / 1e6:.1f} M tokens")


if __name__ == "__main__":
    run_command(main)
