"""The TtT objective as pure functions of tensors: samples, noise, what is scored and with which weight. Who sees whom
is in attention_ttt.py; the forwards in between are the model's.

    Noise (`draw_noise` in training, `noise_grid` in evaluation) -> one forward over `Noise.input_ids` -> `score`.

A loss is always the weighted `cross_entropy` of the logits at the scored positions. The functions here say which
positions those are (`targets`, -100 elsewhere) and how much each counts (`weights`), so that `score` gathers the hidden
states it needs and never projects the others to the vocabulary.

Noise level, truncation, prefix preservation and normalisation belong to a sample, and a sample is a row of a padded
batch or one of several sequences packed into a row. `Samples` (samples_ttt.py) says which is which; nothing here knows
about rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .configuration_ttt import TttConfig
from .samples_ttt import IGNORE_INDEX, Samples, draw_uniform

EVAL_NOISE_SEED = 0
EVAL_NOISE_LENGTH = 4096
NUM_NOISE_BINS = 4
CROSS_ENTROPY_ROWS = 256


@dataclass(frozen=True)
class Noise:
    """
    What one forward hides from the model, and what it is scored on.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): the tokens as the model sees them.
        labels (`torch.LongTensor` of shape `(batch, length)`): clean ids of what is scored, -100 elsewhere.
        maskable, masked (`torch.BoolTensor` of shape `(batch, length)`):
            What the bound is averaged over, and what of it was replaced by the mask token.
        levels (`torch.FloatTensor` of shape `(samples,)`): λ, the probability with which a sample was masked.
        num_forwards (`int`): how many forwards the loss is averaged over.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    maskable: torch.Tensor
    masked: torch.Tensor
    levels: torch.Tensor
    num_forwards: int = 1


def draw_noise(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    diffused: torch.Tensor,
    samples: Samples,
    config: TttConfig,
    generator: torch.Generator | None = None,
) -> Noise:
    """
    Draw the noise of a training step: clean batches (BANOM), preserved prefixes (PPM), levels and masks. Both sides are
    scored in its forward.

    Args:
        input_ids, labels (`torch.LongTensor` of shape `(batch, length)`): clean; -100 is not scored.
        diffused (`torch.BoolTensor` of shape `(batch, length)`): labels that are absorbed and predicted in place.

    Returns:
        [`Noise`].
    """
    maskable = diffused
    if config.text_objective == "autoregressive":
        maskable = drop_for_clean_batch(maskable, config.clean_batch_probability, generator)
    maskable = preserve_prefixes(
        maskable, samples, config.prefix_preservation_probability, generator, config.prefix_preservation_unit
    )
    levels = draw_noise_levels(
        samples.count, config.noise_epsilon, config.stratified_noise, generator, input_ids.device
    )
    noisy_ids, masked = mask_tokens(input_ids, maskable, samples, levels, config.mask_token_id, generator)
    return Noise(noisy_ids, labels, maskable, masked, levels)


