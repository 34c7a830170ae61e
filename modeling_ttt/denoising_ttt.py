"""One denoising step as pure functions: guidance, drawing tokens, confidence, which positions the step fixes.

Which forwards give the logits, and what becomes of the tokens, is in decoding_ttt.py and response_diffusion_ttt.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def denoise(
    logits: torch.Tensor,
    undecided: torch.Tensor,
    sizes: Sequence[int],
    steps_done: Sequence[int],
    options: Any,
    generators: Sequence[torch.Generator | None],
    forbidden: Sequence[int] = (),
    unconditional: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Do one denoising step of each row's block: guide, draw, rate, choose.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, block, candidates)`): of the masked block, float32.
        undecided (`torch.BoolTensor` of shape `(rows, block)`): positions that are still masked.
        sizes, steps_done (`list[int]`): of each row, positions of its own block, which comes first in `block`, and the
            steps that it has had.
        options ([`TttGenerationConfig`]): the `audio_...` ones act here, but for the block size.
        generators (`list[torch.Generator]`): of each row, see `make_generators`; `None` where nothing is drawn.
        forbidden (`list[int]`): candidates that are never taken.
        unconditional (`torch.FloatTensor` of the shape of `logits`, *optional*): logits to be guided away from.

    Returns:
        `tuple`: the token of every position, an index into the candidates, and which positions stay fixed (bool), both
        of shape `(rows, block)`.
    """
    if unconditional is not None:
        logits = guide(logits, unconditional, options.audio_guidance_scale)
    if forbidden:
        logits[..., list(forbidden)] = -torch.inf

    noise, drawn_from = None, logits
    if options.audio_temperature > 0:
        scaled = keep_probable(logits / options.audio_temperature, options.audio_top_k, options.audio_top_p)
        drawn_from = scaled.log_softmax(dim=-1)
        shapes = [(size, logits.shape[-1]) for size in sizes]
        noise = _stack([exponential(shape, own) for shape, own in zip(shapes, generators, strict=True)], logits, 1.0)
    tokens = draw(drawn_from, noise)  # (rows, block)

    if options.audio_remasking == "random":
        draws = [
            torch.rand(size, generator=own, device=logits.device) for size, own in zip(sizes, generators, strict=True)
        ]
        confidence = _stack(draws, logits, 0.0)
    else:
        confidence = confidence_of(logits, tokens, options.audio_remasking)

    if options.audio_prefix_probability is not None:
        return tokens, choose_prefix(confidence, undecided, options.audio_prefix_probability)
    threshold = options.audio_confidence_threshold
    shares = [split_evenly(size, options.audio_steps_per_block) for size in sizes]
    counts = [
        1 if threshold is not None or done >= len(share) else share[done]
        for share, done in zip(shares, steps_done, strict=True)
    ]
    count = torch.tensor(counts, device=logits.device)
    return tokens, choose_positions(confidence, undecided, count, threshold, options.audio_order_bias)


def make_generators(options: Any, num_rows: int, device: torch.device) -> list[torch.Generator | None]:
    """
    Return the source of each row's noise, so that no row's noise depends on its neighbours: seeded with `options.seed`
    plus the row's number, or with the row's own seed of a list; without a seed, from torch's global generator. `None`
    where nothing is drawn.

    Raises:
        ValueError: if `options.seed` lists another number of seeds than there are rows.
    """
    seed = options.seed
    if isinstance(seed, list | tuple) and len(seed) != num_rows:
        raise ValueError(f"`seed` names {len(seed)} seeds for {num_rows} rows; give one per row, or one integer.")
    if not (options.do_sample or options.audio_temperature > 0 or options.audio_remasking == "random"):
        return [None] * num_rows
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    seeds = seed if isinstance(seed, list | tuple) else [seed + row for row in range(num_rows)]
    return [torch.Generator(device).manual_seed(row_seed) for row_seed in seeds]


