"""The TtT objective as pure functions of tensors: spans, noise, what is scored and with which weight.

A loss is always `weighted_cross_entropy` of the logits at the scored positions. The functions here say which positions
those are (`targets`, -100 elsewhere) and how much each counts (`weights`), so that a model can gather the hidden states
it needs and never project the others to the vocabulary. Modules only wire these functions together.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
EVAL_NOISE_SEED = 0
EVAL_NOISE_LENGTH = 4096


def compute_span_ids(
    input_ids: torch.Tensor,
    audio_token_id_start: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    end_of_prompt_audio_token_id: int | None = None,
) -> torch.Tensor:
    """
    Number the audio spans of each row: a span is a maximal run of audio-side tokens (the published code's rule).

    Must be given the clean ids, before any noise. The result is what `create_causal_mask` calls `block_sequence_ids`.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, length)`): clean token ids.
        audio_token_id_start (`int`): ids from here up are audio-side.
        attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 marks padding, which is in no span.
        position_ids (`torch.Tensor` of shape `(batch or 1, length)`, *optional*):
            A break in the positions (packed sequences) also ends a span.
        end_of_prompt_audio_token_id (`int`, *optional*):
            Leave spans that this token closes without a number, hence causal (the paper's rule for prompts). A user's
            audio is complete in every prompt and a response never writes this token, so that training and generation
            agree without knowing where the prompt ends.

    Returns:
        `torch.Tensor` of shape `(batch, length)`: 0, 1, ... inside the spans of a row, -1 outside.
    """
    is_audio = input_ids >= audio_token_id_start
    if attention_mask is not None:
        is_audio = is_audio & attention_mask.bool()

    starts = is_audio.clone()
    starts[:, 1:] &= ~is_audio[:, :-1]
    if position_ids is not None:
        starts[:, 1:] |= is_audio[:, 1:] & (position_ids[:, 1:] - position_ids[:, :-1] != 1)
    run = starts.long().cumsum(-1) - 1  # (batch, length)
    span_ids = run.masked_fill(~is_audio, -1)

    if end_of_prompt_audio_token_id is not None:
        # Mark, per run, whether its last token is followed by the closing token; column 0 takes what is in no run.
        closes = torch.zeros_like(is_audio)
        closes[:, :-1] = is_audio[:, :-1] & (input_ids[:, 1:] == end_of_prompt_audio_token_id)
        is_prompt_run = torch.zeros(
            input_ids.shape[0], input_ids.shape[1] + 1, dtype=torch.long, device=input_ids.device
        )
        is_prompt_run.scatter_add_(1, span_ids + 1, closes.long())
        in_prompt_run = is_prompt_run.gather(1, span_ids + 1) > 0
        span_ids = span_ids.masked_fill(in_prompt_run, -1)
    return span_ids


def draw_noise_levels(
    batch_size: int,
    epsilon: float = 1e-3,
    stratified: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Draw one noise level λ = (1 - ε) t + ε a sample, t ~ U(0, 1).

    With `stratified`, sample k takes its t from a stratum of width 1 / batch of its own (in random order): every λ is
    still uniform, but the batch covers the range evenly.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    time = _uniform((batch_size,), generator, device)
    if stratified:
        order = _uniform((batch_size,), generator, device).argsort()
        time = (order + time) / batch_size
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
    return maskable & (_uniform((1,), generator, maskable.device) >= probability)


def preserve_prefixes(
    maskable: torch.Tensor,
    probability: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Take the spans before a random one out of the maskable tokens (PPM, p_prefix of the paper).

    Per sample with the given probability, one start of a maskable span is chosen uniformly; what lies before it stays
    clean and is not scored.

    Args:
        maskable (`torch.Tensor` of shape `(batch, length)`, bool).

    Returns:
        `torch.Tensor` of shape `(batch, length)`, bool.
    """
    batch_size, length = maskable.shape
    starts = maskable.clone()
    starts[:, 1:] &= ~maskable[:, :-1]
    num_starts = starts.sum(-1)  # (batch,)
    chosen = (_uniform((batch_size,), generator, maskable.device) * num_starts).long()
    preserve = _uniform((batch_size,), generator, maskable.device) < probability
    before_chosen = starts.long().cumsum(-1) <= chosen[:, None]  # (batch, length)
    return maskable & ~(before_chosen & preserve[:, None])


def mask_tokens(
    input_ids: torch.Tensor,
    maskable: torch.Tensor,
    noise_levels: torch.Tensor,
    mask_token_id: int,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Replace each maskable token by the mask token with probability λ of its sample (the forward diffusion process).

    Args:
        input_ids (`torch.Tensor` of shape `(batch, length)`), maskable (the same shape, bool).
        noise_levels (`torch.Tensor` of shape `(batch,)`): λ.
        noise (`torch.Tensor` of shape `(batch, length)`, *optional*): uniform draws to use instead of new ones.

    Returns:
        `tuple`: the noisy ids, and which positions were masked (bool), both `(batch, length)`.
    """
    if noise is None:
        noise = _uniform(tuple(input_ids.shape), generator, input_ids.device)
    masked = maskable & (noise < noise_levels[:, None])
    return input_ids.masked_fill(masked, mask_token_id), masked


def fixed_noise(maskable: torch.Tensor, num_levels: int) -> torch.Tensor:
    """
    Uniform noise that is the same in every call: the i-th maskable token of any row always gets the same draws.

    So a sample's evaluation depends neither on its neighbours nor on padding, and the global random state is untouched.

    Returns:
        `torch.Tensor` of shape `(num_levels, batch, length)`.
    """
    generator = torch.Generator().manual_seed(EVAL_NOISE_SEED)
    table = torch.rand(num_levels, EVAL_NOISE_LENGTH, generator=generator).to(maskable.device)
    rank = (maskable.long().cumsum(-1) - 1).clamp(min=0) % EVAL_NOISE_LENGTH
    return table[:, rank]


def sample_weights(labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """
    How much each sample's loss counts.

    Without `num_items_in_batch` all samples count the same, as published: the batch is averaged. With it (the number of
    labels in all micro-batches of an optimizer step, as the `Trainer` counts it: not -100, first position left out), a
    sample counts by its share of those labels, so that the micro-batches of any sizes add up to the one large batch.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    if num_items_in_batch is None:
        return torch.full((labels.shape[0],), 1.0 / max(labels.shape[0], 1), device=labels.device)
    num_labels = (labels[:, 1:] != IGNORE_INDEX).sum(-1)
    total = torch.as_tensor(num_items_in_batch, device=labels.device, dtype=torch.float32).flatten()[0]
    return num_labels / total.clamp(min=1.0)


def next_token_targets(
    labels: torch.Tensor, scored: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What an autoregressive loss scores: position t predicts the label at t + 1; mean per sample over its own labels.

    Args:
        labels (`torch.Tensor` of shape `(batch, length)`).
        scored (`torch.Tensor` of shape `(batch, length)`, bool): which labels this loss is about, text-side ones say.
        weight (`torch.Tensor` of shape `(batch,)`): what each sample counts, see `sample_weights`.

    Returns:
        `tuple`: targets (-100 where nothing is scored) and weights, both `(batch, length)`.
    """
    targets = F.pad(labels.masked_fill(~scored, IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX)
    num_scored = (targets != IGNORE_INDEX).sum(-1).clamp(min=1)
    return targets, (weight / num_scored)[:, None].expand_as(targets)


def diffusion_targets(
    labels: torch.Tensor,
    masked: torch.Tensor,
    noise_levels: torch.Tensor,
    num_maskable: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What the absorbing-diffusion bound scores: the clean token at each masked position (no shift), weighted by 1 / λ and
    averaged over the sample's maskable tokens (those that prefix preservation left maskable).

    Args:
        labels (`torch.Tensor` of shape `(batch, length)`): clean ids. masked: the same shape, bool.
        noise_levels, num_maskable, weight (`torch.Tensor` of shape `(batch,)`):
            λ, number of maskable tokens and `sample_weights`.

    Returns:
        `tuple`: targets (-100 where nothing is scored) and weights, both `(batch, length)`.
    """
    targets = labels.masked_fill(~masked, IGNORE_INDEX)
    return targets, (weight / (noise_levels * num_maskable.clamp(min=1)))[:, None].expand_as(targets)


def weighted_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Sum of weighted cross-entropies, in float32. Zero, with a zero gradient, where nothing is scored.

    Args:
        logits (`torch.Tensor` of shape `(scored, vocab)`), targets and weights (`(scored,)`).
    """
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def _uniform(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str | None
) -> torch.Tensor:
    """U[0, 1) draws; a generator draws on its own device, so that a CPU generator gives the same noise everywhere."""
    if generator is None:
        return torch.rand(shape, device=device)
    return torch.rand(shape, generator=generator, device=generator.device).to(device)


__all__ = [
    "compute_span_ids",
    "diffusion_targets",
    "draw_noise_levels",
    "drop_for_clean_batch",
    "fixed_noise",
    "mask_tokens",
    "next_token_targets",
    "preserve_prefixes",
    "sample_weights",
    "weighted_cross_entropy",
]
