"""Pure functions of the audio sampler: guidance, drawing codes, confidence, which positions a step fixes."""

import torch


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Classifier-free guidance as the published sampler writes it: u + (scale + 1) * (c - u). Any shape; scale 0 is c.
    """
    return unconditional + (scale + 1) * (conditional - unconditional)


def split_evenly(positions: int, steps: int) -> list[int]:
    """How many positions each step fixes: an even split, earlier steps taking the remainder, without idle steps."""
    share, remainder = divmod(positions, steps)
    return [share + (step < remainder) for step in range(min(positions, steps))]


def keep_probable(logits: torch.Tensor, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """
    Sets all but the `top_k` most probable tokens, then all but the smallest set of most probable tokens whose
    probabilities sum to at least `top_p`, to -inf. logits: (..., vocab).
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
    One token per position, (..., vocab) -> (...). Without noise the most probable one; with noise, of the same shape
    and drawn from Exp(1), a sample of softmax(logits): the token whose exponential clock of rate p rings first.
    """
    return (logits if noise is None else logits - noise.log()).argmax(dim=-1)


def confidence_of(logits: torch.Tensor, tokens: torch.Tensor, rule: str) -> torch.Tensor:
    """
    Confidence in (0, 1] of each position: the probability of `tokens` under softmax(logits) for "low_confidence",
    exp(-entropy) of the distribution for "entropy" (the order of the lowest entropy, on the scale of a probability).

    Taken in float64 where the device has it: near-certain positions differ only in the last digits, and their order
    must not depend on the batch they are computed in. logits: (..., vocab), tokens: (...).
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    log_probabilities = logits.to(wide).log_softmax(dim=-1)
    if rule == "low_confidence":
        return log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()
    if rule == "entropy":
        return (log_probabilities.exp() * log_probabilities.clamp(min=torch.finfo(wide).min)).sum(dim=-1).exp()
    raise ValueError(f"no confidence is defined for the remasking rule {rule!r}")


def choose_positions(
    confidence: torch.Tensor, undecided: torch.Tensor, count: torch.Tensor, threshold: float | None = None
) -> torch.Tensor:
    """
    Which undecided positions this step fixes: the `count` most confident ones of each row (ties: the earlier position)
    and, with a threshold, every one whose confidence reaches it. confidence, undecided: (rows, block); count: (rows,);
    returns bool (rows, block).
    """
    confidence = confidence.masked_fill(~undecided, -1.0)
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    chosen = rank < count[:, None]
    if threshold is not None:
        chosen = chosen | (confidence >= threshold)
    return chosen & undecided


__all__ = ["choose_positions", "confidence_of", "draw", "guide", "keep_probable", "split_evenly"]
