"""Makes held-out lists of what people say, for task_set.py, from recordings in two packages of Debian.

    apt-get download tuxpaint-stamps-default pocketsphinx-testdata
    for package in *.deb; do dpkg -x $package data/humans; done
    python training_examples/ttt_tiny/human_lists.py --humans data/humans --output_dir data/ttt_tiny

Tux Paint's stamps (GPL-2) have the ten digits by an American and a British speaker, and names of animals; the test data
of PocketSphinx (BSD-2) have connected digits and sentences. They are for measuring alone: neither the recordings nor
anything trained on them belongs into this repository. Words are trimmed, brought to one level and spliced with short
gaps; a trained synthetic voice that is treated alike gives the control lists (`control_*`), so that what splicing costs
can be told from what people cost.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import librosa
import numpy as np
import soundfile
from tqdm import tqdm

from training_examples.command_line import ScriptParser, check_least
from training_examples.files import write_text
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.augmentation import splice
from training_examples.ttt_tiny.synthesis import SAMPLING_RATE, level, speak, trim
from training_examples.user_errors import run_command

STAMPS, SPHINX = "usr/share/tuxpaint/stamps", "usr/share/pocketsphinx/test/data"
SPEAKERS = {"american": "{}.ogg", "british": "{}_en_GB.ogg"}
DIGITS = domain.NUMBERS[:10]
GAP_SECONDS, EDGE_SECONDS, RMS = 0.06, 0.1, 0.05
RAW_RATE = 16_000
# Sentences of PocketSphinx's test data: inside the domain they are taken down, outside it is said so.
DICTATIONS = {"tidigits/dhd.2934z.raw": "two nine three four zero", "cards/004.wav": "five five"}
OTHERS = {
    "goforward.raw": "go forward ten meters",
    "something.raw": "go somewhere and do something",
    "cards/001.wav": "ten of clubs",
    "cards/002.wav": "four queen of clubs",
    "cards/003.wav": "seven of clubs",
    "cards/005.wav": "eight of spades four of clubs seven of hearts",
} | {
    f"librivox/sense_and_sensibility_01_austen_64kb-{number}.wav": text
    for number, text in {
        "0870": "and mister john dashwood had then leisure to consider how much there might be prudently in his power "
        "to do for them",
        "0880": "he was not an ill disposed young man",
        "0890": "unless to be rather cold hearted and rather selfish is to be ill disposed",
        "0920": "had he married a more a amiable woman he might have been made still more respectable than he was",
        "0930": "he might even have been made amiable himself",
    }.items()
}


@dataclass
class HumanArguments:
    humans: Path = field(default=Path("data/humans"), metadata={"help": "Where the packages were unpacked."})
    output_dir: Path = field(default=Path("data/ttt_tiny"), metadata={"help": "As in build_speech.py."})
    strings: int = field(default=90, metadata={"help": "Strings of 2 to 5 digits of each speaker."})
    control: str = field(default="kokoro:am_adam", metadata={"help": "Trained voice of the control lists."})
    seed: int = field(default=0, metadata={"help": "Seed of the strings."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, strings=1)


def read_recording(path: Path) -> np.ndarray:
    """
    Return a recording at 24 kHz, trimmed and at `RMS`: float32 of shape `(samples,)`.

    Raises:
        FileNotFoundError: If it is not there; the message says where it comes from.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: unpack tuxpaint-stamps-default and pocketsphinx-testdata there")
    if path.suffix == ".raw":
        samples, rate = np.fromfile(path, np.int16).astype(np.float32) / 32768, RAW_RATE
    else:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        samples = samples.mean(axis=1)
    if rate != SAMPLING_RATE:
        samples = librosa.resample(samples, orig_sr=rate, target_sr=SAMPLING_RATE)
    return cut_out(samples)


def cut_out(samples: np.ndarray) -> np.ndarray:
    """Return a word at `RMS` with 30 ms around what is within 38 dB of its loudest; recordings are never silent."""
    return level(trim(samples, keep=0.03, threshold=-38.0), rms=RMS).astype(np.float32)


