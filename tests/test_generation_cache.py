"""Generation streams what is final, and hands its cache from one turn of a conversation to the next."""

import copy

import pytest
import torch
from reference_sampler import golden_cases, golden_prompts, load_published
from transformers import DynamicCache, StaticCache
from transformers.generation import BaseStreamer

MODELS: dict = {}


def model_of(name: str):
    if name not in MODELS:
        MODELS[name] = load_published(name)
    return MODELS[name]


class PutBack(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        assert not self.ended and value.device.type == "cpu"
        self.pieces.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_gets_text_singly_and_audio_in_final_blocks():
    model, case = model_of("c"), golden_cases("c")[3]
    streamer, prompt = PutBack(), torch.tensor([case["prompt"]])
    options = {"max_new_tokens": 60, "audio_block_size": 10, "audio_steps_per_block": 4}
    sequence = model.generate(prompt, streamer=streamer, **options)
    assert streamer.ended and torch.equal(streamer.pieces[0], prompt)
    assert torch.equal(torch.cat([streamer.pieces[0][0], *streamer.pieces[1:]]), sequence[0])
    text = [piece for piece in streamer.pieces[1:] if piece[0] < 110]
    audio = [piece for piece in streamer.pieces[1:] if piece[0] >= 110]
    assert text and all(piece.shape == (1,) for piece in text)
    assert len(audio) > 2 and all(1 <= len(piece) <= 11 and (piece >= 110).all() for piece in audio)
    ends = [[i for i, token in enumerate(piece.tolist()) if token in (176, 177)] for piece in audio]
    assert all(found in ([], [len(piece) - 1]) for found, piece in zip(ends, audio, strict=True))
    with pytest.raises(ValueError, match="streamer.*2"):
        model.generate(prompt.repeat(2, 1), streamer=PutBack(), **options)


def second_turn(model, prompts: list[list[int]], keep_cache: bool, **options):
    """What the model writes after an answer and a follow-up question, and the width of that prompt."""
    options["return_dict_in_generate"] = True
    width = max(map(len, prompts))
    inputs = torch.tensor([[105] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    first = model.generate(inputs, attention_mask=(inputs != 105).long(), **options)
    question = torch.tensor([[104, 103, 60, 61, 5, 104, 61, 103, 62, 61]] * len(prompts))
    whole = torch.cat([first.sequences, question], dim=1)
    past = first.past_key_values if keep_cache else None
    mask = (whole != 105).long()
    return model.generate(whole, attention_mask=mask, past_key_values=past, **options), whole.shape[1]


@pytest.mark.parametrize("limit", [14, 60])
def test_a_second_turn_on_the_cache_equals_the_whole_conversation(limit):
    model, prompts = model_of("b"), golden_prompts("b")[:1]
    options = {"max_new_tokens": limit, "audio_block_size": 10}
    cached, width = second_turn(model, prompts, True, **options)
    fresh, _ = second_turn(model, prompts, False, **options)
    assert torch.equal(cached.sequences, fresh.sequences)
    assert cached.num_token_positions < fresh.num_token_positions - width // 2


def test_a_second_turn_of_a_batch_on_the_cache_equals_the_whole_conversations():
    model, prompts = model_of("b"), golden_prompts("b")[:4]
    options = {"max_new_tokens": 40, "audio_block_size": 10}
    cached, _ = second_turn(model, prompts, True, **options)
    fresh, _ = second_turn(model, prompts, False, **options)
    assert torch.equal(cached.sequences, fresh.sequences)
    assert cached.num_token_positions < fresh.num_token_positions


def test_an_interrupted_call_leaves_an_empty_cache_that_still_serves():
    model, prompt = model_of("b"), torch.tensor([golden_prompts("b")[0]])
    options = {"max_new_tokens": 40, "audio_block_size": 10}
    cache = model.generate(prompt, return_dict_in_generate=True, **options).past_key_values

    class Interrupt(PutBack):
        def put(self, value):
            super().put(value)
            if len(self.pieces) > 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, past_key_values=cache, streamer=Interrupt(), **options)
    assert cache.get_seq_length() == 0
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), model.generate(prompt, **options))


