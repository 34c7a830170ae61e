"""Train the audio tokenizer of ttt-tiny on the speech of build_speech.py, in three resumable stages and one more.

    python training_examples/ttt_tiny/train_codec.py --stage tokenizer  # encoder, codes and mel decoder
    python training_examples/ttt_tiny/train_codec.py --stage vocoder    # on real log-mels; may run beside the first
    python training_examples/ttt_tiny/train_codec.py --stage decoder    # and vocoder together on the frozen codes
    python training_examples/ttt_tiny/train_codec.py --stage head --model model_cards/ttt-tiny/audio_tokenizer

`tokenizer` joins a phoneme head (CTC on all voices: the codes must carry what is said) with a log-mel decoder that is
trained on the assistant's voice only (so every voice comes back in that one). `head` trains such a phoneme head alone,
for an audio tokenizer that was published without one: build_examples.py and best_answers.py take its folder as
--aligner. Held-out sentences are left out. Each stage writes OUTPUT/STAGE/ as a TttCodecModel folder plus its optimiser
state, and goes on from there when run again.
"""

import json
import math
import random
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import set_seed

from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel
from training_examples.command_line import ScriptParser
from training_examples.files import whole_file
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny.discriminator import Discriminator
from training_examples.ttt_tiny.domain import is_held_out
from training_examples.ttt_tiny.phonemes import (
    PhonemeHead,
    build_head,
    load_head,
    phoneme_error_rates,
    pronunciations,
    read_head,
)
from training_examples.ttt_tiny.speech import read_audio, read_list, read_shard, to_int16
from training_examples.ttt_tiny.waveforms import augment, pad
from training_examples.user_errors import run_command

SHAPE = {"fsq_levels": [5, 5, 4, 4], "codes_per_second": 12.5, "sampling_rate": 24_000, "num_mel_bins": 100}
# Options that only these stages take.
STAGES_OF = {
    **dict.fromkeys(SHAPE, ("tokenizer", "vocoder")),
    "eval_dir": ("tokenizer", "head"),
    "phoneme_weight": ("tokenizer",),
    **dict.fromkeys(("adversarial_steps", "aligner", "clarity_weight"), ("decoder",)),
}


