"""Generation writes the tokens of the published sampler, cached and in batches."""

import pytest
import torch
from reference_sampler import Trace, golden_cases, golden_prompts, load_published, reference_generate

from modeling_ttt.decoding_ttt import TttDecoder

MODELS: dict = {}


def model_of(name: str):
    if name not in MODELS:
        MODELS[name] = load_published(name)
    return MODELS[name]


def common_prefix_holds(ours: list[int], theirs: list[int], prompt_length: int, limit: int) -> bool:
    """Equal, or equal for `limit` new tokens where theirs ran up to the limit or past it."""
    if len(theirs) - prompt_length < limit:
        return ours == theirs
    return ours[: prompt_length + limit] == theirs[: prompt_length + limit]


def pad_left(prompts: list[list[int]], pad: int = 105) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "inputs": torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def answers_alone(model, prompts: list[list[int]], seed: int | None = None, **options) -> list[list[int]]:
    answers = []
    for row, prompt in enumerate(prompts):
        if seed is not None:
            options["seed"] = seed + row
        answers.append(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    return answers


def assert_batch_equals_one_by_one(model, prompts: list[list[int]], seed: int | None = None, **options) -> None:
    inputs = pad_left(prompts)
    together = model.generate(**inputs, **options, **({} if seed is None else {"seed": seed}))
    width = inputs["inputs"].shape[1]
    alone = answers_alone(model, prompts, seed, **options)
    longest = max(map(len, alone))
    assert together[:, width:].tolist() == [answer + [105] * (longest - len(answer)) for answer in alone]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_golden_tokens_are_the_published_ones(name):
    model, ratio = model_of(name), [0, 0]
    for case in golden_cases(name):
        blocks = case["diffusion_gen_length"] // case["block_length"]
        output = model.generate(
            torch.tensor([case["prompt"]]),
            max_new_tokens=case["max_gen_len"] + 1,  # the last one may be the end token that closes a cut span
            audio_block_size=case["block_length"],
            audio_steps_per_block=case["diffusion_steps"] // blocks,
            audio_guidance_scale=case["cfg_scale"],
            return_dict_in_generate=True,
        )
        ours = output.sequences[0].tolist()
        assert common_prefix_holds(ours, case["output"], len(case["prompt"]), case["max_gen_len"])
        if case["cfg_scale"] == 0:
            ratio[0] += output.num_token_positions
            ratio[1] += case["trace"]["tokens"]
    assert ratio[1] > 2.5 * ratio[0]  # the cache saves what it is there to save


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options, reference",
    [
        ({"audio_steps_per_block": 4}, {"steps": 4}),
        ({"audio_guidance_scale": 0.7, "audio_steps_per_block": 3}, {"guidance": 0.7, "steps": 3}),
        ({"audio_remasking": "entropy"}, {"remasking": "entropy"}),
        ({"audio_confidence_threshold": 0.6}, {"threshold": 0.6}),
        (
            {"audio_confidence_threshold": 0.3, "audio_remasking": "entropy"},
            {"threshold": 0.3, "remasking": "entropy"},
        ),
        ({"audio_prefix_probability": 0.1}, {"prefix": 0.1}),
        ({"audio_prefix_probability": 0.02, "audio_remasking": "entropy"}, {"prefix": 0.02, "remasking": "entropy"}),
        ({"audio_remasking": "random", "seed": 3}, {"remasking": "random", "seed": 3}),
        ({"audio_order_bias": 0.02, "audio_steps_per_block": 4}, {"order_bias": 0.02, "steps": 4}),
        (
            {"audio_order_bias": 0.02, "audio_confidence_threshold": 0.4},
            {"order_bias": 0.02, "threshold": 0.4},
        ),
        (
            {"audio_temperature": 1.2, "audio_top_k": 12, "audio_top_p": 0.9, "do_sample": True, "seed": 5},
            {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "do_sample": True, "seed": 5},
        ),
    ],
    ids=[
        "greedy",
        "guidance",
        "entropy",
        "threshold",
        "entropy-threshold",
        "prefix",
        "entropy-prefix",
        "random",
        "order",
        "order-threshold",
        "sampling",
    ],
)
def test_cached_tokens_equal_the_uncached_reference(options, reference, implementation):
    model = model_of("c")
    model.set_attn_implementation(implementation)
    for prompt in golden_prompts("c")[:2]:
        trace = Trace()
        theirs = reference_generate(model, prompt, 50, block_size=10, trace=trace, **reference)
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=51,
            audio_block_size=10,
            top_k=0,
            return_dict_in_generate=True,
            **options,
        )
        assert common_prefix_holds(output.sequences[0].tolist(), theirs, len(prompt), 50)
        assert output.num_token_positions < trace.positions
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"audio_guidance_scale": 0.5},
        {"audio_remasking": "entropy", "audio_steps_per_block": 5},
        {"audio_remasking": "random", "seed": 11},
        {"audio_confidence_threshold": 0.7},
        {"audio_prefix_probability": 0.1},
        {"do_sample": True, "temperature": 1.3, "audio_temperature": 0.8, "seed": 4, "audio_guidance_scale": 0.3},
        {"repetition_penalty": 1.3, "min_new_tokens": 40, "no_repeat_ngram_size": 3},
        {"max_audio_codes_per_span": 7, "max_new_tokens": 23},
        {"audio_order_bias": 0.05, "audio_steps_per_block": 4},
    ],
    ids="greedy guidance entropy random threshold prefix sampling processors limits order".split(),
)
@pytest.mark.parametrize("name", ["b", "c"])
def test_rows_of_a_batch_get_what_they_get_alone(name, options):
    prompts = golden_prompts(name)[:5]
    assert len(set(map(len, prompts))) > 1
    settings = {"max_new_tokens": 60, "audio_block_size": 10, "audio_steps_per_block": 2, **options}
    assert_batch_equals_one_by_one(model_of(name), prompts, settings.pop("seed", None), **settings)