def noise_grid(
    input_ids: torch.Tensor, labels: torch.Tensor, diffused: torch.Tensor, samples: Samples, config: TttConfig
) -> list[Noise]:
    """
    Return the noise of an evaluation, which is the same in every call: what is autoregressive is scored on the clean
    sequence, what is diffused on a grid of levels with fixed draws, one forward each. Arguments as in `draw_noise`.
    """
    forwards = []
    if "autoregressive" in (config.text_objective, config.audio_objective):
        nothing = torch.zeros_like(diffused)
        levels = torch.ones(samples.count, device=input_ids.device)
        forwards.append(Noise(input_ids, labels.masked_fill(diffused, IGNORE_INDEX), nothing, nothing, levels))
    if "diffusion" in (config.text_objective, config.audio_objective):
        labels, grid = labels.masked_fill(~diffused, IGNORE_INDEX), config.eval_noise_levels
        for level, draws in zip(grid, fixed_noise(diffused, samples, len(grid)), strict=True):
            levels = torch.full((samples.count,), level, device=input_ids.device)
            noisy_ids, masked = mask_tokens(input_ids, diffused, samples, levels, config.mask_token_id, noise=draws)
            forwards.append(Noise(noisy_ids, labels, diffused, masked, levels, len(grid)))
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
    samples: Samples,
    noise_levels: torch.Tensor,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Replace each maskable token by the mask token with probability λ of its sample (the forward diffusion process).

    The i-th maskable token of the batch takes the i-th draw, so that on a CPU one seed masks the same tokens whether
    the samples are padded or packed.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, length)`), maskable (the same shape, bool).
        noise_levels (`torch.Tensor` of shape `(samples,)`): λ.
        noise (`torch.Tensor` of shape `(batch, length)`, *optional*): uniform draws to use instead of new ones.

    Returns:
        `tuple`: the noisy ids, and which positions were masked (bool), both `(batch, length)`.
    """
    if noise is None:
        rank = (maskable.flatten().long().cumsum(0) - 1).clamp(min=0)
        noise = draw_uniform(input_ids.numel(), generator, input_ids.device)[rank].view_as(input_ids)
    masked = maskable & (noise < noise_levels[samples.ids])
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
    noise_levels: torch.Tensor,
    num_maskable: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return what the absorbing-diffusion bound scores: the clean token at each masked position (no shift), weighted by
    1 / λ and averaged over the sample's maskable tokens (those that prefix preservation left maskable).

    Args:
        labels (`torch.Tensor` of shape `(batch, length)`): clean ids. masked: the same shape, bool.
        noise_levels, num_maskable, weight (`torch.Tensor` of shape `(samples,)`):
            λ, number of maskable tokens and `sample_weights`.

    Returns:
        `tuple`: targets (-100 where nothing is scored) and weights, both `(batch, length)`.
    """
    targets = labels.masked_fill(~masked, IGNORE_INDEX)
    return targets, (weight / (noise_levels * num_maskable.clamp(min=1)))[samples.ids]


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
        positions (`tuple` of two `torch.LongTensor` of shape `(scored,)`): rows and columns.
        tokens, groups (`torch.LongTensor` of shape `(scored,)`): clean ids, and groups of the score table.
        weights (`torch.FloatTensor` of shape `(scored,)`): how much each counts.
    """

    positions: tuple[torch.Tensor, ...]
    tokens: torch.Tensor
    weights: torch.Tensor
    groups: torch.Tensor


def find_targets(
    side: torch.Tensor,
    objective: str,
    noise: Noise,
    samples: Samples,
    weight: torch.Tensor,
    groups: torch.Tensor,
) -> Targets:
    """
    Find what one side, text or audio, is scored on: the next token, or the clean token at each masked position.

    Args:
        side (`torch.BoolTensor` of shape `(batch, length)`): labels of this side.
        objective (`str`): `"autoregressive"` or `"diffusion"`.
        weight, groups (`torch.Tensor` of shape `(samples,)`): see `sample_weights`; groups of the score table.
    """
    if objective == "diffusion":
        num_maskable = samples.total(noise.maskable & side)
        targets, weights = diffusion_targets(
            noise.labels, noise.masked & side, samples, noise.levels, num_maskable, weight
        )
    else:
        targets, weights = next_token_targets(noise.labels, side, samples, weight)
    positions = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    return Targets(positions, targets[positions], weights[positions], groups[samples.ids[positions]])


def score(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    is_audio: torch.Tensor,
    noise: Noise,
    samples: Samples,
    weight: torch.Tensor,
    config: TttConfig,
) -> Scores:
    """
    Score one forward. The scored positions of both sides are projected to the vocabulary at once, and no others.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): of `noise.input_ids`.
        head (`Callable`): hidden states `(scored, hidden_size)` to logits `(scored, vocab)`.
        is_audio (`torch.BoolTensor` of shape `(batch, length)`): which clean tokens are audio-side.
        weight (`torch.FloatTensor` of shape `(samples,)`): see `sample_weights`.
    """
    weight = weight / noise.num_forwards
    is_scored = noise.labels != IGNORE_INDEX
    bins = (noise.levels * NUM_NOISE_BINS).long().clamp(max=NUM_NOISE_BINS - 1)  # (samples,)
    audio_group = 1 + (bins if config.audio_objective == "diffusion" else torch.zeros_like(bins))
    text = find_targets(is_scored & ~is_audio, config.text_objective, noise, samples, weight, torch.zeros_like(bins))
    audio = find_targets(is_scored & is_audio, config.audio_objective, noise, samples, weight, audio_group)
    rows, tokens, weights, groups = (
        torch.cat(parts)
        for parts in zip(
            (text.positions[0], text.tokens, text.weights, text.groups),
            (audio.positions[0], audio.tokens, audio.weights, audio.groups),
            strict=True,
        )
    )
    logits = head(torch.cat([hidden_states[text.positions], hidden_states[audio.positions]]))  # (scored, vocab)
    losses = cross_entropy(logits, tokens) * weights
    text_loss, audio_loss = (part.sum() for part in losses.split([len(text.tokens), len(audio.tokens)]))
    num_rows, num_groups = len(noise.labels), 1 + (NUM_NOISE_BINS if config.audio_objective == "diffusion" else 1)
    with torch.no_grad():
        table = tabulate_scores(
            losses.detach() * num_rows, logits.argmax(-1) == tokens, rows, groups, (num_rows, num_groups)
        )
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
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        pieces = zip(logits.split(CROSS_ENTROPY_ROWS), targets.split(CROSS_ENTROPY_ROWS), strict=True)
        return torch.cat([F.cross_entropy(rows.float(), target, reduction="none") for rows, target in pieces])

    @staticmethod
    def backward(ctx, grad_losses):
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for first in range(0, len(logits), CROSS_ENTROPY_ROWS):
            piece = slice(first, first + CROSS_ENTROPY_ROWS)
            rows = logits[piece].float().softmax(-1)
            rows.scatter_add_(1, targets[piece, None], -torch.ones_like(rows[:, :1]))
            gradient[piece] = rows.mul_(grad_losses[piece, None])
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
    "mask_tokens",
    "next_token_targets",
    "noise_grid",
    "preserve_prefixes",
    "sample_weights",
    "score",
    "tabulate_scores",
    "truncate_last_spans",
]