def exponential(shape: Sequence[int], generator: torch.Generator | None) -> torch.Tensor:
    """Return Exp(1) draws on the generator's device, never 0."""
    device = None if generator is None else generator.device
    noise = torch.empty(*shape, device=device).exponential_(generator=generator)
    return noise.clamp_(min=torch.finfo(noise.dtype).tiny)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Return classifier-free guidance as the published sampler writes it: u + (scale + 1) * (c - u). Any shape; scale 0 is
    c.
    """
    return unconditional + (scale + 1) * (conditional - unconditional)


def split_evenly(positions: int, steps: int) -> list[int]:
    """Split positions evenly over steps, earlier steps taking the remainder, without idle steps: one number a step."""
    share, remainder = divmod(positions, steps)
    return [share + (step < remainder) for step in range(min(positions, steps))]


def keep_probable(logits: torch.Tensor, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """
    Set all but the `top_k` most probable tokens, then all but the smallest set of most probable tokens whose
    probabilities sum to at least `top_p`, to -inf.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab)`).
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        drop = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def draw(logits: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """
    Take one token per position, `(..., vocab)` to `(...)`: without noise the most probable one; with noise, of the same
    shape and drawn from Exp(1), a sample of softmax(logits): the token whose exponential clock of rate p rings first.
    """
    return (logits if noise is None else logits - noise.log()).argmax(dim=-1)


def confidence_of(logits: torch.Tensor, tokens: torch.Tensor, rule: str) -> torch.Tensor:
    """
    Return the confidence in (0, 1] of each position: the probability of `tokens` under softmax(logits) for the rule
    "low_confidence", exp(-entropy) of the distribution for "entropy" (the order of the lowest entropy, on the scale of
    a probability).

    Taken in float64 where the device has it: near-certain positions differ only in the last digits, and their order
    must not depend on the batch they are computed in.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab)`), tokens (`torch.LongTensor` of shape `(...)`).

    Returns:
        `torch.FloatTensor` of shape `(...)`.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    log_probabilities = logits.to(wide).log_softmax(dim=-1)
    if rule == "low_confidence":
        return log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()
    if rule == "entropy":
        return (log_probabilities.exp() * log_probabilities.clamp(min=torch.finfo(wide).min)).sum(dim=-1).exp()
    raise ValueError(f"no confidence is defined for the remasking rule {rule!r}")


def choose_positions(
    confidence: torch.Tensor,
    undecided: torch.Tensor,
    count: torch.Tensor,
    threshold: float | None = None,
    order_bias: float = 0.0,
) -> torch.Tensor:
    """
    Choose which undecided positions this step fixes: the `count` most confident ones of each row (ties: the earlier
    position) and, with a threshold, every one whose confidence reaches it. `order_bias` is taken off the confidence in
    the first choice, once for every position that stands before, so that earlier positions come first.

    Args:
        confidence, undecided (`torch.Tensor` of shape `(rows, block)`), count (`torch.LongTensor` of shape `(rows,)`).

    Returns:
        `torch.BoolTensor` of shape `(rows, block)`.
    """
    places = torch.arange(confidence.shape[-1], device=confidence.device).expand_as(confidence)
    bias = min(order_bias, 2.0)  # confidences differ by less than 1, so that from there on it is the order alone
    preference = (confidence - bias * places).masked_fill(~undecided, -torch.inf)
    order = preference.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    chosen = rank < count[:, None]
    if threshold is not None:
        chosen = chosen | (confidence >= threshold)
    return chosen & undecided


def choose_prefix(confidence: torch.Tensor, undecided: torch.Tensor, probability: float) -> torch.Tensor:
    """
    Choose the first undecided position of each row and those after it for as long as the product of the confidences,
    its own included, is at least `probability`.

    Args:
        confidence, undecided (`torch.Tensor` of shape `(rows, block)`).

    Returns:
        `torch.BoolTensor` of shape `(rows, block)`.
    """
    joint = confidence.masked_fill(~undecided, 1.0).cumprod(dim=-1)
    first = undecided.cumsum(dim=-1) == 1
    return undecided & (first | (joint >= probability))


def _stack(rows: list[torch.Tensor], like: torch.Tensor, filling: float) -> torch.Tensor:
    """Stack what rows with blocks of different sizes have drawn, as wide as the widest block."""
    return pad_sequence(rows, batch_first=True, padding_value=filling).to(like.device)


__all__ = [
    "choose_positions",
    "choose_prefix",
    "confidence_of",
    "denoise",
    "draw",
    "exponential",
    "guide",
    "keep_probable",
    "make_generators",
    "split_evenly",
]
