"""Training batches: right padding, labels, and rows of several examples."""

from itertools import pairwise

import pytest
import torch
from builders import build_processor

from processing import TttDataCollator, TttTokenIds, interleave, pack_examples

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
    return TttDataCollator(**{"pad_token_id": 0, **options})


def pack(examples, max_length=64):
    rows = pack_examples({name: [row[name] for row in examples] for name in examples[0]}, max_length)
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


def test_rows_are_padded_on_the_right_to_a_multiple():
    rows = [example(3, 4), example(3, 9)]
    batch = collator(pad_to_multiple_of=16)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (2, 32)
    for row, source in enumerate(rows):
        length = len(source["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == source["input_ids"]
        assert batch["labels"][row, :length].tolist() == source["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (32 - length)
        assert (batch["labels"][row, length:] == -100).all() and (batch["input_ids"][row, length:] == 0).all()


def test_tensors_and_prompt_length_give_the_same_batch_as_lists_and_labels():
    source = example()
    other = {"input_ids": torch.tensor(source["input_ids"]), "prompt_length": len(PROMPT), "length": 99}
    for name, tensor in collator()([source]).items():
        assert torch.equal(collator()([other])[name], tensor)


def test_a_processor_or_its_tokenizer_says_what_is_written_as_padding():
    processor = build_processor(audio_tokenizer=None)
    for source in (processor, processor.tokenizer):
        assert TttDataCollator(source).pad_token_id == processor.tokenizer.pad_token_id
    processor.tokenizer.pad_token = None
    assert TttDataCollator(processor).pad_token_id == processor.tokenizer.eos_token_id
    with pytest.raises(ValueError, match="Give a `tokenizer`"):
        TttDataCollator()


def test_the_first_token_of_an_example_is_never_scored():
    ids = [5, 6, 7]
    for source in ({"input_ids": ids, "labels": ids}, {"input_ids": ids, "prompt_length": 0}):
        assert collator(pad_to_multiple_of=1)([source])["labels"].tolist() == [[-100, 6, 7]]
    rows = pack([{"input_ids": ids, "labels": ids}] * 2)
    assert [row["labels"] for row in rows] == [[-100, 6, 7, -100, 6, 7]]


def test_long_examples_lose_their_end():
    source = example(3, 60)
    batch = collator(max_length=30, pad_to_multiple_of=1)([source])
    assert batch["input_ids"][0].tolist() == source["input_ids"][:30]
    assert [row["input_ids"] for row in pack([source, example(3, 1)], 32)][0] == source["input_ids"][:32]


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
    examples = [example(3, number) for number in (1, 40, 2, 3, 44, 12, 25, 5)]
    rows = pack(examples, 64)
    assert len(rows) == -(-sum(len(source["input_ids"]) for source in examples) // 64)
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    batch = collator()(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"} and batch["input_ids"].shape == (len(rows), 64)
    assert pieces(batch) == sorted((source["input_ids"], source["labels"]) for source in examples)


def test_rows_come_in_the_order_of_their_first_examples():
    """Not from the longest to the shortest, which would make neighbours alike where nothing shuffles them."""
    examples = [example(3, number) for number in (2, 40, 3, 44, 2, 44)]
    positions = [row["position_ids"] for row in pack(examples, 80)]
    lengths = [row.index(0, 1) for row in positions]  # of the first example in each row
    assert lengths == [len(source["input_ids"]) for source in examples[:3]] == [15, 53, 16]


def test_bad_examples_and_options_are_named():
    make = collator()
    with pytest.raises(ValueError, match="Example 1 has neither `labels` nor `prompt_length`"):
        make([example(), {"input_ids": [1]}])
    with pytest.raises(ValueError, match="Example 0 has 2 `input_ids` but 1 `labels`"):
        make([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="empty list"):
        make([])
    with pytest.raises(ValueError, match="pack all of a batch, or none"):
        make([*pack([example()]), example()])
    for call in (lambda: collator(max_length=0), lambda: pack([example()], 0)):
        with pytest.raises(ValueError, match="`max_length` must be at least 1, got 0"):
            call()
