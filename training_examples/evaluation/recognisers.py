"""An independent recogniser for evaluation: PocketSphinx with a language model of a domain, and word error rates.

PocketSphinx's wheel carries an English acoustic model and a pronouncing dictionary; nothing is downloaded. It shares no
part with the audio tokenizer, so what it understands is evidence about the speech and not about the codes.
"""

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import jiwer
import librosa
import numpy as np
import pocketsphinx
from tqdm.auto import tqdm

from training_examples.workers import worker_pool

SAMPLING_RATE = 16_000
# What the uniform half of the language model expects: sequences of this many words (they decide how likely an end is).
MEAN_SEQUENCE_LENGTH = 5
DECODING: dict[str, object] = {"lw": 6.5}
PADDING_SECONDS = 0.1
LEVEL_RMS = 0.05
NOISE_RMS = 1e-5


def bigram_arpa(sentences: Iterable[str], vocabulary: Sequence[str], uniform_weight: float = 0.5) -> str:
    """
    Return a bigram language model in ARPA format: the sentences' bigrams mixed with the uniform distribution.

    p(w | h) = (1 - u) count(h, w) / count(h) + u q(w), where q gives every word of the vocabulary the same probability
    and the end of the sentence 1 / (MEAN_SEQUENCE_LENGTH + 1). The mixture is exact: a bigram that never occurred backs
    off to q with weight u, or with weight 1 after a word that never occurred.

    Args:
        sentences (`Iterable[str]`): sentences of words separated by blanks; each word must be in the vocabulary.
        vocabulary (`Sequence[str]`): all words, each once.
        uniform_weight (`float`, *optional*, defaults to 0.5): u, from 0 (exclusive) to 1.

    Returns:
        `str`: the text of the ARPA file.
    """
    words = set(vocabulary)
    bigrams: Counter[tuple[str, str]] = Counter()
    for sentence in sentences:
        tokens = sentence.split()
        if unknown := sorted(set(tokens) - words):
            raise ValueError(f"`sentences` has words that `vocabulary` lacks: {unknown} in {sentence!r}")
        bigrams.update(pairwise(["<s>", *tokens, "</s>"]))
    histories: Counter[str] = Counter()
    for (history, _), count in bigrams.items():
        histories[history] += count

    end = 1 / (MEAN_SEQUENCE_LENGTH + 1)
    unigrams = {word: (1 - end) / len(words) for word in sorted(words)} | {"</s>": end}
    lines = ["\\data\\", f"ngram 1={len(unigrams) + 1}", f"ngram 2={len(bigrams)}", "", "\\1-grams:"]
    lines.append(f"-99 <s> {_log10(uniform_weight if histories['<s>'] else 1.0)}")
    for word, probability in unigrams.items():
        back_off = uniform_weight if histories[word] else 1.0
        lines.append(f"{_log10(probability)} {word} {_log10(back_off)}" if word != "</s>" else f"{_log10(end)} </s>")
    lines += ["", "\\2-grams:"]
    for (history, word), count in sorted(bigrams.items()):
        seen = (1 - uniform_weight) * count / histories[history]
        lines.append(f"{_log10(seen + uniform_weight * unigrams[word])} {history} {word}")
    return "\n".join([*lines, "", "\\end\\", ""])


def _log10(probability: float) -> str:
    return f"{math.log10(probability):.6f}"


def pronouncing_dictionary(vocabulary: Sequence[str], extra: dict[str, Sequence[str]] | None = None) -> str:
    """
    Return the pronunciations of the vocabulary's words from PocketSphinx's copy of CMUdict, in its format.

    Args:
        vocabulary (`Sequence[str]`): the words.
        extra (`dict[str, Sequence[str]]`, *optional*): pronunciations (ARPAbet phones separated by blanks) of words
            that CMUdict lacks.

    Raises:
        ValueError: Names the words that have no pronunciation.
    """
    found: dict[str, list[str]] = {word: list(phones) for word, phones in (extra or {}).items()}
    wanted = set(vocabulary)
    path = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))
    for line in path.read_text(encoding="utf-8").splitlines():
        entry, _, phones = line.partition(" ")
        word = entry.partition("(")[0]  # variants are written word(2), word(3)
        if word in wanted:
            found.setdefault(word, []).append(phones.strip())
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"No pronunciation for {missing}: add them to `extra`.")
    lines = []
    for word in sorted(wanted):
        for number, phones in enumerate(dict.fromkeys(found[word]), start=1):
            lines.append(f"{word if number == 1 else f'{word}({number})'} {phones}")
    return "\n".join(lines) + "\n"


