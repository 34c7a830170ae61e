"""The streamer: pieces in order, waveforms that join to the whole, errors and readers that leave."""

import queue
import threading

import numpy as np
import pytest
import torch
from builders import build_processor

from modeling_ttt.ttt_codec import TttCodecConfig
from processing import TttStreamer
from processing.streaming_ttt import TttStreamCancelled

TEXT = "naïve ☃ answers take more than one span"
CODES = [(7 * number) % 16 for number in range(70)]


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def feed(streamer, processor, response):
    """As `generate` does: the prompt, then text ids one by one and the ids of audio as blocks."""
    streamer.put(torch.tensor([[1, 2, 3]]))
    block = []
    for token_id in response:
        if token_id >= processor.token_ids.audio_token_id_start:
            block.append(token_id)
            continue
        if block:
            streamer.put(torch.tensor(block))
            block = []
        streamer.put(torch.tensor([token_id]))
    streamer.end()


def join(pieces):
    text = "".join(piece["text"] for piece in pieces if "text" in piece)
    audio = [piece["audio"] for piece in pieces if "audio" in piece]
    return text, np.concatenate(audio) if audio else np.zeros(0, dtype=np.float32)


def test_text_and_waveform_come_in_pieces_that_join_to_the_whole_answer(processor):
    streamer = processor.streamer()
    feed(streamer, processor, processor.build_response(TEXT, CODES))
    pieces = list(streamer)
    text, waveform = join(pieces)
    whole = processor.decode_audio([CODES])[0]
    assert text == TEXT
    assert sum("audio" in piece for piece in pieces) > 1 and pieces[-1]["sampling_rate"] == 16_000
    assert len(waveform) == len(whole)
    difference = np.sqrt(np.mean((waveform - whole) ** 2)) / np.sqrt(np.mean(whole**2))
    assert 20 * np.log10(difference + 1e-12) < -40


def test_a_character_is_held_back_until_it_is_complete(processor):
    streamer = processor.streamer()
    feed(streamer, processor, processor.build_response("☃é"))
    assert [piece["text"] for piece in streamer] == ["☃", "é"]


@pytest.mark.parametrize("size", [2, 4, 5, 26])
def test_the_text_does_not_depend_on_how_many_ids_come_at_once(processor, size):
    text = "ab\U0001f642 sch\u00f6n \u4f60\u597d und mehr"
    ids, streamer = processor.build_response(text), processor.streamer()
    for piece in ([1], *(ids[start : start + size] for start in range(0, len(ids), size))):
        streamer.put(torch.tensor(piece))
    streamer.end()
    assert "".join(piece["text"] for piece in streamer) == text


def test_bytes_that_are_no_character_do_not_hold_the_stream_back(processor):
    broken = processor.tokenizer("☃")["input_ids"][1]  # a continuation byte
    streamer = processor.streamer(timeout=10)
    streamer.put(torch.tensor([[1]]))
    for _ in range(8):
        streamer.put(torch.tensor([broken]))
    assert "\ufffd" in next(iter(streamer))["text"]


def test_a_piece_is_there_before_the_answer_ends(processor):
    streamer = processor.streamer(timeout=10)
    pieces = iter(streamer)
    streamer.put(torch.tensor([[1, 2]]))
    streamer.put(torch.tensor([processor.tokenizer("a")["input_ids"][0]]))
    assert next(pieces) == {"text": "a"}
    streamer.put(torch.tensor(processor.token_ids.codes_to_ids(CODES)))
    assert len(next(pieces)["audio"]) > 0


def test_an_audio_tokenizer_without_streaming_is_decoded_at_the_end(processor):
    whole = TttCodecConfig(
        **{**processor.audio_tokenizer.config.to_dict(), "vocoder": "griffin_lim", "sampling_rate": 24_000}
    )

    class Whole:
        device, config = torch.device("cpu"), whole  # whose samples depend on all codes

        def decode(self, audio_codes):
            return processor.audio_tokenizer.decode(audio_codes)

    streamer = TttStreamer(processor.tokenizer, processor.token_ids, Whole())
    feed(streamer, processor, processor.build_response(TEXT, CODES))
    pieces = list(streamer)
    assert [("audio" in piece) for piece in pieces].count(True) == 1 and "audio" in pieces[-1]
    assert np.allclose(pieces[-1]["audio"], processor.decode_audio([CODES])[0], atol=1e-5)
    assert pieces[-1]["sampling_rate"] == 24_000  # as its audio tokenizer speaks


def test_text_tokens_added_above_the_audio_range_are_written():
    processor = build_processor()
    processor.tokenizer.add_tokens(["<mood>"])
    response = processor.build_response("so<mood>", CODES)
    assert max(response) == len(processor.tokenizer) - 1
    streamer = processor.streamer()
    feed(streamer, processor, response)
    assert join(list(streamer))[0] == processor.post_process([response])[0]["text"] == "so<mood>"


def test_nothing_after_the_end_of_the_turn_is_passed_on(processor):
    streamer = processor.streamer()
    feed(streamer, processor, processor.build_response("one") + processor.build_response("two", CODES))
    assert [piece.get("text") for piece in streamer] == ["o", "n", "e"]


def test_a_failure_while_generating_is_raised_where_the_stream_is_read(processor):
    streamer = processor.streamer()
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor([processor.tokenizer("a")["input_ids"][0]]))
    streamer.fail(RuntimeError("out of memory"))
    pieces = iter(streamer)
    assert next(pieces) == {"text": "a"}
    with pytest.raises(RuntimeError, match="out of memory"):
        next(pieces)


def test_a_streamer_takes_one_answer_after_another(processor):
    streamer = processor.streamer()
    for text, codes in ((TEXT, CODES), ("again", CODES[:30]), ("and again", [])):
        feed(streamer, processor, processor.build_response(text, codes))
        spoken, waveform = join(list(streamer))
        whole = processor.decode_audio([codes])[0]
        assert spoken == text and len(waveform) == len(whole) and np.allclose(waveform, whole, atol=1e-3)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor(processor.build_response("lost", CODES)[:3]))
    streamer.fail(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError):
        list(streamer)
    feed(streamer, processor, processor.build_response("found"))
    assert join(list(streamer))[0] == "found"


def test_generation_stops_when_the_reader_has_left(processor):
    streamer = processor.streamer()
    stopped = threading.Event()
    token = torch.tensor(processor.tokenizer("a")["input_ids"])

    def generate():
        try:
            while True:
                streamer.put(token)
        except TttStreamCancelled:
            stopped.set()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    next(iter(streamer))
    streamer.cancel()
    assert stopped.wait(10)


def test_batches_are_refused_and_silence_times_out(processor):
    streamer = processor.streamer(timeout=0.01)
    with pytest.raises(ValueError, match="one answer, got a batch of 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(queue.Empty):
        next(iter(streamer))
