"""The server's parts that need no server: sound on the wire, truncation, turns, conversations, keys, stores, rates."""

import asyncio

import numpy as np
import pytest
import soundfile
from builders import build_processor, tone
from serving import SECONDS

from pipelines.serving.answer_dataset import check_ids
from pipelines.serving.answers import Answer, AnswerStore
from pipelines.serving.conversation import Conversation, Item, Part, Rhythm, messages
from pipelines.serving.errors import ApiError
from pipelines.serving.limits import Limits, RateLimit
from pipelines.serving.outbox import ROOM_BYTES, Outbox
from pipelines.serving.ray_app import build_replica_parser, check, http_options
from pipelines.serving.security import KeyRing, is_loopback, read_api_keys
from pipelines.serving.sound import (
    FileStream,
    Resampler,
    decode_file,
    encode_file,
    float_to_pcm,
    pcm_to_float,
    split_pcm,
)
from pipelines.serving.truncation import codes_heard, cut_answer
from pipelines.serving.vad import SpeechDetector, SpeechEvent
from pipelines.ttt_serve import build_parser
from pipelines.ttt_talk import UsageError

# ---- sound ---------------------------------------------------------------------------------------------------------


def test_pcm_goes_to_samples_and_back():
    pcm = np.array([0, 1, -1, 32767, -32768], "<i2").tobytes()
    assert float_to_pcm(pcm_to_float(pcm)) == pcm
    assert float_to_pcm(np.array([2.0, -2.0], np.float32)) == np.array([32767, -32768], "<i2").tobytes()
    assert b"".join(split_pcm(pcm * 10_000)) == pcm * 10_000


@pytest.mark.parametrize("size", [1, 160, 4096])
def test_resampling_in_pieces_is_resampling(size):
    samples = tone(0.5)
    resampler = Resampler(16_000, 24_000)
    pieces = [resampler.push(samples[start : start + size]) for start in range(0, len(samples), size)]
    whole = np.concatenate([*pieces, resampler.push(samples[:0], last=True)])
    assert len(whole) == 12_000
    assert np.abs(whole - tone(0.5, 24_000))[200:-200].max() < 1e-2
    assert Resampler(16_000, 16_000).push(samples) is samples


@pytest.mark.parametrize("file_format", ["wav", "flac"])
def test_files_are_written_in_pieces_and_read_again(file_format):
    samples = tone(0.5)
    stream = FileStream(16_000, file_format)
    content = b"".join([stream.push(samples[:3000]), stream.push(samples[3000:]), stream.flush()])
    read, rate = decode_file(content, Limits(), "file")
    assert rate == 16_000 and np.abs(read - samples).max() < 1e-4
    assert decode_file(encode_file(samples, 16_000, file_format), Limits(), "file")[0].tolist() == read.tolist()


def test_channels_are_averaged_and_numbers_that_are_none_refused(tmp_path):
    both = np.stack([tone(0.2), -tone(0.2)], axis=1)
    soundfile.write(tmp_path / "a.wav", both, 16_000, subtype="FLOAT")
    assert np.abs(decode_file((tmp_path / "a.wav").read_bytes(), Limits(), "file")[0]).max() < 1e-6
    both[3] = np.nan
    soundfile.write(tmp_path / "a.wav", both, 16_000, subtype="FLOAT")
    with pytest.raises(ApiError, match="no numbers"):
        decode_file((tmp_path / "a.wav").read_bytes(), Limits(), "file")


# ---- truncation ----------------------------------------------------------------------------------------------------


def test_codes_heard_are_whole_frames():
    assert codes_heard(0, 12.5) == codes_heard(79, 12.5) == 0
    assert codes_heard(80, 12.5) == 1 and codes_heard(2080, 12.5) == 26
    assert codes_heard(1000, 100.0, codes_per_frame=8) == 96
    assert codes_heard(-5, 12.5) == 0


def test_text_is_cut_by_the_rhythm_in_which_it_was_written():
    text, codes = list(range(30)), list(range(60))
    assert cut_answer(text, codes, 60) == (text, codes) == cut_answer(text, codes, 100)
    assert cut_answer(text, codes, 26) == (text[:13], codes[:26])
    assert cut_answer(text, codes, 27) == (text[:14], codes[:27])
    assert cut_answer(text, codes, 0) == ([], [])
    assert cut_answer(text[:5], codes, 50) == (text[:5], codes[:50])
    assert cut_answer(text, codes, 10, text_chunk_size=5, audio_chunk_size=10) == (text[:5], codes[:10])


