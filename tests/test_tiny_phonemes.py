"""What ttt-tiny's codes keep of what is said."""

import numpy as np
import pytest
import torch
from builders import build_codec

from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel
from training_examples.ttt_tiny.phonemes import (
    build_head,
    load_head,
    most_likely,
    phoneme_error_rates,
    pronunciations,
    read_head,
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
    codec.save_pretrained(tmp_path)
    head = build_head(codec, 3)
    torch.save({"head": head.state_dict(), "step": 1}, tmp_path / "training_state.pt")
    loaded = load_head(tmp_path, codec, 3)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), head.parameters(), strict=True))


def train_once(*modules):
    """The state of an optimiser of these modules after one step."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    return optimizer.state_dict()


def test_a_head_that_no_optimiser_trained_is_none(tmp_path):
    """As the stages vocoder and decoder once kept it, untrained, beside theirs."""
    codec = build_codec()
    codec.save_pretrained(tmp_path)
    head = build_head(codec, 3)
    for modules, trained in (((codec.encoder, head), True), ((head,), True), ((codec.decoder, codec.vocoder), False)):
        state = {"optimizer": train_once(*modules), "head": head.state_dict(), "step": 1}
        torch.save(state, tmp_path / "training_state.pt")
        assert (read_head(tmp_path) is not None) == trained
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no trained phoneme head: .*stage `tokenizer`"):
        load_head(tmp_path, codec, 3)


def test_a_head_of_another_audio_tokenizer_is_refused_and_rounded_weights_are_not(tmp_path):
    codec = build_codec()
    codec.save_pretrained(tmp_path)
    torch.save({"head": build_head(codec, 3).state_dict()}, tmp_path / "training_state.pt")
    load_head(tmp_path, build_codec().to(torch.bfloat16), 3)
    with pytest.raises(ValueError, match=rf"{tmp_path} is of another .*`fsq_levels` is \[4, 4\], not \[2, 8\]"):
        load_head(tmp_path, TttCodecModel(TttCodecConfig(**{**codec.config.to_dict(), "fsq_levels": [2, 8]})), 3)
    codec.save_pretrained(tmp_path / "longer")
    longer = TttCodecModel.from_pretrained(tmp_path / "longer")
    with torch.no_grad():
        longer.encoder.proj_out.weight[0] *= 1.2
    with pytest.raises(ValueError, match=f"{tmp_path} is of another .* in {tmp_path / 'longer'}: .*weights"):
        load_head(tmp_path, longer, 3)