def test_a_cache_that_only_partly_fits_gives_the_same_tokens_and_logits():
    model, prompt = model_of("b"), list(golden_prompts("b")[0])
    options = {"max_new_tokens": 40, "audio_block_size": 10, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(torch.tensor([prompt]), **options).sequences[0].tolist()
    code = next(i for i, token in enumerate(whole) if i > len(prompt) + 2 and token >= 110) + 2
    changes = {
        "inside the user's audio": prompt[:7] + [3] + prompt[8:],
        "inside a written span": whole[:code] + [5, 6],
        "the prompt again": prompt,
        "not the end": whole[:-3],
        "nothing in common": [5, *prompt],
    }
    for change, prompt_after in changes.items():
        cache = model.generate(torch.tensor([prompt]), **options).past_key_values
        cached = model.generate(torch.tensor([prompt_after]), past_key_values=cache, **options)
        fresh = model.generate(torch.tensor([prompt_after]), **options)
        assert torch.equal(cached.sequences, fresh.sequences), change
        torch.testing.assert_close(
            torch.cat(cached.logits)[:, :110], torch.cat(fresh.logits)[:, :110], atol=1e-4, rtol=1e-4, msg=change
        )


def test_a_dynamic_cache_of_the_prompts_start_is_taken_over():
    model, prompts = model_of("b"), golden_prompts("b")[:3]
    width = max(map(len, prompts))
    ids = torch.tensor([[105] * (width - len(p)) + list(p) for p in prompts])
    mask = (ids != 105).long()
    options = {"attention_mask": mask, "max_new_tokens": 30, "audio_block_size": 10}
    past = DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12], past_key_values=past)
    assert torch.equal(model.generate(ids, past_key_values=past, **options), model.generate(ids, **options))


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_empty_dynamic_cache_is_filled_and_serves_the_next_turn(name):
    model, prompts = model_of(name), golden_prompts(name)[:3]
    width = max(map(len, prompts))
    ids = torch.tensor([[105] * (width - len(p)) + list(p) for p in prompts])
    options = {"max_new_tokens": 30, "audio_block_size": 10, "return_dict_in_generate": True}
    past, saved = DynamicCache(config=model.config.text_config), 0
    for turn in range(3):
        fresh = model.generate(ids, attention_mask=(ids != 105).long(), **options)
        cached = model.generate(ids, attention_mask=(ids != 105).long(), past_key_values=past, **options)
        assert torch.equal(cached.sequences, fresh.sequences)
        saved += fresh.num_token_positions - cached.num_token_positions
        assert (saved > 0) == (turn > 0)
        seen = past.get_seq_length()
        assert ids.shape[1] < seen < cached.sequences.shape[1]
        question = torch.tensor([[104, 103, 60, 61, 5, 104, 61, 103, 62, 61]] * len(prompts))
        ids = torch.cat([fresh.sequences, question], dim=1)
    mask, whole = (cached.sequences != 105).long(), DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(cached.sequences, attention_mask=mask, position_ids=positions, past_key_values=whole)
    whole.crop(seen - cached.sequences.shape[1])
    for ours, theirs in zip(past.layers, whole.layers, strict=True):
        is_token = mask[:, None, :seen, None].bool().expand_as(theirs.keys)
        torch.testing.assert_close(ours.keys[is_token], theirs.keys[is_token], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values[is_token], theirs.values[is_token], atol=1e-4, rtol=1e-4)


def test_a_dynamic_cache_may_be_passed_on_between_block_sizes(tiny_model):
    model = tiny_model({"initializer_range": 0.3}, span_attention="block_causal", block_lengths=[4])
    ids, past = torch.tensor([[1, 2, 3, 100, 111, 112, 101, 5, 100]]), DynamicCache()
    for block_size in (2, 4, 2):
        options = {"max_new_tokens": 20, "audio_block_size": block_size, "do_sample": True, "audio_temperature": 1.0}
        options |= {"seed": 3, "output_logits": True, "return_dict_in_generate": True}
        fresh, cached = model.generate(ids, **options), model.generate(ids, past_key_values=past, **options)
        assert torch.equal(cached.sequences, fresh.sequences) and past.get_seq_length() > 0
        logits, expected = (torch.cat(output.logits)[:, :110] for output in (cached, fresh))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        ids = torch.cat([fresh.sequences, torch.tensor([[9, 10]])], dim=1)


