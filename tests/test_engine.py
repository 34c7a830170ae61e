"""The engine: many requests at once, each answered as `generate` answers it alone."""

import asyncio
import random
import threading
import time

import numpy as np
import pytest
import torch
from builders import build_model, build_processor, tone
from engine_models import build_varied_model

from modeling_ttt.generation_config_ttt import SURE_RULES
from modeling_ttt.ttt_codec.modeling_ttt_codec import TttCodecStreamingDecoder
from pipelines.serving import (
    AudioDelta,
    Engine,
    EngineClosed,
    Finished,
    GenerationRequest,
    Overloaded,
    TextDelta,
)
from pipelines.serving.engine_codec import _Answer, _Piece, _speak
from pipelines.serving.engine_requests import Generation, Usage
from pipelines.serving.engine_sessions import SessionCaches
from processing.audio_codes_ttt import decode_codes

PROCESSOR = build_processor(audio_tokenizer=None)
KINDS = {"bidirectional": {}, "block_causal": {"span_attention": "block_causal", "block_lengths": [4]}}
PARTS = ["how", "why is it so", "tell me", "a longer question than the others, to have rows of many lengths"]
MODELS: dict = {}


def varied(kind: str = "bidirectional", attention: str = "sdpa"):
    if (kind, attention) not in MODELS:
        MODELS[kind, attention] = build_varied_model(PROCESSOR, attention, **KINDS[kind])
    return MODELS[kind, attention]


def write_prompt(draw: random.Random) -> list[int]:
    """Text; sometimes codes of the user, sometimes a span that is begun."""
    ids = PROCESSOR.token_ids
    prompt = PROCESSOR.tokenizer(draw.choice(PARTS))["input_ids"]
    codes = [ids.audio_code_id_start + draw.randrange(ids.num_audio_codes) for _ in range(draw.randint(1, 9))]
    form = draw.random()
    if form < 0.3:
        prompt = [*prompt, ids.begin_of_audio_token_id, *codes, ids.end_of_prompt_audio_token_id, *prompt[:2]]
    elif form < 0.5:
        prompt = [*prompt, ids.begin_of_last_audio_token_id, *(codes if form < 0.4 else [])]
    return prompt


def draw_options(draw: random.Random) -> dict:
    options: dict = {"max_new_tokens": draw.choice([1, 2, 8, 20, 30]), "audio_block_size": draw.choice([3, 4, 6])}
    options["audio_steps_per_block"] = draw.choice([1, 2, 4])
    options["seed"] = draw.randrange(1000)
    for name, value in (
        ("do_sample", True),
        ("audio_temperature", 0.8),
        ("audio_remasking", "entropy"),
        (draw.choice(SURE_RULES), 0.5),
        ("audio_order_bias", 0.05),
        ("repetition_penalty", 1.3),
        ("max_audio_codes_per_span", 5),
        ("audio_guidance_scale", 0.5),
        ("min_new_tokens", 1),
    ):
        if draw.random() < 0.25:
            options[name] = value
    if options.get("do_sample"):
        options |= {"temperature": draw.choice([0.7, 1.2]), "top_k": draw.choice([5, 50])}
    return options


def alone(model, prompt: list[int], options: dict) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def ids_of(events: list) -> tuple[list[int], list[int]]:
    text = [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]
    codes = [code for event in events if isinstance(event, AudioDelta) for code in event.codes]
    return text, codes


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("attention", "number"), [("sdpa", 200), ("eager", 40)])
def test_an_answer_among_many_is_the_answer_alone(kind, attention, number):
    model, draw = varied(kind, attention), random.Random(0)
    pool = [(write_prompt(draw), draw_options(draw)) for _ in range(30)]
    expected = [alone(model, prompt, options) for prompt, options in pool]
    assert len({tuple(answer) for answer in expected}) > 20 and max(map(len, expected)) > 20

    running: list = []
    with Engine(model, PROCESSOR, max_rows=16, max_queue=number) as engine:
        for _ in range(number):
            which, fate = draw.randrange(len(pool)), draw.random()
            prompt, options = pool[which]
            deadline = 0.0 if fate < 0.05 else draw.random() / 10 if fate < 0.15 else None
            generation = engine.submit(GenerationRequest(prompt, options, deadline=deadline))
            running.append((which, generation))
            if fate > 0.85:
                draw.choice(running)[1].cancel()
            if fate > 0.5:
                time.sleep(draw.random() / 100)
            if fate > 0.9:
                next(draw.choice(running)[1], None)
        ends = [(which, generation.result(60)[2]) for which, generation in running]
        stats = engine.stats()

    whole = 0
    for which, end in ends:
        assert end.token_ids == expected[which][: len(end.token_ids)]
        if end.reason in ("stop", "length"):
            assert end.token_ids == expected[which]
            whole += 1
        assert end.error is None and end.reason != "failed"
    assert whole > number / 2 and stats.rows == stats.queued == 0
    assert sum(stats.finished.values()) == stats.submitted == number


