"""The recogniser of the evaluation: its language model, its dictionary, its ear, and the error rates."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from training_examples.evaluation.recognisers import (
    MEAN_SEQUENCE_LENGTH,
    Recognizer,
    bigram_arpa,
    prepare_waveform,
    pronouncing_dictionary,
    word_error_rate,
)
from training_examples.ttt_tiny import domain
from training_examples.ttt_tiny.judge import domain_recognizer

SPEECH = Path(__file__).parent / "fixtures" / "recognition"
WORDS = ["is", "one", "plus", "three", "two"]
SENTENCES = ["one plus two is three", "two plus one is three", "is one"]


def read_arpa(text: str) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """Unigram probabilities, back-off weights, and bigram probabilities by history."""
    unigrams, back_offs, bigrams = {}, {}, defaultdict(dict)
    for line in text.splitlines():
        if re.match(r"-?\d", line):
            number, *rest = line.split()
            if text.index(line) < text.index("\\2-grams:"):
                unigrams[rest[0]] = 10 ** float(number)
                if len(rest) > 1:
                    back_offs[rest[0]] = 10 ** float(rest[1])
            else:
                bigrams[rest[0]][rest[1]] = 10 ** float(number)
    return unigrams, back_offs, bigrams


@pytest.mark.parametrize("uniform_weight", [0.5, 0.1])
def test_every_history_of_the_language_model_sums_to_one(uniform_weight):
    unigrams, back_offs, bigrams = read_arpa(bigram_arpa(SENTENCES, WORDS, uniform_weight))
    ends = [word for word in unigrams if word != "<s>"]
    assert sum(unigrams[word] for word in ends) == pytest.approx(1, abs=1e-4)
    for history in ["<s>", *WORDS]:
        total = sum(bigrams[history].get(word, back_offs[history] * unigrams[word]) for word in ends)
        assert total == pytest.approx(1, abs=1e-4), history


def test_the_language_model_is_the_stated_mixture():
    unigrams, back_offs, bigrams = read_arpa(bigram_arpa(SENTENCES, WORDS, uniform_weight=0.5))
    assert unigrams["</s>"] == pytest.approx(1 / (MEAN_SEQUENCE_LENGTH + 1), rel=1e-4)
    # "plus" occurs twice, once before "two"
    assert bigrams["plus"]["two"] == pytest.approx(0.5 * 1 / 2 + 0.5 * unigrams["two"], rel=1e-4)
    assert back_offs["plus"] == pytest.approx(0.5, rel=1e-4)
    assert "three" not in bigrams["plus"]


def test_a_word_never_seen_backs_off_with_full_weight():
    _, back_offs, bigrams = read_arpa(bigram_arpa(["one plus two"], WORDS))
    assert back_offs["three"] == pytest.approx(1)
    assert not bigrams["three"]


def test_a_sentence_with_an_unknown_word_is_refused_by_name():
    with pytest.raises(ValueError, match="zebra"):
        bigram_arpa(["one zebra"], WORDS)


def test_the_dictionary_holds_all_variants_of_the_words_and_no_others():
    lines = pronouncing_dictionary(["the", "one"]).splitlines()
    entries = {line.split()[0] for line in lines}
    assert {entry.partition("(")[0] for entry in entries} == {"the", "one"}
    assert "the(2)" in entries
    assert all(len(line.split()) > 1 for line in lines)


def test_a_word_without_pronunciation_is_named_and_can_be_added():
    with pytest.raises(ValueError, match="xyzzyq"):
        pronouncing_dictionary(["one", "xyzzyq"])
    assert "xyzzyq Z IH Z IY K" in pronouncing_dictionary(["one", "xyzzyq"], {"xyzzyq": ["Z IH Z IY K"]})


def test_every_word_of_the_domain_has_a_pronunciation():
    lines = pronouncing_dictionary(domain.vocabulary()).splitlines()
    assert {line.split()[0].partition("(")[0] for line in lines} == set(domain.vocabulary())


def test_level_does_not_change_what_the_recogniser_is_given():
    waveform = np.sin(np.arange(8000) / 7).astype(np.float32)
    loud, quiet = prepare_waveform(waveform, 16_000), prepare_waveform(waveform / 50, 16_000)
    assert np.abs(loud.astype(int) - quiet).max() <= 1
    assert len(loud) > len(waveform)


def test_silence_and_nothing_are_heard_as_nothing_and_bad_waveforms_are_refused():
    assert prepare_waveform(np.zeros(1000), 16_000) is None
    assert prepare_waveform(np.zeros(0), 16_000) is None
    for bad in (np.full(10, np.nan), np.ones((2, 10))):
        with pytest.raises(ValueError, match="waveform"):
            prepare_waveform(bad, 16_000)


def read_speech() -> tuple[list[str], list[np.ndarray]]:
    """Texts and waveforms of the fixtures: a file's name is what is said in it."""
    paths = sorted(SPEECH.glob("*.flac"))
    return [path.stem.replace("_", " ") for path in paths], [soundfile.read(path, dtype="float32")[0] for path in paths]


def test_recognises_synthetic_speech_whatever_came_before_it():
    texts, waveforms = read_speech()
    recognizer = domain_recognizer(num_workers=1, of_slt=True)
    assert recognizer.transcribe(waveforms, 16_000) == texts
    again = recognizer.transcribe([np.zeros(0), *waveforms[::-1]], 16_000)
    assert again == ["", *texts[::-1]]


def test_workers_hear_the_same_and_keep_the_order():
    texts, waveforms = read_speech()
    sentences = domain.lm_sentences(seed=0, n=2000)
    with Recognizer(domain.vocabulary(), sentences, num_workers=2) as recognizer:
        heard = recognizer.transcribe(waveforms + waveforms[::-1], 16_000)
    assert heard == Recognizer(domain.vocabulary(), sentences).transcribe(waveforms + waveforms[::-1], 16_000)
    assert len(heard) == 2 * len(texts)


def test_resamples_other_rates():
    _, waveforms = read_speech()
    assert len(prepare_waveform(waveforms[0], 8_000)) > 1.9 * len(waveforms[0])


def test_word_error_rate_counts_over_all_words():
    assert word_error_rate(["one two three", "four"], ["one two three", "four"]) == 0
    # a substitution and a deletion in three words, an insertion beside one
    assert word_error_rate(["one two three", "four"], ["one five", "four four"]) == pytest.approx(3 / 4)
    assert word_error_rate(["one two", ""], ["one two", "three"]) == pytest.approx(1 / 2)
    assert word_error_rate(["one two"], [""]) == 1


@pytest.mark.parametrize("pair", [([], []), (["one"], []), ([""], ["one"])])
def test_word_error_rate_of_nothing_is_refused(pair):
    with pytest.raises(ValueError):
        word_error_rate(*pair)