def test_a_dynamic_cache_goes_on_in_a_plain_forward():
    model, prompt = model_of("b"), torch.tensor([golden_prompts("b")[0]])
    past = DynamicCache()
    sequence = model.generate(prompt, max_new_tokens=5, past_key_values=past)
    assert past.get_seq_length() == sequence.shape[1] - 1
    logits = model(sequence[:, -1:], past_key_values=past).logits[:, -1]
    torch.testing.assert_close(logits, model(sequence).logits[:, -1], atol=1e-4, rtol=1e-4)
    model.generate(sequence, max_new_tokens=5, past_key_values=past)  # which holds all of it
    assert past.get_seq_length() >= sequence.shape[1]


def test_a_returned_cache_serves_a_plain_forward():
    model, prompt = model_of("b"), torch.tensor([golden_prompts("b")[0]])
    output = model.generate(prompt, max_new_tokens=5, return_dict_in_generate=True)
    cache = output.past_key_values
    seen = cache.get_seq_length()
    assert seen == output.sequences.shape[1] - 1
    logits = model(output.sequences[:, seen:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, model(output.sequences).logits[:, -1], atol=1e-4, rtol=1e-4)


def assert_serves_as_fresh(model, cache, sequences, **options):
    """The cache is used for `sequences` as far as it holds them, and changes no token."""
    options = {"max_new_tokens": 12, "audio_block_size": 4, "return_dict_in_generate": True, **options}
    cached = model.generate(sequences, past_key_values=cache, **options)
    fresh = model.generate(sequences, **options)
    assert torch.equal(cached.sequences, fresh.sequences)
    return fresh.num_token_positions - cached.num_token_positions


@pytest.mark.parametrize("seed", range(4))
def test_what_others_cut_off_or_wrote_over_is_not_taken_over(tiny_model, seed):
    model, generator = tiny_model({"initializer_range": 0.3}), torch.Generator().manual_seed(seed)
    prompt = torch.randint(100, (1, 20), generator=generator)
    other = torch.randint(100, (1, 10), generator=generator)

    def cache_of_prompt():
        options = {"max_new_tokens": 1, "return_dict_in_generate": True}
        return model.generate(prompt, **options).past_key_values

    cut = cache_of_prompt()
    cut.crop(-8)
    assert cut.token_ids == [prompt[0, :12].tolist()]
    assert assert_serves_as_fresh(model, cut, prompt) == 12

    overwritten = cache_of_prompt()
    overwritten.crop(-8)
    model(other, past_key_values=overwritten)
    assert overwritten.get_seq_length() == 22
    assert assert_serves_as_fresh(model, overwritten, prompt) == 12

    extended = cache_of_prompt()
    model(other, past_key_values=extended)
    whole = torch.cat([prompt, other], dim=1)
    assert assert_serves_as_fresh(model, extended, whole) == 20
    with pytest.raises(ValueError, match="as a negative number"):
        extended.crop(3)


def test_rows_of_a_cache_may_be_chosen_and_repeated():
    model, prompts = model_of("b"), [list(prompt) for prompt in golden_prompts("b")[:3]]
    width = max(map(len, prompts))
    ids = torch.tensor([[105] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = (ids != 105).long()
    first = model.generate(ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True)
    for rows in ([2, 0], [1, 1, 2], [False, True, True]):
        cache = copy.deepcopy(first.past_key_values)
        cache.batch_select_indices(torch.tensor(rows))
        assert assert_serves_as_fresh(model, cache, ids[rows], attention_mask=mask[rows]) > 0
    cache = copy.deepcopy(first.past_key_values)
    with pytest.raises(ValueError, match="different lengths, so only `generate` can crop it"):
        cache.crop(-1)
    cache.batch_repeat_interleave(2)
    repeated = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    assert assert_serves_as_fresh(model, cache, repeated[0], attention_mask=repeated[1]) > 0
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(-2)  # one row is as long as itself
    assert cache.get_seq_length() == len(cache.token_ids[0])


def test_caches_that_cannot_be_cut_back_are_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="`past_key_values` is a StaticCache"):
        model.generate(
            torch.tensor([[1, 2, 3]]),
            past_key_values=StaticCache(model.config.get_text_config(), max_cache_len=20),
            max_new_tokens=3,
        )
    cache = model.generate(torch.tensor([[1, 2]] * 2), max_new_tokens=3, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows.*1"):
        model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=3)


def test_without_use_cache_no_cache_is_returned(tiny_model):
    output = tiny_model().generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=3, return_dict_in_generate=True, use_cache=False
    )
    assert output.past_key_values is None
