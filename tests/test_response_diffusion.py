"""Generation of the purely diffused baseline: the cached loop gives what the plain algorithm gives, and answers are
learnt."""

import pytest
import torch
from builders import run_without_packages
from conftest import make_model
from test_generation_cache import PutBack

MASK, END = 175, 104
PROMPTS = [[1, 2, 100, 111, 112, 113, 101, 3], [1, 4, 5]]


def generate(model, prompts, **options):
    width = max(map(len, prompts))
    ids = torch.tensor([[105] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sequences = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(sequences[:, :width], ids)
    return sequences[:, width:].tolist()


def reference(model, prompt, block_size, steps, max_new_tokens):
    """One row, every step over the whole sequence."""
    response = []
    while len(response) < max_new_tokens and END not in response:
        block = [MASK] * min(block_size, max_new_tokens - len(response))
        for step in range(steps):
            ids = torch.tensor([prompt + response + block])
            span_ids = model.model.get_span_ids(ids)
            span_ids[0, len(prompt) :] = 1_000
            with torch.no_grad():
                logits = model(ids, span_ids=span_ids).logits[0, -len(block) :]
            logits[:, MASK] = -torch.inf
            best, tokens = logits.softmax(-1).max(-1)
            masked = [position for position, token in enumerate(block) if token == MASK]
            number = -(-len(masked) // (steps - step))  # an even split, earlier steps taking the remainder
            for position in sorted(masked, key=lambda position: -best[position])[:number]:
                block[position] = tokens[position].item()
        response += block
    return response[: response.index(END) + 1] if END in response else response


@pytest.mark.parametrize("steps", [1, 3])
def test_cached_blocks_equal_the_plain_algorithm(steps):
    model = make_model(text_objective="diffusion")
    options = {"audio_block_size": 6, "audio_steps_per_block": steps, "max_new_tokens": 15}
    written = generate(model, PROMPTS, **options)
    for prompt, response in zip(PROMPTS, written, strict=True):
        expected = reference(model, prompt, 6, steps, 15)
        assert response[: len(expected)] == expected and set(response[len(expected) :]) <= {105}


def test_a_model_trained_on_two_answers_writes_both():
    """Text, audio and the end of the turn are diffused together; one answer is longer than a block."""
    answers = [[10, 11, 102, 130, 131, 177, END], [20, 21, 22, 100, 140, 141, 142, 143, 176, 23, 24, END]]
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    batch = {
        "input_ids": torch.tensor([row + [105] * (15 - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (15 - len(row)) for row in rows]),
    }
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(PROMPTS):
        batch["labels"][row, : len(prompt)] = -100
    model = make_model(text_objective="diffusion", prefix_preservation_probability=0.0, noise_epsilon=0.2).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    written = generate(model.eval(), PROMPTS, audio_block_size=12, audio_steps_per_block=12, max_new_tokens=24)
    assert written[1] == answers[1] and written[0][: len(answers[0])] == answers[0]


SAMPLED = {"audio_temperature": 1.0, "audio_remasking": "random", "max_new_tokens": 12, "audio_block_size": 5}


def test_sampling_follows_the_global_generator_and_guidance_is_refused():
    model = make_model(text_objective="diffusion")
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generate(model, PROMPTS, **SAMPLED))
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(ValueError, match="`audio_guidance_scale` is 0.5"):
        generate(model, PROMPTS, audio_guidance_scale=0.5, max_new_tokens=4)


def test_a_seed_decides_each_rows_sample_whatever_its_neighbours():
    model = make_model(text_objective="diffusion")
    both, again, other = (generate(model, PROMPTS, seed=seed, eos_token_id=[109], **SAMPLED) for seed in (1, 1, 5))
    assert both == again and both[0] != other[0]
    assert generate(model, PROMPTS[1:], seed=2, eos_token_id=[109], **SAMPLED) == both[1:]
    at_once = {
        "audio_confidence_threshold": 0.02,
        "audio_temperature": 1.0,
        "max_new_tokens": 20,
        "audio_block_size": 6,
    }
    both = generate(model, PROMPTS, seed=1, eos_token_id=[109], **at_once)
    assert [
        generate(model, [prompt], seed=1 + row, eos_token_id=[109], **at_once)[0] for row, prompt in enumerate(PROMPTS)
    ] == both
    with pytest.raises(ValueError, match="`seed` names 3 seeds for 2 rows"):
        generate(model, PROMPTS, seed=[1, 2, 3], **SAMPLED)


def test_what_cannot_be_written_is_refused_before_any_forward():
    model = make_model(text_objective="diffusion")
    with pytest.raises(ValueError, match=r"prompt \(8 tokens\) and `max_new_tokens` \(249\) make 257 positions"):
        generate(model, PROMPTS, max_new_tokens=249)
    with pytest.raises(ValueError, match="`output_scores` is of text written left to right"):
        generate(model, PROMPTS[:1], max_new_tokens=4, output_scores=True, return_dict_in_generate=True)


def test_it_streams_blocks_reports_forwards_and_hands_its_cache_on():
    model, streamer = make_model(text_objective="diffusion"), PutBack()
    options = {"audio_block_size": 5, "audio_steps_per_block": 2, "max_new_tokens": 12, "eos_token_id": [109]}
    options["return_dict_in_generate"] = True
    prompt = torch.tensor(PROMPTS[:1])
    output = model.generate(prompt, streamer=streamer, **options)
    assert [len(piece.flatten()) for piece in streamer.pieces] == [8, 5, 5, 2] and streamer.ended
    assert torch.cat([piece.flatten() for piece in streamer.pieces]).tolist() == output.sequences[0].tolist()
    assert output.num_forwards == 7 and output.past_key_values.token_ids == PROMPTS[:1]
    again = model.generate(prompt, past_key_values=output.past_key_values, **options)
    assert torch.equal(again.sequences, output.sequences)
    assert again.num_token_positions < output.num_token_positions


REMOTE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = torch.tensor([json.loads(sys.argv[2])])
print(model.generate(prompt, max_new_tokens=9, audio_block_size=4)[0].tolist())
"""


def test_it_answers_from_its_folder_alone(tmp_path):
    model = make_model(text_objective="diffusion")
    model.save_pretrained(tmp_path / "model")
    (printed,) = run_without_packages(REMOTE, tmp_path / "model", PROMPTS[1], cwd=tmp_path)
    expected = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=9, audio_block_size=4)
    assert printed == str(expected[0].tolist())
