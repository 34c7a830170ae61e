"""Stock clients, unchanged, talk to a real server with ttt-tiny: openai's HTTP and Realtime clients, openai-agents."""

import asyncio
import base64
import io

import numpy as np
import pytest
import soundfile
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from serving import ANSWER, QUESTION, ROOT, SECONDS, question_pcm, serve, silence_pcm

from modeling_ttt import TttForConditionalGeneration
from processing import TttProcessor

TINY = ROOT / "model_cards" / "ttt-tiny"
KEY = "a-key-for-these-tests"
pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="the default model is not there")
MODEL = "ttt-tiny"


@pytest.fixture(scope="module")
def server():
    model = TttForConditionalGeneration.from_pretrained(TINY, dtype="float32").eval()
    with serve(model, TttProcessor.from_pretrained(TINY), keys=[KEY]) as running:
        yield running


@pytest.fixture
def client(server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=SECONDS, max_retries=0)


def asynchronous(server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=SECONDS, max_retries=0)


def spoken_question() -> dict:
    audio = {"data": base64.b64encode(QUESTION.read_bytes()).decode(), "format": "wav"}
    return {"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}


def is_speech(samples: np.ndarray, seconds: float = 1.0) -> bool:
    return len(samples) > seconds * 24_000 and np.abs(samples).max() > 0.05


# ---- HTTP ----------------------------------------------------------------------------------------------------------


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


def test_speech_is_streamed_and_heard_back_by_the_transcription(client):
    with client.audio.speech.with_streaming_response.create(model=MODEL, voice="alloy", input=ANSWER) as response:
        content = b"".join(response.iter_bytes())
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == 24_000 and is_speech(samples)
    flac = client.audio.speech.create(model=MODEL, voice="alloy", input=ANSWER, response_format="flac").content
    assert np.abs(soundfile.read(io.BytesIO(flac), dtype="float32")[0] - samples).max() < 1e-4
    pcm = client.audio.speech.create(model=MODEL, voice="alloy", input=ANSWER, response_format="pcm").content
    assert pcm == content[44:]


def test_speech_as_events(client):
    kwargs = {"model": MODEL, "voice": "alloy", "input": ANSWER, "response_format": "pcm"}
    with client.audio.speech.with_streaming_response.create(**kwargs, stream_format="sse") as response:
        lines = [line for line in response.iter_lines() if line]
    assert '"speech.audio.delta"' in lines[0] and '"speech.audio.done"' in lines[-1] and '"total_tokens"' in lines[-1]


def test_transcriptions_in_every_form(client):
    kwargs = {"model": MODEL, "file": QUESTION}
    heard = client.audio.transcriptions.create(**kwargs).text
    assert heard.endswith("seven plus eight")
    text = client.audio.transcriptions.create(**kwargs, response_format="text", language="en", temperature=0)
    assert text == f"{heard}\n"
    events = list(client.audio.transcriptions.create(**kwargs, stream=True))
    assert "".join(event.delta for event in events[:-1]).strip() == events[-1].text == heard


def test_a_spoken_question_is_answered_in_speech_and_the_answer_is_remembered_by_its_id(client):
    audio = {"voice": "alloy", "format": "wav"}
    kwargs = {"model": MODEL, "modalities": ["text", "audio"], "audio": audio}
    first = client.chat.completions.create(messages=[spoken_question()], **kwargs)
    message = first.choices[0].message
    assert message.audio.transcript == ANSWER and first.choices[0].finish_reason == "stop"
    assert is_speech(soundfile.read(io.BytesIO(base64.b64decode(message.audio.data)), dtype="float32")[0])
    later = [spoken_question(), {"role": "assistant", "audio": {"id": message.audio.id}}, spoken_question()]
    second = client.chat.completions.create(messages=later, **kwargs)
    assert second.choices[0].message.audio.transcript
    # The prompt has the answer's text and codes: one more question, the answer, and the turns around them.
    assert second.usage.prompt_tokens > 2 * first.usage.prompt_tokens + first.usage.completion_tokens - 15
    later[1]["audio"]["id"] = "audio_of_another_server"
    with pytest.raises(NotFoundError) as error:
        client.chat.completions.create(messages=later, **kwargs)
    assert error.value.code == "audio_not_found"


def test_an_answer_may_come_back_as_the_client_has_it(client):
    kwargs = {"model": MODEL, "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
    first = client.chat.completions.create(messages=[spoken_question()], **kwargs).choices[0].message
    again = [spoken_question(), first.model_dump(), {"role": "user", "content": "what is two plus two"}]
    assert client.chat.completions.create(messages=again, **kwargs).choices[0].message.audio.transcript


def test_a_written_question_is_answered_in_text_alone(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "what is seven plus eight"}], seed=3, temperature=0
    )
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].message.audio is None
    assert answer.usage.completion_tokens_details.audio_tokens == 0


def test_a_spoken_answer_is_streamed(client):
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[spoken_question()],
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    audio = [chunk.choices[0].delta.to_dict().get("audio", {}) for chunk in chunks if chunk.choices]
    assert "".join(part.get("transcript", "") for part in audio) == ANSWER
    pcm = b"".join(base64.b64decode(part.get("data", "")) for part in audio)
    assert is_speech(np.frombuffer(pcm, "<i2") / 32768)
    assert len({part["id"] for part in audio if "id" in part}) == 1 and any("expires_at" in part for part in audio)
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 20


def test_options_of_generation_go_into_the_field_ttt(client):
    kwargs = {"model": MODEL, "messages": [{"role": "user", "content": "what is seven plus eight"}]}
    answer = client.chat.completions.create(**kwargs, extra_body={"ttt": {"max_new_tokens": 3}})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3
    with pytest.raises(BadRequestError, match="audio_blocks"):
        client.chat.completions.create(**kwargs, extra_body={"ttt": {"audio_blocks": 3}})
    with pytest.raises(BadRequestError, match="There is no task 'sing'"):
        client.chat.completions.create(**kwargs, extra_body={"ttt": {"task": "sing"}})


