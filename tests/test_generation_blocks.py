"""Generation with block-causal spans: the tokens of the uncached reference, at the cost of a block a step."""

import pytest
import torch
from conftest import make_model, no_compilation
from reference_sampler import Trace, golden_prompts, load_published, reference_generate
from test_generation import assert_batch_equals_one_by_one, common_prefix_holds, pad_left
from test_generation_cache import PutBack, second_turn
from transformers import LogitsProcessor

from modeling_ttt import TttConfig, TttForConditionalGeneration

MODELS: dict = {}
BLOCK = 4  # spans of the goldens have several


def model_of(name: str) -> TttForConditionalGeneration:
    if name not in MODELS:
        MODELS[name] = load_published(name)
        MODELS[name].config.span_attention = "block_causal"
        MODELS[name].config.block_lengths = [BLOCK]
    return MODELS[name]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options, reference",
    [
        ({"audio_steps_per_block": 4}, {"steps": 4}),
        ({"audio_steps_per_block": 1}, {"steps": 1}),
        ({"audio_guidance_scale": 0.7, "audio_steps_per_block": 3}, {"guidance": 0.7, "steps": 3}),
        ({"audio_confidence_threshold": 0.6, "audio_order_bias": 0.02}, {"threshold": 0.6, "order_bias": 0.02}),
        ({"audio_prefix_probability": 0.1}, {"prefix": 0.1}),
        (
            {"audio_temperature": 1.2, "audio_remasking": "random", "do_sample": True, "seed": 5},
            {"temperature": 1.2, "remasking": "random", "do_sample": True, "seed": 5},
        ),
    ],
    ids="greedy one-step guidance threshold prefix sampling".split(),
)
def test_cached_tokens_equal_the_uncached_reference(options, reference, implementation):
    model = model_of("c")
    model.set_attn_implementation(implementation)
    for prompt in golden_prompts("c")[:2]:
        trace = Trace()
        theirs = reference_generate(model, prompt, 50, block_size=BLOCK, trace=trace, **reference)
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=51,
            audio_block_size=BLOCK,
            top_k=0,
            return_dict_in_generate=True,
            **options,
        )
        assert common_prefix_holds(output.sequences[0].tolist(), theirs, len(prompt), 50)
        assert output.num_token_positions < trace.positions / 2
    model.set_attn_implementation("sdpa")


def test_attention_differs_from_that_of_whole_spans():
    model, prompt = model_of("c"), torch.tensor([golden_prompts("c")[0]])
    options = {"max_new_tokens": 50, "audio_block_size": BLOCK, "audio_steps_per_block": 4}
    causal = model.generate(prompt, **options)
    model.config.span_attention = "bidirectional"
    whole = model.generate(prompt, **options)
    model.config.span_attention = "block_causal"
    assert causal.tolist() != whole.tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"audio_guidance_scale": 0.5}, {"do_sample": True, "temperature": 1.3, "audio_temperature": 0.8, "seed": 4}],
    ids=["greedy", "guidance", "sampling"],
)
@pytest.mark.parametrize("name", ["b", "c"])
def test_rows_of_a_batch_get_what_they_get_alone(name, options):
    settings = {"max_new_tokens": 60, "audio_block_size": BLOCK, "audio_steps_per_block": 2, **options}
    assert_batch_equals_one_by_one(model_of(name), golden_prompts(name)[:5], settings.pop("seed", None), **settings)


def longest_forward(model: TttForConditionalGeneration, prompt: torch.Tensor, **options) -> int:
    lengths = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(prompt, **options)
    handle.remove()
    return max(lengths[1:])  # but the prompt's


def test_a_step_runs_its_block_alone_and_the_first_one_stores_the_block_before():
    model, prompt = model_of("c"), torch.tensor([golden_prompts("c")[0]])
    options = {"max_new_tokens": 60, "audio_block_size": BLOCK, "audio_steps_per_block": 2}
    assert longest_forward(model, prompt, **options) == 2 * BLOCK
    model.config.span_attention = "bidirectional"
    assert longest_forward(model, prompt, **options) > 2 * BLOCK
    model.config.span_attention = "block_causal"


def test_guidance_computes_the_masked_past_once_a_block():
    model, prompt = model_of("c"), torch.tensor([golden_prompts("c")[0]])
    plain, guided = (
        model.generate(
            prompt,
            max_new_tokens=40,
            audio_block_size=BLOCK,
            audio_steps_per_block=BLOCK,
            audio_guidance_scale=scale,
            return_dict_in_generate=True,
        )
        for scale in (0.0, 1e-9)
    )
    assert torch.equal(plain.sequences, guided.sequences)
    answer = guided.sequences[0, prompt.shape[1] :].tolist()
    begins, codes = sum(token in (100, 102) for token in answer), sum(token >= 110 for token in answer)
    num_blocks = begins + codes // BLOCK
    extra = guided.num_token_positions - plain.num_token_positions
    assert codes > 3 * BLOCK and extra <= num_blocks * (len(guided.sequences[0]) + BLOCK * BLOCK)


