"""The objective's pure functions against the published goldens and small cases worked out by hand."""

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file

from modeling_ttt.objective_ttt import (
    compute_span_ids,
    diffusion_targets,
    draw_noise_levels,
    drop_for_clean_batch,
    fixed_noise,
    mask_tokens,
    next_token_targets,
    preserve_prefixes,
    sample_weights,
    weighted_cross_entropy,
)

AUDIO = 110
END_OF_PROMPT_AUDIO = 101


def loss_of(logits, targets, weights):
    scored = targets != -100
    return weighted_cross_entropy(logits[scored], targets[scored], weights[scored])


@pytest.fixture(params=["a", "b", "c"])
def golden(request):
    return load_file(FIXTURES / "ttt_published" / request.param / "tensors.safetensors")


def test_span_ids_give_the_published_mask_exactly(golden):
    span_ids = compute_span_ids(golden["input_ids"], AUDIO, golden["attention_mask"])
    length = span_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same_span = (span_ids[:, :, None] == span_ids[:, None, :]) & (span_ids >= 0)[:, :, None]
    is_token = golden["attention_mask"].bool()
    allowed = (causal | same_span) & is_token[:, None, :]
    assert torch.equal(allowed[is_token], golden["allowed"][:, 0][is_token])


def test_losses_equal_the_published_ones(golden):
    labels = golden["labels"]
    weight = sample_weights(labels)
    text = next_token_targets(labels, (labels != -100) & (labels < AUDIO), weight)
    audio = diffusion_targets(
        labels, golden["masked_indices"], golden["p_mask"][:, 0], golden["answer_lengths"][:, 0], weight
    )
    for name, loss in {
        "ar_loss_clean": loss_of(golden["logits_clean"], *text),
        "ar_loss_noisy": loss_of(golden["logits_noisy"], *text),
        "diffusion_loss": loss_of(golden["logits_noisy"], *audio),
    }.items():
        torch.testing.assert_close(loss, golden[name], atol=1e-5, rtol=0, msg=name)


def test_maskable_tokens_are_the_audio_labels(golden):
    positions = torch.arange(golden["labels"].shape[1])
    in_answer = (positions >= golden["prompt_lengths"][:, None]) & golden["attention_mask"].bool()
    assert torch.equal(golden["labels"] >= AUDIO, in_answer & (golden["input_ids"] >= AUDIO))


def test_span_is_a_run_of_audio_tokens():
    ids = torch.tensor([[1, 111, 176, 2, 112, 112, 3], [111, 1, 2, 3, 4, 5, 120]])
    expected = [[-1, 0, 0, -1, 1, 1, -1], [0, -1, -1, -1, -1, -1, 1]]
    assert compute_span_ids(ids, AUDIO).tolist() == expected


def test_padding_belongs_to_no_span_even_if_its_id_is_audio():
    ids = torch.tensor([[175, 175, 1, 111, 112]])
    attention_mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert compute_span_ids(ids, AUDIO, attention_mask).tolist() == [[-1, -1, -1, 0, 0]]


