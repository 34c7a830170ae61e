"""TttConfig: what it accepts, what it refuses, and that it survives a round trip."""

import copy
import re

import pytest
import torch
from conftest import AUDIO_VOCABULARY, BACKBONE, make_config, make_model
from transformers import AutoConfig, AutoModel, LlamaConfig, Qwen2Config, Qwen3Config

from modeling_ttt import TttConfig, TttForConditionalGeneration


def test_default_backbone_is_qwen2():
    assert isinstance(TttConfig().text_config, Qwen2Config)


def test_default_has_the_shape_of_a_published_checkpoint():
    config = TttConfig()
    assert config.audio_code_id_start + config.num_audio_codes == config.mask_token_id
    assert config.end_of_last_audio_token_id == config.vocab_size - 1


@pytest.mark.parametrize("backbone", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_backbone_may_be_a_config_or_its_dictionary(backbone):
    from_config = TttConfig(text_config=backbone(**BACKBONE), **AUDIO_VOCABULARY)
    from_dict = TttConfig(text_config={"model_type": backbone.model_type, **BACKBONE}, **AUDIO_VOCABULARY)
    assert isinstance(from_config.text_config, backbone)
    assert isinstance(from_dict.text_config, backbone)
    assert from_dict.vocab_size == from_config.vocab_size == 178


def test_round_trip_keeps_every_setting(tmp_path):
    config = make_config(
        {"model_type": "llama", "tie_word_embeddings": True},
        audio_objective="autoregressive",
        causal_prompt_audio=True,
        eval_noise_levels=(0.3, 0.9),
        noise_epsilon=0.01,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TttConfig
    loaded.name_or_path = config.name_or_path
    assert loaded.to_dict() == config.to_dict()


def test_ids_and_tying_come_from_the_backbone_unless_given():
    config = make_config({"tie_word_embeddings": True})
    assert (config.pad_token_id, config.eos_token_id, config.tie_word_embeddings) == (105, 104, True)
    overridden = make_config(pad_token_id=3, tie_word_embeddings=True)
    assert (overridden.text_config.pad_token_id, overridden.text_config.tie_word_embeddings) == (3, True)


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_backbones_configuration_that_was_given_stays_as_it_is(as_dict):
    given = LlamaConfig(**BACKBONE)
    given = given.to_dict() if as_dict else given
    before = copy.deepcopy(given)
    settings = {"pad_token_id": 3, "tie_word_embeddings": True, "vocab_size": 200, "attn_implementation": "eager"}
    config = TttConfig(text_config=given, **AUDIO_VOCABULARY, **settings)
    config.text_config.rope_parameters["rope_theta"] = 5.0
    assert (config.text_config.pad_token_id, config.text_config.vocab_size) == (3, 200)
    assert given == before
    if not as_dict:
        assert given._attn_implementation == before._attn_implementation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_token_id": 100}, "`mask_token_id` is 100.*audio-side"),
        ({"begin_of_audio_token_id": 176}, "`begin_of_audio_token_id` is 176.*text-side"),
        ({"end_of_audio_token_id": 120}, "`end_of_audio_token_id` is 120, which is audio code 9"),
        ({"end_of_audio_token_id": 177}, "`end_of_last_audio_token_id` and `end_of_audio_token_id` are both 177"),
        ({"end_of_last_audio_token_id": 178}, "`end_of_last_audio_token_id` is 178.*vocabulary"),
        ({"begin_of_last_audio_token_id": -1}, "`begin_of_last_audio_token_id` is -1"),
        ({"audio_token_id_start": 112}, "`audio_token_id_start` is 112"),
        ({"num_audio_codes": 68}, "reaches id 178"),
        ({"num_audio_codes": 0}, "`num_audio_codes` is 0"),
        ({"clean_batch_probability": 1.5}, "`clean_batch_probability` is 1.5"),
        ({"prefix_preservation_probability": -0.1}, "`prefix_preservation_probability`"),
        ({"span_truncation_probability": 2}, "`span_truncation_probability`"),
        ({"noise_epsilon": 0.0}, "`noise_epsilon`"),
        ({"eval_noise_levels": []}, "`eval_noise_levels`"),
        ({"eval_noise_levels": [0.0, 0.5]}, "`eval_noise_levels`"),
        ({"audio_objective": "flow"}, "`audio_objective` is 'flow'"),
        ({"text_objective": "flow"}, "`text_objective` is 'flow'"),
        ({"text_objective": "diffusion", "audio_objective": "autoregressive"}, "text is diffused together with audio"),
        ({"prefix_preservation_unit": "word"}, "`prefix_preservation_unit` is 'word'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


def test_backbone_that_is_no_config_is_refused():
    with pytest.raises(TypeError, match="text_config"):
        TttConfig(text_config="qwen2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audio_code_id_start": 5000}, "reaches id 5063"),
        ({"text_config": {"vocab_size": 20}}, "`text_config.vocab_size` is 20"),
        ({"vocab_size": 20}, "`text_config.vocab_size` is 20"),
        ({"mask_token_id": 100}, "`mask_token_id` is 100"),
        ({"noise_epsilon": 3.0}, "`noise_epsilon` is 3.0"),
    ],
)
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel])
def test_what_is_passed_to_from_pretrained_is_checked_too(auto_class, settings, message, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(tmp_path, **settings)


def test_what_is_passed_to_from_pretrained_reaches_backbone_and_model(tmp_path):
    make_config().save_pretrained(tmp_path)
    config, unused = AutoConfig.from_pretrained(
        tmp_path, pad_token_id=7, text_config={"vocab_size": 200}, other=1, return_unused_kwargs=True
    )
    assert (config.pad_token_id, config.text_config.pad_token_id, config.vocab_size) == (7, 7, 200)
    assert config.text_config.hidden_size == 32 and unused == {"other": 1}
    nested = AutoConfig.from_pretrained(tmp_path, text_config={"pad_token_id": 8})
    assert (nested.pad_token_id, nested.text_config.pad_token_id) == (8, 8)


def test_the_vocabulary_size_can_be_set_and_is_checked():
    config = make_config()
    config.vocab_size = 200
    assert config.vocab_size == config.text_config.vocab_size == 200
    with pytest.raises(ValueError, match="`end_of_last_audio_token_id` is 177"):
        config.vocab_size = 177
    assert config.vocab_size == 200
    assert make_config(vocab_size=190).vocab_size == 190


def test_what_was_set_since_is_checked_where_a_model_is_built_and_where_it_is_saved(tmp_path):
    config = make_config()
    config.mask_token_id = 120
    for use in (lambda: TttForConditionalGeneration(config), lambda: config.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="`mask_token_id` is 120, which is audio code 9"):
            use()


def test_the_audio_side_ends_with_its_last_token_and_text_goes_on_above():
    config = make_config({"vocab_size": 190}, begin_of_audio_token_id=180)
    assert config.audio_token_id_end == 178
    assert config.is_audio(torch.tensor([109, 110, 177, 178, -100])).tolist() == [False, True, True, False, False]
    assert config.is_audio(177) and not config.is_audio(178)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mask_token_id", ["175", None, 175.0, True]),
        ("num_audio_codes", [64.0, "64", None]),
        ("audio_token_id_start", ["110", [110]]),
        ("noise_epsilon", [None, "0.001"]),
        ("clean_batch_probability", ["0.5", True, [0.5]]),
        ("block_filling_weight", ["0.2", None]),
        ("stratified_noise", ["yes", 1, None]),
        ("span_attention", [None, 3, ["bidirectional"]]),
        ("block_lengths", [26, "26", ["26"], [26.0], None]),
        ("eval_noise_levels", [0.5, "0.5", [None], None]),
    ],
)
def test_settings_of_a_wrong_type_are_refused_by_name_whenever_they_are_given(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^`{name}` is .*; give"):
            make_config(**{name: value})
        with pytest.raises(ValueError, match=f"^`{name}` is .*; give"):
            TttConfig.from_dict({**make_config().to_dict(), name: value})
        changed = make_config()
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=f"^`{name}` is .*; give"):
            changed.validate()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_audio_codes", True, "`num_audio_codes` is True; give an integer."),
        ("noise_epsilon", "0.1", "`noise_epsilon` is '0.1'; give a number."),
        ("stratified_noise", 1, "`stratified_noise` is 1; give True or False."),
        ("block_lengths", "26", "`block_lengths` is '26'; give a list of integers."),
        ("span_attention", "causal", "`span_attention` is 'causal'; give 'bidirectional' or 'block_causal'."),
    ],
)
def test_a_setting_of_the_wrong_type_is_told_what_to_be(name, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TttConfig(**{name: value})


def test_whole_numbers_serve_as_probabilities_and_lists_and_tuples_as_sequences():
    config = make_config(clean_batch_probability=1, block_lengths=(4, 8), eval_noise_levels=[1])
    assert (config.block_lengths, config.eval_noise_levels) == ([4, 8], [1])
    assert TttConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
