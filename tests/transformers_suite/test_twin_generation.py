"""The twin is written by the library's ordinary `generate`: what its tests of generation, which the archive leaves out,
ask of every causal model. TtT's own loop is tested in tests/test_generation*.py."""

import copy
from typing import Any

import pytest
import torch

from modeling_ttt import TttForConditionalGeneration

from .model_tests import TttModelTester

TESTER = TttModelTester(audio_objective="autoregressive")
LENGTH = 8


@pytest.fixture(scope="module")
def model() -> TttForConditionalGeneration:
    torch.manual_seed(0)
    model = TttForConditionalGeneration(TESTER.get_config()).eval()
    model.generation_config.update(eos_token_id=None, max_new_tokens=LENGTH)
    return model


@pytest.fixture(scope="module")
def prompts() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return TESTER.prepare_config_and_inputs_for_common()[1]


@pytest.fixture(scope="module")
def greedy(model: TttForConditionalGeneration, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, prompt + LENGTH)"""
    return model.generate(**prompts)


def row(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[:1] for name, value in inputs.items()}


def test_greedy_is_the_most_probable_next_token(model, prompts, greedy):
    with torch.no_grad():
        logits = model(greedy).logits
    assert torch.equal(logits[:, -LENGTH - 1 : -1].argmax(-1), greedy[:, -LENGTH:])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
    ],
    ids=str,
)
def test_greedy_is_the_same_however_it_is_computed(model, prompts, greedy, options):
    assert torch.equal(model.generate(**prompts, **options), greedy)


@pytest.mark.parametrize("option", ["assistant_model", "prompt_lookup_num_tokens"])
def test_speculation_changes_nothing(model, prompts, greedy, option):
    value = copy.deepcopy(model) if option == "assistant_model" else 2
    assert torch.equal(model.generate(**row(prompts), **{option: value}), greedy[:1])


def test_left_padding_changes_nothing(model, prompts, greedy):
    padding = torch.full((TESTER.batch_size, 3), model.config.pad_token_id)
    padded = {
        "input_ids": torch.cat([padding, prompts["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros_like(padding), prompts["attention_mask"]], 1),
    }
    assert torch.equal(model.generate(**padded)[:, 3:], greedy)


def test_a_conversation_goes_on_from_its_cache(model, prompts, greedy):
    half = model.generate(**prompts, max_new_tokens=LENGTH // 2, return_dict_in_generate=True)
    whole = model.generate(half.sequences, past_key_values=half.past_key_values, max_new_tokens=LENGTH - LENGTH // 2)
    assert torch.equal(whole, greedy)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_embeddings_are_continued_as_their_tokens_are(model, prompts, greedy, options):
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    new = model.generate(inputs_embeds=embeds, attention_mask=prompts["attention_mask"], **options)
    assert torch.equal(new, greedy[:, -LENGTH:])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_samples_and_beams_return_as_many_sequences_as_asked_for(model, prompts, options):
    torch.manual_seed(0)
    assert model.generate(**prompts, **options).shape == (2 * TESTER.batch_size, TESTER.seq_length + LENGTH)


def test_what_is_asked_for_is_returned(model, prompts, greedy):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked: dict[str, Any] = {name: True for name in names}
    output = eager.generate(**prompts, **asked, return_dict_in_generate=True)
    assert torch.equal(output.sequences, greedy)
    assert all(len(getattr(output, name.removeprefix("output_"))) == LENGTH for name in names)
    assert output.attentions[0][0].shape == (TESTER.batch_size, TESTER.num_attention_heads, *[TESTER.seq_length] * 2)
    assert output.hidden_states[0][0].shape == (TESTER.batch_size, TESTER.seq_length, TESTER.hidden_size)
    scores = eager.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    expected = torch.stack(output.logits, 1).log_softmax(-1).gather(-1, greedy[:, -LENGTH:, None])[..., 0]
    torch.testing.assert_close(scores, expected)


def test_the_forward_of_generate_compiles_without_graph_breaks(model, prompts, greedy):
    compiled = copy.deepcopy(model)
    torch.compiler.reset()
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="eager")
    assert torch.equal(compiled.generate(**prompts, cache_implementation="static"), greedy)
