"""Who sees whom: the published rule, and the same rule in every forward of training and generation."""

import pytest
import torch
from conftest import FIXTURES, make_model
from safetensors.torch import load_file
from transformers.masking_utils import create_masks_for_generate

from modeling_ttt.attention_ttt import (
    compute_span_ids,
    create_generation_mask,
    open_span_ids,
    overlay_response_spans,
)

AUDIO = (110, 178)  # first audio-side id, and the one after the last
END_OF_PROMPT_AUDIO = 101


def flags(*values):
    return torch.tensor([values], dtype=torch.bool)


@pytest.fixture(params=["a", "b", "c"])
def golden(request):
    return load_file(FIXTURES / "ttt_published" / request.param / "tensors.safetensors")


def test_span_ids_give_the_published_mask_exactly(golden):
    span_ids = compute_span_ids(golden["input_ids"], *AUDIO, golden["attention_mask"])
    length = span_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same_span = (span_ids[:, :, None] == span_ids[:, None, :]) & (span_ids >= 0)[:, :, None]
    is_token = golden["attention_mask"].bool()
    allowed = (causal | same_span) & is_token[:, None, :]
    assert torch.equal(allowed[is_token], golden["allowed"][:, 0][is_token])


def test_span_is_a_run_of_audio_tokens():
    ids = torch.tensor([[1, 111, 176, 2, 112, 112, 3], [111, 1, 2, 3, 4, 5, 120]])
    expected = [[-1, 0, 0, -1, 1, 1, -1], [0, -1, -1, -1, -1, -1, 1]]
    assert compute_span_ids(ids, *AUDIO).tolist() == expected


def test_padding_belongs_to_no_span_even_if_its_id_is_audio():
    ids = torch.tensor([[175, 175, 1, 111, 112]])
    attention_mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert compute_span_ids(ids, *AUDIO, attention_mask).tolist() == [[-1, -1, -1, 0, 0]]


def test_text_above_the_audio_side_is_in_no_span():
    ids = torch.tensor([[1, 111, 177, 178, 190, 112]])
    assert compute_span_ids(ids, *AUDIO).tolist() == [[-1, 0, 0, -1, -1, 1]]


def test_a_break_in_the_positions_ends_a_span():
    ids = torch.tensor([[1, 111, 112, 113, 114, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert compute_span_ids(ids, *AUDIO, position_ids=positions).tolist() == [[-1, 0, 0, 1, 1, -1]]


def test_causal_prompt_rule_drops_only_spans_that_the_user_token_closes():
    ids = torch.tensor([[100, 111, 112, 101, 5, 100, 113, 176, 6], [100, 111, 176, 101, 111, 112, 3, 4, 101]])
    span_ids = compute_span_ids(ids, *AUDIO, end_of_prompt_audio_token_id=END_OF_PROMPT_AUDIO, causal_prompt_audio=True)
    assert span_ids.tolist() == [[-1, -1, -1, -1, -1, -1, 1, 1, -1], [-1, -1, -1, -1, 1, 1, -1, -1, -1]]


def test_a_diffused_response_is_one_span_a_run_of_labels():
    labels = torch.tensor([[-100, -100, 5, 120, 6, -100, 7, -100, 8]])
    span_ids = torch.tensor([[-1, 0, -1, 1, -1, -1, -1, 2, -1]])
    overlaid = overlay_response_spans(span_ids, labels != -100, flags(1, 0, 0, 0, 0, 0, 0, 0, 0))
    assert overlaid.tolist() == [[-1, 0, 3, 3, 3, -1, 4, 2, 5]]
    overlaid = overlay_response_spans(span_ids, labels != -100, flags(1, 0, 0, 0, 1, 0, 0, 0, 0))
    assert overlaid.tolist() == [[-1, 0, 3, 3, 4, -1, 5, 2, 6]]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_sees_what_training_sees(golden, implementation):
    """A row cut anywhere: the tokens after the cut, behind a cache of those before, have the mask of the whole row."""
    model = make_model()
    model.set_attn_implementation(implementation)
    config, length = model.model.language_model.config, golden["input_ids"].shape[1]
    span_ids = compute_span_ids(golden["input_ids"], *AUDIO, golden["attention_mask"])
    embeddings = torch.zeros(len(span_ids), length, 1)
    masks = create_masks_for_generate(config, embeddings, None, None, None, block_sequence_ids=span_ids)
    whole = masks["full_attention"]
    for starts in ([0] * len(span_ids), list(range(len(span_ids)))):
        num_queries = length - max(starts)
        mask = create_generation_mask(config, span_ids, starts, num_queries, torch.float32)
        for row, start in enumerate(starts):
            assert torch.equal(mask[row], whole[row, :, start : start + num_queries])


def test_an_open_span_is_numbered_from_its_start_to_its_end():
    assert open_span_ids([1, 2, 4], [3, 2, 6], 5).tolist() == [
        [-1, 0, 0, -1, -1],
        [-1, -1, -1, -1, -1],
        [-1, -1, -1, -1, 0],
    ]