def digit_texts(rng: random.Random, strings: int) -> list[str]:
    """Return each digit alone, then strings of 2 to 5 random digits."""
    return [*DIGITS, *(domain.random_words(rng, 2, 5, DIGITS) for _ in range(strings))]


def animal_texts(folder: Path) -> dict[Path, str]:
    """Return the recordings that name an animal of the domain, and its name. What is written beside one is "A dog.",
    what is said is "dog"."""
    found = {}
    for path in sorted(folder.glob("animals/**/*_desc.ogg")):
        text = path.with_name(path.name.replace("_desc.ogg", ".txt"))
        if not text.exists():
            continue
        words = text.read_text(encoding="utf-8", errors="replace").splitlines()[0].lower().strip(" .").split()
        if len(words) == 2 and words[1] in domain.vocabulary():
            found[path] = words[1]
    return found


def spliced(text: str, word: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return words spliced with gaps of 60 ms and 100 ms of silence at both ends."""
    edge = np.zeros(int(EDGE_SECONDS * SAMPLING_RATE), np.float32)
    return np.concatenate([edge, splice([word(item) for item in text.split()], SAMPLING_RATE, GAP_SECONDS), edge])


def write_list(folder: Path, name: str, items: list[tuple[dict, np.ndarray]]) -> None:
    """Write the rows and their recordings in the layout of build_speech.py's lists."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (row, wave) in enumerate(items):
        audio = f"{name}/{index:04d}.flac"
        soundfile.write(folder / audio, wave, SAMPLING_RATE)
        lines.append(json.dumps({"id": f"{name}-{index:04d}", **row, "audio": audio, "answer_audio": None}) + "\n")
    write_text(folder / f"{name}.jsonl", "".join(lines))


def dictation(text: str, kind: str, voice: str) -> dict:
    """Return the row of something to be taken down."""
    return {"task": "asr", "question": "", "answer": text, "kind": kind, "seen_voice": False, "voice": voice}


def main() -> None:
    (args,) = ScriptParser(HumanArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    folder, stamps, sphinx = args.output_dir / "eval", args.humans / STAMPS, args.humans / SPHINX
    texts = {speaker: digit_texts(random.Random(f"{args.seed} {speaker}"), args.strings) for speaker in SPEAKERS}
    recordings = {
        speaker: {
            word: read_recording(stamps / "symbols/math" / name.format(number)) for number, word in enumerate(DIGITS)
        }
        for speaker, name in SPEAKERS.items()
    }
    synthetic = {word: cut_out(speak(word, args.control)) for word in tqdm(DIGITS, desc="control")}
    human, control = [], []
    for speaker, sentences in texts.items():
        for text in sentences:
            kind = "single" if text in DIGITS else "string"
            human.append((dictation(text, kind, f"human:{speaker}"), spliced(text, recordings[speaker].__getitem__)))
            control.append((dictation(text, kind, args.control), spliced(text, synthetic.__getitem__)))
    write_list(folder, "human_digits", human)
    write_list(folder, "control_digits", control)

    words = [
        (dictation(text, "word", "human:american"), read_recording(path)) for path, text in animal_texts(stamps).items()
    ]
    words += [
        (dictation(text, "connected", "human:sphinx"), read_recording(sphinx / name))
        for name, text in DICTATIONS.items()
    ]
    write_list(folder, "human_words", words)
    others = []
    for name, text in OTHERS.items():
        row = dictation(domain.NOT_KNOWN, "other", "human:sphinx") | {"task": "spoken_qa", "question": text}
        others.append((row, read_recording(sphinx / name)))
    write_list(folder, "human_other", others)
    print(f"{folder}: {len(human)} digit items, as many controls, {len(words)} words, {len(others)} other sentences")


if __name__ == "__main__":
    run_command(main)
