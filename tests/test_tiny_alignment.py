"""Where the words of a recording are: CTC's best path, and what is cut out along it."""

import itertools

import numpy as np
import pytest
import torch
from builders import build_codec

from training_examples.ttt_tiny import alignment
from training_examples.ttt_tiny.alignment import align, cut_words
from training_examples.ttt_tiny.phonemes import build_head


def surest_of(*path, size=4):
    """Log-probabilities of shape (positions, size) that are surest of the given phonemes."""
    return np.log(np.full((len(path), size), 0.1) + 0.6 * np.eye(size)[list(path)])


def test_phonemes_lie_where_they_are_likeliest():
    assert align(surest_of(0, 2, 2, 0, 3, 1, 0), [2, 3, 1]) == [(1, 2), (4, 4), (5, 5)]
    assert align(surest_of(1, 0, 1), [1, 1]) == [(0, 0), (2, 2)]  # a phoneme twice wants a blank between


def test_what_is_said_comes_before_what_is_heard():
    assert align(surest_of(2, 2, 0, 1), [2, 3, 1]) == [(0, 0), (1, 1), (3, 3)]  # nothing sounds like a 3; it is there


@pytest.mark.parametrize("seed", range(5))
def test_the_path_is_the_best_of_all_paths(seed):
    rng = np.random.default_rng(seed)
    log_probs = np.log(rng.dirichlet(np.ones(3), 6))
    said = rng.integers(1, 3, 2).tolist()

    def collapse(path):
        return [label for label, _ in itertools.groupby(path) if label]

    paths = [path for path in itertools.product(range(3), repeat=6) if collapse(path) == said]
    best = max(paths, key=lambda path: sum(row[label] for row, label in zip(log_probs, path, strict=True)))
    runs, place = [], 0
    for label, run in itertools.groupby(best):
        length = len(list(run))
        runs += [(place, place + length - 1)] if label else []
        place += length
    assert align(log_probs, said) == runs


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 phonemes do not fit into 2 positions"):
        align(surest_of(1, 2), [1, 2, 3])
    with pytest.raises(ValueError, match="2 phonemes do not fit into 2 positions"):
        align(surest_of(1, 1), [1, 1])
    with pytest.raises(ValueError, match="empty"):
        align(surest_of(1, 2), [])


class SureOf(torch.nn.Module):
    """A head that hears the given path, whatever is said."""

    def __init__(self, path):
        super().__init__()
        self.log_probs = torch.from_numpy(surest_of(*path)).float()

    def forward(self, features, grid):
        assert features.shape[1] == len(self.log_probs)
        return [torch.zeros_like(self.log_probs[:, None]), self.log_probs[:, None]]


def test_words_are_cut_half_way_between_their_phonemes():
    codec = build_codec().eval()
    position = codec.config.hop_length // 4
    wave = np.arange(12 * position, dtype=np.int16)
    head = SureOf([0, 1, 2, 0, 0, 3, 0, 0, 0, 1, 0, 0])
    words = {"ab": [1, 2], "c": [3], "a": [1]}
    samples = round(0.02 * codec.config.sampling_rate)
    assert samples == position
    found = cut_words(codec, head, wave, "ab c a", words)
    assert [word for word, _ in found] == ["ab", "c", "a"]
    assert [len(part) / position for _, part in found] == pytest.approx([4, 3.5, 4.5], abs=0.1)
    assert np.array_equal(np.concatenate([part for _, part in found]), wave)


def test_words_that_are_not_heard_are_left_out(monkeypatch):
    codec = build_codec().eval()
    wave = np.ones(8 * codec.config.hop_length // 4, dtype=np.int16)
    head = SureOf([1, 1, 0, 0, 2, 2, 0, 0])
    words = {"a": [1], "b": [2], "c": [3]}
    assert [word for word, _ in cut_words(codec, head, wave, "a c b", words)] == ["a", "b"]
    monkeypatch.setattr(alignment, "LEAST_CONFIDENCE", 0.0)
    assert [word for word, _ in cut_words(codec, head, wave, "a c b", words)] == ["a", "c", "b"]
    assert cut_words(codec, head, wave, " ".join("abcabcabc"), words) == []  # faster than anybody speaks


def test_an_untrained_head_is_sure_of_nothing():
    codec = build_codec().eval()
    wave = np.ones(8 * codec.config.hop_length // 4, dtype=np.int16)
    assert cut_words(codec, build_head(codec, 30).eval(), wave, "a b", {"a": [1], "b": [2]}) == []
