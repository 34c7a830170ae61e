"""Training batches: right padding, labels, and stochastic span truncation by the published rule."""

from itertools import pairwise

import pytest
import torch

from processing import TttDataCollator, TttTokenIds, interleave

IDS = TttTokenIds(
    audio_token_id_start=100,
    audio_code_id_start=101,
    num_audio_codes=40,
    mask_token_id=141,
    begin_of_audio_token_id=90,
    end_of_prompt_audio_token_id=91,
    begin_of_last_audio_token_id=92,
    end_of_audio_token_id=142,
    end_of_last_audio_token_id=143,
    end_of_turn_token_id=93,
)
PROMPT = [1, 2, 90, 105, 106, 91, 3]


def example(num_text=3, num_codes=20):
    response = interleave([5] * num_text, [number % 40 for number in range(num_codes)], IDS, end_of_turn=True)
    return {"input_ids": PROMPT + response, "labels": [-100] * len(PROMPT) + response}


def collator(**options):
    return TttDataCollator(IDS, **{"pad_token_id": 0, **options})


def epochs(make, rows, number):
    """The batch that the collator makes of the rows in each of the first epochs."""
    for epoch in range(number):
        make.set_epoch(epoch)
        yield make(rows)


def test_rows_are_padded_on_the_right_to_a_multiple():
    rows = [example(3, 4), example(3, 9)]
    batch = collator(span_truncation_probability=0.0, pad_to_multiple_of=16)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (2, 32)
    for row, source in enumerate(rows):
        length = len(source["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == source["input_ids"]
        assert batch["labels"][row, :length].tolist() == source["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (32 - length)
        assert (batch["labels"][row, length:] == -100).all() and (batch["input_ids"][row, length:] == 0).all()


def test_tensors_and_prompt_length_give_the_same_batch_as_lists_and_labels():
    make = collator(training=False)
    source = example()
    other = {"input_ids": torch.tensor(source["input_ids"]), "prompt_length": len(PROMPT), "length": 99}
    for name, tensor in make([source]).items():
        assert torch.equal(make([other])[name], tensor)


def test_truncation_cuts_the_last_span_with_its_end_and_everything_after():
    num_codes = 60
    whole = example(3, num_codes)
    start = whole["input_ids"].index(92) + 1
    kept = set()
    make = collator(span_truncation_probability=1.0, pad_to_multiple_of=1)
    for batch in epochs(make, [whole], 400):
        length = batch["input_ids"].shape[1]
        assert batch["input_ids"][0].tolist() == whole["input_ids"][:length]
        assert batch["labels"][0].tolist() == whole["labels"][:length]
        assert 143 not in batch["input_ids"] and 93 not in batch["input_ids"]
        kept.add(length - start)
    assert kept == set(range(18, 55))


def test_truncation_leaves_spans_between_text_alone():
    whole = example(40, 100)
    first_spans = whole["input_ids"][: whole["input_ids"].index(92)]
    batch = collator(span_truncation_probability=1.0, pad_to_multiple_of=1)([whole])
    assert batch["input_ids"][0, : len(first_spans)].tolist() == first_spans
    assert batch["input_ids"].shape[1] < len(whole["input_ids"])


def test_truncation_happens_with_the_given_probability():
    make = collator(span_truncation_probability=0.5, pad_to_multiple_of=1)
    whole = example(3, 60)
    cut = sum(batch["input_ids"].shape[1] < len(whole["input_ids"]) for batch in epochs(make, [whole], 1000))
    assert 440 < cut < 560


@pytest.mark.parametrize("source", [example(3, 10), example(3, 0)])
def test_short_spans_and_answers_without_speech_stay_whole(source):
    batch = collator(span_truncation_probability=1.0, pad_to_multiple_of=1)([source])
    assert batch["input_ids"][0].tolist() == source["input_ids"]


def test_a_span_that_belongs_to_the_prompt_is_never_cut():
    history = example(3, 60)["input_ids"]
    source = {"input_ids": history + [7, 8, 93], "prompt_length": len(history)}
    batch = collator(span_truncation_probability=1.0, pad_to_multiple_of=1)([source])
    assert batch["input_ids"][0].tolist() == source["input_ids"]


def test_truncation_is_off_in_evaluation_and_for_exempt_examples():
    make = collator(span_truncation_probability=1.0, pad_to_multiple_of=1)
    whole = example(3, 60)
    assert make.eval()([whole])["input_ids"].shape[1] == len(whole["input_ids"])
    for exempt in ("span_truncation", "training"):
        assert make([{**whole, exempt: False}])["input_ids"].shape[1] == len(whole["input_ids"])
    assert make([whole])["input_ids"].shape[1] < len(whole["input_ids"])


def test_truncation_depends_on_seed_epoch_and_batch_alone():
    """So a run that was resumed, or that has other workers, sees the batches it would have seen."""
    rows = [example(3, 60)] * 8

    def lengths(rows, epoch=0, **options):
        make = collator(**options)
        make.set_epoch(epoch)
        return make(rows)["attention_mask"].sum(1).tolist()

    expected = lengths(rows)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert lengths(rows) == expected and len(set(expected)) > 1
    assert torch.equal(torch.get_rng_state(), state)
    assert lengths(rows, seed=1) != expected != lengths(rows, epoch=1)
    assert lengths([*rows, example(3, 61)])[:8] != expected


def test_the_first_token_of_an_example_is_never_scored():
    ids = [5, 6, 7]
    assert collator(pad_to_multiple_of=1)([{"input_ids": ids, "labels": ids}])["labels"].tolist() == [[-100, 6, 7]]
    assert collator(pad_to_multiple_of=1)([{"input_ids": ids, "prompt_length": 0}])["labels"].tolist() == [[-100, 6, 7]]


def pieces(batch):
    """The sequences of a packed batch, without the filling: (ids, labels) as sorted lists."""
    found = []
    rows = (batch[name].tolist() for name in ("input_ids", "labels", "position_ids"))
    for ids, labels, positions in zip(*rows, strict=True):
        starts = [column for column, position in enumerate(positions) if position == 0]
        for start, stop in pairwise([*starts, len(ids)]):
            assert positions[start:stop] == list(range(stop - start))
            found.append((ids[start:stop], labels[start:stop]))
    return sorted(piece for piece in found if any(label != -100 for label in piece[1]))


def test_packing_keeps_every_example_whole_in_few_full_rows():
    rows = [example(3, number) for number in (1, 40, 2, 3, 44, 12, 25, 5)]
    lengths = [len(row["input_ids"]) for row in rows]
    batch = collator(packing=True, max_length=64, training=True, span_truncation_probability=0.0)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert pieces(batch) == sorted((row["input_ids"], row["labels"]) for row in rows)
    assert batch["input_ids"].shape == (-(-sum(lengths) // 64), 64)


def test_packing_truncates_as_padding_does():
    rows = [example(3, 60)] * 4
    padded = collator()(rows)
    packed = collator(packing=True, max_length=256)(rows)
    kept = sorted(len(ids) for ids, _ in pieces(packed))
    assert kept == sorted(padded["attention_mask"].sum(1).tolist())


def test_examples_of_an_evaluation_are_never_packed():
    rows = [example(3, 12), example(3, 20), example(3, 1)]
    make = collator(packing=True, max_length=256, span_truncation_probability=1.0, pad_to_multiple_of=1)
    for batch in (make.eval()(rows), make([{**row, "training": False} for row in rows])):
        assert batch["input_ids"].shape == (3, len(rows[1]["input_ids"]))
        for index, row in enumerate(rows):
            assert batch["input_ids"][index].tolist()[: len(row["input_ids"])] == row["input_ids"]
    mixed = make([rows[0], {**rows[1], "training": False}, rows[2]])
    assert mixed["input_ids"].shape[0] == 2


def test_packed_rows_have_no_room_for_longer_examples():
    batch = collator(packing=True, max_length=32, span_truncation_probability=0.0)([example(3, 60), example(3, 1)])
    assert batch["input_ids"].shape == (2, 32)
    assert batch["input_ids"][0].tolist() == example(3, 60)["input_ids"][:32]


def test_long_examples_lose_their_end():
    source = example(3, 60)
    batch = collator(training=False, max_length=30, pad_to_multiple_of=1)([source])
    assert batch["input_ids"][0].tolist() == source["input_ids"][:30]


def test_bad_examples_and_options_are_named():
    make = collator()
    with pytest.raises(ValueError, match="Example 1 has neither `labels` nor `prompt_length`"):
        make([example(), {"input_ids": [1]}])
    with pytest.raises(ValueError, match="Example 0 has 2 `input_ids` but 1 `labels`"):
        make([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="empty list"):
        make([])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 2"):
        collator(span_truncation_probability=2)
    with pytest.raises(ValueError, match="`packing` needs `max_length`"):
        collator(packing=True)
    with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
        collator(max_length=0)
