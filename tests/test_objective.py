"""The objective's pure functions against the published goldens and small cases worked out by hand."""

import pytest
import torch
from conftest import FIXTURES, make_config
from safetensors.torch import load_file

from modeling_ttt.objective_ttt import (
    CROSS_ENTROPY_ROWS,
    cross_entropy,
    diffusion_targets,
    draw_noise_levels,
    drop_for_clean_batch,
    fixed_noise,
    mask_tokens,
    next_token_targets,
    preserve_prefixes,
    sample_weights,
    tabulate_scores,
    truncate_last_spans,
)
from modeling_ttt.samples_ttt import Samples, find_sample_starts

AUDIO = 110


def loss_of(logits, targets, weights):
    scored = targets != -100
    return (cross_entropy(logits[scored], targets[scored]) * weights[scored]).sum()


def one_a_row(tensor):
    """Samples of a padded batch: every row is one."""
    return Samples(torch.arange(len(tensor))[:, None].expand(tensor.shape), len(tensor))


def of_lengths(*lengths):
    """Samples packed into one row."""
    return Samples(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None], len(lengths))


def flags(*values):
    return torch.tensor([values], dtype=torch.bool)


@pytest.fixture(params=["a", "b", "c"])
def golden(request):
    return load_file(FIXTURES / "ttt_published" / request.param / "tensors.safetensors")


def test_losses_equal_the_published_ones(golden):
    labels = golden["labels"]
    samples = Samples.from_starts(find_sample_starts(labels), labels)
    weight = sample_weights(labels, samples)
    text = next_token_targets(labels, (labels != -100) & (labels < AUDIO), samples, weight)
    levels = golden["p_mask"][:, :1].expand_as(labels)
    audio = diffusion_targets(labels, golden["masked_indices"], samples, levels, golden["answer_lengths"][:, 0], weight)
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
    noisy, masked = mask_tokens(ids, maskable, torch.tensor([[0.2], [1.0]]).expand_as(ids), mask_token_id=175)
    assert not masked[:, :100].any()
    assert masked[1, 100:].all()
    assert masked[0].float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(noisy == 175, masked)


def test_prefix_preservation_keeps_whole_spans_before_a_uniformly_chosen_one():
    rows = flags(0, 1, 1, 0, 1, 0, 1, 1, 1).expand(6_000, -1)
    kept = preserve_prefixes(rows, one_a_row(rows), probability=1.0)
    outcomes, counts = kept.unique(dim=0, return_counts=True)
    assert sorted(outcomes.long().tolist()) == [
        [0, 0, 0, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 0, 1, 1, 1],
        [0, 1, 1, 0, 1, 0, 1, 1, 1],
    ]
    assert (counts / 6_000 - 1 / 3).abs().max() < 0.03


def test_prefix_preservation_happens_as_often_as_asked():
    rows = flags(1, 0, 1).expand(10_000, -1)
    assert torch.equal(preserve_prefixes(rows, one_a_row(rows), probability=0.0), rows)
    changed = (preserve_prefixes(rows, one_a_row(rows), probability=0.3) != rows).any(-1).float().mean()
    assert changed.item() == pytest.approx(0.15, abs=0.02)  # half of the choices fall on the first span


def test_a_prefix_may_end_at_any_token_if_asked():
    rows = flags(0, 1, 1, 0, 1).expand(1_000, -1)
    kept = preserve_prefixes(rows, one_a_row(rows), probability=1.0, unit="token")
    outcomes = kept.long().unique(dim=0).tolist()
    assert sorted(outcomes) == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 1], [0, 1, 1, 0, 1]]


def test_prefix_preservation_survives_rows_without_maskable_tokens():
    rows = torch.zeros(2, 5, dtype=torch.bool)
    assert not preserve_prefixes(rows, one_a_row(rows), probability=1.0).any()