@pytest.mark.parametrize("written", [0, 3, 4, 6])
def test_a_prompt_that_stops_in_a_span_goes_on_in_its_block(written):
    model, prompt = model_of("c"), [*golden_prompts("c")[0], 102, *range(120, 120 + written)]
    masks = [175] * (BLOCK - written % BLOCK)
    ids = torch.tensor([prompt + masks])
    logits = model(ids, span_ids=model.model.get_span_ids(ids, block_length=BLOCK)).logits[0, len(prompt) :]
    logits[:, :111], logits[:, 175] = -torch.inf, -torch.inf
    expected = logits.argmax(-1).tolist()
    options = {"audio_block_size": BLOCK, "audio_steps_per_block": 1}
    ours = model.generate(torch.tensor([prompt]), max_new_tokens=len(masks) + 1, **options)[0, len(prompt) :].tolist()
    end = next((i for i, token in enumerate(expected) if token in (176, 177)), len(expected) - 1)
    assert ours[: end + 1] == expected[: end + 1]


@pytest.mark.parametrize("limit", [14, 60])
def test_a_second_turn_on_the_cache_equals_the_whole_conversation(limit):
    options = {"max_new_tokens": limit, "audio_block_size": BLOCK}
    for prompts in (golden_prompts("b")[:1], golden_prompts("b")[:3]):
        cached, width = second_turn(model_of("b"), prompts, True, **options)
        fresh, _ = second_turn(model_of("b"), prompts, False, **options)
        assert torch.equal(cached.sequences, fresh.sequences)
        assert cached.num_token_positions < fresh.num_token_positions - width // 2


def test_a_cache_written_in_other_blocks_is_taken_up_to_its_first_span():
    model, prompt = model_of("b"), golden_prompts("b")[0]
    first = model.generate(torch.tensor([prompt]), max_new_tokens=40, audio_block_size=6, return_dict_in_generate=True)
    assert (first.sequences >= 110).sum() > 8
    whole = torch.cat([first.sequences, torch.tensor([[104, 103, 60, 61, 5, 62]])], 1)
    options = {"max_new_tokens": 30, "audio_block_size": BLOCK}
    fresh = model.generate(whole, **options)
    assert torch.equal(model.generate(whole, past_key_values=first.past_key_values, **options), fresh)


def test_what_is_streamed_is_what_is_returned():
    model, streamer = model_of("c"), PutBack()
    prompt = torch.tensor([golden_prompts("c")[3]])
    sequence = model.generate(prompt, streamer=streamer, max_new_tokens=60, audio_block_size=BLOCK)
    assert torch.equal(torch.cat([streamer.pieces[0][0], *streamer.pieces[1:]]), sequence[0])


def test_flex_attention_writes_the_same_tokens():
    model, inputs = model_of("c"), pad_left(golden_prompts("c")[:2])
    options = {"max_new_tokens": 30, "audio_block_size": BLOCK}
    expected = model.generate(**inputs, **options)
    model.set_attn_implementation("flex_attention")
    with no_compilation("flex_attention"):
        assert torch.equal(model.generate(**inputs, **options), expected)
    model.set_attn_implementation("sdpa")


def test_a_saved_model_keeps_its_blocks(tmp_path):
    model = model_of("c")
    model.save_pretrained(tmp_path)
    loaded = TttForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.config, TttConfig) and loaded.config.is_block_causal
    prompt, options = torch.tensor([golden_prompts("c")[0]]), {"max_new_tokens": 40, "audio_block_size": BLOCK}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


class Prefer(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] += 1e4
        return scores


def test_a_response_never_closes_a_span_as_a_user_does():
    """The span would be a user's when it is read again, and numbered otherwise than it was written."""
    model, closing = make_model(span_attention="block_causal", block_lengths=(BLOCK,)), 101
    options = {"max_new_tokens": 20, "max_audio_codes_per_span": 3, "eos_token_id": [109]}
    answer = model.generate(torch.tensor([[1, 2, 100]]), logits_processor=[Prefer(closing)], **options)[0, 3:].tolist()
    assert closing in answer
    assert all(before < 110 for before, token in zip(answer, answer[1:], strict=False) if token == closing)