class Recognizer:
    """
    PocketSphinx over a closed vocabulary. With several workers, a context manager that ends their processes.

    A waveform's transcript does not depend on the ones before it: the decoder is set back for each.

    Args:
        vocabulary (`Sequence[str]`): the words it knows.
        sentences (`Iterable[str]`, *optional*): typical sentences, for the language model's bigrams (never the
            sentences under test).
        uniform_weight (`float`, *optional*, defaults to 0.5): share of the uniform distribution in the language model.
        num_workers (`int`, *optional*, defaults to 1): processes that decode side by side; 1 decodes in this one.
        pronunciations (`dict[str, Sequence[str]]`, *optional*): pronunciations of words that CMUdict lacks.
        frequency_warp (`float`, *optional*, defaults to 1.0): stretches the frequency axis to make up for a voice's
            vocal tract; 1.0 leaves it.
        cepstral_mean (`Sequence[float]`, *optional*): the voice's mean cepstrum, which PocketSphinx subtracts; `None`
            takes each waveform's own.
        decoding: further settings of PocketSphinx's decoder.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        sentences: Iterable[str] = (),
        uniform_weight: float = 0.5,
        num_workers: int = 1,
        pronunciations: dict[str, Sequence[str]] | None = None,
        frequency_warp: float = 1.0,
        cepstral_mean: Sequence[float] | None = None,
        **decoding: object,
    ):
        settings = (
            bigram_arpa(sentences, vocabulary, uniform_weight),
            pronouncing_dictionary(vocabulary, pronunciations),
            frequency_warp,
            cepstral_mean,
            DECODING | decoding,
        )
        self._decoder = None if num_workers > 1 else _Decoder(*settings)
        self._pool = None
        if num_workers > 1:
            self._pool = worker_pool(num_workers, _start_worker, settings)

    def __enter__(self) -> "Recognizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.shutdown()

    def transcribe(self, waveforms: Sequence[np.ndarray], sampling_rate: int, progress: bool = False) -> list[str]:
        """
        Return what is said in each waveform.

        Args:
            waveforms (`Sequence[np.ndarray]`): mono waveforms, each of shape `(samples,)`, floats in [-1, 1].
            sampling_rate (`int`): of all of them, in Hz; other rates are resampled.
            progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

        Returns:
            `list[str]`: one lower-case sentence a waveform; empty where nothing was recognised.
        """
        samples = (prepare_waveform(waveform, sampling_rate) for waveform in waveforms)
        texts: Iterator[str]
        if self._pool is not None:
            texts = self._pool.map(_decode_in_worker, samples, chunksize=4)
        else:
            assert self._decoder is not None
            texts = map(self._decoder.decode, samples)
        return list(tqdm(texts, total=len(waveforms), desc="recognise", disable=not progress))


class _Decoder:
    """One PocketSphinx decoder, and the files it wants in a temporary folder."""

    def __init__(
        self,
        language_model: str,
        dictionary: str,
        frequency_warp: float,
        cepstral_mean: Sequence[float] | None,
        decoding: dict[str, object],
    ):
        self._mean = ",".join(map(str, cepstral_mean)) if cepstral_mean is not None else None
        source = Path(pocketsphinx.get_model_path("en-us/en-us"))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "domain.arpa").write_text(language_model, encoding="utf-8")
            (folder / "domain.dict").write_text(dictionary, encoding="utf-8")
            # The settings of features come from a file beside the acoustic model, which outranks the decoder's own.
            shutil.copytree(source, folder / "acoustic")
            features = (source / "feat.params").read_text(encoding="utf-8")
            if self._mean is not None:
                features = features.replace("-cmn batch", "-cmn live")
            features += f"-warp_type inverse_linear\n-warp_params {frequency_warp}\n"
            (folder / "acoustic" / "feat.params").write_text(features, encoding="utf-8")
            self._decoder = pocketsphinx.Decoder(
                hmm=str(folder / "acoustic"),
                lm=str(folder / "domain.arpa"),
                dict=str(folder / "domain.dict"),
                loglevel="ERROR",
                **decoding,
            )

    def decode(self, samples: np.ndarray | None) -> str:
        """Return the words in 16 kHz 16-bit samples, empty for None."""
        if samples is None:
            return ""
        if self._mean is not None:
            self._decoder.set_cmn(self._mean)
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=self._mean is None)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr.strip() if hypothesis is not None else ""


def _start_worker(*settings: object) -> None:
    global _worker_decoder
    _worker_decoder = _Decoder(*settings)  # type: ignore[arg-type]


def _decode_in_worker(samples: np.ndarray | None) -> str:
    return _worker_decoder.decode(samples)


_worker_decoder: _Decoder


def prepare_waveform(waveform: np.ndarray, sampling_rate: int) -> np.ndarray | None:
    """
    Return 16 kHz 16-bit samples at a fixed level with a little quiet at both ends; `None` where there is only silence.

    The quiet is faint noise, always the same: PocketSphinx's logarithms do not like digital zero.

    Raises:
        ValueError: If the waveform is not one-dimensional or not finite.
    """
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"`waveform` must be finite and of shape (samples,), got shape {samples.shape}")
    if samples.size == 0 or np.abs(samples).max() < 1e-4:
        return None
    if sampling_rate != SAMPLING_RATE:
        samples = librosa.resample(samples, orig_sr=sampling_rate, target_sr=SAMPLING_RATE)
    samples = samples * (LEVEL_RMS / np.sqrt(np.mean(samples**2)))
    samples = np.pad(samples, int(PADDING_SECONDS * SAMPLING_RATE))
    noisy = samples + np.random.default_rng(0).normal(0.0, NOISE_RMS, samples.shape)
    return (np.clip(noisy, -1.0, 1.0) * 32767).astype(np.int16)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """
    Return substitutions, deletions and insertions over all pairs, divided by the number of reference words.

    Raises:
        ValueError: If the lists differ in length, are empty, or hold no reference word at all.
    """
    if len(references) != len(hypotheses) or not references:
        raise ValueError(
            f"need as many references as hypotheses, at least one; got {len(references)}, {len(hypotheses)}"
        )
    words = sum(len(text.split()) for text in references)
    if words == 0:
        raise ValueError("`references` holds no word")
    # jiwer refuses an empty reference; whatever was heard there is all insertions.
    pairs = [(said, heard) for said, heard in zip(references, hypotheses, strict=True) if said.split()]
    extra = sum(len(heard.split()) for said, heard in zip(references, hypotheses, strict=True) if not said.split())
    counts = jiwer.process_words([said for said, _ in pairs], [heard for _, heard in pairs])
    return (counts.substitutions + counts.deletions + counts.insertions + extra) / words
