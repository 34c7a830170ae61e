"""Which tokens of a training batch belong together: samples, and blocks of audio spans. A sample can be cut after one
of its blocks (block-aligned masking), or all blocks be copied (block-causal spans). Noise and loss are in
objective_ttt.py, attention in attention_ttt.py.

Sampling writes a span block by block: a block of masks stands behind what is final, and nothing stands behind it. Where
a span ends within a block, the sampler drops the rest of the block, so in training the rest is filled with the span's
end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention_ttt import NO_SPAN

IGNORE_INDEX = -100
NO_PIECE = -1


def find_sample_starts(labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """
    Find where a sample starts: at each row's first token and, in packed rows, wherever the positions do not go on by
    one (as `transformers.masking_utils` finds packed sequences).

    Args:
        labels (`torch.Tensor` of shape `(batch, length)`).
        position_ids (`torch.Tensor` of shape `(batch or 1, length)`, *optional*): only of rows without padding mask.

    Returns:
        `torch.Tensor` of shape `(batch, length)`, bool.
    """
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if position_ids is not None:
        starts[:, 1:] |= position_ids.diff(dim=-1) != 1
    return starts


@dataclass(frozen=True)
class Samples:
    """
    Which sample each token belongs to.

    Samples are numbered in order of appearance, row by row; those without labels (an example that is all prompt, the
    filling of a packed row) are none, and their tokens carry the number of a neighbour, which nothing there reads.

    Args:
        ids (`torch.Tensor` of shape `(batch, length)`): never decreasing when read row by row.
        count (`int`): number of samples, at least 1.
    """

    ids: torch.Tensor
    count: int

    @classmethod
    def from_starts(cls, starts: torch.Tensor, labels: torch.Tensor) -> "Samples":
        """From `find_sample_starts` and the labels, both `(batch, length)`."""
        pieces = starts.flatten().long().cumsum(0) - 1  # (batch * length,)
        num_labels = torch.zeros_like(pieces).index_add_(0, pieces, (labels != IGNORE_INDEX).flatten().long())
        numbers = (num_labels > 0).long().cumsum(0)  # of each piece, counted from 1
        return cls((numbers[pieces] - 1).clamp(min=0).view_as(labels), max(int(numbers[-1]), 1))

    def total(self, flags: torch.Tensor) -> torch.Tensor:
        """Count the flagged tokens of each sample: (batch, length) to (count,), long."""
        totals = torch.zeros(self.count, dtype=torch.long, device=flags.device)
        return totals.index_add_(0, self.ids.flatten(), flags.flatten().long())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum up `values` of shape `(batch, length)` over the tokens of each sample, `(count,)`, float32."""
        sums = torch.zeros(self.count, device=values.device)
        return sums.index_add_(0, self.ids.flatten(), values.flatten().float())

    def running_total(self, flags: torch.Tensor) -> torch.Tensor:
        """Count the flagged tokens of the sample up to and including each one, (batch, length), long."""
        before = self.total(flags).cumsum(0) - self.total(flags)  # in earlier samples
        return flags.flatten().long().cumsum(0).view_as(flags) - before[self.ids]


def draw_uniform(number: int, generator: torch.Generator | None, device: torch.device | str | None) -> torch.Tensor:
    """Draw from U[0, 1), on the generator's own device, so that a CPU generator gives the same noise everywhere."""
    if generator is None:
        return torch.rand(number, device=device)
    return torch.rand(number, generator=generator, device=generator.device).to(device)