def test_events_are_the_answer_in_order():
    model, draw = varied(), random.Random(1)
    with Engine(model, PROCESSOR) as engine:
        for _ in range(8):
            prompt, options = write_prompt(draw), draw_options(draw)
            *events, end = engine.submit(GenerationRequest(prompt, options))
            assert isinstance(end, Finished) and not any(isinstance(event, Finished) for event in events)
            answer = PROCESSOR.post_process([end.token_ids], decode_audio=False)[0]
            assert "".join(event.text for event in events if isinstance(event, TextDelta)) == answer["text"]
            text, codes = ids_of(events)
            assert codes == answer["audio_codes"].tolist()
            assert end.usage.prompt_tokens == len(prompt)
            assert end.usage.text_tokens + end.usage.audio_codes == len(end.token_ids)


@pytest.mark.parametrize("kind", list(KINDS))
def test_turns_of_a_session_use_its_cache_and_change_nothing(kind):
    model, draw = varied(kind), random.Random(2)
    options = {"max_new_tokens": 12, "audio_block_size": 4}
    conversations = {f"s{i}": write_prompt(draw) for i in range(6)}
    with Engine(model, PROCESSOR, max_rows=4) as engine:
        for turn in range(3):
            running = {
                name: engine.submit(GenerationRequest(prompt, options, session=name))
                for name, prompt in conversations.items()
            }
            for name, generation in running.items():
                _, _, end = generation.result(60)
                assert end.token_ids == alone(model, conversations[name], options)
                assert (end.usage.cached_tokens > 0) == (turn > 0)
                conversations[name] += end.token_ids + PROCESSOR.tokenizer("and then?")["input_ids"]
        assert engine.stats().sessions == 6 and engine.stats().session_bytes > 0
        engine.forget("s0")
        assert engine.stats().sessions == 5
        # A prompt that is not the continuation of what is kept uses what the two have in common.
        other = conversations["s1"][:10] + PROCESSOR.tokenizer("else")["input_ids"]
        _, _, end = engine.submit(GenerationRequest(other, options, session="s1")).result(60)
        assert end.token_ids == alone(model, other, options) and end.usage.cached_tokens <= 10


def test_two_turns_of_one_session_run_one_after_the_other():
    model = varied()
    prompt = PROCESSOR.tokenizer("first")["input_ids"]
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "audio_block_size": 4}
    with Engine(model, PROCESSOR) as engine:
        generations = [engine.submit(GenerationRequest(prompt, options, session="a")) for _ in range(3)]
        other = engine.submit(GenerationRequest(prompt, {"max_new_tokens": 1}))
        assert other.result(60)[2].reason in ("length", "stop")
        ends = [generation.result(60)[2] for generation in generations]
    assert all(end.token_ids == ends[0].token_ids for end in ends)
    assert [end.usage.cached_tokens for end in ends] == [0, len(prompt) - 1, len(prompt) - 1]


def test_caches_of_sessions_stay_within_their_memory():
    model = varied()
    with Engine(model, PROCESSOR, session_memory=0) as engine:
        engine.submit(GenerationRequest([1, 2, 3], {"max_new_tokens": 2}, session="a")).result(60)
        assert engine.stats().sessions == 0

    cache = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, return_dict_in_generate=True).past_key_values
    sessions = SessionCaches(2 * cache.num_bytes)
    for name in ("a", "b"):
        sessions.take(name)
        sessions.keep(name, cache)
    sessions.keep("a", sessions.take("a"))  # used last
    sessions.take("c")
    sessions.keep("c", cache)
    assert len(sessions) == 2 and sessions.num_bytes == 2 * cache.num_bytes
    assert sessions.take("b") is None and sessions.take("a") is cache
    sessions.forget("a")
    sessions.keep("a", cache)  # a turn that ends after its session was dropped
    assert sessions.take("a") is None


