"""Samples and blocks: what is cut, filled and copied, on cases small enough to read, padded and packed alike."""

import pytest
import torch

from modeling_ttt.samples_ttt import (
    Blocks,
    Layout,
    Samples,
    choose_blocks,
    copy_blocks,
    cut_after_blocks,
    draw_block_lengths,
    find_blocks,
    find_sample_starts,
    number_blocks,
)

END, LAST = 90, 91  # end tokens of spans; what is below 50 is text
PADDED = torch.tensor(
    [
        # text, a span of 3 + end, text, a span of 5 + end, text
        [1, 60, 61, 62, END, 2, 63, 64, 65, 66, 67, LAST, 3],
        # a span that was cut off after 5 codes, and padding
        [4, 5, 70, 71, 72, 73, 74, 0, 0, 0, 0, 0, 0],
    ]
)
IS_TOKEN = torch.tensor([[1] * 13, [1] * 7 + [0] * 6]).bool()
POSITIONS = torch.tensor([[*range(13), *range(7)]])
PACKED = torch.cat([PADDED[:1], PADDED[1:, :7]], 1)


def parts(ids: torch.Tensor, position_ids: torch.Tensor | None = None, lengths=(4, 4)) -> tuple[Blocks, Samples]:
    labels = torch.where(ids > 0, ids, -100)
    samples = Samples.from_starts(find_sample_starts(labels, position_ids), labels)
    lengths, diffused = torch.tensor(lengths), ids >= 50
    numbers = number_blocks(diffused, samples, lengths)
    return find_blocks(ids, numbers, diffused, lengths[samples.ids], [END, LAST]), samples


def test_blocks_are_counted_from_the_start_of_each_span_and_filled_where_it_ends():
    blocks, _ = parts(PADDED)
    assert blocks.ids[0].tolist() == [-1, 0, 0, 0, 0, -1, 1, 1, 1, 1, 2, 2, -1]
    # Of the span that was cut off only the full block counts: no sampler shows the rest.
    assert blocks.ids[1, :7].tolist() == [-1, -1, 3, 3, 3, 3, -1]
    assert blocks.count == 4
    assert blocks.fillings.nonzero().tolist() == [[0, 11]] and blocks.fillings[0, 11] == 2
    assert blocks.starts.sum() == 4


def test_packed_samples_have_the_blocks_of_padded_ones():
    blocks, _ = parts(PACKED, POSITIONS)
    padded, _ = parts(PADDED)
    assert blocks.ids[0].tolist() == [*padded.ids[0].tolist(), *padded.ids[1, :7].tolist()]
    assert blocks.fillings[0].tolist() == [*padded.fillings[0].tolist(), *padded.fillings[1, :7].tolist()]


def test_samples_may_have_blocks_of_different_lengths():
    blocks, _ = parts(PADDED, lengths=(3, 5))
    assert blocks.ids[0].tolist() == [-1, 0, 0, 0, 1, -1, 2, 2, 2, 3, 3, 3, -1]
    assert blocks.fillings[0].tolist() == [0, 0, 0, 0, 2, *[0] * 8]
    assert blocks.ids[1, :7].tolist() == [-1, -1, 4, 4, 4, 4, 4]


def test_spans_of_two_packed_samples_that_touch_are_two():
    ids, positions = torch.tensor([[60, 61, 62, 63]]), torch.tensor([[0, 1, 0, 1]])
    blocks, _ = parts(ids, positions, lengths=(2, 2))
    assert blocks.ids.tolist() == [[0, 0, 1, 1]]