def test_a_cut_answer_is_a_beginning_of_itself_for_the_model():
    processor = build_processor()
    rhythm = Rhythm.of(processor)
    part = Part("output_audio", "abcdefghijklmnopqrstuvwxyz", [*range(16), *range(16), *range(16), *range(4)])
    item = Item("assistant", [part])
    whole = processor.build_response(part.text, part.codes)
    rhythm.truncate(item, 0, 2080)
    assert (part.text, len(part.codes)) == ("abcdefghijklm", 26)
    cut = processor.build_response(part.text, part.codes)
    assert cut[:13] == whole[:13] and cut[14:40] == whole[14:40]
    with pytest.raises(ApiError, match="2080 ms"):
        rhythm.truncate(item, 0, 5000)


# ---- turns ---------------------------------------------------------------------------------------------------------


def detect(probabilities: list[float], **options) -> list[SpeechEvent]:
    """Turns in windows of known probability, pushed in pieces of another length."""
    values = iter(probabilities)
    detector = SpeechDetector(lambda window: next(values), **options)
    samples = np.zeros(512 * len(probabilities), np.float32)
    return [event for start in range(0, len(samples), 700) for event in detector.push(samples[start : start + 700])]


def test_turns_begin_with_two_windows_and_end_after_silence():
    assert detect([0.1, 0.9, 0.1, 0.9, 0.1]) == []
    assert detect([0.1, 0.9, 0.9] + [0.1] * 20, silence_ms=320) == [
        SpeechEvent(True, 512),
        SpeechEvent(False, 512 * 13),
    ]
    wavering = [0.9, 0.9] + [0.4] * 30 + [0.1] * 9 + [0.9] + [0.1] * 10
    assert detect(wavering, silence_ms=320) == [SpeechEvent(True, 0), SpeechEvent(False, 512 * len(wavering))]


# ---- conversations -------------------------------------------------------------------------------------------------


def test_messages_leave_out_what_says_nothing():
    items = [
        Item("system", [Part("input_text", "be brief")]),
        Item("user", [Part("input_audio", "a transcript, which the model does not read", [1, 2])]),
        Item("assistant", [Part("output_audio", "", [])]),
        Item("assistant", [Part("output_audio", "yes", [3])]),
    ]
    written = messages(items, None)
    assert [message["role"] for message in written] == ["system", "user", "assistant"]
    assert written[1]["content"] == [{"type": "audio", "audio_codes": [1, 2]}]
    assert written[2]["content"] == [{"type": "text", "text": "yes"}, {"type": "audio", "audio_codes": [3]}]
    assert messages(items[:1], "answer")[0] == {"role": "system", "content": "answer"}


def test_a_conversation_keeps_only_so_much_audio():
    conversation = Conversation(10, 100)
    items = [Item("user", [Part("input_audio", None, [1], bytes(60))]) for _ in range(3)]
    for item in items:
        conversation.add(item)
    assert [item.parts[0].pcm is None for item in items] == [True, True, False]
    assert "audio" not in items[0].wire(with_audio=True)["content"][0]
    long = Item("user", [Part("input_audio", None, None, bytes(160))])  # it is still to be encoded
    conversation.add(long)
    assert long.parts[0].pcm is not None and items[2].parts[0].pcm is None
    conversation.add(Item("user", [Part("input_text", "and that")]))
    assert long.parts[0].pcm is None


# ---- keys, stores, rates -------------------------------------------------------------------------------------------


def test_replicas_are_served_by_https_where_that_is_asked_for(tmp_path):
    paths = {name: tmp_path / name for name in ("ssl_certfile", "ssl_keyfile")}
    arguments = build_parser().parse_args(["--port", "8001"])
    assert http_options(arguments) == {"host": "127.0.0.1", "port": 8001}
    options = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    arguments = build_parser().parse_args(options)
    assert http_options(arguments) == {"host": "127.0.0.1", "port": 8000, **{k: str(v) for k, v in paths.items()}}


