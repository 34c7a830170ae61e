"""Compares Kokoro's English voices as the assistant of ttt-tiny: how well judges that know nothing of the domain
understand them, how far their band reaches, and how steady they are.

    python training_examples/ttt_tiny/compare_voices.py --whisper base tiny.en --sentences 50 --voices af_heart af_nova

Prints one table row a voice and writes the table to `--output`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import librosa
import numpy as np
from tqdm import tqdm

from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.figures import markdown_table
from training_examples.evaluation.whisper_judge import WhisperJudge, count_word_errors
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.kokoro import SAMPLING_RATE, kokoro
from training_examples.ttt_tiny.synthesis import KOKORO_VOICES, UNHEARD_KOKORO_VOICES, level, trim
from training_examples.user_errors import run_command


@dataclass
class VoiceArguments:
    whisper: list[str] = field(metadata={"help": "Whisper models for faster-whisper: folders or names."})
    voices: list[str] = field(
        default_factory=lambda: sorted([*KOKORO_VOICES, *UNHEARD_KOKORO_VOICES]), metadata={"help": "Kokoro's names."}
    )
    sentences: int = field(default=12, metadata={"help": "Half answers of the domain, half lists of content words."})
    output: Path = field(default=Path("runs/voices.md"), metadata={"help": "Where the table goes."})
    seed: int = field(default=7, metadata={"help": "Seed of the sentences."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, sentences=1)
        if len({Path(name).name for name in self.whisper}) < len(self.whisper):
            raise ValueError("`--whisper` has two models of one name, which is that of their columns; rename one.")


def sample_texts(rng: random.Random, count: int) -> list[str]:
    """Return answers of the domain and lists of 3 to 6 content words, half of each."""
    answers = sorted({item.answer for item in domain.fixed_items()})
    return [rng.choice(answers) for _ in range(count // 2)] + [
        domain.random_words(rng, 3, 6, domain.CONTENT) for _ in range(count - count // 2)
    ]


def band_limit(waves: list[np.ndarray], below: float = 50.0) -> float:
    """Return the highest frequency (Hz) at which waveforms' mean spectrum (24 kHz) is `below` dB under its peak."""
    power = np.mean([np.mean(np.abs(librosa.stft(wave, n_fft=1024)) ** 2, axis=1) for wave in waves], axis=0)
    return float(np.flatnonzero(10 * np.log10(power / power.max()) > -below)[-1] * SAMPLING_RATE / 1024)


def pitch(wave: np.ndarray) -> np.ndarray:
    """Return the pitch of the voiced frames of a waveform (24 kHz), in semitones over 100 Hz."""
    frequency = librosa.yin(wave, fmin=60, fmax=420, sr=SAMPLING_RATE, frame_length=1536, hop_length=480)
    loudness = librosa.feature.rms(y=wave, frame_length=1536, hop_length=480)[0]
    voiced = (loudness > 0.3 * np.percentile(loudness, 95)) & (frequency > 65) & (frequency < 400)
    return 12 * np.log2(frequency[voiced] / 100)


def row_of(voice: str, texts: list[str], judges: dict[str, WhisperJudge]) -> list[object]:
    """Return the table row of one voice."""
    raw = [kokoro().speak(text, voice) for text in texts]
    waves = [level(trim(wave)).astype(np.float32) for wave in raw]
    errors = []
    for judge in judges.values():
        counts = count_word_errors(texts, judge.transcribe(waves, SAMPLING_RATE))
        errors.append(f"{100 * sum(wrong for wrong, _ in counts) / sum(words for _, words in counts):.1f}")
    pitches = [pitch(wave) for wave in waves]
    levels = [20 * np.log10(np.sqrt(np.mean(trim(wave) ** 2))) for wave in raw]
    sounds = [len(kokoro().phonemes(text)) for text in texts]
    rates = np.array(sounds) / [len(wave) / SAMPLING_RATE for wave in waves]
    return [
        voice,
        *errors,
        f"{band_limit(waves) / 1000:.1f}",
        f"{np.std(np.concatenate(pitches)):.1f}",
        f"{np.std([np.median(values) for values in pitches]):.1f}",
        f"{np.std(levels):.1f}",
        f"{np.mean(rates):.1f}",
        f"{100 * np.std(rates) / np.mean(rates):.0f}",
    ]


def main() -> None:
    (args,) = ScriptParser(VoiceArguments, __doc__).parse_args_into_dataclasses()
    threads = use_threads(args.threads)
    judges = {Path(name).name: WhisperJudge(name, num_threads=threads) for name in args.whisper}
    texts = sample_texts(random.Random(args.seed), args.sentences)
    header = ["voice", *(f"{name}, WER %" for name in judges), "band, kHz", "F0 spread, semitones"]
    header += ["F0 between sentences", "level between sentences, dB", "phonemes a second", "their spread, %"]
    rows: list[list[object]] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for voice in tqdm(args.voices, desc="voices"):
        rows.append(row_of(voice, texts, judges))
        args.output.write_text(markdown_table(header, rows) + "\n", encoding="utf-8")
    print(f"{args.sentences} sentences, {sum(len(text.split()) for text in texts)} words\n")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    run_command(main)