# ---- Realtime ------------------------------------------------------------------------------------------------------


async def until(connection, kind: str) -> list:
    """Events up to the first of a type."""
    events = []
    async for event in connection:
        events.append(event)
        assert event.type != "error", event
        if event.type == kind:
            return events
    raise AssertionError(f"no {kind} came")


def spoken(events) -> np.ndarray:
    deltas = [base64.b64decode(event.delta) for event in events if event.type == "response.output_audio.delta"]
    return np.frombuffer(b"".join(deltas), "<i2") / 32768


def test_realtime_with_server_vad_hears_the_question_and_answers_it(server):
    async def talk() -> list:
        async with asynchronous(server).realtime.connect(model=MODEL) as connection:
            events = await until(connection, "session.created")
            await connection.session.update(
                session={
                    "type": "realtime",
                    "output_modalities": ["audio"],
                    "audio": {
                        "input": {
                            "format": {"type": "audio/pcm", "rate": 24000},
                            "transcription": {"model": "whisper-1"},
                            "turn_detection": {"type": "server_vad", "silence_duration_ms": 400},
                        }
                    },
                }
            )
            events += await until(connection, "session.updated")
            pcm = silence_pcm(0.5) + question_pcm() + silence_pcm(1.0)
            for start in range(0, len(pcm), 9_600):
                piece = base64.b64encode(pcm[start : start + 9_600]).decode()
                await connection.input_audio_buffer.append(audio=piece)
            events += await until(connection, "response.done")
            if not any(event.type.endswith("transcription.completed") for event in events):
                events += await until(connection, "conversation.item.input_audio_transcription.completed")
            return events

    events = asyncio.run(talk())
    kinds = [event.type for event in events]
    order = """session.created session.updated input_audio_buffer.speech_started input_audio_buffer.speech_stopped
        input_audio_buffer.committed conversation.item.added conversation.item.done response.created
        response.output_item.added conversation.item.added response.content_part.added
        response.output_audio_transcript.delta response.output_audio.delta response.output_audio.done
        response.output_audio_transcript.done response.content_part.done response.output_item.done
        conversation.item.done response.done""".split()
    position = -1
    for kind in order:
        assert kind in kinds[position + 1 :], f"{kind} is not in {kinds} after {position}"
        position = kinds.index(kind, position + 1)
    assert len({event.event_id for event in events}) == len(events)
    by_kind = {event.type: event for event in events}
    done = by_kind["response.done"].response
    assert done.status == "completed" and done.output[0].content[0].transcript == ANSWER
    transcript = by_kind["conversation.item.input_audio_transcription.completed"]
    assert transcript.transcript.endswith("seven plus eight")
    assert transcript.item_id == by_kind["input_audio_buffer.committed"].item_id
    started, stopped = by_kind["input_audio_buffer.speech_started"], by_kind["input_audio_buffer.speech_stopped"]
    assert started.item_id == stopped.item_id == transcript.item_id
    ends = 500 + 1000 * soundfile.info(QUESTION).duration
    assert 0 <= started.audio_start_ms < 700 and ends - 400 < stopped.audio_end_ms < ends + 1000
    assert is_speech(spoken(events))
    usage = done.usage
    assert usage.input_token_details.audio_tokens > 10 and usage.output_token_details.audio_tokens > 10
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_realtime_turns_by_hand_in_text_and_speech_share_one_conversation(server):
    async def talk():
        async with asynchronous(server).realtime.connect(model=MODEL) as connection:
            await connection.session.update(
                session={
                    "type": "realtime",
                    "audio": {"input": {"turn_detection": None}},
                    "output_modalities": ["text"],
                }
            )
            await connection.input_audio_buffer.append(audio=base64.b64encode(question_pcm()).decode())
            await connection.input_audio_buffer.commit()
            await connection.response.create()
            first = await until(connection, "response.done")
            await connection.conversation.item.create(
                item={
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "what is two plus two"}],
                }
            )
            await connection.response.create(response={"output_modalities": ["audio"]})
            return first, await until(connection, "response.done")

    first, second = asyncio.run(talk())
    assert first[-1].response.output[0].content[0].text == ANSWER and not len(spoken(first))
    assert "".join(event.delta for event in first if event.type == "response.output_text.delta") == ANSWER
    done = second[-1].response
    assert done.output[0].content[0].transcript and is_speech(spoken(second), 0.5)
    assert done.usage.input_tokens > first[-1].response.usage.input_tokens


def test_openai_agents_talks_with_its_own_defaults(server):
    from agents.realtime import RealtimeAgent, RealtimeRunner

    async def talk() -> tuple[list, str]:
        runner = RealtimeRunner(RealtimeAgent(name="tiny"))
        session = await runner.run(model_config={"url": f"{server.ws}/v1/realtime", "api_key": KEY})
        audio, history = [], []
        async with session:
            await session.send_audio(silence_pcm(0.5) + question_pcm() + silence_pcm(1.5))
            async for event in session:
                assert event.type != "error", event
                if event.type == "audio":
                    audio.append(event.audio.data)
                elif event.type == "history_updated":
                    history = event.history
                elif event.type == "agent_end":
                    break
        assistant = [item for item in history if getattr(item, "role", "") == "assistant"]
        return audio, assistant[-1].content[0].transcript

    audio, transcript = asyncio.run(asyncio.wait_for(talk(), SECONDS))
    assert transcript == ANSWER and is_speech(np.frombuffer(b"".join(audio), "<i2") / 32768)
