"""The model's forward: who sees whom, on every backbone and attention backend, with padding, cache and packing."""

import pytest
import torch
from conftest import make_config, make_model
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache

from modeling_ttt import TttForConditionalGeneration

BACKBONES = ["qwen2", "qwen3", "llama"]
# text, span of four, text, span of three, text
IDS = torch.tensor([[1, 2, 100, 120, 121, 122, 176, 3, 102, 130, 131, 177, 4]])
FIRST_SPAN, SECOND_SPAN = range(3, 7), range(9, 12)


def backbone(model_type, **kwargs):
    return {"model_type": model_type, **kwargs}


@torch.no_grad()
def logits_of(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


def changed_positions(model, position):
    """Positions whose logits move when the token at `position` is replaced by another of its side."""
    other = IDS.clone()
    other[0, position] = 140 if IDS[0, position] >= 110 else 50
    difference = (logits_of(model) - logits_of(model, other)).abs().amax(-1)[0]
    return {index for index, value in enumerate(difference.tolist()) if value > 1e-6}


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_code_is_seen_by_its_whole_span_and_by_everything_after(model_type):
    model = make_model(backbone(model_type))
    length = IDS.shape[1]
    assert changed_positions(model, 5) == set(range(3, length))
    assert changed_positions(model, 10) == set(range(9, length))


@pytest.mark.parametrize("model_type", BACKBONES)
def test_text_is_seen_only_by_what_follows(model_type):
    model = make_model(backbone(model_type))
    assert changed_positions(model, 7) == set(range(7, IDS.shape[1]))


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_autoregressive_twin_is_causal_everywhere(model_type):
    model = make_model(backbone(model_type), audio_objective="autoregressive")
    assert changed_positions(model, 5) == set(range(5, IDS.shape[1]))


def test_causal_prompt_audio_makes_only_the_users_audio_causal():
    ids = torch.tensor([[100, 120, 121, 122, 101, 5, 100, 130, 131, 176, 6]])
    other = ids.clone()
    other[0, 3], other[0, 8] = 140, 141
    default, causal = make_model(), make_model(causal_prompt_audio=True)
    for model, first_changed in ((default, 1), (causal, 3)):
        difference = (logits_of(model, ids) - logits_of(model, other)).abs().amax(-1)[0] > 1e-6
        assert difference.tolist().index(True) == first_changed
    only_answer = ids.clone()
    only_answer[0, 8] = 141
    difference = (logits_of(causal, ids) - logits_of(causal, only_answer)).abs().amax(-1)[0] > 1e-6
    assert difference.tolist().index(True) == 7


def assert_equals_sdpa(model, implementation, batch):
    inputs, tokens = (batch["input_ids"], batch["attention_mask"]), batch["attention_mask"].bool()
    assert model.model.language_model.config._attn_implementation == "sdpa"
    expected = logits_of(model, inputs[0], attention_mask=inputs[1])
    model.set_attn_implementation(implementation)
    assert model.model.language_model.config._attn_implementation == implementation
    actual = logits_of(model, inputs[0], attention_mask=inputs[1])
    torch.testing.assert_close(actual[tokens], expected[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_eager_attention_gives_the_same_logits(model_type, batch):
    assert_equals_sdpa(make_model(backbone(model_type)), "eager", batch)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_flex_attention_gives_the_same_logits(model_type, batch):
    with torch.compiler.set_stance("force_eager"):  # compiling its kernel takes long on a CPU
        assert_equals_sdpa(make_model(backbone(model_type)), "flex_attention", batch)


@pytest.mark.slow
def test_compiled_flex_attention_gives_the_same_logits(batch):
    assert_equals_sdpa(make_model(), "flex_attention", batch)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_spans_stay_whole_under_a_sliding_window(implementation):
    """Two kinds of layers, a window shorter than the first span: its tokens see each other, older text drops out."""
    sliding = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    model = make_model({**sliding, "num_hidden_layers": 1})
    model.set_attn_implementation(implementation)
    assert model.config.text_config.layer_types == ["sliding_attention"]
    assert changed_positions(model, 6) == {3, 4, 5, 6, 7, 8}
    assert changed_positions(model, 0) == {0, 1, 2}
    mixed = make_model({**sliding, "max_window_layers": 1})
    assert mixed.config.text_config.layer_types == ["full_attention", "sliding_attention"]
    assert changed_positions(mixed, 5) == set(range(3, IDS.shape[1]))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
def test_flash_attention_is_refused_before_anything_is_built(name):
    message = "cannot express audio spans.*choose 'sdpa'"
    config = make_config()
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(config, attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(make_config(), attn_implementation={"text_config": name})
    model = make_model()
    for request in (name, {"": "sdpa", "text_config": name}):
        with pytest.raises(ValueError, match=message):
            model.set_attn_implementation(request)
    assert model.config._attn_implementation == "sdpa"
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_flash_attention_set_on_the_backbone_alone_is_noticed():
    model = make_model()
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot express audio spans"):
        model(IDS)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    expected = logits_of(model)
    for padding_id in (105, 175):  # an audio-side padding id does not lengthen a span either
        padding = torch.full((1, 3), padding_id)
        pieces = (padding, IDS) if side == "left" else (IDS, padding)
        mask_pieces = (torch.zeros_like(padding), torch.ones_like(IDS))
        attention_mask = torch.cat(mask_pieces if side == "left" else mask_pieces[::-1], dim=1)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = logits_of(model, torch.cat(pieces, 1), attention_mask=attention_mask, position_ids=position_ids)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[attention_mask.bool()][None], expected, atol=1e-5, rtol=0)


def test_mask_token_belongs_to_its_span():
    model = make_model()
    noisy = IDS.clone()
    noisy[0, 4] = 175
    assert torch.equal(model.model.get_span_ids(noisy), model.model.get_span_ids(IDS))


@pytest.mark.parametrize("model_type", BACKBONES)
def test_cached_pieces_give_the_logits_of_the_whole(model_type):
    """Text token by token, spans as one piece: the keys of what is finished are final."""
    model = make_model(backbone(model_type))
    cache, pieces = DynamicCache(config=model.config.text_config), []
    for start, stop in [(0, 3), (3, 7), (7, 8), (8, 9), (9, 12), (12, 13)]:
        pieces.append(logits_of(model, IDS[:, start:stop], past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(pieces, 1), logits_of(model), atol=1e-5, rtol=0)


def test_span_ids_may_cover_the_new_tokens_or_the_whole_sequence():
    model = make_model()
    span_ids = model.model.get_span_ids(IDS)
    results = []
    for given in (None, span_ids[:, 3:], span_ids):
        cache = DynamicCache(config=model.config.text_config)
        model(IDS[:, :3], past_key_values=cache, use_cache=True)
        results.append(logits_of(model, IDS[:, 3:], past_key_values=cache, use_cache=True, span_ids=given))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match="`span_ids` has 2 positions; expected 13"):
        model(IDS, span_ids=span_ids[:, :2])


def test_packed_sequences_do_not_see_each_other():
    model = make_model()
    other = torch.tensor([[5, 100, 125, 126]])  # ends inside a span
    packed = torch.cat([other, torch.tensor([[111, 112, 9]]), IDS], 1)
    positions = torch.cat([torch.arange(n) for n in (4, 3, IDS.shape[1])])[None]
    logits = logits_of(model, packed, position_ids=positions)
    expected = [logits_of(model, other), logits_of(model, torch.tensor([[111, 112, 9]])), logits_of(model)]
    torch.testing.assert_close(logits, torch.cat(expected, 1), atol=1e-5, rtol=0)


def test_embeddings_instead_of_ids_need_span_ids():
    model = make_model()
    embeddings = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="give `span_ids`"):
        model(inputs_embeds=embeddings)
    logits = model(inputs_embeds=embeddings, span_ids=model.model.get_span_ids(IDS)).logits
    torch.testing.assert_close(logits, model(IDS).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(IDS, inputs_embeds=embeddings)
    for ids in (IDS[0], IDS[None]):
        with pytest.raises(ValueError, match=r"`input_ids` has shape .*use \(batch, length\)"):
            model(ids)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_logits_to_keep_and_optional_outputs():
    model = make_model()
    model.set_attn_implementation("eager")
    outputs = model(IDS, logits_to_keep=2, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.logits, model(IDS).logits[:, -2:])
    assert len(outputs.hidden_states) == 3
    assert outputs.attentions[0].shape == (1, 4, IDS.shape[1], IDS.shape[1])
    assert isinstance(model(IDS, return_dict=False), tuple)


def test_the_twin_writes_audio_with_ordinary_generation():
    model = make_model(audio_objective="autoregressive")
    generated = model.generate(IDS[:, :4], max_new_tokens=6, do_sample=False)
    expected = IDS[:, :4]
    for _ in range(generated.shape[1] - 4):
        expected = torch.cat([expected, logits_of(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)


def test_untied_and_tied_heads():
    untied, tied = make_model(), make_model({"tie_word_embeddings": True})
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert tied.get_output_embeddings() is tied.lm_head


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_can_be_resized(tied, tmp_path):
    model = make_model({"tie_word_embeddings": tied})
    expected = logits_of(model)
    model.resize_token_embeddings(200, mean_resizing=False)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 200
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 200
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits_of(model)[..., :178], expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(TttForConditionalGeneration.from_pretrained(tmp_path))[..., :178], expected)


def test_a_vocabulary_too_small_for_the_audio_is_refused_before_anything_is_cut():
    model = make_model()
    for size, message in [(170, "reaches id 174"), (177, "`end_of_last_audio_token_id` is 177")]:
        with pytest.raises(ValueError, match=message):
            model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 178


def test_bfloat16_runs_and_stays_close():
    model = make_model()
    expected = logits_of(model)
    logits = logits_of(model.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
def test_backbones_whose_embeddings_have_another_name(model_type, tied, tmp_path):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2} if model_type == "gpt2" else {}
    model = make_model(backbone(model_type, tie_word_embeddings=tied, **sizes))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert changed_positions(model, 5) == set(range(3, IDS.shape[1]))
    model.save_pretrained(tmp_path)
    loaded = TttForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("model_type", ["mamba", "opt"])
def test_backbones_that_take_no_mask_are_refused(model_type):
    with pytest.raises(ValueError, match=f"`text_config` is a {model_type}, whose layers take no mask"):
        make_model(backbone(model_type))


@pytest.mark.parametrize(
    ("model_type", "name", "neutral"),
    [("gemma2", "final_logit_softcapping", None), ("granite", "logits_scaling", 1.0), ("cohere", "logit_scale", 1.0)],
)
def test_backbones_that_change_their_logits_are_refused_unless_they_do_nothing(model_type, name, neutral):
    with pytest.raises(ValueError, match=f"`text_config.{name}` is 30.0"):
        make_model(backbone(model_type, head_dim=8, **{name: 30.0}))
    assert changed_positions(make_model(backbone(model_type, head_dim=8, **{name: neutral})), 5) == set(range(3, 13))


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_the_forward_is_one_graph_compiled_and_exported(objective):
    """Logits of one model; the twin also decodes on a static cache."""
    model = make_model(audio_objective=objective)
    assert model._can_compile_fullgraph == (objective == "autoregressive")
    expected = logits_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits_of(compiled), expected)
    exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(IDS, use_cache=False).logits, expected)


def test_the_twin_generates_on_a_static_cache_with_compiled_steps():
    model = make_model(audio_objective="autoregressive")
    dynamic = model.generate(IDS, max_new_tokens=6, eos_token_id=[109])
    options = CompileConfig(fullgraph=True, backend="eager", mode=None)
    options._compile_all_devices = True
    static = model.generate(
        IDS, max_new_tokens=6, eos_token_id=[109], cache_implementation="static", compile_config=options
    )
    assert torch.equal(static, dynamic)
