"""The tokens that TtT adds: their order, their ids, and which ids are text, audio and structure."""

import pytest
from builders import build_tokenizer
from conftest import AUDIO_VOCABULARY, make_config

from processing import TttTokenIds
from processing.vocabulary_ttt import TEXT_TOKENS, TOKENS, added_tokens, audio_tokens

NUM_CODES = 6


@pytest.fixture
def tokenizer():
    return build_tokenizer(NUM_CODES)


def test_added_tokens_are_the_published_ones_in_their_order():
    assert added_tokens(2) == [
        *("<|im_start|>", "<|im_end|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_quad|>"),
        *("<|audio|>", "<|audio_0|>", "<|audio_1|>"),
        *("<|mask_token|>", "<|end_of_audio_new|>", "<|end_of_audio_span_last|>"),
    ]
    assert added_tokens(2) == [*TEXT_TOKENS, *audio_tokens(2)]


def test_ids_are_those_the_tokenizer_gives_the_strings(tokenizer):
    ids = TttTokenIds.from_tokenizer(tokenizer)
    for name, token in TOKENS.items():
        assert getattr(ids, name) == tokenizer.convert_tokens_to_ids(token), name
    assert ids.num_audio_codes == NUM_CODES


def test_a_config_takes_the_ids_as_its_arguments(tokenizer):
    ids = TttTokenIds.from_tokenizer(tokenizer)
    config = make_config({"vocab_size": len(tokenizer)}, **ids.config_arguments())
    assert {name: getattr(config, name) for name in ids.config_arguments()} == ids.config_arguments()
    assert set(ids.config_arguments()) == set(AUDIO_VOCABULARY)


def test_every_missing_token_is_named(tokenizer):
    vocabulary = tokenizer.get_vocab()
    del vocabulary["<|mask_token|>"], vocabulary["<|im_end|>"]
    tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(ValueError, match=r"no token `<\|mask_token\|>`, `<\|im_end\|>`"):
        TttTokenIds.from_tokenizer(tokenizer)


def test_codes_out_of_order_are_refused(tokenizer):
    vocabulary = tokenizer.get_vocab()
    vocabulary["<|audio_2|>"], vocabulary["<|audio_3|>"] = vocabulary["<|audio_3|>"], vocabulary["<|audio_2|>"]
    tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(ValueError, match=r"consecutive ids: `<\|audio_2\|>` has id"):
        TttTokenIds.from_tokenizer(tokenizer)


def test_tokens_added_above_the_audio_range_are_text(tokenizer):
    tokenizer.add_tokens(["<|mood|>"])
    ids = TttTokenIds.from_tokenizer(tokenizer)
    above = tokenizer.convert_tokens_to_ids("<|mood|>")
    assert ids.audio_token_id_end == above
    assert ids.is_text(above) and not ids.is_audio(above) and not ids.is_code(above)
    audio = tokenizer.convert_tokens_to_ids(audio_tokens(NUM_CODES))
    assert all(ids.is_audio(token_id) and not ids.is_text(token_id) for token_id in audio)
    assert [token_id for token_id in audio if ids.is_code(token_id)] == audio[1 : 1 + NUM_CODES]
    assert not any(ids.is_text(token_id) or ids.is_audio(token_id) for token_id in ids.structural)