def test_rows_in_different_phases_share_forwards():
    model, prompts = model_of("b"), golden_prompts("b")[:5]
    options = {"max_new_tokens": 60, "audio_block_size": 10, "return_dict_in_generate": True}
    together = model.generate(**pad_left(prompts), **options)
    alone = [model.generate(torch.tensor([prompt]), **options) for prompt in prompts]
    assert together.num_forwards < 0.6 * sum(output.num_forwards for output in alone)
    assert together.forwards_per_row.tolist() == [output.num_forwards for output in alone]


@pytest.mark.parametrize("options", [{}, {"audio_guidance_scale": 0.5}, {"do_sample": True, "seed": 1}])
def test_the_order_of_rows_changes_no_token(monkeypatch, options):
    model, prompts = model_of("b"), golden_prompts("b")[:5]
    options = {"max_new_tokens": 60, "audio_block_size": 10, "return_dict_in_generate": True, **options}
    text_first = model.generate(**pad_left(prompts), **options)
    monkeypatch.setattr(TttDecoder, "text_first", property(lambda self: False, lambda self, value: None), raising=False)
    all_at_once = model.generate(**pad_left(prompts), **options)
    assert torch.equal(text_first.sequences, all_at_once.sequences)
    if "audio_guidance_scale" not in options:
        assert all_at_once.num_forwards == all_at_once.forwards_per_row.max()


def test_a_cut_prompt_goes_on_inside_its_span():
    model = model_of("a")
    case = golden_cases("a")[0]
    options = {"max_new_tokens": 40, "audio_block_size": 10, "audio_steps_per_block": 10}
    begin = case["output"].index(102)
    ours = model.generate(torch.tensor([case["output"][: begin + 1]]), **options)[0].tolist()
    assert ours == case["output"]
    after_a_block = model.generate(torch.tensor([case["output"][: begin + 11]]), **options)[0].tolist()
    assert after_a_block == case["output"]


def test_the_seed_decides_the_sample_and_torch_seeds_without_it():
    model, prompt = model_of("c"), torch.tensor([golden_prompts("c")[0]])
    options = {"do_sample": True, "audio_temperature": 1.0, "max_new_tokens": 30, "audio_block_size": 10}
    first, again, other = (model.generate(prompt, seed=seed, **options).tolist() for seed in (1, 1, 2))
    assert first == again != other
    torch.manual_seed(7)
    first = model.generate(prompt, **options).tolist()
    second = model.generate(prompt, **options).tolist()
    torch.manual_seed(7)
    assert model.generate(prompt, **options).tolist() == first != second


def test_several_answers_to_one_prompt_are_the_rows_with_their_seeds():
    model, prompt = model_of("c"), torch.tensor([golden_prompts("c")[0]])
    options = {"do_sample": True, "audio_temperature": 1.0, "max_new_tokens": 30, "audio_block_size": 10}
    three = model.generate(prompt, num_return_sequences=3, seed=20, **options)
    listed = model.generate(prompt.repeat(3, 1), seed=[20, 21, 22], **options)
    assert torch.equal(three, listed)
    alone = [model.generate(prompt, seed=20 + row, **options)[0].tolist() for row in range(3)]
    assert [row[: len(single)] for row, single in zip(three.tolist(), alone, strict=True)] == alone