def test_a_clean_batch_is_clean_as_a_whole():
    maskable = torch.ones(3, 4, dtype=torch.bool)
    kept = torch.stack([drop_for_clean_batch(maskable, 0.3) for _ in range(2_000)]).flatten(1).float()
    assert set(kept.mean(-1).tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(0.7, abs=0.04)


def test_fixed_noise_depends_on_the_rank_among_maskable_tokens_only():
    state = torch.get_rng_state()
    maskable = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    noise = fixed_noise(maskable, one_a_row(maskable), num_levels=3)
    assert torch.equal(noise[:, 0, [1, 2, 4]], noise[:, 1, [0, 1, 2]])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_next_token_targets_are_shifted_and_averaged_over_the_samples_own_labels():
    labels = torch.tensor([[-100, 7, 120, 8], [-100, -100, 9, 10]])
    is_text = (labels != -100) & (labels < AUDIO)
    targets, weights = next_token_targets(labels, is_text, one_a_row(labels), torch.tensor([0.5, 0.5]))
    assert targets.tolist() == [[7, -100, 8, -100], [-100, 9, 10, -100]]
    assert torch.allclose(weights, torch.tensor(0.25))


def test_diffusion_targets_are_not_shifted_and_weighted_by_the_inverse_level():
    labels = torch.tensor([[-100, 7, 120, 121, 122]])
    masked = torch.tensor([[False, False, True, False, True]])
    level, number, weight = torch.full(labels.shape, 0.5), torch.tensor([3]), torch.tensor([1.0])
    targets, weights = diffusion_targets(labels, masked, one_a_row(labels), level, number, weight)
    assert targets.tolist() == [[-100, -100, 120, -100, 122]]
    assert torch.allclose(weights, torch.tensor(2 / 3))


def test_the_weighted_bound_is_unbiased():
    """For a constant cross-entropy c, the expectation of the bound over noise is c."""
    batch_size, num_maskable, cross_entropy = 4_000, 10, 2.0
    maskable = torch.ones(batch_size, num_maskable, dtype=torch.bool)
    labels = torch.full((batch_size, num_maskable), 120)
    levels = draw_noise_levels(batch_size, stratified=True)
    samples = one_a_row(labels)
    levels = levels[samples.ids]
    _, masked = mask_tokens(labels, maskable, levels, 175)
    _, weights = diffusion_targets(labels, masked, samples, levels, maskable.sum(-1), sample_weights(labels, samples))
    assert (weights * masked * cross_entropy).sum().item() == pytest.approx(cross_entropy, rel=0.05)


def test_samples_count_the_same_without_num_items_and_by_their_labels_with_it():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 4]])
    samples = one_a_row(labels)
    assert sample_weights(labels, samples).tolist() == [0.5, 0.5]
    assert sample_weights(labels, samples, 8).tolist() == [3 / 8, 1 / 8]
    assert sample_weights(labels, samples, torch.tensor([8])).tolist() == [3 / 8, 1 / 8]
    assert sample_weights(torch.full((2, 3), -100), one_a_row(torch.zeros(2, 3)), 0).tolist() == [0.0, 0.0]


def test_positions_that_start_again_begin_a_sample_and_those_without_labels_are_none():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]])
    labels = torch.tensor([[-100, 7, 8, -100, -100, 9], [-100, 7, -100, -100, -100, -100]])
    starts = find_sample_starts(labels, positions)
    assert starts.long().tolist() == [[1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0]]
    samples = Samples.from_starts(starts, labels)
    assert samples.count == 3 and samples.ids[labels != -100].tolist() == [0, 0, 1, 2]
    nothing = Samples.from_starts(starts, torch.full_like(labels, -100))
    assert nothing.count == 1 and nothing.ids.unique().tolist() == [0]
    assert find_sample_starts(labels).long().sum(-1).tolist() == [1, 1]


def test_totals_are_counted_within_a_sample():
    samples = of_lengths(3, 4)
    flagged = flags(1, 0, 1, 1, 1, 0, 1)
    assert samples.total(flagged).tolist() == [2, 3]
    assert samples.running_total(flagged)[flagged].tolist() == [1, 2, 1, 2, 3]


def test_packed_samples_keep_prefixes_of_their_own():
    """Two samples that meet inside audio: the border is a span start, and the choice in one spares the other."""
    maskable = flags(1, 0, 1, 1, 0, 1)
    outcomes = {
        tuple(preserve_prefixes(maskable, of_lengths(3, 3), probability=1.0)[0].long().tolist()) for _ in range(100)
    }
    assert outcomes == {(*first, *second) for first in [(1, 0, 1), (0, 0, 1)] for second in [(1, 0, 1), (0, 0, 1)]}


def test_packed_samples_have_noise_levels_of_their_own():
    ids = torch.full((1, 2_000), 120)
    samples = of_lengths(1_000, 1_000)
    _, masked = mask_tokens(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([0.1, 0.9])[samples.ids], 175)
    assert masked[0, :1_000].float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert masked[0, 1_000:].float().mean().item() == pytest.approx(0.9, abs=0.03)


def test_a_seed_masks_the_same_tokens_padded_and_packed():
    lengths = (20, 33, 7)
    padded = torch.arange(40) < torch.tensor(lengths)[:, None]
    packed = torch.ones(1, sum(lengths), dtype=torch.bool)
    levels = torch.tensor([0.3, 0.6, 0.9])
    masked = [
        mask_tokens(flagged.long(), flagged, levels[samples.ids], 175, torch.Generator().manual_seed(1))[1][flagged]
        for flagged, samples in ((padded, one_a_row(padded)), (packed, of_lengths(*lengths)))
    ]
    assert torch.equal(*masked) and masked[0].any()


