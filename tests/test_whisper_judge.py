"""What Whisper writes is counted as it sounds: numbers, signs and spellings, and the model itself where it is there."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from training_examples.evaluation.whisper_judge import (
    WhisperJudge,
    canonical,
    closest_reading,
    count_word_errors,
    digit_readings,
    number_words,
)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (47, "forty seven"),
        (100, "one hundred"),
        (612, "six hundred twelve"),
        (1_000, "one thousand"),
        (90_021, "ninety thousand twenty one"),
        (999_999, "nine hundred ninety nine thousand nine hundred ninety nine"),
    ],
)
def test_a_number_in_words(number, words):
    assert number_words(number) == words


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_a_number_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match=str(number)):
        number_words(number)


def test_a_run_of_digits_is_read_in_every_way_the_likeliest_first():
    assert digit_readings("7") == ["seven"]
    assert digit_readings("24") == ["twenty four", "two four"]
    assert digit_readings("102030")[0] == "ten twenty thirty"
    assert digit_readings("9402")[:2] == ["nine four zero two", "nine thousand four hundred two"]
    assert "eleven twelve" in digit_readings("1112") and "one twelve" in digit_readings("112")
    assert digit_readings("05") == ["zero five"]
    assert digit_readings("123456789012") == ["one two three four five six seven eight nine zero one two"]


@pytest.mark.parametrize(
    ("written", "counted"),
    [
        ("Nine minus four, is five.", "nine minus four is five"),
        ("9-4 = 5", "nine minus four is five"),
        ("9 − 4", "nine minus four"),
        ("3+4", "three plus four"),
        ("3x4", "three times four"),
        ("3 × 4", "three times four"),
        ("Twenty-four hours", "twenty four hours"),
        ("The 1st, the 12th", "the first the twelfth"),
        ("1,200 people", "one thousand two hundred people"),
        ("What colour is it? Grey!", "what color is it gray"),
        ("It’s an aeroplane", "it's an airplane"),
        ("Dr. Grey", "doctor gray"),
        ("", ""),
        ("...", ""),
    ],
)
def test_spelling_is_undone(written, counted):
    assert canonical(written) == counted


def test_words_that_sound_alike_are_one_word():
    assert canonical("For too ate won") == canonical("four two eight one") == "four two eight one"
    assert canonical("I do not no") == canonical("i do not know")


@pytest.mark.parametrize(
    ("written", "said", "errors"),
    [
        ("9402", "nine four zero two", 0),
        ("24", "two four", 0),
        ("24", "twenty four", 0),
        ("1112", "eleven twelve", 0),
        ("102030 and 40", "ten twenty thirty and forty", 0),
        ("Count from 3-7.", "count from three to seven", 0),
        ("555-1234", "five five five one two three four", 0),
        ("10 11 12", "ten eleven twelve", 0),
        ("watercat Bridgewater", "water cat bridge water", 0),
        ("An air plane, good-bye", "an airplane goodbye", 0),
        ("The boot a pest", "the budapest", 3),  # other letters stay wrong
        ("one one", "oneone", 0),
        ("Three Monday, Brad.", "three monday bread", 1),  # a wrong word stays wrong
        ("5 5", "five nine", 1),  # and so does a wrong number
        ("", "one two", 2),
        ("thank you", "", 2),
    ],
)
def test_a_numeral_is_read_as_what_was_said_and_nothing_else_is_bent(written, said, errors):
    assert count_word_errors([said], [written]) == [(errors, len(said.split()))]


def test_the_reading_is_given_back_for_the_rows_of_a_report():
    assert closest_reading("9 - 4 is 5.", "nine minus four is five") == "nine minus four is five"


def test_as_many_transcripts_as_references_are_wanted():
    with pytest.raises(ValueError):
        count_word_errors(["one"], [])


@pytest.mark.parametrize(
    ("answers", "heard", "sizes"),
    [
        (["Go ahead and " * 70, "Good honey"], "Good honey", [0, 3]),
        (["eight " * 8], " ".join(["eight"] * 8), [0]),
    ],
)
def test_a_transcript_without_end_is_written_anew(answers, heard, sizes):
    """As Whisper base hears "good honey" of an unclear voice; what is merely repetitive stays."""
    left, asked = list(answers), []

    class Model:
        def transcribe(self, waveform, **options):
            asked.append(options.get("no_repeat_ngram_size", 0))
            return [SimpleNamespace(text=left.pop(0))], None

    judge = object.__new__(WhisperJudge)
    judge.prompt, judge.language, judge._model = None, "en", Model()
    assert judge.transcribe([np.ones(32_000)], 16_000) == [heard]
    assert asked == sizes


@pytest.mark.slow
@pytest.mark.skipif("WHISPER_DIR" not in os.environ, reason="WHISPER_DIR names no folder of a faster-whisper model")
def test_whisper_hears_the_words_and_refuses_what_is_no_waveform():
    judge = WhisperJudge(os.environ["WHISPER_DIR"])
    assert judge.transcribe([np.zeros(0)], 24_000) == [""]
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        judge.transcribe([np.zeros((2, 5))], 16_000)
    with pytest.raises(ValueError, match="finite"):
        judge.transcribe([np.full(16_000, np.nan)], 16_000)
    synthesis = pytest.importorskip("training_examples.ttt_tiny.synthesis")
    try:
        wave = synthesis.speak("seven plus eight is fifteen", "flite:slt")
    except (OSError, ValueError):
        pytest.skip("Flite is not installed")
    heard = judge.transcribe([wave], synthesis.SAMPLING_RATE)
    assert count_word_errors(["seven plus eight is fifteen"], heard)[0][0] <= 1