def test_speech_is_what_the_processor_decodes():
    processor = build_processor()
    model = build_model(processor)
    prompt = processor(text="hello", task="text_chat")["input_ids"]
    with Engine(model, processor) as engine:
        codes = engine.encode_audio(tone(1.0, 24_000), 24_000).result(60)
        expected = processor.encode_audio([{"array": tone(1.0, 24_000), "sampling_rate": 24_000}])[0]
        assert codes == expected.tolist()
        text, waveform, end = engine.submit(GenerationRequest(prompt)).result(60)
        answer = processor.post_process([end.token_ids])[0]
        assert (text, end.reason) == (answer["text"], "stop") and len(answer["audio_codes"]) == 40
        np.testing.assert_allclose(waveform, answer["audio"], atol=1e-5)
        decoded = engine.decode_audio(answer["audio_codes"].tolist()).result(60)
        np.testing.assert_allclose(decoded, answer["audio"], atol=1e-5)

        request = GenerationRequest(prompt, {"max_new_tokens": 9}, modalities=("text",))
        text, waveform, end = engine.submit(request).result(60)
        assert text.startswith("hi") and not waveform.size and end.usage.audio_codes == 0


def test_a_slow_reader_holds_up_nobody_and_fills_no_memory():
    processor = build_processor()
    model = build_model(processor)
    prompt = processor(text="hello", task="text_chat")["input_ids"]
    with Engine(model, processor, max_rows=1, max_buffered_seconds=0.5) as engine:
        slow = [engine.submit(GenerationRequest(prompt)) for _ in range(3)]
        _, fast, _ = engine.submit(GenerationRequest(prompt)).result(60)  # the three before it are generated by then
        for generation in slow:
            assert generation._buffered <= 0.5 * engine.sampling_rate + 60 * 1280 and generation.finished is None
        for generation in slow:
            _, waveform, end = generation.result(60)
            assert end.reason == "stop"
            np.testing.assert_allclose(waveform, fast, atol=1e-5)  # their pieces may be of other sizes


def test_later_codes_wait_until_there_are_half_as_many_as_before():
    processor = build_processor()
    ids = processor.token_ids
    generation = Generation([1], GenerationRequest([1]), 1e9, lambda _: None, lambda _: None)
    answer, sizes = _Answer(generation, processor), []
    for code in range(80):
        answer.add(ids.codes_to_ids([code % 16]))
        while answer.is_due:
            sizes.append(len(answer.take()[0]))
    assert sizes == [1, 1, 1, 1, 2, 3, 4, 6, 9, 14, 21]
    answer.add(ids.codes_to_ids([1]))
    assert not answer.is_due
    answer.add([ids.end_of_audio_token_id])  # what follows on codes is not kept waiting by them
    assert answer.is_due and len(answer.take()[0]) == 19
    answer.add(ids.codes_to_ids([1]))
    assert not answer.is_due
    answer.add(Finished("stop", Usage(), []))
    assert answer.is_due and answer.take() == (ids.codes_to_ids([1]), answer.last)


def test_speech_that_cannot_be_decoded_ends_its_own_answer_alone(monkeypatch):
    processor = build_processor()
    decode, sizes = TttCodecStreamingDecoder.push_together, []

    def fail_for_one(decoders, codes, is_last):
        sizes.append(len(decoders))
        if bad.audio.decoder in decoders:
            raise RuntimeError("no voice")
        return decode(decoders, codes, is_last)

    end, codes = Finished("stop", Usage(), []), list(range(12))
    generations = [Generation([1], GenerationRequest([1]), 1e9, lambda _: None, lambda _: None) for _ in range(3)]
    pieces = [_Piece(_Answer(generation, processor), [], end, codes) for generation in generations]
    bad = pieces[1].answer
    monkeypatch.setattr(TttCodecStreamingDecoder, "push_together", staticmethod(fail_for_one))
    _speak(pieces)
    for piece in pieces:
        piece.finish()
    assert sizes == [3, 1, 1, 1]
    whole = decode_codes(processor.audio_tokenizer, [codes], 1)[0]
    for piece in pieces:
        _, waveform, end = piece.answer.generation.result(60)
        if piece.answer is bad:
            assert end.reason == "failed" and str(end.error) == "no voice"
        else:
            assert end.reason == "stop"
            np.testing.assert_allclose(waveform, whole, atol=1e-5)