def test_a_break_in_the_positions_ends_a_span():
    ids = torch.tensor([[1, 111, 112, 113, 114, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert compute_span_ids(ids, AUDIO, position_ids=positions).tolist() == [[-1, 0, 0, 1, 1, -1]]


def test_causal_prompt_rule_drops_only_spans_that_the_user_token_closes():
    ids = torch.tensor([[100, 111, 112, 101, 5, 100, 113, 176, 6], [100, 111, 176, 101, 111, 112, 3, 4, 101]])
    span_ids = compute_span_ids(ids, AUDIO, end_of_prompt_audio_token_id=END_OF_PROMPT_AUDIO)
    assert span_ids.tolist() == [[-1, -1, -1, -1, -1, -1, 1, 1, -1], [-1, -1, -1, -1, 1, 1, -1, -1, -1]]


def test_noise_levels_are_uniform_above_epsilon():
    levels = draw_noise_levels(20_000, epsilon=0.1)
    assert levels.min() >= 0.1 and levels.max() <= 1.0
    assert levels.mean().item() == pytest.approx(0.55, abs=0.01)


def test_stratified_levels_take_one_from_each_stratum_in_random_order():
    levels = draw_noise_levels(16, epsilon=0.0, stratified=True)
    assert (levels * 16).long().sort().values.tolist() == list(range(16))
    assert levels.tolist() != levels.sort().values.tolist()


def test_generator_reproduces_the_noise_and_spares_the_global_state():
    state = torch.get_rng_state()
    draws = [draw_noise_levels(4, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_rate_follows_the_level_and_only_maskable_tokens_are_masked():
    ids = torch.full((2, 10_000), 120)
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, :100] = False
    noisy, masked = mask_tokens(ids, maskable, torch.tensor([0.2, 1.0]), mask_token_id=175)
    assert not masked[:, :100].any()
    assert masked[1, 100:].all()
    assert masked[0].float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(noisy == 175, masked)


def test_prefix_preservation_keeps_whole_spans_before_a_uniformly_chosen_one():
    row = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    kept = preserve_prefixes(row.expand(6_000, -1), probability=1.0)
    outcomes, counts = kept.unique(dim=0, return_counts=True)
    assert sorted(outcomes.long().tolist()) == [
        [0, 0, 0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 0, 1, 1, 1],
        [0, 1, 1, 0, 1, 0, 1, 1, 1],
    ]
    assert (counts / 6_000 - 1 / 3).abs().max() < 0.03


def test_prefix_preservation_happens_as_often_as_asked():
    row = torch.tensor([1, 0, 1], dtype=torch.bool).expand(10_000, -1)
    assert torch.equal(preserve_prefixes(row, probability=0.0), row)
    changed = (preserve_prefixes(row, probability=0.3) != row).any(-1).float().mean()
    assert changed.item() == pytest.approx(0.15, abs=0.02)  # half of the choices fall on the first span


def test_prefix_preservation_survives_rows_without_maskable_tokens():
    row = torch.zeros(2, 5, dtype=torch.bool)
    assert not preserve_prefixes(row, probability=1.0).any()


def test_a_clean_batch_is_clean_as_a_whole():
    maskable = torch.ones(3, 4, dtype=torch.bool)
    kept = torch.stack([drop_for_clean_batch(maskable, 0.3) for _ in range(2_000)]).flatten(1).float()
    assert set(kept.mean(-1).tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(0.7, abs=0.04)


def test_fixed_noise_depends_on_the_rank_among_maskable_tokens_only():
    state = torch.get_rng_state()
    maskable = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    noise = fixed_noise(maskable, num_levels=3)
    assert torch.equal(noise[:, 0, [1, 2, 4]], noise[:, 1, [0, 1, 2]])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_next_token_targets_are_shifted_and_averaged_over_the_samples_own_labels():
    labels = torch.tensor([[-100, 7, 120, 8], [-100, -100, 9, 10]])
    targets, weights = next_token_targets(labels, (labels != -100) & (labels < AUDIO), torch.tensor([0.5, 0.5]))
    assert targets.tolist() == [[7, -100, 8, -100], [-100, 9, 10, -100]]
    assert torch.allclose(weights, torch.tensor(0.25))


def test_diffusion_targets_are_not_shifted_and_weighted_by_the_inverse_level():
    labels = torch.tensor([[-100, 7, 120, 121, 122]])
    masked = torch.tensor([[False, False, True, False, True]])
    targets, weights = diffusion_targets(labels, masked, torch.tensor([0.5]), torch.tensor([3]), torch.tensor([1.0]))
    assert targets.tolist() == [[-100, -100, 120, -100, 122]]
    assert torch.allclose(weights, torch.tensor(2 / 3))


def test_the_weighted_bound_is_unbiased():
    """For a constant cross-entropy c, the expectation of the bound over noise is c."""
    batch_size, num_maskable, cross_entropy = 4_000, 10, 2.0
    maskable = torch.ones(batch_size, num_maskable, dtype=torch.bool)
    labels = torch.full((batch_size, num_maskable), 120)
    levels = draw_noise_levels(batch_size, stratified=True)
    _, masked = mask_tokens(labels, maskable, levels, 175)
    _, weights = diffusion_targets(labels, masked, levels, maskable.sum(-1), sample_weights(labels))
    assert (weights * masked * cross_entropy).sum().item() == pytest.approx(cross_entropy, rel=0.05)


def test_samples_count_the_same_without_num_items_and_by_their_labels_with_it():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 4]])
    assert sample_weights(labels).tolist() == [0.5, 0.5]
    assert sample_weights(labels, 8).tolist() == [3 / 8, 1 / 8]
    assert sample_weights(labels, torch.tensor([8])).tolist() == [3 / 8, 1 / 8]
    assert sample_weights(torch.full((2, 3), -100), 0).tolist() == [0.0, 0.0]


def test_nothing_scored_gives_zero_with_a_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