@dataclass(frozen=True)
class Batch:
    """
    Clean tokens as a forward takes them.

    Args:
        input_ids, labels (`torch.LongTensor` of shape `(batch, length)`): labels are -100 where nothing is scored and
            at the first token of each sample.
        is_audio (`torch.BoolTensor` of shape `(batch, length)`): audio-side labels.
        diffused (`torch.BoolTensor` of shape `(batch, length)`): labels that are absorbed and predicted in place.
        samples ([`Samples`]): which sample each token belongs to.
        pieces (`torch.LongTensor` of shape `(batch, length)`): numbers of the sequences packed into each row, whether
            they have labels or not; -1 for padding.
        position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): of packed rows, and where the caller
            gave them.
        attention_mask (`torch.Tensor`, *optional*): as the caller gave it.
        span_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): see attention_ttt.py.
        limits (`torch.LongTensor` of shape `(batch, length)`, *optional*): where rows hold noisy copies behind clean
            tokens, see `attention_ttt.create_copies_mask`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    is_audio: torch.Tensor
    diffused: torch.Tensor
    samples: Samples
    pieces: torch.Tensor
    position_ids: torch.Tensor | None = None
    attention_mask: Any = None
    span_ids: torch.Tensor | None = None
    limits: torch.Tensor | None = None


@dataclass(frozen=True)
class Blocks:
    """
    The blocks that are diffused, or of which a part is.

    Args:
        ids (`torch.LongTensor` of shape `(batch, length)`): number of each token's block, counted through the batch; -1
            outside, and in the rest of a span that was cut off without an end token: no sampler shows such a block.
        starts (`torch.BoolTensor` of shape `(batch, length)`): the first token of each block.
        fillings (`torch.LongTensor` of shape `(batch, length)`): how many end tokens are missing behind this one until
            the block is full; above 0 at the end token of a span only.
        count (`int`): number of blocks.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    fillings: torch.Tensor
    count: int


def number_blocks(diffused: torch.Tensor, samples: Samples, lengths: torch.Tensor) -> torch.Tensor:
    """
    Number the blocks of what is diffused, counted from the start of each maximal run of it in one sample.

    Args:
        diffused (`torch.BoolTensor` of shape `(batch, length)`).
        lengths (`torch.LongTensor` of shape `(samples,)`): tokens of a block, for each sample.

    Returns:
        `torch.LongTensor` of shape `(batch, length)`: 0, 1, ... in the blocks of a row, -1 outside.
    """
    first = diffused.clone()
    first[:, 1:] &= ~(diffused[:, :-1] & (samples.ids[:, 1:] == samples.ids[:, :-1]))
    starts = diffused & (_count_from(first) % lengths[samples.ids] == 0)
    return (starts.long().cumsum(-1) - 1).masked_fill(~diffused, NO_SPAN)


def find_blocks(
    input_ids: torch.Tensor,
    numbers: torch.Tensor,
    diffused: torch.Tensor,
    lengths: torch.Tensor,
    end_token_ids: Sequence[int],
    end_of_prompt_audio_token_id: int | None = None,
) -> Blocks:
    """
    Find the blocks that hold something diffused. What else stands in such a block, as the codes of a span that the
    prompt begins, belongs to it.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`): clean ids.
        numbers (`torch.LongTensor` of shape `(batch, length)`): of the blocks of each row, -1 outside.
        diffused (`torch.BoolTensor` of shape `(batch, length)`).
        lengths (`torch.LongTensor` of shape `(batch, length)`): tokens of a block, where each token stands.
        end_token_ids (`list[int]`): the tokens that end a span.
        end_of_prompt_audio_token_id (`int`, *optional*): the text token behind a user's audio, which is one block.

    Returns:
        [`Blocks`].
    """
    inside = numbers >= 0
    starts, last = inside.clone(), inside.clone()  # tokens of their blocks
    starts[:, 1:] &= numbers[:, 1:] != numbers[:, :-1]
    last[:, :-1] &= numbers[:, 1:] != numbers[:, :-1]
    place = _count_from(starts)  # in the block
    ends = last & torch.isin(input_ids, torch.tensor(end_token_ids, device=input_ids.device))
    is_whole = ends | (inside & (place == lengths - 1))  # is full, or will be filled
    if end_of_prompt_audio_token_id is not None:
        is_whole[:, :-1] |= last[:, :-1] & (input_ids[:, 1:] == end_of_prompt_audio_token_id)
    number = (starts.flatten().long().cumsum(0) - 1).view_as(input_ids).clamp(min=0)  # in the batch
    closed, wanted = torch.zeros(2, max(int(starts.sum()), 1), dtype=torch.bool, device=input_ids.device)
    closed[number[is_whole]] = True
    wanted[number[inside & diffused]] = True
    kept = closed & wanted

    inside = inside & kept[number]
    return Blocks(
        ids=torch.where(inside, (kept.long().cumsum(0) - 1)[number], NO_SPAN),
        starts=starts & inside,
        fillings=torch.where(ends & inside, (lengths - 1 - place).clamp(min=0), 0),
        count=int(kept.sum()),
    )