@pytest.mark.parametrize(
    ("options", "got"),
    [(["--max_replicas", "0"], "1 and 0"), (["--replicas", "3", "--max_replicas", "2"], "3 and 2")],
)
def test_numbers_of_replicas_that_make_no_sense_are_refused(options, got):
    arguments = build_replica_parser().parse_args(["--replicas", "2"])
    check(arguments)
    assert arguments.max_replicas == 2
    with pytest.raises(UsageError, match=f"--max_replicas no less; got {got}"):
        check(build_replica_parser().parse_args(options))


@pytest.mark.parametrize("ids", [[None], ["a", None], ["../b"], ["1", 1], ["a/b"]])
def test_questions_of_a_dataset_have_ids_that_name_a_file_each(ids):
    check_ids(["1", "2", "q-3.a"])
    with pytest.raises(ValueError, match="which is to name a file"):
        check_ids(ids)


def test_keys_come_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("# ours\nfirst-key-of-the-file\n\n second-key-of-the-file \n")
    assert read_api_keys(file) == ["first-key-of-the-file", "second-key-of-the-file"]
    assert read_api_keys(None, {"TTT_SERVE_API_KEY": "key-of-the-environment"}) == ["key-of-the-environment"]
    assert read_api_keys(None, {}) == []
    for content in ("", "# nothing\n", "short\n", "has spaces in the middle\n", "schlüssel-der-nicht-geht\n"):
        file.write_text(content)
        with pytest.raises(ValueError, match="key"):
            read_api_keys(file)
    ring = KeyRing(["first-key-of-the-file"])
    assert ring.opens("first-key-of-the-file") and not ring.opens("") and not ring.opens("first-key-of-the-filf")
    assert not KeyRing([]) and not KeyRing([]).opens("")


def test_addresses_of_this_machine():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "localhost.")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", "")))


def test_answers_are_kept_for_a_time_and_not_too_many():
    now = [0.0]
    store = AnswerStore(2, 10.0, lambda: now[0])
    ids = [store.reserve() for _ in range(3)]
    for answer_id, expires_at in ids:
        asyncio.run(store.keep(Answer(answer_id, "text", (1,), expires_at)))
    with pytest.raises(ApiError, match="expired, or another server"):
        asyncio.run(store.get(ids[0][0], "audio.id"))
    assert asyncio.run(store.get(ids[2][0], "audio.id")).codes == (1,)
    now[0] = 10.0
    with pytest.raises(ApiError) as error:
        asyncio.run(store.get(ids[2][0], "audio.id"))
    assert error.value.status == 404


def test_a_rate_is_kept():
    now = [0.0]
    rate = RateLimit(10.0, 20.0, lambda: now[0])
    assert rate.take(20.0) == 0.0 and rate.take(5.0) == 0.5
    now[0] = 100.0
    assert rate.take(20.0) == 0.0 and rate.take(1.0) == pytest.approx(0.1)


# ---- what is sent --------------------------------------------------------------------------------------------------


def test_sending_ends_though_it_is_cancelled_at_the_moment_at_which_an_event_is_sent():
    async def main() -> None:
        async def send(text: str) -> None:
            running.cancel()

        outbox = Outbox(send, 1000, SECONDS)
        running = asyncio.create_task(outbox.run())
        outbox.put({"type": "error"})
        await asyncio.wait({running}, timeout=30.0)
        assert running.cancelled()

    asyncio.run(main())


def test_nobody_waits_for_events_that_will_not_be_sent():
    async def main() -> None:
        async def send(text: str) -> None:
            raise OSError("the connection is lost")

        outbox = Outbox(send, 2 * ROOM_BYTES, SECONDS)
        outbox.put({"type": "error", "error": "x" * ROOM_BYTES}, "resp_1", 1)
        waiting = {asyncio.create_task(wait) for wait in (outbox.room(), outbox.empty(), outbox.sent_all("resp_1"))}
        await asyncio.sleep(0)
        with pytest.raises(OSError, match="lost"):
            await outbox.run()
        _, late = await asyncio.wait(waiting, timeout=30.0)
        assert not late and not outbox.sent

    asyncio.run(main())
