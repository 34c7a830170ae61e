"""Recognisers by name: faster-whisper's, any speech recogniser of Transformers, PocketSphinx with a closed domain.

What they hear is kept in rows.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np

from training_examples.evaluation.figures import fingerprint
from training_examples.evaluation.rows import Listener, Recogniser
from training_examples.evaluation.whisper_judge import NUMBER_PROMPT, WhisperJudge

KINDS = ("whisper", "transformers", "pocketsphinx")
LANGUAGE_HELP = "What is spoken, for the recogniser; auto lets it find out."


class TransformersRecogniser:
    """
    Any model that `pipeline("automatic-speech-recognition")` loads.

    Args:
        model (`str`): folder or Hub name.
        language (`str`, *optional*): told to models of many languages (Whisper's).
        device (`str`, *optional*, defaults to `"cpu"`): where it runs.
        batch_size (`int`, *optional*, defaults to 8): waveforms at once.
    """

    def __init__(self, model: str, language: str | None = None, device: str = "cpu", batch_size: int = 8):
        from transformers import pipeline

        self._pipe = pipeline("automatic-speech-recognition", model=model, device=device)
        self._batch_size = batch_size
        takes_language = getattr(getattr(self._pipe.model, "generation_config", None), "is_multilingual", False)
        self._options = {"generate_kwargs": {"language": language}} if language and takes_language else {}

    def transcribe(self, waveforms: Sequence[np.ndarray], sampling_rate: int) -> list[str]:
        """Return one transcript for each mono waveform of shape `(samples,)`; empty for an empty one."""
        rate = self._pipe.feature_extractor.sampling_rate
        texts = []
        for start in range(0, len(waveforms), self._batch_size):
            batch = [np.asarray(wave, np.float32) for wave in waveforms[start : start + self._batch_size]]
            if sampling_rate != rate:
                batch = [librosa.resample(wave, orig_sr=sampling_rate, target_sr=rate) for wave in batch]
            heard = self._pipe([{"raw": wave, "sampling_rate": rate} for wave in batch if len(wave)], **self._options)
            found = iter(heard)
            texts += [next(found)["text"].strip() if len(wave) else "" for wave in batch]
        return texts


def closed_domain(sentences: Path) -> Recogniser:
    """
    Return PocketSphinx over the words of a text file, whose lines are typical sentences.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no word, or one without a pronunciation.
    """
    from training_examples.evaluation.recognisers import Recognizer

    lines = [line.split() for line in sentences.read_text(encoding="utf-8").lower().splitlines()]
    vocabulary = sorted({word for line in lines for word in line})
    if not vocabulary:
        raise ValueError(f"`--recogniser` pocketsphinx:{sentences} holds no word")
    return Recognizer(vocabulary, [" ".join(line) for line in lines if line])


def open_listener(spec: str, language: str = "en", device: str = "cpu", threads: int = 1) -> Listener:
    """
    Return a recogniser by its description; nothing is loaded yet.

    Args:
        spec (`str`): `whisper:` and a faster-whisper folder, name or Hub repository; `transformers:` and a folder or
            Hub name; `pocketsphinx:` and a text file of sentences. Without a prefix a folder says by its files what it
            is, and a name is faster-whisper's.
        language (`str`, *optional*, defaults to `"en"`): what is spoken; "auto" lets the recogniser find out.
        device (`str`, *optional*, defaults to `"cpu"`): of a Transformers model.
        threads (`int`, *optional*, defaults to 1): of faster-whisper.

    Raises:
        ValueError: If the kind is unknown, a folder holds no model, or faster-whisper knows no such name.
        FileNotFoundError: If the file of sentences is not there.
    """
    kind, colon, name = spec.partition(":")
    if not colon or kind not in KINDS:
        if colon and not Path(spec).exists():
            raise ValueError(f"`--recogniser` {spec}: there is no kind {kind!r}; use one of {', '.join(KINDS)}.")
        folder = Path(spec)
        kind, name = "transformers" if (folder / "preprocessor_config.json").exists() else "whisper", spec
        if (folder / "model.bin").exists():
            kind = "whisper"
    if kind == "whisper" and Path(name).is_dir() and not (Path(name) / "model.bin").exists():
        raise ValueError(f"`--recogniser` {spec}: the folder has no model.bin, as faster-whisper's models have.")
    if kind == "whisper" and "/" not in name and not Path(name).exists():
        from faster_whisper import available_models

        if name not in (names := available_models()):
            raise ValueError(
                f"`--recogniser` {spec}: there is neither a folder {name} nor such a model of faster-whisper; use one "
                f"of {', '.join(names)}."
            )
    if kind == "pocketsphinx" and not Path(name).is_file():
        raise FileNotFoundError(f"`--recogniser` {spec}: there is no file {name} of sentences.")
    settings: dict[str, Any] = {"kind": kind, "name": name, "language": language}
    if Path(name).exists():
        settings["hash"] = fingerprint(name)

    spoken = None if language == "auto" else language

    def start() -> Recogniser:
        if kind == "transformers":
            return TransformersRecogniser(name, spoken, device)
        if kind == "pocketsphinx":
            return closed_domain(Path(name))
        prompt = NUMBER_PROMPT if spoken == "en" else None
        return WhisperJudge(name, prompt=prompt, num_threads=threads, language=spoken)

    title = Path(name).stem if kind == "pocketsphinx" else Path(name).name
    if kind == "whisper" and "whisper" not in title:
        title = f"whisper-{title}"
    return Listener(title, start, settings)