def test_nothing_scored_gives_zero_with_a_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long)).sum()
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("number", [1, CROSS_ENTROPY_ROWS, 2 * CROSS_ENTROPY_ROWS + 3])
def test_cross_entropy_and_its_gradient_are_those_of_pytorch(number):
    logits = (5 * torch.randn(number, 11)).requires_grad_()
    targets, weights = torch.randint(11, (number,)), torch.rand(number)
    results = []
    for losses in (
        cross_entropy(logits, targets),
        torch.nn.functional.cross_entropy(logits, targets, reduction="none"),
    ):
        (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
        results.append((losses, gradient))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_gradient_of_cross_entropy_is_differentiable_and_works_under_torch_func():
    logits, targets = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    results = []
    for loss in (
        lambda rows: cross_entropy(rows, targets).sum(),
        lambda rows: torch.nn.functional.cross_entropy(rows, targets, reduction="sum"),
    ):
        (gradient,) = torch.autograd.grad(loss(logits), logits, create_graph=True)
        results.append((torch.func.grad(loss)(logits), torch.autograd.grad(gradient.square().sum(), logits)[0]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_cross_entropy_of_bfloat16_logits_is_taken_in_float32():
    logits = torch.randn(9, 11, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(11, (9,))
    losses = cross_entropy(logits, targets)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"))


def test_scores_are_tabulated_by_row_and_group():
    table = tabulate_scores(
        losses=torch.tensor([1.0, 2.0, 4.0, 8.0]),
        correct=torch.tensor([True, False, True, True]),
        rows=torch.tensor([0, 0, 1, 1]),
        groups=torch.tensor([0, 2, 2, 2]),
        shape=(2, 3),
    )
    assert table.tolist() == [[[1, 1, 1], [0, 0, 0], [2, 0, 1]], [[0, 0, 0], [0, 0, 0], [12, 2, 2]]]


def answer(num_codes, *after):
    """A prompt with codes, text, and a last span of so many codes; 102 begins it, 177 ends it, 104 ends the turn."""
    codes = [111 + number % 64 for number in range(num_codes)]
    return [1, 102, *range(111, 151), 177, 5, 102, *codes, 177, 104, *after]


PROMPT = 43  # tokens of an answer's prompt, which ends with a last span of an earlier turn


def cut_off(rows, probability=1.0, **options):
    """Of rows of one length: how many tokens each keeps, and the number of rows that were cut."""
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    config = make_config(span_truncation_probability=probability, **options)
    cut = truncate_last_spans(ids, labels, one_a_row(ids), config, torch.Generator().manual_seed(0))
    kept = (~cut).sum(-1)
    assert torch.equal(cut, torch.arange(ids.shape[1]) >= kept[:, None])  # an end, nothing in between
    return kept.tolist()


def test_truncation_cuts_the_last_span_with_its_end_and_everything_after():
    kept = cut_off([answer(60, 7, 8)] * 400)
    assert {number - PROMPT - 2 for number in kept} == set(range(18, 55))  # 30 to 90 % of 60 codes


def test_truncation_keeps_five_codes_of_the_shortest_span_and_leaves_shorter_ones_whole():
    assert {number - PROMPT - 2 for number in cut_off([answer(11)] * 100)} == {5, 6, 7, 8, 9}
    for num_codes in (10, 0):
        assert cut_off([answer(num_codes)] * 8) == [len(answer(num_codes))] * 8


def test_truncation_happens_with_the_given_probability():
    kept = cut_off([answer(60)] * 1000, 0.5)
    assert 440 < sum(number < len(answer(60)) for number in kept) < 560
    for options in ({"probability": 0.0}, {"audio_objective": "autoregressive"}):
        assert cut_off([answer(60)] * 8, **options) == [len(answer(60))] * 8


def test_truncation_takes_codes_alone_for_codes():
    """A span ends before an id above the codes or below; without an end token, where its sample ends."""
    for stop in (175, 178, 90, 110):  # the mask token, a token added above the audio range, text, the placeholder
        row = answer(20)
        row[PROMPT + 2 + 8] = stop
        assert cut_off([row] * 8, text_config={"vocab_size": 200}) == [len(row)] * 8
    assert {number - PROMPT - 2 for number in cut_off([answer(20)[:-2]] * 200)} == set(range(6, 19))


def test_packed_samples_are_cut_as_padded_ones():
    lengths = [len(answer(number)) for number in (40, 30, 20)]
    padded = torch.tensor([answer(number) + [105] * (40 - number) for number in (40, 30, 20)])
    packed = torch.tensor([[token for number in (40, 30, 20) for token in answer(number)]])
    config = make_config(span_truncation_probability=1.0)
    results = []
    for ids, samples in ((padded, one_a_row(padded)), (packed, of_lengths(*lengths))):
        labels = ids.masked_fill(ids == 105, -100)
        cut = truncate_last_spans(ids, labels, samples, config, torch.Generator().manual_seed(0))
        results.append(samples.total(~cut & (labels != -100)).tolist())
    assert results[0] == results[1] and all(kept < length for kept, length in zip(results[0], lengths, strict=True))
