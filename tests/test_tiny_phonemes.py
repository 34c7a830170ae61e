"""What ttt-tiny's codes keep of what is said."""

import numpy as np
import pytest
import torch
from builders import build_codec

from training_examples.ttt_tiny.phonemes import (
    build_head,
    load_head,
    most_likely,
    phoneme_error_rates,
    pronunciations,
)


def path_of(*phonemes):
    """Log-probabilities of shape (positions, 4) that are surest of the given phonemes."""
    return torch.nn.functional.one_hot(torch.tensor(phonemes), 4).float()


def test_repetitions_and_blanks_are_dropped():
    assert most_likely(path_of(0, 2, 2, 0, 2, 3, 3, 1, 0)) == [2, 2, 3, 1]
    assert most_likely(path_of(0, 0)) == []


def test_words_have_their_phonemes():
    words, count = pronunciations()
    assert len(words["seven"]) == 5 and words["one"] == words["won"]
    assert {phoneme for phonemes in words.values() for phoneme in phonemes} == set(range(1, count + 1))


def test_errors_are_counted_over_all_phonemes_of_all_sentences():
    codec = build_codec().eval()
    head = build_head(codec, 3)
    for layer in (head.proj_out, head.proj_features):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    head.proj_out.bias.data[2] = 1.0  # the codes say phoneme 2, whatever was said; the features say nothing
    waves = [np.full(9_000, 100, dtype=np.int16)] * 2
    words = {"two": [2], "both": [2, 1], "three": [3]}
    of_codes, of_features = phoneme_error_rates(codec, head, [("two both", waves[0]), ("three", waves[1])], words)
    assert of_codes == pytest.approx((2 + 1) / 4)  # one 2 of "2 2 1" is found, and a 2 in place of 3
    assert of_features == 1.0


def test_the_head_lies_beside_the_tokenizer_or_its_absence_is_said(tmp_path):
    codec = build_codec()
    with pytest.raises(FileNotFoundError, match="stage `tokenizer`"):
        load_head(tmp_path, codec, 3)
    head = build_head(codec, 3)
    torch.save({"head": head.state_dict(), "step": 1}, tmp_path / "training_state.pt")
    loaded = load_head(tmp_path, codec, 3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), head.parameters(), strict=True))