def test_a_sample_is_cut_after_its_block_which_is_filled_up():
    blocks, samples = parts(PADDED)
    layout = cut_after_blocks(blocks.ids == 2, blocks, samples, IS_TOKEN)
    assert layout.take(PADDED, 0)[0].tolist() == [1, 60, 61, 62, END, 2, 63, 64, 65, 66, 67, LAST, LAST, LAST]
    assert layout.copies[0].tolist() == [0] * 12 + [1, 2]
    assert layout.take(PADDED, 0)[1].tolist() == [4, 5, 70, 71, 72, 73, 74, *[0] * 7]  # nothing chosen: whole

    layout = cut_after_blocks((blocks.ids == 0) | (blocks.ids == 3), blocks, samples, IS_TOKEN)
    assert layout.take(PADDED, 0).tolist() == [[1, 60, 61, 62, END, 0], [4, 5, 70, 71, 72, 73]]
    assert layout.is_token.tolist() == [[True] * 5 + [False], [True] * 6]


def test_a_cut_in_a_packed_row_leaves_the_other_samples_as_they_are():
    blocks, samples = parts(PACKED, POSITIONS)
    layout = cut_after_blocks(blocks.ids == 2, blocks, samples, torch.ones_like(PACKED, dtype=torch.bool))
    expected = [1, 60, 61, 62, END, 2, 63, 64, 65, 66, 67, LAST, LAST, LAST, 4, 5, 70, 71, 72, 73, 74]
    assert layout.take(PACKED, 0)[0].tolist() == expected
    assert (layout.take(POSITIONS, 0) + layout.copies)[0].tolist() == [*range(14), *range(7)]


def test_padding_on_the_left_is_left_out():
    ids = torch.tensor([[0, 0, 1, 60, 61, END], [1, 60, 61, 62, 63, END]])
    blocks, samples = parts(ids, lengths=(2, 2))
    layout = cut_after_blocks(torch.zeros_like(ids, dtype=torch.bool), blocks, samples, ids > 0)
    assert layout.take(ids, 0).tolist() == [[1, 60, 61, END, 0, 0], [1, 60, 61, 62, 63, END]]


def test_copies_hold_every_block_full():
    blocks, _ = parts(PADDED)
    layout = copy_blocks(blocks)
    assert layout.take(PADDED, 0).tolist() == [
        [60, 61, 62, END, 63, 64, 65, 66, 67, LAST, LAST, LAST],
        [70, 71, 72, 73, *[0] * 8],
    ]


def test_every_block_of_a_sample_is_chosen_alike_and_only_as_often_as_asked():
    blocks, samples = parts(PADDED)
    generator = torch.Generator().manual_seed(0)
    chosen = [choose_blocks(blocks, samples, 0.5, generator) for _ in range(2000)]
    of_first = [set(blocks.ids[0][c[0]].tolist()) for c in chosen]
    assert all(len(ids) <= 1 for ids in of_first)
    shares = [sum(ids == {block} for ids in of_first) / 2000 for block in range(3)]
    assert shares == pytest.approx([1 / 6] * 3, abs=0.03)
    assert not choose_blocks(blocks, samples, 0.0, generator).any()


def test_nothing_is_chosen_where_there_is_no_block():
    blocks, samples = parts(torch.tensor([[1, 2, 3]]), lengths=(4,))
    assert blocks.count == 0 and not choose_blocks(blocks, samples, 1.0).any()
    assert copy_blocks(blocks).is_token.sum() == 0


def test_block_lengths_are_drawn_from_the_choices():
    lengths = draw_block_lengths([4, 13, 26], 3000, torch.Generator().manual_seed(0), "cpu")
    assert lengths.unique().tolist() == [4, 13, 26]
    assert [(lengths == n).float().mean().item() for n in (4, 13, 26)] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_a_layout_writes_each_token_as_often_as_told():
    layout = Layout.from_counts(torch.tensor([[1, 0, 3], [2, 1, 0]]))
    assert layout.sources.tolist() == [[0, 2, 2, 2], [0, 0, 1, 0]]
    assert layout.copies.tolist() == [[0, 0, 1, 2], [0, 1, 0, 0]]
    assert layout.is_token.tolist() == [[True] * 4, [True] * 3 + [False]]
