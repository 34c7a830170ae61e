"""A denoising step and the pure functions that it is made of."""

import pytest
import torch

from modeling_ttt import TttGenerationConfig
from modeling_ttt.denoising_ttt import (
    choose_positions,
    choose_prefix,
    confidence_of,
    denoise,
    draw,
    guide,
    keep_probable,
    make_generators,
    split_evenly,
)


@pytest.mark.parametrize(
    "positions, steps, shares", [(26, 2, [13, 13]), (10, 4, [3, 3, 2, 2]), (3, 5, [1, 1, 1]), (7, 1, [7])]
)
def test_positions_are_split_evenly_earlier_steps_taking_the_remainder(positions, steps, shares):
    assert split_evenly(positions, steps) == shares


def test_guidance_moves_away_from_the_unconditional_logits():
    conditional, unconditional = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    assert guide(conditional, unconditional, 0.0).tolist() == [2.0, 0.0]
    assert guide(conditional, unconditional, 0.5).tolist() == [2.5, -0.5]


def test_top_k_and_top_p_keep_the_most_probable():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert keep_probable(logits, top_k=2).isfinite().tolist() == [[False, True, False, True]]
    assert keep_probable(logits, top_p=0.65).isfinite().tolist() == [[False, True, False, True]]
    assert keep_probable(logits, top_p=0.01).isfinite().tolist() == [[False, True, False, False]]
    assert keep_probable(logits, top_k=9, top_p=1.0).isfinite().all()


def test_draws_follow_the_distribution_and_need_no_noise_at_temperature_zero():
    logits = torch.tensor([0.6, 0.3, 0.1, 0.0]).log()
    noise = torch.empty(20_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits.expand(20_000, 4), noise), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1, 0.0]), atol=0.02, rtol=0)
    assert int(draw(logits)) == 0


def test_confidence_is_the_probability_or_the_exponential_of_negative_entropy():
    logits = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]).log()
    tokens = torch.tensor([0, 1, 2])
    assert confidence_of(logits, tokens, "low_confidence").tolist() == pytest.approx([0.5, 1.0, 1 / 3])
    assert confidence_of(logits, tokens, "entropy").tolist() == pytest.approx([0.5, 1.0, 1 / 3])


def test_nearly_certain_positions_keep_their_order():
    logits = torch.tensor([[30.0, 0.0], [32.0, 0.0], [31.0, 0.0]])
    confidence = confidence_of(logits, torch.zeros(3, dtype=torch.long), "low_confidence")
    assert confidence.argsort(descending=True).tolist() == [1, 2, 0]


def test_the_most_confident_undecided_positions_are_fixed_earlier_ones_first_in_a_tie():
    confidence = torch.tensor([[0.9, 0.5, 0.5, 0.8], [0.1, 0.2, 0.3, 0.4]])
    undecided = torch.tensor([[False, True, True, True], [True, True, False, False]])
    chosen = choose_positions(confidence, undecided, torch.tensor([2, 3]))
    assert chosen.tolist() == [[False, True, False, True], [True, True, False, False]]


def test_a_threshold_fixes_all_that_pass_and_at_least_the_best():
    confidence, undecided = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.2, 0.1]]), torch.ones(2, 3, dtype=torch.bool)
    chosen = choose_positions(confidence, undecided, torch.tensor([1, 1]), threshold=0.8)
    assert chosen.tolist() == [[True, True, False], [True, False, False]]


def test_a_preference_for_earlier_positions_changes_the_order_and_not_the_threshold():
    confidence, undecided = torch.tensor([[0.2, 0.5, 0.55, 0.9]]), torch.ones(1, 4, dtype=torch.bool)
    one = torch.tensor([1])
    assert choose_positions(confidence, undecided, one, order_bias=0.1).tolist() == [[False, False, False, True]]
    assert choose_positions(confidence, undecided, one, order_bias=0.3).tolist() == [[True, False, False, False]]
    two = choose_positions(confidence, undecided, torch.tensor([2]), order_bias=0.06)
    assert two.tolist() == [[False, True, False, True]]  # 0.5 - 0.06 before 0.55 - 0.12
    chosen = choose_positions(confidence, undecided, one, threshold=0.5, order_bias=0.3)
    assert chosen.tolist() == [[True, True, True, True]]


def test_a_prefix_reaches_as_far_as_its_joint_probability_and_holds_the_first_undecided_position():
    confidence = torch.tensor([[0.1, 0.9, 0.8, 0.7], [0.2, 0.9, 0.9, 0.9], [0.9, 0.9, 0.1, 0.9]])
    undecided = torch.tensor([[False, True, True, True], [True, True, True, True], [True, False, False, True]])
    chosen = choose_prefix(confidence, undecided, 0.72 - 1e-6)
    assert chosen.tolist() == [
        [False, True, True, False],  # 0.9 * 0.8 = 0.72; what is decided counts no more
        [True, False, False, False],
        [True, False, False, True],  # 0.9 * 0.9, over what is decided
    ]
    assert not choose_prefix(confidence, torch.zeros_like(undecided), 0.5).any()


def options_of(**options):
    defaults = TttGenerationConfig._get_default_generation_params()
    return TttGenerationConfig(**{**defaults, **options})


def test_a_step_fixes_its_share_of_every_block_and_never_takes_what_is_forbidden():
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    logits[..., 5] += 100
    undecided = torch.tensor([[True] * 4, [True, True, False, False]])  # the second row's block is shorter
    tokens, fixed = denoise(
        logits, undecided, [4, 2], [0, 0], options_of(audio_steps_per_block=2), [None] * 2, forbidden=[5]
    )
    assert fixed.sum(-1).tolist() == [2, 1] and not (fixed & ~undecided).any() and tokens.max() < 5


def test_rows_with_shorter_blocks_draw_what_they_draw_alone():
    options = options_of(audio_temperature=1.0, audio_remasking="random", seed=[3, 4])
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    generators = make_generators(options, 2, torch.device("cpu"))
    for _ in range(2):  # and so in the next step
        together, _ = denoise(logits.clone(), torch.ones(2, 4).bool(), [2, 4], [0, 0], options, generators)
    alone = make_generators(options_of(audio_temperature=1.0, audio_remasking="random", seed=3), 1, torch.device("cpu"))
    for _ in range(2):
        single, _ = denoise(logits[:1, :2].clone(), torch.ones(1, 2).bool(), [2], [0], options, alone)
    assert torch.equal(together[:1, :2], single)


def test_a_list_of_seeds_has_one_for_each_row():
    with pytest.raises(ValueError, match="`seed` names 2 seeds for 3 rows"):
        make_generators(options_of(seed=[1, 2]), 3, torch.device("cpu"))


@pytest.mark.parametrize("bias", [2.0, 1e39])
def test_a_large_order_bias_is_the_order_alone(bias):
    confidence, undecided = torch.tensor([[0.5, 0.6, 0.7]]), torch.tensor([[False, True, True]])
    chosen = choose_positions(confidence, undecided, torch.tensor([1]), None, bias)
    assert chosen.tolist() == [[False, True, False]]
