"""The forms in which texts are compared: normalisers for languages and for short answers, and what is a unit.

What is counted of them is in scoring.py; how a recogniser's spelling of numbers is undone in whisper_judge.py.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from rapidfuzz.distance import Levenshtein

from training_examples.evaluation.whisper_judge import canonical, closest_reading, count_word_errors

# Ideographs of every plane; each is a unit of its own where texts are counted in characters and words mixed.
IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af\u3005\u3007"
IDEOGRAPHS = re.compile(f"[{IDEOGRAPH}]")
MARKUP = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")  # <NOISE>, <|zh|>, [UNK]
# Scripts that put no blanks between words: ideographs, kana, Thai, Lao, Burmese, Khmer.
UNSPACED = re.compile(f"[{IDEOGRAPH}\u3040-\u30ff\u31f0-\u31ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
UNSPACED_LANGUAGES = ("ja", "japanese", "th", "thai", "lo", "lao", "my", "myanmar", "burmese", "km", "khmer")
HAN_DIGITS = "零一二三四五六七八九"
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def plain_text(text: str) -> str:
    """Return a text in lower case and compatibility form (full-width letters and digits become ordinary ones), without
    punctuation and symbols, with single blanks. Apostrophes inside words stay."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = []
    for index, sign in enumerate(text):
        inside = 0 < index < len(text) - 1 and text[index - 1].isalnum() and text[index + 1].isalnum()
        if unicodedata.category(sign)[0] not in "PS" or (sign == "'" and inside):
            kept.append(sign)
        else:
            kept.append(" ")
    return " ".join("".join(kept).split())


@cache
def _whisper_normalizer() -> Any:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def english_text(text: str) -> str:
    """Return a text as Whisper's normaliser of English (package whisper-normalizer) writes it."""
    return " ".join(_whisper_normalizer()(unicodedata.normalize("NFKC", text)).split())


def answer_text(text: str) -> str:
    """Return a short answer as it is looked for: without accents, articles and punctuation, in lower case. Signs of
    scripts without blanks stand apart, for an answer is a part of what would else be one long word."""
    text = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    text = UNSPACED.sub(lambda match: f" {match[0]} ", ARTICLES.sub(" ", plain_text(text)))
    return " ".join(text.split())


def spell_han_number(number: int) -> str:
    """
    Return a whole number as Chinese says it: 12 is 十二, 105 is 一百零五, 20000 is 二万.

    Raises:
        ValueError: If it is not from 0 to 10**16 - 1.
    """
    if not 0 <= number < 10**16:
        raise ValueError(f"`number` is {number}; it must be from 0 to 10**16 - 1")
    if number == 0:
        return HAN_DIGITS[0]
    words, gap = "", False
    for power, unit in ((12, "万亿"), (8, "亿"), (4, "万"), (0, "")):
        group, number = divmod(number, 10**power)
        if group == 0:
            gap = gap or bool(words)
            continue
        if words and (gap or group < 1000):
            words += HAN_DIGITS[0]
        words += _spell_group(group) + unit
        gap = False
    return words.removeprefix("一") if words.startswith("一十") else words


def _spell_group(group: int) -> str:
    """Return a number from 1 to 9999."""
    words, gap = "", False
    for value, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, group = divmod(group, value)
        if digit == 0:
            gap = gap or bool(words)
            continue
        words += (HAN_DIGITS[0] if gap else "") + HAN_DIGITS[digit] + unit
        gap = False
    return words


def _spell_digits(digits: str) -> str:
    return "".join(HAN_DIGITS[int(digit)] for digit in digits)


def _spell_match(match: re.Match[str]) -> str:
    whole, fraction = match["whole"].replace(",", ""), match["fraction"]
    # Years, telephone numbers and the like are read digit by digit.
    is_year = match["year"] is not None and len(whole) == 4
    is_long = len(whole) > 16 or (len(whole) > 7 and "," not in match["whole"])
    one_by_one = is_year or is_long or (len(whole) > 1 and whole.startswith("0"))
    words = _spell_digits(whole) if one_by_one else spell_han_number(int(whole))
    if fraction:
        words += "点" + _spell_digits(fraction)
    if match["sign"]:
        words = "负" + words
    return ("百分之" if match["percent"] else "") + words


HAN_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.])-)?(?<![A-Za-z\d])(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?![A-Za-z\d])(?:\.(?P<fraction>\d+))?"
    r"(?:(?P<percent>%)|(?P<year>(?<=\d{4})(?=年)))?"
)


