"""Kokoro-82M in-process: English words to phonemes by a lexicon, a voice or a mixture of voices, a 24 kHz waveform.

The ONNX export runs on one thread at 3 to 4 seconds of speech a second. Only the data scripts need it (and the package
`onnxruntime`, of the extra `train`); a trained model does not.
"""

import json
import os
from functools import cache, cached_property
from pathlib import Path

import numpy as np

SAMPLING_RATE = 24_000
# Where the model lies when nobody says otherwise; `KOKORO_DIR` names another folder.
DEFAULT_DIR = "data/voices/kokoro"
FILES = ("model.onnx", "vocab.json", "us_gold.json", "us_silver.json", "voices")
# Words as they sound in running speech, where the lexicons give the citation form, and two that they lack.
RUNNING_SPEECH = {
    "a": "ɐ", "an": "ən", "the": "ðə", "is": "ɪz", "of": "ʌv", "has": "hæz", "was": "wʌz", "to": "tə", "i": "I",
    "am": "æm", "in": "ɪn", "minutes": "mˈɪnəts",
}  # fmt: skip
ENDINGS = {"statement": ".", "question": "?", "list": "."}


class Kokoro:
    """
    Text and a voice in, a waveform out.

    Args:
        folder (`str` or `Path`): holds `model.onnx`, `vocab.json`, the lexicons `us_gold.json` and `us_silver.json`,
            and `voices/`.

    Raises:
        FileNotFoundError: Names the files that are missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if missing := [name for name in FILES if not (self.folder / name).exists()]:
            raise FileNotFoundError(f"Kokoro's folder {self.folder} lacks {missing}; set KOKORO_DIR to where they are")
        self.vocabulary = json.loads((self.folder / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        self._lexicons = [
            json.loads((self.folder / f"us_{name}.json").read_text(encoding="utf-8")) for name in ("gold", "silver")
        ]
        self._style = cache(self._read_style)

    @cached_property
    def _session(self):
        import onnxruntime
        import torch

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        return onnxruntime.InferenceSession(self.folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def pronounce(self, word: str) -> str | None:
        """Return the phonemes of a lower-case word as running speech has them; None if no lexicon knows it."""
        if word in RUNNING_SPEECH:
            return RUNNING_SPEECH[word]
        if sound := self._look_up(word):
            return sound
        # The lexicons leave out regular plurals and third persons.
        stems = [word[:-1]] if word.endswith("s") and not word.endswith("ss") else []
        stems += [word[:-3] + "y"] if word.endswith("ies") else [word[:-2]] if word.endswith("es") else []
        stem = next(filter(None, map(self._look_up, stems)), None)
        return stem + ("ᵻz" if stem[-1] in "szʃʒʧʤ" else "s" if stem[-1] in "ptkfθ" else "z") if stem else None

    def _look_up(self, word: str) -> str | None:
        for lexicon in self._lexicons:
            for form in (word, word.capitalize()):
                entry = lexicon.get(form)
                if sound := entry if isinstance(entry, str) or entry is None else entry["DEFAULT"]:
                    return sound
        return None

    def phonemes(self, text: str, phrasing: str = "statement") -> str:
        """
        Return the phonemes of lower-case words separated by blanks.

        Args:
            text (`str`): the words.
            phrasing (`str`, *optional*, defaults to `"statement"`): or `"question"` (the voice rises) or `"list"` (a
                short pause after each word).

        Raises:
            ValueError: If a word is in no lexicon, or the phrasing is unknown.
        """
        if phrasing not in ENDINGS:
            raise ValueError(f"`phrasing` is {phrasing!r}; use one of {list(ENDINGS)}")
        words = text.split()
        sounds = [self.pronounce(word) for word in words]
        if unknown := [word for word, sound in zip(words, sounds, strict=True) if sound is None]:
            raise ValueError(f"no lexicon knows {unknown} in {text!r}")
        for index, (word, following) in enumerate(zip(words, words[1:], strict=False)):
            if word == "the" and following[0] in "aeiou":
                sounds[index] = "ði"
        return (", " if phrasing == "list" else " ").join(map(str, sounds)) + ENDINGS[phrasing]

    def _read_style(self, voice: str) -> np.ndarray:
        path = self.folder / "voices" / f"{voice}.bin"
        if not path.exists():
            known = sorted(file.stem for file in path.parent.glob("*.bin"))
            raise ValueError(f"unknown Kokoro voice {voice!r}; there are {known}")
        return np.fromfile(path, dtype=np.float32).reshape(-1, 256)  # by number of phonemes

    def style(self, voice: str, length: int) -> np.ndarray:
        """
        Return the style of `voice` for `length` phonemes, of shape `(1, 256)`.

        `voice` is a name, or names with weights that sum to 1 (`"af_heart:0.6+am_puck:0.4"`): such a mixture is a voice
        of its own.
        """
        parts = [part.partition(":") for part in voice.split("+")]
        weights = [float(weight or 1.0) for _, _, weight in parts]
        if abs(sum(weights) - 1) > 1e-3:
            raise ValueError(f"the weights of voice {voice!r} sum to {sum(weights):g}, not to 1")
        styles = [self._style(name) for name, _, _ in parts]
        rows = [style[min(length, len(style) - 1)] for style in styles]
        return sum(weight * row for weight, row in zip(weights, rows, strict=True))[None].astype(np.float32)

    def speak(self, text: str, voice: str, speed: float = 1.0, phrasing: str = "statement") -> np.ndarray:
        """Speak `text`: float32 of shape `(samples,)`, 24 kHz, as the model gives it."""
        ids = [self.vocabulary[sound] for sound in self.phonemes(text, phrasing) if sound in self.vocabulary]
        inputs = {
            "tokens": np.array([[0, *ids, 0]], dtype=np.int64),
            "style": self.style(voice, len(ids)),
            "speed": np.array([speed], dtype=np.float32),
        }
        return self._session.run(None, inputs)[0].ravel()


@cache
def kokoro(folder: str | None = None) -> Kokoro:
    """Return the model in `folder`, else in the folder that `KOKORO_DIR` names, loaded once."""
    return Kokoro(folder or os.environ.get("KOKORO_DIR", DEFAULT_DIR))