@dataclass
class CodecArguments:
    stage: str = field(
        metadata={
            "help": "tokenizer, vocoder or decoder; or head, of a finished audio tokenizer.",
            "choices": ["tokenizer", "vocoder", "decoder", "head"],
        }
    )
    speech_dir: Path = field(default=Path("data/ttt_tiny/speech"), metadata={"help": "Shards of build_speech.py."})
    output_dir: Path = field(default=Path("runs/codec"), metadata={"help": "One folder per stage."})
    max_steps: int = field(default=3000, metadata={"help": "Optimiser steps of the stage."})
    batch_size: int = field(default=24, metadata={"help": "Sentences per step (segments of 1 s for the vocoder)."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak; 200 steps of warm-up, then cosine to a 50th."})
    save_every: int = field(default=250, metadata={"help": "Steps between checkpoints."})
    model: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of the audio tokenizer to start from, in place of what earlier stages made; in the stage "
            "tokenizer, what has another shape starts anew. A stage that goes on has started, and does not read it."
        },
    )
    fsq_levels: list[int] | None = field(
        default=None,
        metadata={"help": "Levels of the quantiser; their product are the codes (default: 5 5 4 4)."},
    )
    codes_per_second: float | None = field(
        default=None, metadata={"help": "Codes a second (default: 12.5, the published rate)."}
    )
    sampling_rate: int | None = field(
        default=None, metadata={"help": "Of the waveforms in and out, in Hz (default: 24000)."}
    )
    num_mel_bins: int | None = field(default=None, metadata={"help": "Log-mel channels (default: 100)."})
    eval_dir: Path | None = field(
        default=None,
        metadata={
            "help": "Held-out lists: log at every checkpoint what the codes keep of the phonemes of 60 sentences."
        },
    )
    phoneme_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the codes' phoneme loss beside twice the L1 of log-mels (default: 1)."},
    )
    adversarial_steps: int | None = field(
        default=None,
        metadata={"help": "Last steps of the stage decoder in which a discriminator takes part (default: 0)."},
    )
    aligner: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of the stage tokenizer or head of the same encoder: in the stage decoder, its phoneme head "
            "shall hear in the decoded log-mels what is said."
        },
    )
    clarity_weight: float | None = field(
        default=None, metadata={"help": "Weight of what --aligner hears (default: 0.5)."}
    )
    device: str = field(default="cpu", metadata={"help": "Where the steps run, such as cuda."})
    threads: int = threads_field()
    seed: int = field(default=0, metadata={"help": "Seed of weights, batches and augmentation."})

    def __post_init__(self) -> None:
        for name, stages in STAGES_OF.items():
            if getattr(self, name) is not None and self.stage not in stages:
                raise ValueError(
                    f"--{name} takes part in the stage {' and '.join(stages)} alone; leave it out of the stage "
                    f"{self.stage}"
                )
        if self.clarity_weight is not None and self.aligner is None:
            raise ValueError(
                f"--clarity_weight {self.clarity_weight} has no effect without --aligner; give both or neither"
            )
        # Half of a batch are the assistant's sentences, half are questions.
        batch = 2 if self.stage in ("tokenizer", "head") else 1
        for name, least in (("max_steps", 1), ("save_every", 1), ("batch_size", batch), ("adversarial_steps", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; it must be at least {least} in the stage {self.stage}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # no such device; PyTorch built without it
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--device is {self.device}, which cannot be used here ({reason}); leave it out for the CPU"
            ) from error
        if self.model is not None and not (self.model / "config.json").exists():
            raise ValueError(f"--model {self.model}: there is no audio tokenizer in that folder")


class Speech:
    """All sentences of one kind (`assistant` or `questions`), mapped from disk; new shards join at every epoch.

    Left out are held-out sentences, and those with a word whose pronunciation is not in `words`.
    """

    def __init__(self, folder: Path, kind: str, sampling_rate: int, seed: int, words: Container[str]):
        self.folder, self.kind, self.rng = folder, kind, random.Random(seed)
        self.words = words
        self.sampling_rate = sampling_rate
        self.shards: set[Path] = set()
        self.sentences: list[tuple[str, np.ndarray]] = []

    def refresh(self) -> None:
        for path in sorted(set(self.folder.glob(f"{self.kind}-*.safetensors")) - self.shards):
            rows, waves = read_shard(path, self.sampling_rate)
            self.sentences += [
                (row["text"], wave)
                for row, wave in zip(rows, waves, strict=True)
                if not (" " in row["text"] and is_held_out(row["text"]))
                and all(word in self.words for word in row["text"].split())
            ]
            self.shards.add(path)
        if not self.sentences:
            raise SystemExit(f"no {self.kind} shards in {self.folder}: run build_speech.py first")

    def batches(self, size: int) -> Iterator[list[tuple[str, np.ndarray]]]:
        """Yield batches of sentences of similar length without end."""
        while True:
            self.refresh()
            order = self.rng.sample(range(len(self.sentences)), min(len(self.sentences), 64 * size))
            size = min(size, len(order))
            order.sort(key=lambda index: len(self.sentences[index][1]))
            groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
            self.rng.shuffle(groups)
            for group in groups:
                yield [self.sentences[index] for index in group]

    def segments(self, size: int, samples: int) -> Iterator[torch.Tensor]:
        """Yield batches (size, samples) of random segments without end."""
        while True:
            self.refresh()
            for _ in range(64):
                rows = []
                for _, wave in self.rng.choices(self.sentences, k=size):
                    start = self.rng.randrange(max(len(wave) - samples, 0) + 1)
                    rows.append(wave[start : start + samples])
                yield pad(rows, samples)[0]


def spectral_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the multi-resolution short-time Fourier loss (Yamamoto et al., 2020) of (batch, samples) waveforms."""
    loss = predicted.new_zeros(())
    for n_fft in (128, 256, 512, 1024, 2048):
        window = torch.hann_window(n_fft, device=predicted.device)
        x, y = (
            torch.stft(wave.float(), n_fft, n_fft // 4, window=window, return_complex=True).abs().clamp(min=1e-4)
            for wave in (predicted, target)
        )
        loss = loss + (x - y).norm() / y.norm() + (x.log() - y.log()).abs().mean()
    return loss / 5


def mel_loss(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L1 of log-mels and of their differences in time, over unpadded frames; mask (batch, frames)."""
    weight = mask[..., None].float() / (mask.sum() * target.shape[-1])
    error = predicted.float() - target
    return (error.abs() * weight).sum(), (error.diff(dim=1).abs() * weight[:, 1:]).sum()


def draw_waveforms(sentences: list[tuple[str, np.ndarray]], hop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return waveforms (batch, samples), half of which begin anywhere in their first code or after silence, and a mask
    (batch, codes)."""
    before = [
        random.randrange(int(random.choice((1, 4)) * hop)) if random.random() < 0.5 else 0
        for _ in range(len(sentences))
    ]
    clean, lengths = pad([wave for _, wave in sentences], hop, before)
    return clean, (torch.arange(clean.shape[1] // hop) * hop < lengths[:, None]).long()


def phoneme_losses(log_probs, mask: torch.Tensor, positions: int, sentences, words) -> list[torch.Tensor]:
    """Return the CTC losses of what a head hears in the codes, and in the features before them."""
    labels = [torch.tensor([p for word in text.split() for p in words[word]]) for text, _ in sentences]
    targets, lengths = torch.cat(labels).to(mask.device), torch.tensor([len(x) for x in labels])
    heard = (mask.sum(-1) * positions).cpu()  # ctc_loss wants lengths there
    return [F.ctc_loss(x, targets, heard, lengths, zero_infinity=True) for x in log_probs]


def tokenizer_step(
    model: TttCodecModel, head: PhonemeHead, questions, answers, words, phoneme_weight: float
) -> dict[str, torch.Tensor]:
    said, frames = len(answers), model.config.frames_per_code
    clean, mask = draw_waveforms(answers + questions, model.config.hop_length)
    noisy = augment(clean, model.config.sampling_rate)
    noisy, clean, mask = (tensor.to(model.device) for tensor in (noisy, clean, mask))
    with torch.no_grad():
        noisy, target = model.log_mel(noisy), model.log_mel(clean[:said])
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        features = model.encoder.extract_features(noisy, mask)
        grid = model.quantizer(model.encoder.project(features))
        log_probs = head(features, grid)
        mel = model.decoder(grid[:said], model.quantizer.to_codes(grid[:said].detach()), mask[:said])
    ctc, feature_ctc = phoneme_losses(log_probs, mask, head.positions, answers + questions, words)
    l1, delta = mel_loss(mel, target, mask[:said].repeat_interleave(frames, 1))
    loss = phoneme_weight * ctc + 0.5 * feature_ctc + 2 * l1 + delta
    return {"loss": loss, "ctc": ctc, "feature_ctc": feature_ctc, "mel": l1}


def head_step(model: TttCodecModel, head: PhonemeHead, sentences, words) -> dict[str, torch.Tensor]:
    clean, mask = draw_waveforms(sentences, model.config.hop_length)
    noisy, mask = augment(clean, model.config.sampling_rate).to(model.device), mask.to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        with torch.no_grad():
            features = model.encoder.extract_features(model.log_mel(noisy), mask)
            grid = model.quantizer(model.encoder.project(features))
        log_probs = head(features, grid)
    ctc, feature_ctc = phoneme_losses(log_probs, mask, head.positions, sentences, words)
    return {"loss": ctc + feature_ctc, "ctc": ctc, "feature_ctc": feature_ctc}


def vocoder_step(model: TttCodecModel, segments: torch.Tensor) -> dict[str, torch.Tensor]:
    segments = segments.to(model.device)
    with torch.no_grad():
        mel = model.log_mel(segments)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        waveform = model.vocoder(mel, torch.ones(mel.shape[:2], device=model.device))
    spectral = spectral_loss(waveform, segments)
    return {"loss": spectral + (model.log_mel(waveform) - mel).abs().mean(), "spectral": spectral}


class Critic:
    """A discriminator that takes part in the stage decoder, and its optimiser.

    Args:
        rows (`int`): segments it sees of every batch.
        samples (`int`): their length.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where it learns.
    """

    def __init__(self, rows: int, samples: int, device: torch.device | str = "cpu"):
        self.model, self.rows, self.samples = Discriminator().to(device), rows, samples
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-4, betas=(0.8, 0.9), weight_decay=0.01)

    def state_dict(self) -> dict[str, dict]:
        """Return what `load_state_dict` goes on from."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Go on from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def losses(self, real: torch.Tensor, decoded: torch.Tensor) -> dict[str, torch.Tensor]:
        """Learn from segments of (batch, samples), and return what the decoder shall learn from them."""
        rows = torch.randperm(len(real))[: self.rows]
        start = random.randrange(max(real.shape[1] - self.samples, 0) + 1)
        real, decoded = (wave[rows, start : start + self.samples] for wave in (real, decoded))
        own = self.model.own_loss(real, decoded)
        own.backward()
        self.optimizer.step()
        adversarial, matching = self.model.decoder_losses(real, decoded)
        return {"adversarial": adversarial, "matching": matching, "critic": own.detach()}

    def forget_gradients(self) -> None:
        """Drop the gradients that the decoder's loss left here."""
        self.optimizer.zero_grad()


class Listener:
    """A trained phoneme head that takes part in the stage decoder: what it does not hear was not said clearly."""

    def __init__(self, folder: Path, model: TttCodecModel, num_phonemes: int, words, weight: float):
        self.head = load_head(folder, model, num_phonemes).requires_grad_(False).to(model.device)
        self.words, self.weight = words, weight

    def loss(self, model: TttCodecModel, mel: torch.Tensor, mask: torch.Tensor, sentences) -> torch.Tensor:
        """Return the CTC loss of what is said, heard in decoded log-mels (batch, frames, bins)."""
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            heard = self.head.proj_features(model.encoder.extract_features(mel, mask))
        log_probs = heard.float().log_softmax(-1).transpose(0, 1)
        return phoneme_losses([log_probs], mask, self.head.positions, sentences, self.words)[0]


def decoder_step(
    model: TttCodecModel, answers, critic: Critic | None = None, listener: Listener | None = None
) -> dict[str, torch.Tensor]:
    hop, frames, piece = model.config.hop_length, model.config.frames_per_code, round(model.config.frame_rate)
    clean, lengths = (tensor.to(model.device) for tensor in pad([wave for _, wave in answers], hop))
    encoded = model.encode(clean, torch.arange(clean.shape[1], device=clean.device) < lengths[:, None])
    # One loudness for all sentences: codes are local and cannot tell how loud the whole was.
    clean = clean * (0.1 / (clean.pow(2).sum(-1) / lengths).sqrt())[:, None]
    target, mask = model.log_mel(clean), encoded.audio_codes_mask
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        mel = model.decode_mel(encoded.audio_codes[:, 0], mask)
        # The vocoder learns on segments of about a second: what matters to it is local.
        start = random.randrange(max(int(mask.sum(-1).min()) - piece, 0) + 1)
        frame_slice = slice(start * frames, (start + piece) * frames)
        waveform = model.vocoder(mel[:, frame_slice], mask.repeat_interleave(frames, 1)[:, frame_slice])
    l1, delta = mel_loss(mel, target, mask.repeat_interleave(frames, 1))
    segments = clean[:, start * hop : (start + piece) * hop]
    spectral = spectral_loss(waveform, segments)
    spoken = model.log_mel(waveform)
    sound = (spoken - target[:, frame_slice]).abs().mean()
    # The frozen encoder hears phonemes: what it hears in the decoded speech shall be what it hears in the original.
    segment_mask = mask[:, start : start + piece]
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        heard = model.encoder.extract_features(spoken, segment_mask)
        with torch.no_grad():
            said = model.encoder.extract_features(model.log_mel(segments), segment_mask)
    content = (heard.float() - said.float()).abs().mean()
    loss = 2 * l1 + delta + spectral + sound + content
    found: dict[str, torch.Tensor] = {}
    if critic is not None:
        found = critic.losses(segments, waveform)
        loss = loss + 0.1 * found["adversarial"] + 0.5 * found["matching"]
    if listener is not None:
        found["clarity"] = listener.loss(model, mel, mask, answers)
        loss = loss + listener.weight * found["clarity"]
    return {"loss": loss, "mel": l1, "spectral": spectral, "content": content, **found}


def held_out_sentences(folder: Path, rate: int, words: Container[str]) -> list[tuple[str, np.ndarray]]:
    """Return 60 texts of the development list of the assistant's speech, and their int16 waveforms."""
    rows = [row for row in read_list(folder, "development_tts") if all(word in words for word in row["answer"].split())]
    return [(row["answer"], to_int16(read_audio(folder, row["answer_audio"], rate))) for row in rows[:60]]


def configure(args: CodecArguments) -> TttCodecConfig:
    """
    Return the configuration that the options name, with log-mel frames every 10 ms.

    Raises:
        ValueError: If frames are no whole samples, or codes no whole pairs of frames.
    """
    shape: dict[str, Any] = SHAPE | {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    sampling_rate, codes_per_second = shape["sampling_rate"], shape["codes_per_second"]
    frame = sampling_rate // 100
    if sampling_rate < 100 or sampling_rate % 100:
        raise ValueError(f"--sampling_rate {sampling_rate}: 10 ms must be whole samples; give a multiple of 100")
    if codes_per_second <= 0 or sampling_rate / codes_per_second % (2 * frame):
        raise ValueError(f"--codes_per_second {codes_per_second}: a code must last a multiple of 20 ms, as at 12.5")
    return TttCodecConfig(
        sampling_rate=sampling_rate,
        hop_length=int(sampling_rate / codes_per_second),
        mel_hop_length=frame,
        n_fft=4 * frame,
        num_mel_bins=shape["num_mel_bins"],
        fsq_levels=shape["fsq_levels"],
    )


def check_shape(args: CodecArguments, config: TttCodecConfig, folder: Path) -> None:
    """
    Compare the shape that options name with that of the audio tokenizer which the stage goes on from.

    Raises:
        ValueError: If it has another.
    """
    found = {name: config.frame_rate if name == "codes_per_second" else getattr(config, name) for name in SHAPE}
    for name, value in found.items():
        if getattr(args, name) not in (None, value):
            raise ValueError(
                f"--{name} is {getattr(args, name)}, but the stage goes on from {folder}, where it is {value}; leave "
                "it out, or give another --output_dir"
            )


def load_for_stage(args: CodecArguments, folder: Path) -> TttCodecModel:
    """Load the stage's own checkpoint; else `--model`; else what earlier stages made; else fresh weights."""
    if (folder / "config.json").exists():
        if args.model is not None:
            print(f"the stage goes on from {folder}; --model {args.model} is not read again", flush=True)
        model = TttCodecModel.from_pretrained(folder)
        check_shape(args, model.config, folder)
        return model
    if args.model is not None and args.stage == "tokenizer":
        return TttCodecModel.from_pretrained(args.model, config=configure(args), ignore_mismatched_sizes=True)
    if args.model is not None:
        model = TttCodecModel.from_pretrained(args.model)
        check_shape(args, model.config, args.model)
        return model
    if args.stage in ("tokenizer", "vocoder"):
        return TttCodecModel(configure(args))
    for earlier in ("tokenizer", "vocoder") if args.stage == "decoder" else ("tokenizer",):
        if not (args.output_dir / earlier / "config.json").exists():
            raise ValueError(
                f"the stage {args.stage} goes on from {args.output_dir / earlier}, or from --model; run the stage "
                f"{earlier} first, or give --model"
            )
    model = TttCodecModel.from_pretrained(args.output_dir / "tokenizer")
    if args.stage == "head":
        return model
    vocoder = TttCodecModel.from_pretrained(args.output_dir / "vocoder").vocoder
    model.vocoder.load_state_dict(vocoder.state_dict())
    return model


def main() -> None:
    (args,) = ScriptParser(CodecArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    folder = args.output_dir / args.stage
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    words, num_phonemes = pronunciations()
    model = load_for_stage(args, folder).to(args.device)
    config = model.config
    head = build_head(model, num_phonemes).to(model.device)
    stages: dict[str, list[torch.nn.Module]] = {
        "tokenizer": [model.encoder, model.decoder, head],
        "vocoder": [model.vocoder],
        "decoder": [model.decoder, model.vocoder],
        "head": [head],
    }
    parameters = [p for module in stages[args.stage] for p in module.parameters()]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in parameters))
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, critic_state = 0, None
    state_file = folder / "training_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if head in stages[args.stage]:
            head.load_state_dict(state["head"])
        step, critic_state = state["step"], state.get("critic")
    elif args.model is not None and (known := read_head(args.model)) is not None:
        fresh = head.state_dict()
        head.load_state_dict(fresh | {key: value for key, value in known.items() if value.shape == fresh[key].shape})
    set_seed(args.seed + step)
    rate = config.sampling_rate
    answers = Speech(args.speech_dir, "assistant", rate, args.seed + step, words)
    questions = Speech(args.speech_dir, "questions", rate, args.seed + step + 1, words)
    answer_batches = answers.batches(args.batch_size // 2 if args.stage in ("tokenizer", "head") else args.batch_size)
    question_batches, segments = questions.batches(args.batch_size // 2), answers.segments(args.batch_size, rate)

    held_out = []
    if args.eval_dir is not None:
        held_out = held_out_sentences(args.eval_dir, rate, words)
    progress, started = tqdm(total=args.max_steps, initial=step, desc=args.stage), time.time()
    running: dict[str, float] = {}
    critic: Critic | None = None
    adversarial_steps = args.adversarial_steps or 0
    phoneme_weight = 1.0 if args.phoneme_weight is None else args.phoneme_weight
    listener = None
    if args.aligner is not None:
        weight = 0.5 if args.clarity_weight is None else args.clarity_weight
        listener = Listener(args.aligner, model, num_phonemes, words, weight)
    while step < args.max_steps:
        scale = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.max_steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        if args.stage == "tokenizer":
            losses = tokenizer_step(model, head, next(question_batches), next(answer_batches), words, phoneme_weight)
        elif args.stage == "head":
            losses = head_step(model, head, next(question_batches) + next(answer_batches), words)
        elif args.stage == "vocoder":
            losses = vocoder_step(model, next(segments))
        else:
            if critic is None and step >= args.max_steps - adversarial_steps:
                critic = Critic(rows=8, samples=rate // 2, device=model.device)
                if critic_state is not None:
                    critic.load_state_dict(critic_state)
            losses = decoder_step(model, next(answer_batches), critic, listener)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if critic is not None:
            critic.forget_gradients()
        step += 1
        for name, value in losses.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        progress.update()
        if step % 50 == 0:
            line = {
                "step": step,
                "seconds": round(time.time() - started),
                **{k: round(v, 4) for k, v in running.items()},
            }
            progress.set_postfix({k: v for k, v in line.items() if k in running})
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if step % args.save_every == 0 or step == args.max_steps:
            model.save_pretrained(folder)
            state = {"optimizer": optimizer.state_dict(), "step": step}
            if head in stages[args.stage]:  # no other stage trains it
                state["head"] = head.state_dict()
            if critic is not None:
                state["critic"] = critic.state_dict()
            elif critic_state is not None:
                state["critic"] = critic_state
            with whole_file(state_file) as partial:
                torch.save(state, partial)
            if held_out:
                of_codes, of_features = phoneme_error_rates(model, head, held_out, words)
                with (folder / "log.jsonl").open("a") as log:
                    found = {"step": step, "phoneme_error": of_codes, "phoneme_error_before_codes": of_features}
                    log.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    run_command(main)
