"""The TtT objective as pure functions of tensors: samples, noise, what is scored and with which weight. Who sees whom
is in attention_ttt.py; the forwards in between are the model's.

    Noise (`draw_noise` in training, `noise_grid` in evaluation) -> one forward over `Noise.input_ids` -> `score`.

A loss is always the weighted `cross_entropy` of the logits at the scored positions. The functions here say which
positions those are (`targets`, -100 elsewhere) and how much each counts (`weights`), so that `score` gathers the hidden
states it needs and never projects the others to the vocabulary.

Noise level, truncation, prefix preservation and normalisation belong to a sample, and a sample is a row of a padded
batch or one of several sequences packed into a row: `Samples` (samples_ttt.py) says which is which.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention_ttt import NO_SPAN, compute_span_ids
from .configuration_ttt import TttConfig
from .samples_ttt import (
    IGNORE_INDEX,
    NO_PIECE,
    Batch,
    Blocks,
    Layout,
    Samples,
    choose_blocks,
    copy_blocks,
    cut_after_blocks,
    draw_block_lengths,
    draw_uniform,
    find_blocks,
    number_blocks,
)

EVAL_NOISE_SEED = 0
EVAL_NOISE_LENGTH = 4096
NUM_NOISE_BINS = 4
CROSS_ENTROPY_ROWS = 256


@dataclass(frozen=True)
class Noise:
    """
    What one forward hides from the model, and what it is scored on.

    Args:
        batch ([`Batch`]): the clean tokens behind it; its labels are what is scored.
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the tokens as the model sees them.
        maskable, masked (`torch.BoolTensor` of shape `(batch, length)`):
            What the bound is averaged over, and what of it was replaced by the mask token.
        levels (`torch.FloatTensor` of shape `(batch, length)`): λ, the probability with which each token was masked.
        importance (`torch.FloatTensor` of shape `(batch, length)`, *optional*):
            How much a token counts in the bound; 1 if not given.
        num_forwards (`int`): how many forwards the loss is averaged over.
    """

    batch: Batch
    input_ids: torch.Tensor
    maskable: torch.Tensor
    masked: torch.Tensor
    levels: torch.Tensor
    importance: torch.Tensor | None = None
    num_forwards: int = 1

    @classmethod
    def nothing(cls, batch: Batch) -> "Noise":
        """Hide nothing, so that only what is autoregressive is scored."""
        nowhere = torch.zeros_like(batch.diffused)
        return cls(batch, batch.input_ids, nowhere, nowhere, torch.ones_like(nowhere, dtype=torch.float32))


def draw_noise(batch: Batch, config: TttConfig, generator: torch.Generator | None = None) -> Noise:
    """
    Draw the noise of a training step: clean batches (BANOM), preserved prefixes (PPM) or blocks, levels and masks. Both
    sides are scored in its forward. [`TttConfig`] says what its options mean.

    Returns:
        [`Noise`]; where samples are cut or blocks copied, its batch is laid out anew.
    """
    samples, device = batch.samples, batch.input_ids.device
    if config.is_block_causal:
        lengths = draw_block_lengths(config.block_lengths, samples.count, generator, device)
        numbers = _number_as_attended(batch, lengths, config)
        blocks = _find_blocks(batch, numbers, lengths, config)
        levels = draw_noise_levels(
            max(blocks.count, 1), config.noise_epsilon, config.stratified_noise, generator, device
        )
        levels = mask_fully(levels, config.full_block_probability, generator)
        return _copy_noisily(batch, numbers, blocks, levels, config, generator)

    maskable, importance = batch.diffused, None
    if config.text_objective == "autoregressive":
        maskable = drop_for_clean_batch(maskable, config.clean_batch_probability, generator)
    unit = config.prefix_preservation_unit
    preserved = preserve_prefixes(maskable, samples, config.prefix_preservation_probability, generator, unit)
    levels = draw_noise_levels(samples.count, config.noise_epsilon, config.stratified_noise, generator, device)
    if config.block_masking_probability == 0:
        maskable = preserved
    else:
        lengths = draw_block_lengths(config.block_lengths, samples.count, generator, device)
        blocks = _find_blocks(batch, number_blocks(batch.diffused, samples, lengths), lengths, config)
        chosen = choose_blocks(blocks, samples, config.block_masking_probability, generator) & maskable
        is_cut = samples.total(chosen) > 0  # (samples,)
        levels = torch.where(is_cut, mask_fully(levels, config.full_block_probability, generator), levels)
        layout = cut_after_blocks(chosen, blocks, samples, batch.pieces >= 0)
        maskable = layout.take(torch.where(is_cut[samples.ids], chosen, preserved), False)
        batch = lay_out(batch, layout, config.pad_token_id or 0)
        importance = 1.0 - (1.0 - config.block_filling_weight) * (layout.copies > 0)
    levels = levels[batch.samples.ids]  # (batch, length)
    noisy_ids, masked = mask_tokens(batch.input_ids, maskable, levels, config.mask_token_id, generator)
    return Noise(batch, noisy_ids, maskable, masked, levels, importance)


def noise_grid(batch: Batch, config: TttConfig) -> list[Noise]:
    """
    Return the noise of an evaluation, which is the same in every call: what is autoregressive is scored on the clean
    sequence, what is diffused on a grid of levels with fixed draws, one forward each.
    """
    forwards = []
    if "autoregressive" in (config.text_objective, config.audio_objective):
        labels = batch.labels.masked_fill(batch.diffused, IGNORE_INDEX)
        forwards.append(Noise.nothing(replace(batch, labels=labels)))
    if "diffusion" not in (config.text_objective, config.audio_objective):
        return forwards

    samples, grid, device = batch.samples, config.eval_noise_levels, batch.input_ids.device
    batch = replace(batch, labels=batch.labels.masked_fill(~batch.diffused, IGNORE_INDEX))
    if config.is_block_causal:
        lengths = torch.full((samples.count,), config.block_lengths[0], device=device)
        numbers = _number_as_attended(batch, lengths, config)
        blocks = _find_blocks(batch, numbers, lengths, config)
        for index, level in enumerate(grid):
            levels = torch.full((max(blocks.count, 1),), level, device=device)
            noise = _copy_noisily(batch, numbers, blocks, levels, config, fixed_draws=(index, len(grid)))
            forwards.append(replace(noise, num_forwards=len(grid)))
        return forwards
    for level, draws in zip(grid, fixed_noise(batch.diffused, samples, len(grid)), strict=True):
        levels = torch.full_like(batch.input_ids, level, dtype=torch.float32)
        noisy_ids, masked = mask_tokens(batch.input_ids, batch.diffused, levels, config.mask_token_id, noise=draws)
        forwards.append(Noise(batch, noisy_ids, batch.diffused, masked, levels, num_forwards=len(grid)))
    return forwards


def truncate_last_spans(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    samples: Samples,
    config: TttConfig,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Choose what stochastic span truncation cuts off (SST, p_trunc of the paper), so that the end of speech is learned
    from content, not from position.

    Per sample with the given probability, the last span of its response (`<|begin_of_quad|>`, scored) keeps only a
    random number of its codes, uniform from max(30 %, 5) to 90 %, and loses its end token and everything after. Spans
    of 10 codes or fewer stay whole. Who takes the labels of what is cut off, and its place in the span, has the sample
    as if it ended there: nothing before it sees what comes later.

    Args:
        input_ids, labels (`torch.LongTensor` of shape `(batch, length)`): clean; -100 is not scored.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`: what is cut off.
    """
    probability = config.span_truncation_probability
    if probability == 0.0 or config.audio_objective == "autoregressive":  # the twin writes code by code
        return torch.zeros_like(labels, dtype=torch.bool)
    positions = torch.arange(input_ids.numel(), device=input_ids.device)
    ids = samples.ids.flatten()  # (batch * length,)
    begins = ((input_ids == config.begin_of_last_audio_token_id) & (labels != IGNORE_INDEX)).flatten()
    is_code = (input_ids >= config.audio_code_id_start).flatten()
    is_code &= (input_ids < config.audio_code_id_start + config.num_audio_codes).flatten()

    nowhere = torch.full((samples.count,), -1, device=input_ids.device)
    begin = nowhere.scatter_reduce(0, ids, positions.masked_fill(~begins, -1), "amax")  # (samples,)
    last = nowhere.scatter_reduce(0, ids, positions, "amax")
    stops = ~is_code & (positions > begin[ids])
    stop = (last + 1).scatter_reduce(0, ids, positions.masked_fill(~stops, len(positions)), "amin")
    num_codes = stop - begin - 1
    fewest, most = (num_codes * 3 // 10).clamp(min=5), num_codes * 9 // 10
    draws = draw_uniform(samples.count, generator, input_ids.device)
    kept = fewest + (draws * (most - fewest + 1)).long()
    cut = (draw_uniform(samples.count, generator, input_ids.device) < probability) & (begin >= 0) & (num_codes > 10)
    return (cut[ids] & (positions > (begin + kept)[ids])).view_as(labels)


def lay_out(batch: Batch, layout: Layout, pad_token_id: int) -> Batch:
    """Return a batch whose tokens stand where `layout` puts them; padding goes to the right."""
    width = layout.is_token.shape[1]
    attention_mask, position_ids = batch.attention_mask, batch.position_ids
    if attention_mask is not None or position_ids is None:
        attention_mask = layout.is_token.long()
    if position_ids is not None:
        column = torch.arange(width, device=position_ids.device)
        filling = column - layout.is_token.sum(-1, keepdim=True)  # counts anew: it sees itself only
        position_ids = torch.where(layout.is_token, layout.take(position_ids, 0) + layout.copies, filling)
    return replace(
        batch,
        input_ids=layout.take(batch.input_ids, pad_token_id),
        labels=layout.take(batch.labels, IGNORE_INDEX),
        is_audio=layout.take(batch.is_audio, False),
        diffused=layout.take(batch.diffused, False),
        samples=Samples(layout.take(batch.samples.ids, 0), batch.samples.count),
        pieces=layout.take(batch.pieces, NO_PIECE),
        position_ids=position_ids,
        attention_mask=attention_mask,
        span_ids=None if batch.span_ids is None else layout.take(batch.span_ids, NO_SPAN),
    )


def _find_blocks(batch: Batch, numbers: torch.Tensor, lengths: torch.Tensor, config: TttConfig) -> Blocks:
    ends = [config.end_of_audio_token_id, config.end_of_last_audio_token_id]
    closing = config.end_of_prompt_audio_token_id if config.is_block_causal else None
    return find_blocks(batch.input_ids, numbers, batch.diffused, lengths[batch.samples.ids], ends, closing)


def _number_as_attended(batch: Batch, lengths: torch.Tensor, config: TttConfig) -> torch.Tensor:
    """
    Number the blocks of block-causal spans as attention sees them, from the start of each span, scored or not.

    Args:
        lengths (`torch.LongTensor` of shape `(samples,)`): tokens of a block, for each sample.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: -1 outside spans, in what truncation has cut off, and in a user's
        audio where it is causal; else that is one block.
    """
    numbers = compute_span_ids(
        batch.input_ids,
        config.audio_token_id_start,
        config.audio_token_id_end,
        batch.pieces >= 0,
        batch.position_ids,
        config.end_of_prompt_audio_token_id,
        config.causal_prompt_audio,
        lengths[batch.samples.ids],
    )
    assert batch.span_ids is not None
    return numbers.masked_fill(batch.span_ids == NO_SPAN, NO_SPAN)


def _copy_noisily(
    batch: Batch,
    numbers: torch.Tensor,
    blocks: Blocks,
    levels: torch.Tensor,
    config: TttConfig,
    generator: torch.Generator | None = None,
    fixed_draws: tuple[int, int] | None = None,
) -> Noise:
    """
    Return the noise of block-causal spans: clean tokens, where text is scored, and behind them noisy copies of all
    blocks, filled up, where audio is (BD3-LM, arXiv 2503.09573). What a block holds that is not scored, the codes of a
    span that the prompt begins, stays clean in its copy, as it does when `generate` goes on with such a prompt.

    Args:
        numbers (`torch.LongTensor` of shape `(batch, length)`): of the blocks, as attention sees them.
        levels (`torch.FloatTensor` of shape `(blocks,)`): λ of each block.
        fixed_draws (`tuple`, *optional*): which draws of how many of `fixed_noise` to use instead of new ones.
    """
    layout, samples = copy_blocks(blocks), batch.samples
    copied = lay_out(replace(batch, attention_mask=None), layout, config.pad_token_id or 0)
    block_ids = layout.take(blocks.ids, 0)  # (batch, copies)
    maskable = layout.is_token & copied.diffused
    draws = None
    if fixed_draws is not None:
        draws = fixed_noise(maskable, copied.samples, fixed_draws[1])[fixed_draws[0]]
    copied_levels = levels[block_ids]
    noisy_ids, masked = mask_tokens(copied.input_ids, maskable, copied_levels, config.mask_token_id, generator, draws)

    # Who sees whom: clean tokens as always, copies what is clean before their block, and each other.
    column = torch.arange(batch.input_ids.shape[1] + block_ids.shape[1], device=block_ids.device)
    column = column.expand(len(block_ids), -1)
    clean, behind = column.split([batch.input_ids.shape[1], block_ids.shape[1]], 1)
    first = torch.zeros(max(blocks.count, 1), dtype=torch.long, device=block_ids.device)
    first[blocks.ids[blocks.starts]] = clean[blocks.starts]
    copied_numbers = torch.where(layout.is_token, block_ids + clean.shape[1], NO_SPAN)
    positions = clean if batch.position_ids is None else batch.position_ids

    def join(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.cat([left, right], 1)

    nowhere = torch.zeros_like(batch.diffused)
    joined = Batch(
        input_ids=join(batch.input_ids, copied.input_ids),
        labels=join(batch.labels.masked_fill(batch.diffused, IGNORE_INDEX), copied.labels),
        is_audio=join(batch.is_audio, copied.is_audio),
        diffused=join(nowhere, copied.diffused),
        samples=Samples(join(samples.ids, copied.samples.ids), samples.count),
        pieces=join(batch.pieces, copied.pieces),
        position_ids=join(positions, layout.take(positions, 0) + layout.copies),
        span_ids=join(numbers, copied_numbers),
        limits=join(clean + 1, torch.where(layout.is_token, first[block_ids], behind + 1)),
    )
    return Noise(
        joined,
        input_ids=join(batch.input_ids, noisy_ids),
        maskable=join(nowhere, maskable),
        masked=join(nowhere, masked),
        levels=join(torch.ones_like(clean, dtype=torch.float32), copied_levels),
        importance=join(
            torch.ones_like(clean, dtype=torch.float32),
            1.0 - (1.0 - config.block_filling_weight) * (layout.copies > 0),
        ),
    )


def draw_noise_levels(
    num_samples: int,
    epsilon: float = 1e-3,
    stratified: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Draw one noise level λ = (1 - ε) t + ε a sample, t ~ U(0, 1).

    With `stratified`, sample k takes its t from a stratum of width 1 / samples of its own (in random order): every λ is
    still uniform, but the batch covers the range evenly.

    Returns:
        `torch.Tensor` of shape `(samples,)`, float32.
    """
    time = draw_uniform(num_samples, generator, device)
    if stratified:
        order = draw_uniform(num_samples, generator, device).argsort()
        time = (order + time) / num_samples
    return (1.0 - epsilon) * time + epsilon


def mask_fully(levels: torch.Tensor, probability: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Set noise levels of shape `(number,)` to 1 with the given probability: then everything is masked."""
    if probability == 0:
        return levels
    return levels.masked_fill(draw_uniform(len(levels), generator, levels.device) < probability, 1.0)


def drop_for_clean_batch(
    maskable: torch.Tensor, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    With the given probability leave the whole batch without maskable tokens, so that only its text is scored (BANOM,
    p_mix of the paper).

    Args:
        maskable (`torch.Tensor` of shape `(batch, length)`, bool).

    Returns:
        `torch.Tensor` of shape `(batch, length)`, bool.
    """
    return maskable & (draw_uniform(1, generator, maskable.device) >= probability)


def preserve_prefixes(
    maskable: torch.Tensor,
    samples: Samples,
    probability: float,
    generator: torch.Generator | None = None,
    unit: str = "span",
) -> torch.Tensor:
    """
    Take the spans before a random one out of the maskable tokens (PPM, p_prefix of the paper).

    Per sample with the given probability, one start of a maskable span is chosen uniformly; what lies before it stays
    clean and is not scored. With the unit `"token"` the prefix may end at any maskable token, inside a span too: then
    training shows what block-wise sampling meets in every block but a span's first, clean codes before masked ones.

    Args:
        maskable (`torch.Tensor` of shape `(batch, length)`, bool).
        unit (`str`): `"span"` as published, or `"token"`.

    Returns:
        `torch.Tensor` of shape `(batch, length)`, bool.
    """
    starts = maskable.clone()
    if unit == "span":
        starts[:, 1:] &= ~maskable[:, :-1] | (samples.ids[:, 1:] != samples.ids[:, :-1])
    chosen = (draw_uniform(samples.count, generator, maskable.device) * samples.total(starts)).long()
    preserve = draw_uniform(samples.count, generator, maskable.device) < probability
    before_chosen = samples.running_total(starts) <= chosen[samples.ids]
    return maskable & ~(before_chosen & preserve[samples.ids])


def mask_tokens(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    levels: torch.Tensor,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Replace each maskable token by the mask token with its probability λ (the forward diffusion process).

    The i-th maskable token of the batch takes the i-th draw, so that on a CPU one seed masks the same tokens whether
    the samples are padded or packed.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`), maskable (the same shape, bool).
        levels (`torch.FloatTensor` of shape `(batch, length)`): λ.
        noise (`torch.FloatTensor` of shape `(batch, length)`, *optional*): uniform draws to use instead of new ones.

    Returns:
        `tuple`: the noisy ids, and which positions were masked (bool), both of shape `(batch, length)`.
    """
    if noise is None:
        rank = (maskable.flatten().long().cumsum(0) - 1).clamp(min=0)
        noise = draw_uniform(input_ids.numel(), generator, input_ids.device)[rank].view_as(input_ids)
    masked = maskable & (noise < levels)
    return input_ids.masked_fill(masked, mask_token_id), masked


def fixed_noise(maskable: torch.Tensor, samples: Samples, num_levels: int) -> torch.Tensor:
    """
    Return uniform noise that is the same in every call: the i-th maskable token of any sample always gets the same
    draws.

    So a sample's evaluation depends neither on its neighbours nor on padding, and the global random state is untouched.

    Returns:
        `torch.Tensor` of shape `(num_levels, batch, length)`.
    """
    generator = torch.Generator().manual_seed(EVAL_NOISE_SEED)
    table = torch.rand(num_levels, EVAL_NOISE_LENGTH, generator=generator).to(maskable.device)
    rank = (samples.running_total(maskable) - 1).clamp(min=0) % EVAL_NOISE_LENGTH
    return table[:, rank]


def sample_weights(
    labels: torch.Tensor, samples: Samples, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Return how much each sample's loss counts.

    Without `num_items_in_batch` all samples count the same, as published: the batch is averaged. With it (the number of
    labels in all micro-batches of an optimizer step, as the `Trainer` counts it), a sample counts by its share of those
    labels, so that the micro-batches of any sizes add up to the one large batch.

    Args:
        labels (`torch.Tensor` of shape `(batch, length)`): -100 at the first token of each sample.

    Returns:
        `torch.Tensor` of shape `(samples,)`, float32.
    """
    if num_items_in_batch is None:
        return torch.full((samples.count,), 1.0 / samples.count, device=labels.device)
    total = torch.as_tensor(num_items_in_batch, device=labels.device, dtype=torch.float32).flatten()[0]
    return samples.total(labels != IGNORE_INDEX) / total.clamp(min=1.0)


def next_token_targets(
    labels: torch.Tensor, scored: torch.Tensor, samples: Samples, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return what an autoregressive loss scores: position t predicts the label at t + 1; mean per sample over its own
    labels.

    Args:
        labels (`torch.Tensor` of shape `(batch, length)`): -100 at the first token of each sample, which has no past.
        scored (`torch.Tensor` of shape `(batch, length)`, bool): which labels this loss is about, text-side ones say.
        weight (`torch.Tensor` of shape `(samples,)`): what each sample counts, see `sample_weights`.

    Returns:
        `tuple`: targets (-100 where nothing is scored) and weights, both `(batch, length)`.
    """
    targets = F.pad(labels.masked_fill(~scored, IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX)
    num_scored = samples.total(targets != IGNORE_INDEX).clamp(min=1)
    return targets, (weight / num_scored)[samples.ids]


def diffusion_targets(
    labels: torch.Tensor,
    masked: torch.Tensor,
    samples: Samples,
    levels: torch.Tensor,
    num_maskable: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return what the absorbing-diffusion bound scores: the clean token at each masked position (no shift), weighted by
    1 / λ and averaged over the sample's maskable tokens (those that prefix preservation left maskable).

    Args:
        labels (`torch.LongTensor` of shape `(batch, length)`): clean ids.
        masked (`torch.BoolTensor` of shape `(batch, length)`), levels (the same shape): what was masked, and λ.
        num_maskable, weight (`torch.Tensor` of shape `(samples,)`): number of maskable tokens and `sample_weights`.

    Returns:
        `tuple`: targets (-100 where nothing is scored) and weights, both of shape `(batch, length)`.
    """
    targets = labels.masked_fill(~masked, IGNORE_INDEX)
    return targets, (weight / num_maskable.clamp(min=1))[samples.ids] / levels


class Scores(NamedTuple):
    """
    Losses of text and of audio, weighted and summed, and what they are made of.

    Args:
        text_loss, audio_loss (`torch.FloatTensor` of shape `()`).
        table (`torch.FloatTensor` of shape `(batch, groups, 3)`):
            See `tabulate_scores`. Group 0 is text; the others are audio, by noise level in `NUM_NOISE_BINS` equal bins
            if it is diffused, one group if not.
    """

    text_loss: torch.Tensor
    audio_loss: torch.Tensor
    table: torch.Tensor

    @classmethod
    def total(cls, parts: list["Scores"]) -> "Scores":
        """Add up the scores of several forwards."""
        return cls(*(sum(values[1:], values[0]) for values in zip(*parts, strict=True)))


class Targets(NamedTuple):
    """
    What one side is scored on in a forward.

    Args:
        rows, columns (`torch.LongTensor` of shape `(scored,)`): whose logits are scored.
        tokens, groups (`torch.LongTensor` of shape `(scored,)`): clean ids, and groups of the score table.
        weights (`torch.FloatTensor` of shape `(scored,)`): how much each counts.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    groups: torch.Tensor


def find_targets(
    side: torch.Tensor, objective: str, noise: Noise, weight: torch.Tensor, groups: torch.Tensor
) -> Targets:
    """
    Find what one side, text or audio, is scored on: the next token, or the clean token at each masked position.

    Args:
        side (`torch.BoolTensor` of shape `(batch, length)`): labels of this side.
        objective (`str`): `"autoregressive"` or `"diffusion"`.
        weight (`torch.FloatTensor` of shape `(samples,)`): see `sample_weights`.
        groups (`torch.LongTensor` of shape `(batch, length)`): groups of the score table.
    """
    samples, labels = noise.batch.samples, noise.batch.labels
    if objective == "diffusion":
        importance = torch.ones_like(noise.levels) if noise.importance is None else noise.importance
        num_maskable = samples.sum((noise.maskable & side) * importance)
        targets, weights = diffusion_targets(labels, noise.masked & side, samples, noise.levels, num_maskable, weight)
        weights = weights * importance
    else:
        targets, weights = next_token_targets(labels, side, samples, weight)
    rows, columns = places = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    return Targets(rows, columns, targets[places], weights[places], groups[places])


def score(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    noise: Noise,
    weight: torch.Tensor,
    config: TttConfig,
) -> Scores:
    """
    Score one forward. The scored positions of both sides are projected to the vocabulary at once, and no others.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): of `noise.input_ids`.
        head (`Callable`): hidden states `(scored, hidden_size)` to logits `(scored, vocab)`.
        weight (`torch.FloatTensor` of shape `(samples,)`): see `sample_weights`.
    """
    weight = weight / noise.num_forwards
    is_scored, is_audio = noise.batch.labels != IGNORE_INDEX, noise.batch.is_audio
    bins = (noise.levels * NUM_NOISE_BINS).long().clamp(max=NUM_NOISE_BINS - 1)  # (batch, length)
    audio_group = 1 + (bins if config.audio_objective == "diffusion" else torch.zeros_like(bins))
    text = find_targets(is_scored & ~is_audio, config.text_objective, noise, weight, torch.zeros_like(bins))
    audio = find_targets(is_scored & is_audio, config.audio_objective, noise, weight, audio_group)
    both = Targets(*map(torch.cat, zip(text, audio, strict=True)))
    logits = head(hidden_states[both.rows, both.columns])  # (scored, vocab)
    losses = cross_entropy(logits, both.tokens) * both.weights
    text_loss, audio_loss = (part.sum() for part in losses.split([len(text.tokens), len(audio.tokens)]))
    num_rows, num_groups = len(noise.input_ids), 1 + (NUM_NOISE_BINS if config.audio_objective == "diffusion" else 1)
    with torch.no_grad():
        is_right = logits.argmax(-1) == both.tokens
        table = tabulate_scores(losses.detach() * num_rows, is_right, both.rows, both.groups, (num_rows, num_groups))
    return Scores(text_loss, audio_loss, table)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Return the cross-entropy of each position in float32, (scored, vocab) and (scored,) to (scored,).

    Large vocabularies make this the peak of a training step, so no float32 copy of the logits is kept: both directions
    convert `CROSS_ENTROPY_ROWS` positions at a time.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(logits, targets):
        pieces = zip(logits.split(CROSS_ENTROPY_ROWS), targets.split(CROSS_ENTROPY_ROWS), strict=True)
        return torch.cat([F.cross_entropy(rows.float(), target, reduction="none") for rows, target in pieces])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_losses):
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for first in range(0, len(logits), CROSS_ENTROPY_ROWS):
            piece = slice(first, first + CROSS_ENTROPY_ROWS)
            rows = logits[piece].float().softmax(-1)
            rows = rows.scatter_add(1, targets[piece, None], -torch.ones_like(rows[:, :1]))
            gradient[piece] = rows * grad_losses[piece, None]
        return gradient, None


def tabulate_scores(
    losses: torch.Tensor, correct: torch.Tensor, rows: torch.Tensor, groups: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """
    Sum up scored positions by row and group: their weighted losses, how many were predicted right, how many there are.

    Args:
        losses, correct, rows, groups (`torch.Tensor` of shape `(scored,)`): of each scored position.
        shape (`tuple`): number of rows and of groups.

    Returns:
        `torch.Tensor` of shape `(rows, groups, 3)`, float32.
    """
    values = torch.stack([losses, correct.to(losses.dtype), torch.ones_like(losses)], dim=-1)  # (scored, 3)
    table = values.new_zeros(shape[0] * shape[1], 3)
    return table.index_add_(0, rows * shape[1] + groups, values).view(*shape, 3)


__all__ = [
    "Noise",
    "Scores",
    "cross_entropy",
    "diffusion_targets",
    "draw_noise",
    "draw_noise_levels",
    "drop_for_clean_batch",
    "find_targets",
    "fixed_noise",
    "lay_out",
    "mask_fully",
    "mask_tokens",
    "next_token_targets",
    "noise_grid",
    "preserve_prefixes",
    "sample_weights",
    "score",
    "tabulate_scores",
    "truncate_last_spans",
]