def chinese_text(text: str) -> str:
    """
    Return Chinese text, English words in it or not, as it is counted: markup and punctuation out, compatibility form,
    lower case, numbers in characters (years and long runs digit by digit, the rest as quantities), ideographs apart and
    other words whole. Traditional characters are left as they are.
    """
    text = MARKUP.sub(" ", unicodedata.normalize("NFKC", text))
    text = IDEOGRAPHS.sub(lambda match: f" {match[0]} ", plain_text(HAN_NUMBER.sub(_spell_match, text)))
    return " ".join(text.split())


def spoken_pair(reference: str, hypothesis: str) -> tuple[str, str]:
    """Return both texts as they sound, the hypothesis in the reading that is closest to the reference."""
    return canonical(reference), closest_reading(hypothesis, reference)


def _single_blanks(text: str) -> str:
    return " ".join(text.split())


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "none": _single_blanks,
    "plain": plain_text,
    "english": english_text,
    "chinese": chinese_text,
    "answer": answer_text,
}
UNITS = ("word", "character")


def _base_language(language: str) -> str:
    """Return a language without its region: "zh" of "zh-CN"."""
    return language.lower().replace("_", "-").partition("-")[0]


def is_chinese(language: str) -> bool:
    """Return whether a language is Chinese, whose words are counted in characters."""
    return _base_language(language) in ("zh", "yue", "cmn", "chinese", "cantonese", "mandarin")


def is_unspaced(language: str) -> bool:
    """Return whether a language other than Chinese is written without blanks between words."""
    return _base_language(language) in UNSPACED_LANGUAGES


def normalizer_of(language: str) -> str:
    """
    Return the normaliser of what is spoken: "english", "chinese" (of "auto", too, which may be any language) or, of any
    other language, "plain". That of English drops accents and words such as "um", which elsewhere are words of their
    own.
    """
    if is_chinese(language) or language == "auto":
        return "chinese"
    return "english" if _base_language(language) in ("en", "english") else "plain"


def error_rate_options(language: str) -> dict[str, str]:
    """Return the options of the scorer `error_rate` for what is spoken: characters where words are not told apart."""
    return {"normalizer": normalizer_of(language), "unit": "character" if is_unspaced(language) else "word"}


def spoken_form(text: str, language: str = "en") -> str:
    """
    Return a text as it sounds, as far as spelling is known to vary: in English numerals are words. A text that has no
    form in the language (English of Chinese signs) is plain.
    """
    form = canonical(text) if normalizer_of(language) == "english" else NORMALIZERS[normalizer_of(language)](text)
    return form or plain_text(text)


def count_errors(references: Sequence[str], transcripts: Sequence[str], language: str = "en") -> list[tuple[int, int]]:
    """
    Return the errors in what was heard and the units of what was said of each pair: words, spelling set aside, in
    English; of other languages as `error_rate_options` says.

    Raises:
        ValueError: If the lists differ in length.
    """
    options = error_rate_options(language)
    if options["normalizer"] == "english":
        return count_word_errors(references, transcripts)
    counts = []
    for pair in zip(references, transcripts, strict=True):
        said, heard = (units_of(text, options["unit"]) for text in normalize_pair(*pair, options["normalizer"]))
        counts.append((Levenshtein.distance(heard, said), len(said)))
    return counts


def normalize_pair(reference: str, hypothesis: str, normalizer: str) -> tuple[str, str]:
    """
    Return reference and hypothesis in the form in which they are compared.

    Args:
        reference, hypothesis (`str`): the texts.
        normalizer (`str`): one of `NORMALIZERS`, or "spoken", which reads numerals as what was said.

    Raises:
        ValueError: If there is no such normaliser.
    """
    if normalizer == "spoken":
        return spoken_pair(reference, hypothesis)
    if normalizer not in NORMALIZERS:
        raise ValueError(f"`normalizer` is {normalizer!r}; use one of {', '.join([*NORMALIZERS, 'spoken'])}.")
    return NORMALIZERS[normalizer](reference), NORMALIZERS[normalizer](hypothesis)


def has_words(texts: Sequence[str], normalizer: str) -> bool:
    """Return whether anything is left of some text once it is normalised: English has no form of "Hmm."."""
    return any(normalize_pair(text, "", normalizer)[0] for text in texts)


def units_of(text: str, unit: str) -> list[str]:
    """
    Return the units of a normalised text: its words, or its characters without blanks.

    Raises:
        ValueError: If `unit` is neither "word" nor "character".
    """
    if unit not in UNITS:
        raise ValueError(f"`unit` is {unit!r}; use one of {', '.join(UNITS)}.")
    return text.split() if unit == "word" else list(text.replace(" ", ""))