def test_only_codes_and_end_tokens_stand_in_spans_and_only_text_outside():
    torch.manual_seed(0)
    model = model_of("c")
    text = {
        "do_sample": True,
        "temperature": 3.0,
        "audio_temperature": 3.0,
        "max_new_tokens": 120,
        "audio_block_size": 6,
    }
    for seed in range(3):
        prompt = golden_prompts("c")[seed]
        answer = model.generate(torch.tensor([prompt]), seed=seed, **text)[0, len(prompt) :].tolist()
        inside = False
        for token in answer:
            assert (111 <= token <= 174 or token in (176, 177)) if inside else token < 110
            inside = token in (100, 102) or (inside and token not in (176, 177))


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_other_backbones_write_the_reference_tokens(tiny_model, model_type):
    model = tiny_model(text_config={"model_type": model_type})
    for prompt in ([1, 2, 100, 120, 121, 101, 3, 102], [5, 6, 7]):
        options = {"max_new_tokens": 31, "audio_block_size": 6, "audio_steps_per_block": 3, "eos_token_id": [104]}
        ours = model.generate(torch.tensor([prompt]), **options)[0].tolist()
        theirs = reference_generate(model, prompt, 30, block_size=6, steps=3)
        assert common_prefix_holds(ours, theirs, len(prompt), 30)


def test_a_causal_prompt_stays_causal_and_answers_stay_bidirectional():
    model, causal = load_published("c"), load_published("c")
    causal.config.causal_prompt_audio = True
    differ = False
    for prompt in golden_prompts("c")[:3]:
        theirs = reference_generate(causal, prompt, 40, 10, 5)
        options = {"max_new_tokens": 41, "audio_block_size": 10, "audio_steps_per_block": 5}
        ours = causal.generate(torch.tensor([prompt]), **options)
        assert common_prefix_holds(ours[0].tolist(), theirs, len(prompt), 40)
        differ |= not torch.equal(ours, model.generate(torch.tensor([prompt]), **options))
    assert differ


def test_a_head_that_cannot_be_sliced_gives_the_same_tokens():
    model, prompt = load_published("b"), torch.tensor([golden_prompts("b")[0]])
    options = {"max_new_tokens": 60, "audio_block_size": 10}
    sliced = model.generate(prompt, **options)
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(model.generate(prompt, **options), sliced) and calls


def test_text_tokens_added_above_the_audio_side_are_written_as_text_and_not_in_spans(tiny_model):
    model = tiny_model()
    model.resize_token_embeddings(256)
    options = {"max_new_tokens": 40, "audio_block_size": 6, "do_sample": True, "audio_temperature": 4.0, "seed": 0}
    in_span = model.generate(torch.tensor([[1, 2, 100]]), temperature=4.0, top_k=0, **options)[0, 3:]
    assert (in_span[:6] < 178).all() and not (in_span == 175).any() and not (in_span == 110).any()

    bias = {"sequence_bias": {(200,): 50.0}, "output_logits": True, "output_scores": True}
    written = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, return_dict_in_generate=True, **bias)
    assert written.sequences[0, 3:].tolist() == [200] * 5
    expected = model(torch.tensor([[1, 2, 3]])).logits[:, -1]
    text = [*range(110), *range(178, 256)]
    torch.testing.assert_close(written.logits[0][:, text], expected[:, text])
    assert written.logits[0].isfinite()[0].nonzero().squeeze(-1).tolist() == text
    assert written.scores[0][0, 200] - written.logits[0][0, 200] == 50

    prompt = torch.tensor([[1, 200, 201, 3]])
    whole = model(prompt).logits[0, -1].index_fill(0, torch.arange(110, 178), -torch.inf)
    assert model.generate(prompt, max_new_tokens=1)[0, -1] == whole.argmax()


def test_half_precision_writes_legal_tokens_in_batches():
    model, prompts = load_published("b").to(torch.bfloat16), golden_prompts("b")[:3]
    output = model.generate(**pad_left(prompts), max_new_tokens=30, audio_block_size=10, audio_guidance_scale=0.2)
    assert output.shape[1] <= 38 + 30 and not (output == 175).any()


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_flex_attention_writes_the_same_tokens_in_batches(guidance):
    model, inputs = load_published("b"), pad_left(golden_prompts("b")[:2])
    options = {"max_new_tokens": 25, "audio_block_size": 10, "audio_guidance_scale": guidance}
    sdpa = model.generate(**inputs, **options)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling its kernel takes long on a CPU
        assert torch.equal(model.generate(**inputs, **options), sdpa)
