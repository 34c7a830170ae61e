"""Interleaving of text and codes: the published layout, its edge cases, and the exact inverse."""

import random

import pytest

from processing import TttTokenIds
from processing.interleaving_ttt import (
    Deinterleaver,
    deinterleave,
    interleave,
)

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
BOA, BOQ, EOA, EOL, END = 90, 92, 142, 143, 93


def code_ids(codes):
    return [101 + code for code in codes]


def test_text_and_codes_alternate_13_to_26_and_the_last_span_takes_the_rest():
    text = list(range(30))
    codes = [number % 40 for number in range(70)]
    assert interleave(text, codes, IDS, end_of_turn=True) == (
        text[:13]
        + [BOA, *code_ids(codes[:26]), EOA]
        + text[13:26]
        + [BOA, *code_ids(codes[26:52]), EOA]
        + text[26:]
        + [BOQ, *code_ids(codes[52:]), EOL, END]
    )


def test_text_that_fills_its_chunk_exactly_is_followed_by_the_last_span():
    codes = [1] * 40
    assert interleave(list(range(13)), codes, IDS) == [*range(13), BOQ, *code_ids(codes), EOL]


@pytest.mark.parametrize("num_codes", [1, 2, 3])
def test_short_audio_goes_into_the_last_span_after_all_of_the_text(num_codes):
    ids = interleave(list(range(10)), [7] * num_codes, IDS, text_chunk_size=2, audio_chunk_size=3)
    assert ids == [*range(10), BOQ, *code_ids([7] * num_codes), EOL]


def test_a_span_between_text_is_written_only_while_codes_remain_for_the_last_one():
    ids = interleave(list(range(10)), [7, 8, 9, 6], IDS, text_chunk_size=2, audio_chunk_size=3)
    assert ids == [0, 1, BOA, *code_ids([7, 8, 9]), EOA, *range(2, 10), BOQ, *code_ids([6]), EOL]


def test_text_alone_codes_alone_and_nothing():
    assert interleave([1, 2], [], IDS, end_of_turn=True) == [1, 2, END]
    assert interleave([], [5, 6], IDS) == [BOQ, *code_ids([5, 6]), EOL]
    assert interleave([], [], IDS) == []


def test_deinterleave_is_the_exact_inverse_for_random_lengths_and_chunk_sizes():
    rng = random.Random(0)
    for _ in range(500):
        text = [rng.randrange(90) for _ in range(rng.choice([0, 1, 12, 13, 14, 26, rng.randrange(100)]))]
        codes = [rng.randrange(40) for _ in range(rng.choice([0, 1, 25, 26, 27, 52, rng.randrange(200)]))]
        sizes = {"text_chunk_size": rng.randint(1, 20), "audio_chunk_size": rng.randint(1, 40)}
        for end_of_turn in (False, True):
            ids = interleave(text, codes, IDS, end_of_turn=end_of_turn, **sizes)
            assert deinterleave(ids, IDS) == (text, codes)


def test_every_response_with_codes_closes_with_exactly_one_last_span():
    rng = random.Random(1)
    for _ in range(200):
        ids = interleave([1] * rng.randrange(80), [2] * rng.randint(1, 150), IDS)
        assert ids.count(BOQ) == 1 and ids.count(EOL) == 1 and ids[-1] == EOL
        assert ids.count(BOA) == ids.count(EOA)
        codes = ids[ids.index(BOQ) + 1 : -1]
        assert codes and all(map(IDS.is_code, codes))


def test_deinterleave_reads_a_truncated_answer_as_far_as_it_goes():
    text, codes = list(range(30)), [3] * 80
    ids = interleave(text, codes, IDS, end_of_turn=True)
    for length in range(len(ids)):
        part_text, part_codes = deinterleave(ids[:length], IDS)
        assert text[: len(part_text)] == part_text and codes[: len(part_codes)] == part_codes


def test_deinterleave_skips_masks_and_stops_at_the_end_of_the_turn():
    assert deinterleave([1, BOQ, 105, 141, 141], IDS) == ([1], [4])
    assert deinterleave([1, END, 2, 105], IDS) == ([1], [])


@pytest.mark.parametrize("codes_per_frame", [1, 3])
def test_an_answer_read_in_pieces_is_the_answer_read_at_once(codes_per_frame):
    rng = random.Random(2)
    anything = [*range(10), BOA, BOQ, EOA, EOL, 91, 100, 141, 144, *code_ids(range(40)), *code_ids(range(40)), END]
    for _ in range(200):
        ids = rng.choices(anything, k=rng.randrange(120))
        reader, text, codes, position = Deinterleaver(IDS, codes_per_frame), [], [], 0
        while position < len(ids):
            end = position + rng.randint(1, 20)
            new_text, new_codes = reader.push(ids[position:end])
            assert len(new_codes) % codes_per_frame == 0
            text, codes, position = text + new_text, codes + new_codes, end
        assert (text, codes) == deinterleave(ids, IDS, codes_per_frame)


def test_text_tokens_added_above_the_audio_range_are_kept():
    assert deinterleave([144, 1, BOQ, *code_ids([4]), EOL, 150], IDS) == ([144, 1, 150], [4])


def test_bad_ids_and_sizes_are_named():
    with pytest.raises(ValueError, match="code 40 at position 1 is outside the codebook"):
        interleave([1], [0, 40], IDS)
    with pytest.raises(ValueError, match="code -1 at position 0"):
        interleave([1], [-1], IDS)
    assert interleave([1, 144], [], IDS) == [1, 144]  # added by a user above the audio range
    for bad in (BOA, BOQ, END, 91, 100, 120, 143):
        with pytest.raises(ValueError, match=f"id {bad} at position 2"):
            interleave([1, 2, bad], [0], IDS)
    with pytest.raises(ValueError, match="at least 1, got 0 and 26"):
        interleave([1], [0], IDS, text_chunk_size=0)