def test_answers_are_read_in_asyncio_and_cancelled_there():
    model = varied()
    prompt, options = [1, 2, 3], {"max_new_tokens": 200, "min_new_tokens": 200, "audio_block_size": 4}

    async def read(engine: Engine, most: int) -> Finished:
        generation = engine.submit(GenerationRequest(prompt, options))
        events = []
        async for event in generation:
            events.append(event)
            if len(events) == most:
                generation.cancel()
        assert generation.finished is events[-1]
        return events[-1]

    async def main() -> list[Finished]:
        async with Engine(model, PROCESSOR, max_rows=4) as engine:
            return await asyncio.gather(*(read(engine, most) for most in (1, 3, 5, 10**6, 2)))

    ends = asyncio.run(main())
    expected = alone(model, prompt, options)
    assert [end.reason for end in ends].count("length") >= 1
    for end in ends:
        assert end.reason in ("cancelled", "length") and end.token_ids == expected[: len(end.token_ids)]


def test_an_engine_without_a_queue_hears_one_after_the_other():
    with Engine(varied(), build_processor(), max_queue=0) as engine:
        held = threading.Event()
        running = engine._codec._submit(held.wait)
        with pytest.raises(Overloaded):
            engine.encode_audio(tone(0.1), 16_000)
        held.set()
        assert running.result(60)
        while engine.stats().encoding:
            time.sleep(0.01)
        assert engine.encode_audio(tone(0.1), 16_000).result(60)


def test_a_full_queue_is_refused_at_once_and_drained():
    model = varied()
    options = {"max_new_tokens": 60, "min_new_tokens": 60}
    engine = Engine(model, PROCESSOR, max_rows=1, max_queue=2).start()
    generations = []
    with pytest.raises(Overloaded) as raised:
        for _ in range(10):
            generations.append(engine.submit(GenerationRequest([1, 2, 3], options)))
    assert raised.value.retry_after >= 1 and engine.stats().overloaded == 1
    engine.close()
    assert all(generation.result(1)[2].reason == "length" for generation in generations)
    with pytest.raises(EngineClosed):
        engine.submit(GenerationRequest([1, 2, 3]))
    with pytest.raises(EngineClosed):
        engine.encode_audio(tone(0.1), 16_000)
    engine.close()
    with pytest.raises(EngineClosed):
        engine.start()


def test_closing_without_draining_ends_everything():
    engine = Engine(varied(), PROCESSOR, max_rows=2).start()
    options = {"max_new_tokens": 400, "min_new_tokens": 400}
    generations = [engine.submit(GenerationRequest([1, 2, 3], options)) for _ in range(6)]
    engine.close(drain=False)
    assert all(generation.result(1)[2].reason == "cancelled" for generation in generations)
    assert not engine.is_running


def test_audio_that_waits_when_the_engine_closes_ends_as_closed():
    engine, go_on = Engine(varied(), PROCESSOR).start(), threading.Event()
    at_work = engine._codec._submit(go_on.wait)
    waiting = [engine.encode_audio(tone(0.1), 16_000), engine.decode_audio([1, 2, 3])]
    engine.close(drain=False)
    go_on.set()
    assert at_work.result(60)
    for future in waiting:
        with pytest.raises(EngineClosed):
            future.result(60)
    with pytest.raises(EngineClosed):  # who had looked before it closed
        engine._codec.encode(tone(0.1), 16_000)


def test_what_ends_early_ends_for_its_reason():
    options = {"max_new_tokens": 400, "min_new_tokens": 400}
    with Engine(varied(), PROCESSOR, max_rows=1) as engine:
        long = engine.submit(GenerationRequest([1, 2, 3], options))
        cancelled = engine.submit(GenerationRequest([1, 2, 3], options))
        late = engine.submit(GenerationRequest([1, 2, 3], options, deadline=0))
        cancelled.cancel()
        cancelled.cancel()
        assert cancelled.result(60)[2].reason == "cancelled" and late.result(60)[2].reason == "deadline"
        long.cancel()
        assert long.result(60)[2].reason == "cancelled" and list(long) == []
        one = engine.submit(GenerationRequest([1, 2, 3], {"max_new_tokens": 1})).result(60)[2]
        assert one.reason == "length" and len(one.token_ids) == 1


