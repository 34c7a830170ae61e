"""A judge that knows nothing of the domain: Whisper through faster-whisper, and the spelling of what it writes.

A recogniser may differ from what was said in spelling alone ("9-4" for "nine minus four", "102030" for "ten twenty
thirty", "for" for "four"). `closest_reading` undoes that before words are counted; it needs no model.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import librosa
import numpy as np
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm

SAMPLING_RATE = 16_000
LOOP_COMPRESSION = 2.4  # above it Whisper's own decoding takes a transcript for failed
FASTEST_SPEECH = 30  # letters a second
LONGEST_REPETITION = 3  # tokens, where a transcript is written anew
# Makes Whisper spell numbers. It is no sentence of the domain and is the same for everything that is judged.
NUMBER_PROMPT = "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty."

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
SIGNS = {"+": "plus", "=": "is", "*": "times", "×": "times", "÷": "divided by", "%": "percent", "&": "and"}
ORDINALS = {
    "1st": "first", "2nd": "second", "3rd": "third", "4th": "fourth", "5th": "fifth", "6th": "sixth", "7th": "seventh",
    "8th": "eighth", "9th": "ninth", "10th": "tenth", "11th": "eleventh", "12th": "twelfth", "20th": "twentieth",
}  # fmt: skip
SPELLINGS = {
    "colour": "color", "colours": "colors", "grey": "gray", "ok": "okay", "mr": "mister", "mrs": "missus",
    "dr": "doctor", "aeroplane": "airplane", "centre": "center", "favourite": "favorite",
}  # fmt: skip
# Words that sound alike are one word to the ear: each is counted as the first of its group.
SOUND_ALIKE = {
    word: group.split()[0]
    for group in (
        "two to too", "four for fore", "eight ate", "one won", "red read", "blue blew", "son sun", "sea see", "bee be",
        "flower flour", "hour our", "week weak", "meet meat", "right write", "no know", "here hear", "mail male",
        "tale tail", "hair hare", "bear bare", "pair pear", "wood would", "road rode", "night knight", "by buy",
        "high hi", "i eye", "deer dear", "plane plain", "peace piece", "their there they're", "whole hole", "new knew",
        "so sew", "wait weight", "way weigh", "may mae", "rose rows", "nose knows", "rome roam", "greece grease",
    )
    for word in group.split()[1:]
}  # fmt: skip
LONGEST_CUT = 10  # digits; longer runs are not tried in every cut


def repeats_itself(transcript: str, seconds: float) -> bool:
    """
    Return whether a transcript of so many seconds is a loop: by the measure of Whisper's own decoding it compresses too
    well, and it is more than anyone says in that time, which a list of one word is not.
    """
    data = transcript.encode()
    return len(data) > FASTEST_SPEECH * seconds and len(data) / len(zlib.compress(data)) > LOOP_COMPRESSION


def number_words(number: int) -> str:
    """
    Return a number in words, without "and".

    Raises:
        ValueError: If the number is not from 0 to 999,999.
    """
    if not 0 <= number < 1_000_000:
        raise ValueError(f"`number` is {number}; it must be from 0 to 999,999")
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = f" {number_words(number % unit)}" if number % unit else ""
    return f"{number_words(number // unit)} {name}{rest}"


def digit_readings(digits: str) -> list[str]:
    """
    Return ways to read a run of digits aloud, the likeliest first.

    Up to three digits are a number, more are tens ("102030") or single digits; then every cut into numbers of one or
    two digits ("1112" may be "eleven twelve").
    """
    spelled = " ".join(ONES[int(digit)] for digit in digits)
    if len(digits) > LONGEST_CUT:
        return [spelled]
    cuts = [" ".join(cut) for cut in _cuts(digits)]
    tens = [cut for cut in cuts if all(word in TENS[1:] for word in cut.split())]
    number = [number_words(int(digits))] if len(digits) <= 6 and str(int(digits)) == digits else []
    first = number if len(digits) <= 3 else tens
    return list(dict.fromkeys([*first, spelled, *number, *cuts]))


def _cuts(digits: str) -> list[list[str]]:
    if not digits:
        return [[]]
    found = [[ONES[int(digits[0])], *rest] for rest in _cuts(digits[1:])]
    if len(digits) > 1 and digits[0] != "0":
        found += [[number_words(int(digits[:2])), *rest] for rest in _cuts(digits[2:])]
    return found


def readings(text: str) -> list[list[str]]:
    """
    Return the words of a transcript in speaking order; each item lists the ways to read it, the likeliest first.

    Lower case, no punctuation, American spelling, numbers in words; words that sound alike are written as one of them.
    """
    text = text.lower().replace("’", "'").replace("−", "-").replace("–", "-")
    items: list[list[str]] = []
    tokens = re.findall(r"\d+(?:st|nd|rd|th)\b|\d{1,3}(?:,\d{3})+\b|\d+|[a-z]+(?:'[a-z]+)*|[-+=*×÷%&]", text)
    for index, token in enumerate(tokens):
        after_digit = index > 0 and tokens[index - 1].isdigit()
        if "," in token and int(digits := token.replace(",", "")) < 1_000_000:
            items.append(list(dict.fromkeys([number_words(int(digits)), *digit_readings(digits)])))
        elif token in ORDINALS:
            items.append([ORDINALS[token]])
        elif token.isdigit():
            items.append(digit_readings(token))
        elif token == "-":
            if after_digit and index + 1 < len(tokens) and tokens[index + 1].isdigit():
                items.append(["minus", "to", ""])
        elif token == "x" and after_digit:
            items.append(["times"])
        elif token in SIGNS:
            items.append([SIGNS[token]])
        else:
            items.append([SPELLINGS.get(token, token)])
    return [[" ".join(SOUND_ALIKE.get(word, word) for word in way.split()) for way in ways] for ways in items]


def canonical(text: str) -> str:
    """Return a text as it is counted, every item in its likeliest reading. References are brought into this form."""
    return " ".join(way for way in (ways[0] for ways in readings(text)) if way)


def closest_reading(transcript: str, reference: str) -> str:
    """
    Return the reading of `transcript` with the fewest word errors against `reference` (which is made `canonical`).

    Only spelling has several readings: "9-4" may be "nine minus four", but "nine" is never anything else. Items are
    settled from left to right. Words of the reference that are written as one, or one that is written as several, are
    the same letters: "watercat" is "water cat", "air plane" is "airplane".
    """
    said = canonical(reference).split()
    items = readings(transcript)
    chosen = [ways[0] for ways in items]
    for index, ways in enumerate(items):
        if len(ways) > 1:

            def errors(way: str, index: int = index) -> int:
                return Levenshtein.distance(" ".join([*chosen[:index], way, *chosen[index + 1 :]]).split(), said)

            chosen[index] = min(ways, key=errors)
    return " ".join(_divide_as(" ".join(way for way in chosen if way).split(), said))


def _divide_as(words: list[str], said: list[str]) -> list[str]:
    """Return `words` divided as in `said`, where one word of either is the letters of some in a row of the other."""
    apart = {"".join(said[i:j]): said[i:j] for i in range(len(said)) for j in range(i + 2, min(i + 4, len(said)) + 1)}
    words = [part for word in words for part in apart.get(word, [word])]
    whole, found = set(said), []
    while words:
        take = next((n for n in (3, 2) if "".join(words[:n]) in whole and words[0] not in whole), 1)
        found.append("".join(words[:take]))
        words = words[take:]
    return found


def count_word_errors(references: Sequence[str], transcripts: Sequence[str]) -> list[tuple[int, int]]:
    """
    Return word errors and reference words of each pair, spelling set aside: what intervals are drawn over.

    Raises:
        ValueError: If the lists differ in length.
    """
    return [
        (
            Levenshtein.distance(closest_reading(heard, said).split(), canonical(said).split()),
            len(canonical(said).split()),
        )
        for said, heard in zip(references, transcripts, strict=True)
    ]


class WhisperJudge:
    """
    Whisper over whole waveforms, greedy, without memory of what came before.

    Where it repeats itself without end, as it may after unclear words, it is asked again and may not write the same
    three tokens twice: else the transcript of one such row has more errors than a hundred others.

    Args:
        model (`str` or `Path`): a folder in faster-whisper's (CTranslate2's) format, a name such as `"base"` or
            `"tiny.en"`, or a Hub repository in that format.
        prompt (`str`, *optional*, defaults to spelled-out numbers): text that sets the style of writing, the same for
            everything that is compared; None for none.
        num_threads (`int`, *optional*, defaults to 1): CPU threads.
        compute_type (`str`, *optional*, defaults to `"int8"`): CTranslate2's number format.
        language (`str`, *optional*, defaults to `"en"`): what is spoken; None lets Whisper find out.
    """

    def __init__(
        self,
        model: str | Path,
        prompt: str | None = NUMBER_PROMPT,
        num_threads: int = 1,
        compute_type: str = "int8",
        language: str | None = "en",
    ):
        from faster_whisper import WhisperModel

        self.prompt, self.language = prompt, language
        self._model = WhisperModel(
            str(model), device="cpu", compute_type=compute_type, cpu_threads=num_threads, num_workers=1
        )

    def transcribe(self, waveforms: Sequence[np.ndarray], sampling_rate: int, progress: bool = False) -> list[str]:
        """
        Return what is said in each waveform, as Whisper writes it.

        Args:
            waveforms (`Sequence[np.ndarray]`): mono waveforms, each of shape `(samples,)`, floats in [-1, 1].
            sampling_rate (`int`): of all of them, in Hz.
            progress (`bool`, *optional*, defaults to `False`): whether to show a progress bar.

        Returns:
            `list[str]`: one transcript a waveform, empty where nothing was heard.

        Raises:
            ValueError: If a waveform is not one-dimensional or not finite.
        """
        return [
            self._transcribe(np.asarray(waveform, dtype=np.float32), sampling_rate)
            for waveform in tqdm(waveforms, desc="Whisper", disable=not progress)
        ]

    def _transcribe(self, waveform: np.ndarray, sampling_rate: int) -> str:
        if waveform.ndim != 1 or not np.isfinite(waveform).all():
            raise ValueError(f"`waveforms` must be finite and of shape (samples,), got shape {waveform.shape}")
        if waveform.size == 0:
            return ""
        if sampling_rate != SAMPLING_RATE:
            waveform = librosa.resample(waveform, orig_sr=sampling_rate, target_sr=SAMPLING_RATE)
        transcript = self._decode(waveform)
        if repeats_itself(transcript, len(waveform) / SAMPLING_RATE):
            transcript = self._decode(waveform, no_repeat_ngram_size=LONGEST_REPETITION)
        return transcript

    def _decode(self, waveform: np.ndarray, **options: Any) -> str:
        options |= {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}
        segments, _ = self._model.transcribe(
            waveform, language=self.language, initial_prompt=self.prompt, without_timestamps=True, **options
        )
        return " ".join(segment.text.strip() for segment in segments)