def _count_from(starts: torch.Tensor) -> torch.Tensor:
    """How many tokens each one stands behind the last start up to it, (batch, length)."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return index - (index * starts).cummax(-1).values


@dataclass(frozen=True)
class Layout:
    """
    Where the tokens of a batch come to stand in another one.

    Args:
        sources (`torch.LongTensor` of shape `(batch, width)`): the column each token comes from; 0 in the padding.
        copies (`torch.LongTensor` of shape `(batch, width)`): 0 for a token itself, 1, 2, ... for its further copies.
        is_token (`torch.BoolTensor` of shape `(batch, width)`): False in the padding, which is on the right.
    """

    sources: torch.Tensor
    copies: torch.Tensor
    is_token: torch.Tensor

    @classmethod
    def from_counts(cls, counts: torch.Tensor) -> "Layout":
        """Write each token as often as `counts`, `torch.LongTensor` of shape `(batch, length)`, says, in order."""
        rows, length = counts.shape
        source = torch.repeat_interleave(counts.flatten())  # (tokens,), an index into the flat batch
        index = torch.arange(len(source), device=counts.device)
        of_token, of_row = counts.flatten(), counts.sum(-1)
        copy = index - (of_token.cumsum(0) - of_token)[source]
        place = source // length, index - (of_row.cumsum(0) - of_row)[source // length]
        shape = rows, max(int(of_row.max()), 1)
        sources, copies = (counts.new_zeros(shape).index_put(place, values) for values in (source % length, copy))
        is_token = torch.zeros(shape, dtype=torch.bool, device=counts.device)
        is_token[place] = True
        return cls(sources, copies, is_token)

    def take(self, values: torch.Tensor, padding: int | float | bool) -> torch.Tensor:
        """Lay out `values` of shape `(batch, length)`, with `padding` behind them: shape `(batch, width)`."""
        return values.gather(1, self.sources).masked_fill(~self.is_token, padding)


def draw_block_lengths(
    choices: Sequence[int], num_samples: int, generator: torch.Generator | None, device: torch.device | str | None
) -> torch.Tensor:
    """Draw a block length for each sample, all of `choices` alike: `torch.LongTensor` of shape `(samples,)`."""
    chosen = (draw_uniform(num_samples, generator, device) * len(choices)).long()
    return torch.tensor(choices, device=chosen.device)[chosen]


def choose_blocks(
    blocks: Blocks, samples: Samples, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Choose one block of each sample uniformly, with the given probability; none where a sample has none.

    Returns:
        `torch.BoolTensor` of shape `(batch, length)`: the tokens of the chosen blocks.
    """
    device = blocks.ids.device
    is_cut = draw_uniform(samples.count, generator, device) < probability
    chosen = (draw_uniform(samples.count, generator, device) * samples.total(blocks.starts)).long()
    rank = samples.running_total(blocks.starts) - 1
    return (blocks.ids >= 0) & (rank == chosen[samples.ids]) & is_cut[samples.ids]


def cut_after_blocks(chosen: torch.Tensor, blocks: Blocks, samples: Samples, is_token: torch.Tensor) -> Layout:
    """
    Cut samples after their chosen block, which is filled up; other samples stay whole.

    Args:
        chosen (`torch.BoolTensor` of shape `(batch, length)`): from `choose_blocks`.
        is_token (`torch.BoolTensor` of shape `(batch, length)`): False for padding, which is left out.

    Returns:
        [`Layout`].
    """
    behind = ~chosen & (samples.running_total(chosen) > 0)
    return Layout.from_counts((is_token & ~behind) * (1 + blocks.fillings * chosen))


def copy_blocks(blocks: Blocks) -> Layout:
    """Lay out all blocks, each filled up, one behind the other."""
    return Layout.from_counts((blocks.ids >= 0) * (1 + blocks.fillings))


__all__ = [
    "Batch",
    "Blocks",
    "Layout",
    "Samples",
    "choose_blocks",
    "copy_blocks",
    "cut_after_blocks",
    "draw_block_lengths",
    "draw_uniform",
    "find_blocks",
    "find_sample_starts",
    "number_blocks",
]