def test_a_request_that_fails_ends_alone(caplog):
    model = varied()
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    with Engine(model, PROCESSOR) as engine:
        good = engine.submit(GenerationRequest([1, 2, 3], options))
        job = engine._prepare(GenerationRequest([1, 2, 3], options))

        def fail(ids, scores):
            raise RuntimeError("a processor's own")

        job.call.processors.append(fail)
        with engine._changed:
            engine._waiting.append(job)
            engine._changed.notify_all()
        end = job.generation.result(60)[2]
        assert (end.reason, str(end.error)) == ("failed", "a processor's own")
        assert "RuntimeError: a processor's own" in caplog.text  # where its client is told to look
        assert good.result(60)[2].token_ids == alone(model, [1, 2, 3], options)


def test_the_engine_outlives_a_forward_that_fails(monkeypatch):
    model = varied()
    with Engine(model, PROCESSOR) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._decoder.runner, "step", lambda *_: 1 / 0)
            end = engine.submit(GenerationRequest([1, 2, 3], {"max_new_tokens": 20}, session="a")).result(60)[2]
            assert end.reason == "failed" and isinstance(end.error, ZeroDivisionError)
        end = engine.submit(GenerationRequest([1, 2, 3], {"max_new_tokens": 20})).result(60)[2]
        assert end.token_ids == alone(model, [1, 2, 3], {"max_new_tokens": 20})
        assert engine.stats().sessions == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest([]), "input_ids"),
        (GenerationRequest("text"), "input_ids"),
        (GenerationRequest(b"text"), "input_ids"),
        (GenerationRequest(torch.zeros(0, dtype=torch.long)), "input_ids"),
        (GenerationRequest([[1]]), "at position 0"),
        (GenerationRequest([1], ["max_new_tokens"]), "options"),
        (GenerationRequest([1], {1: 2}), "options"),
        (GenerationRequest([1, 10**6]), "at position 1"),
        (GenerationRequest([-1]), "at position 0"),
        (GenerationRequest([1, 2.5]), "at position 1"),
        (GenerationRequest(torch.ones(2, 3, dtype=torch.long)), "shape"),
        (GenerationRequest([1], {"max_tokens": 3}), "max_tokens"),
        (GenerationRequest([1], {"__dict__": 3}), "__dict__"),
        (GenerationRequest([1], {"num_beams": 3}), "num_beams"),
        (GenerationRequest([1], {"num_return_sequences": 2}), "num_return_sequences"),
        (GenerationRequest([1], {"audio_steps_per_block": 0}), "audio_steps_per_block"),
        (GenerationRequest([1], {"max_new_tokens": 0}), "max_new_tokens"),
        (GenerationRequest([1], {"seed": 1}, seed=2), "seed"),
        (GenerationRequest([1], seed=-1), "seed"),
        (GenerationRequest([1], {"max_new_tokens": 100}), "longer than 64"),
        (GenerationRequest([1] * 64), "no room"),
        (GenerationRequest([1], modalities=("audio",)), "modalities"),
        (GenerationRequest([1], modalities="text"), "modalities"),
        (GenerationRequest([1], deadline=float("nan")), "deadline"),
        (GenerationRequest([1], session=""), "session"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(request_, message):
    with ENGINES["strict"] as engine, pytest.raises(ValueError, match=message):
        engine.submit(request_)


class _Once:
    """An engine that is started at its first use and left to its end."""

    def __init__(self):
        self.engine = None

    def __enter__(self) -> Engine:
        if self.engine is None:
            self.engine = Engine(varied(), PROCESSOR, max_context=64).start()
        return self.engine

    def __exit__(self, *_) -> None:
        pass


ENGINES = {"strict": _Once()}


def test_a_default_length_is_cut_to_the_context():
    with ENGINES["strict"] as engine:
        end = engine.submit(GenerationRequest([1] * 60, {"min_new_tokens": 50})).result(60)[2]
        assert end.reason == "length" and len(end.token_ids) == 4


@pytest.mark.parametrize(
    ("waveform", "rate"),
    [
        (np.zeros(0), 16_000),
        (np.zeros((2, 100)), 16_000),
        (np.zeros(100), 0),
        (np.full(100, np.nan), 16_000),
        ("x", 8000),
    ],
)
def test_audio_that_is_none_is_refused(waveform, rate):
    with ENGINES["strict"] as engine, pytest.raises(ValueError):
        engine.encode_audio(waveform, rate)


def test_long_audio_is_refused_before_it_is_read():
    with ENGINES["strict"] as engine, pytest.raises(ValueError, match="at most 60 s"):
        engine.encode_audio(np.zeros(61 * 8000, dtype=np.int16), 8000)


def test_models_that_cannot_be_served_are_refused():
    with pytest.raises(ValueError, match="max_rows"):
        Engine(varied(), PROCESSOR, max_rows=0)
    training = build_varied_model(PROCESSOR).train()
    with pytest.raises(ValueError, match="eval"):
        Engine(training, PROCESSOR)
    with pytest.raises(ValueError, match="generate_batch"):
        Engine(build_varied_model(PROCESSOR, audio_objective="autoregressive"), PROCESSOR)
    engine = Engine(varied(), PROCESSOR)
    with pytest.raises(EngineClosed):
        engine.submit(GenerationRequest([1]))
    engine.close()
    with pytest.raises(EngineClosed):
        engine.start()


def test_stop_strings_end_an_answer():
    model, ids = varied(), PROCESSOR.token_ids
    begins = [ids.begin_of_audio_token_id, ids.begin_of_last_audio_token_id]
    options = {"max_new_tokens": 60, "suppress_tokens": begins, "do_sample": True, "seed": 0}
    letters = [PROCESSOR.tokenizer.decode([token]) for token in alone(model, [1, 2, 3], options)]
    options["stop_strings"] = [next(letter for letter in letters if letter.isascii() and letter.isprintable())]
    with ENGINES["strict"] as engine:
        end = engine.submit(GenerationRequest([1, 2, 3], options)).result(60)[2]
    assert end.token_ids == alone(model, [1, 2, 3], options | {"tokenizer": PROCESSOR.tokenizer})
    assert end.reason == "stop" and len(end.token_ids) < len(letters)


def test_odd_prompts_are_continued_and_their_sessions_kept():
    model, ids = varied(), PROCESSOR.token_ids
    options = {"max_new_tokens": 10, "audio_block_size": 4}
    code, begin, end_ = ids.audio_code_id_start, ids.begin_of_audio_token_id, ids.end_of_audio_token_id
    with ENGINES["strict"] as engine:
        for prompt in ([ids.mask_token_id], [code] * 3, [begin], [end_], [ids.end_of_turn_token_id], [0]):
            end = engine.submit(GenerationRequest(prompt, options, session="odd")).result(60)[2]
            assert end.token_ids == alone(model, prompt, options)
            generation = engine.submit(GenerationRequest(prompt, options, session="odd"))
            generation.cancel()
            assert generation.result(60)[2].reason == "cancelled"


def test_readers_that_vanish_leave_nothing_behind():
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "audio_block_size": 4}

    async def read(engine: Engine) -> None:
        generation = engine.submit(GenerationRequest([1, 2, 3], options))
        try:
            async for _ in generation:
                pass
        finally:
            generation.cancel()

    async def main() -> None:
        async with Engine(varied(), PROCESSOR, max_rows=3) as engine:
            readers = [asyncio.create_task(read(engine)) for _ in range(6)]
            while engine.stats().text_tokens + engine.stats().audio_codes < 10:
                await asyncio.sleep(0.01)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        assert engine.stats().rows == engine.stats().queued == engine._cache.rows_held == 0
        assert not engine._answers._answers and not engine._decoder.rows

    asyncio.run(main())


def test_many_threads_submit_at_once():
    model, ends = varied(), []
    options = {"max_new_tokens": 8, "audio_block_size": 4}
    expected = alone(model, [1, 2, 3], options)
    with Engine(model, PROCESSOR) as engine:

        def ask() -> None:
            ends.append(engine.submit(GenerationRequest([1, 2, 3], options)).result(60)[2])

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [end.token_ids for end in ends] == [expected] * 12
