"""Generation settings are validated, saved, loaded and upgraded."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, GenerationConfig
from transformers.utils import logging

from modeling_ttt import TttForConditionalGeneration, TttGenerationConfig
from modeling_ttt.generation_config_ttt import SURE_RULES


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("audio_block_size", 0, "at least 1"),
        ("audio_block_size", 2.5, "at least 1"),
        ("audio_steps_per_block", -1, "at least 1"),
        ("audio_steps_per_block", True, "at least 1"),
        ("max_audio_codes_per_span", 0, "at least 1"),
        ("audio_top_k", 0, "at least 1"),
        ("audio_remasking", "highest", "low_confidence"),
        ("audio_temperature", -0.1, "at least 0"),
        ("audio_temperature", float("nan"), "finite"),
        ("audio_guidance_scale", -1, "at least 0"),
        ("audio_order_bias", -0.1, "at least 0"),
        ("audio_confidence_threshold", 0.0, "at most 1"),
        ("audio_confidence_threshold", 1.5, "at most 1"),
        ("audio_prefix_probability", 0, "at most 1"),
        ("audio_prefix_probability", 1.1, "at most 1"),
        ("audio_top_p", 2, "at most 1"),
        ("seed", -3, "integer"),
        ("seed", [1, 2.5], "integer"),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_a_remedy(name, value, remedy):
    with pytest.raises(ValueError) as refusal:
        TttGenerationConfig(**{name: value})
    assert name in str(refusal.value) and repr(value) in str(refusal.value) and remedy in str(refusal.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_new_tokens", "20"),
        ("max_new_tokens", 20.0),
        ("max_length", [20]),
        ("top_k", "5"),
        ("num_return_sequences", 1.5),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", [0.9]),
        ("repetition_penalty", "1.1"),
        ("max_time", "soon"),
        ("do_sample", "yes"),
        ("use_cache", 1),
        ("eos_token_id", "<|im_end|>"),
        ("pad_token_id", 1.0),
    ],
)
def test_an_inherited_option_of_a_wrong_type_is_refused_by_name(tiny_model, name, value):
    calls = (
        lambda: TttGenerationConfig(**{name: value}),
        lambda: tiny_model().generate(torch.tensor([[1, 2, 3]]), **{"max_new_tokens": 2, name: value}),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"`{name}` is .*; use "):
            call()


def test_numbers_of_numpy_and_ids_in_tensors_are_taken(tiny_model):
    options = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "eos_token_id": torch.tensor([104])}
    assert tiny_model().generate(torch.tensor([[1, 2, 3]]), do_sample=True, **options).shape[1] <= 6


def test_numbers_of_numpy_are_taken_for_audio_too_and_saved(tiny_model, tmp_path):
    theirs = {
        "audio_block_size": np.int32(4),
        "audio_steps_per_block": np.int64(2),
        "audio_temperature": np.float32(0.5),
        "seed": np.int64(3),
    }
    config = TttGenerationConfig(**theirs)
    config.save_pretrained(tmp_path)
    loaded = TttGenerationConfig.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) == getattr(config, name) == value for name, value in theirs.items())
    model, prompt = tiny_model(), torch.tensor([[1, 2, 100]])
    ours = {name: value.item() for name, value in theirs.items()}
    expected = model.generate(prompt, max_new_tokens=12, **ours)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, **theirs), expected)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, **theirs | {"seed": [np.int64(3)]}), expected)


@pytest.mark.parametrize("drawn", [{"audio_temperature": 2.0}, {"audio_remasking": "random"}])
def test_several_answers_to_a_prompt_may_have_the_text_in_common(tiny_model, drawn):
    model, prompt = tiny_model(), torch.tensor([[1, 2, 100]])
    options = {"max_new_tokens": 12, "audio_block_size": 6, **drawn}
    together = model.generate(prompt, num_return_sequences=3, seed=3, **options)
    alone = [model.generate(prompt, seed=3 + row, **options)[0] for row in range(3)]
    assert [row[: len(one)] for row, one in zip(together.tolist(), alone, strict=True)] == [
        one.tolist() for one in alone
    ]
    with pytest.raises(ValueError, match="`num_return_sequences`"):
        model.generate(prompt, num_return_sequences=3, max_new_tokens=12)


@pytest.mark.parametrize("rule", SURE_RULES)
def test_a_bound_on_random_confidence_is_refused(rule):
    with pytest.raises(ValueError, match=f"{rule}.*random"):
        TttGenerationConfig(audio_remasking="random", **{rule: 0.5})


def test_two_rules_for_one_choice_are_refused(tiny_model):
    rules = {"audio_confidence_threshold": 0.5, "audio_prefix_probability": 0.25}
    both = "`audio_confidence_threshold` is 0.5 and `audio_prefix_probability` is 0.25"
    with pytest.raises(ValueError, match=both):
        TttGenerationConfig(**rules)
    with pytest.raises(ValueError, match=both):
        tiny_model().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, **rules)
    one = TttGenerationConfig(audio_confidence_threshold=0.5)
    with pytest.raises(ValueError, match=both):
        tiny_model().generate(torch.tensor([[1, 2, 3]]), one, max_new_tokens=2, audio_prefix_probability=0.25)


def test_generate_refuses_wrong_values_given_as_keywords(tiny_model):
    with pytest.raises(ValueError, match="audio_steps_per_block.*0"):
        tiny_model().generate(torch.tensor([[1, 2, 3]]), audio_steps_per_block=0, max_new_tokens=2)


def test_settings_survive_saving_and_only_what_is_set_is_written(tmp_path):
    saved = TttGenerationConfig(audio_steps_per_block=8, audio_confidence_threshold=0.9, max_new_tokens=300)
    saved.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name for name in written if name.startswith(("audio", "max"))} == {
        "audio_steps_per_block",
        "audio_confidence_threshold",
        "max_new_tokens",
    }
    assert TttGenerationConfig.from_pretrained(tmp_path) == saved


def test_a_model_folder_keeps_its_settings(tiny_model, tmp_path):
    model = tiny_model()
    assert isinstance(model.generation_config, TttGenerationConfig)
    assert model.generation_config.eos_token_id == 104
    model.generation_config.audio_steps_per_block = 8
    model.save_pretrained(tmp_path)
    loaded = TttForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, TttGenerationConfig)
    assert loaded.generation_config.audio_steps_per_block == 8
    (tmp_path / "generation_config.json").unlink()
    without = TttForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(without.generation_config, TttGenerationConfig)
    assert without.generation_config.eos_token_id == 104


def test_a_plain_generation_config_file_is_upgraded(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    GenerationConfig(max_new_tokens=7, eos_token_id=104).save_pretrained(tmp_path)
    loaded = TttForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, TttGenerationConfig)
    assert loaded.generation_config.max_new_tokens == 7


def test_remote_code_brings_our_settings(tiny_model, tmp_path):
    model = tiny_model()
    model.generation_config.audio_steps_per_block = 5
    model.save_pretrained(tmp_path)
    assert (tmp_path / "generation_config_ttt.py").is_file() and (tmp_path / "decoding_ttt.py").is_file()
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded.generation_config).__name__ == "TttGenerationConfig"
    assert loaded.generation_config.audio_steps_per_block == 5
    prompt = torch.tensor([[1, 2, 100]])
    options = {"max_new_tokens": 12, "audio_block_size": 4}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


def test_the_caller_overrides_the_checkpoint_and_the_checkpoint_the_default(tiny_model):
    model, prompt = tiny_model(), torch.tensor([[1, 2, 100]])
    model.generation_config.update(audio_steps_per_block=1, audio_block_size=4, max_audio_codes_per_span=4)

    def forwards(**options) -> int:
        return model.generate(prompt, max_new_tokens=5, return_dict_in_generate=True, **options).num_forwards

    least = forwards()  # prompt and one denoising step, or a few if an early end token lets text follow
    assert forwards(audio_steps_per_block=4, audio_confidence_threshold=None) > least
    assert forwards(generation_config=TttGenerationConfig(audio_steps_per_block=4)) > least
    assert forwards(generation_config=GenerationConfig(temperature=1.0)) == least
    assert model.generation_config.audio_steps_per_block == 1


def test_steps_that_a_call_asks_for_go_before_a_threshold_of_the_checkpoint(tiny_model):
    model = tiny_model()
    model.generation_config.update(audio_steps_per_block=2, audio_confidence_threshold=0.9)

    def threshold(generation_config=None, **options) -> float | None:
        return model._prepare_generation_config(generation_config, **options)[0].audio_confidence_threshold

    assert threshold() == threshold(audio_block_size=4) == threshold(TttGenerationConfig(audio_block_size=4)) == 0.9
    assert threshold(audio_steps_per_block=None) == threshold(model.generation_config) == 0.9
    assert threshold(audio_steps_per_block=4) is threshold(TttGenerationConfig(audio_steps_per_block=4)) is None
    both = {"audio_steps_per_block": 4, "audio_confidence_threshold": 0.5}
    assert threshold(**both) == threshold(TttGenerationConfig(**both)) == 0.5


@pytest.mark.parametrize("rule, other", [SURE_RULES, SURE_RULES[::-1]])
def test_a_rule_that_a_call_asks_for_goes_before_that_of_the_checkpoint(tiny_model, rule, other):
    model = tiny_model()
    model.generation_config.update(audio_steps_per_block=2, **{rule: 0.9})

    def rules(generation_config=None, **options) -> list[float | None]:
        prepared = model._prepare_generation_config(generation_config, **options)[0]
        return [getattr(prepared, name) for name in (rule, other)]

    assert rules() == rules(model.generation_config) == rules(TttGenerationConfig(audio_block_size=4)) == [0.9, None]
    assert rules(**{other: 0.5}) == rules(TttGenerationConfig(**{other: 0.5})) == [None, 0.5]
    assert rules(**{other: 0.5, rule: None}) == [None, 0.5]
    assert rules(**{rule: 0.5}) == rules(**{rule: 0.5, "audio_steps_per_block": 3}) == [0.5, None]
    assert rules(audio_steps_per_block=3) == rules(**{rule: None}) == [None, None]
    assert getattr(model.generation_config, rule) == 0.9


@pytest.mark.parametrize("rule, other", [SURE_RULES, SURE_RULES[::-1]])
def test_a_rule_that_a_copy_of_the_checkpoints_settings_has_is_not_asked_for(tiny_model, rule, other):
    model = tiny_model()
    model.generation_config.update(audio_steps_per_block=2, **{rule: 0.9})
    copied = copy.deepcopy(model.generation_config)
    copied.max_new_tokens = 7

    def rules(**options) -> list[float | None]:
        prepared = model._prepare_generation_config(copied, **options)[0]
        return [getattr(prepared, name) for name in (rule, other)]

    assert rules() == [0.9, None]
    assert rules(audio_steps_per_block=3) == [None, None]
    assert rules(**{other: 0.5}) == [None, 0.5]
    copied.audio_steps_per_block = 4
    assert rules() == [None, None]  # what was changed in a copy is asked for


@pytest.mark.parametrize("rule", SURE_RULES)
def test_random_remasking_that_a_call_asks_for_goes_before_a_rule_of_the_checkpoint(tiny_model, rule):
    model, prompt = tiny_model(), torch.tensor([[1, 2, 102]])
    model.generation_config.update(**{rule: 0.9})
    asked = {"audio_remasking": "random", "seed": 3, "max_new_tokens": 9}
    expected = tiny_model().generate(prompt, **asked)
    for options in (asked, asked | {"audio_steps_per_block": 2}):
        assert torch.equal(model.generate(prompt, **options), expected)
        assert torch.equal(model.generate(prompt, TttGenerationConfig(**options)), expected)
    with pytest.raises(ValueError, match=f"{rule}.*random"):
        model.generate(prompt, **asked, **{rule: 0.9})


def test_two_rules_in_the_settings_of_a_checkpoint_are_refused_and_not_saved(tiny_model, tmp_path):
    model = tiny_model()
    both = "`audio_confidence_threshold` is 0.5 and `audio_prefix_probability` is 0.4"
    with pytest.raises(ValueError, match=both):
        model.generation_config.update(audio_confidence_threshold=0.5, audio_prefix_probability=0.4)
    with pytest.raises(ValueError, match=both):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)
    with pytest.raises(ValueError, match=both):
        model.generation_config.save_pretrained(tmp_path)
    model.generation_config.update(audio_confidence_threshold=None)
    model.generation_config.save_pretrained(tmp_path)
    assert TttGenerationConfig.from_pretrained(tmp_path).audio_prefix_probability == 0.4


def test_an_option_without_effect_beside_a_rule_is_said_to_have_none(tiny_model, caplog):
    model = tiny_model()
    model.generation_config.update(audio_steps_per_block=2, audio_prefix_probability=0.4)
    logger = logging.get_logger("modeling_ttt.generation_ttt")
    logger.addHandler(caplog.handler)

    def warned(**options) -> bool:
        caplog.clear()
        type(logger).warning_once.cache_clear()  # which says nothing twice in one process
        model._prepare_generation_config(None, **options)
        told = "beside the checkpoint's `audio_prefix_probability` of 0.4", "beside `audio_confidence_threshold`"
        return any(what in caplog.text for what in told)

    try:
        assert warned(audio_order_bias=0.05)
        assert warned(audio_steps_per_block=3, audio_confidence_threshold=0.9)
        assert not warned(audio_order_bias=0.05, audio_steps_per_block=3)
        assert not warned(audio_confidence_threshold=0.9)
        assert not warned(audio_order_bias=0.0) and not warned()
    finally:
        logger.removeHandler(caplog.handler)


def test_none_as_a_keyword_asks_for_the_default(tiny_model):
    prompt = torch.tensor([[1, 2, 102]])  # ends with a begin token: a span follows
    model = tiny_model()
    default = model.generate(prompt, max_new_tokens=20)
    assert torch.equal(default, model.generate(prompt, max_new_tokens=20, audio_block_size=None, audio_remasking=None))
