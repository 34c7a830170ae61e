"""The audio-to-audio pipeline: all forms of request, streams, batches, and a process that has only the model folder."""

import copy
import io
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from builders import build_model, build_processor, run_without_packages, tone, write_wav
from datasets import Dataset as HubDataset
from datasets import DatasetDict
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset
from transformers import AutoConfig, pipeline

from pipelines import TttAudioToAudioPipeline

PROMPTS = {
    **{"spoken_chat": "Chat.", "asr": "Write.", "tts": "Read.", "captioning": "Look.", "text_chat": "Talk."},
    "translate": {"system_prompt": "Translate.", "needs_text": True},
    "match": {"system_prompt": "Match.", "needs_text": True, "needs_audio": True},
}


@pytest.fixture(scope="module")
def pipe():
    processor = build_processor(system_prompts=PROMPTS)
    return TttAudioToAudioPipeline(model=build_model(processor), processor=processor, device="cpu")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(pipe, monkeypatch):
    """The prompts, as text, that reach `generate`."""
    seen = []
    generate = pipe.model.generate

    def record(input_ids, attention_mask, **options):
        for row, mask in zip(input_ids, attention_mask, strict=True):
            seen.append(pipe.tokenizer.decode(row[mask.bool()]))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(pipe.model, "generate", record)
    return seen


def assert_answer(pipe, answer):
    assert answer["text"] == "hi" and answer["sampling_rate"] == 16_000
    assert np.allclose(answer["audio"], pipe.processor.decode_audio([[3] * 40])[0], atol=1e-5)
    assert set(answer) == {"text", "audio", "sampling_rate"}


def test_one_question_gives_one_answer(pipe, prompts, tmp_path):
    path = write_wav(tmp_path / "question.wav", tone(0.3))
    for request in (tone(0.3), torch.tensor(tone(0.3)), str(path), path, {"array": tone(0.3), "sampling_rate": 16_000}):
        assert_answer(pipe, pipe(request))
    assert all(prompt.startswith("<|im_start|>system\nChat.<|im_end|>") for prompt in prompts)
    assert len(prompts) == 5


def test_audio_comes_in_every_form_with_its_rate(pipe, prompts, tmp_path):
    samples = tone(0.3, sampling_rate=8_000)
    path = write_wav(tmp_path / "question.wav", samples, 8_000)
    content = path.read_bytes()
    requests = [
        {"audio": samples, "sampling_rate": 8_000},  # as pipelines return it
        {"raw": samples, "sample_rate": 8_000},
        (samples, 8_000),
        (8_000, samples),
        {"audio": {"array": samples, "sampling_rate": 8_000}},
        {"audio": str(path)},
        {"file": str(path)},
        {"url": f"file://{path}"},
        {"bytes": content, "path": None},
        content,
        bytearray(content),
        memoryview(content),
    ]
    for request in requests:
        pipe(request)
    pipe(io.BytesIO(content))
    with open(path, "rb") as file:
        pipe(file)
    pipe(samples, sampling_rate=8_000)
    alone = len(prompts)
    assert len(pipe([*requests, io.BytesIO(content), open(path, "rb")], batch_size=5)) == len(requests) + 2
    assert len(pipe((str(path), str(path)))) == 2
    assert alone == len(requests) + 3 and len(set(prompts)) == 1


def test_an_answer_can_be_asked_about(pipe, prompts):
    answer = pipe(tone(0.3))
    pipe({name: answer[name] for name in ("audio", "sampling_rate")}, task="asr")
    pipe({"audio_codes": [3] * 40}, task="asr")
    assert len(prompts) == 3 and prompts[2].count("<|audio_3|>") == 40


def test_lists_give_lists_whatever_the_batch_size(pipe, prompts):
    requests = [tone(0.3), tone(0.9), tone(0.5)]
    for batch_size in (1, 2, 3):
        answers = pipe(requests, batch_size=batch_size, task="asr", num_workers=0)
        assert isinstance(answers, list) and len(answers) == 3
        for answer in answers:
            assert_answer(pipe, answer)
    assert prompts[:3] == prompts[3:6] == prompts[6:] and "Write." in prompts[0]
    assert pipe([]) == []


def test_generators_datasets_and_columns_are_answered_as_they_are_read(pipe):
    datasets = pytest.importorskip("datasets")
    read = []

    def generator():
        for seconds in (0.2, 0.4):
            read.append(seconds)
            yield tone(seconds)

    answers = pipe(generator())
    assert_answer(pipe, next(answers))
    assert read == [0.2]
    assert len(list(answers)) == 1

    rows = [{"array": tone(0.2), "sampling_rate": 16_000}] * 2
    dataset = datasets.Dataset.from_dict({"audio": rows, "text": ["transcript"] * 2})
    for inputs in (dataset, dataset["audio"]):
        answers = list(pipe(inputs, batch_size=2))
        assert len(answers) == 2
        assert_answer(pipe, answers[0])

    class Sounds(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return [tone(0.2), tone(0.3)][index]

    assert len(list(pipe(Sounds()))) == 2


def test_a_datasets_transcript_never_reaches_the_model(pipe, prompts):
    datasets = pytest.importorskip("datasets")
    rows = [{"array": tone(0.2), "sampling_rate": 16_000}]
    dataset = datasets.Dataset.from_dict({"audio": rows, "text": ["the transcript"]})
    list(pipe(dataset, task="asr"))
    list(pipe(dataset, task="tts"))
    assert "transcript" not in prompts[0] and "the transcript" in prompts[1]
    with pytest.raises(ValueError, match="no column `audio`; it has text"):
        list(pipe(dataset.remove_columns("audio")))


def test_a_datasets_audio_column_needs_no_decoder(pipe, prompts, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = [str(write_wav(tmp_path / f"{seconds}.wav", tone(seconds))) for seconds in (0.2, 0.4)]
    dataset = datasets.Dataset.from_dict({"audio": paths}).cast_column("audio", datasets.Audio(sampling_rate=8_000))
    for inputs in (dataset, dataset.to_iterable_dataset()):
        assert len(list(pipe(inputs, batch_size=2))) == 2
    list(pipe(paths))
    assert prompts[:2] == prompts[2:4] == prompts[4:]


def test_text_requests_are_spoken(pipe, prompts):
    assert_answer(pipe, pipe("one two", task="tts"))
    assert_answer(pipe, pipe(text="one two", task="tts"))
    assert_answer(pipe, pipe(text="how are you"))
    assert len(pipe(["one", "two"], task="tts", batch_size=2)) == 2
    assert prompts[0] == prompts[1] and "Read." in prompts[0] and "one two" in prompts[0]
    assert "Talk." in prompts[2] and "how are you" in prompts[2]


def test_text_goes_with_audio(pipe, prompts):
    pipe(tone(0.2), text="Which sound?", task="captioning")
    pipe({"audio": tone(0.2), "text": "Which sound?"}, task="captioning")
    pipe(tone(0.2), task="captioning", system_prompt="Listen.")
    assert prompts[0] == prompts[1] and "Which sound?<|begin_of_audio|>" in prompts[0]
    assert prompts[2].startswith("<|im_start|>system\nListen.")


def test_conversations_are_answered(pipe, prompts):
    turn = {"role": "user", "content": [{"type": "audio", "audio": tone(0.2)}]}
    assert_answer(pipe, pipe([turn]))
    assert len(pipe([[turn], [turn, {"role": "assistant", "content": "yes"}, turn]], batch_size=2, task="asr")) == 2
    assert prompts[0].startswith("<|im_start|>user") and prompts[2].startswith("<|im_start|>system\nWrite.")
    assert "yes<|im_end|>" in prompts[2]


def test_conversations_may_come_by_name(pipe, prompts):
    turn = {"role": "user", "content": [{"type": "audio", "audio": tone(0.2), "sampling_rate": 8_000}]}
    assert_answer(pipe, pipe({"messages": [turn]}))
    pipe([{"messages": [turn]}, [turn]], batch_size=2)
    assert len(set(prompts)) == 1 and len(prompts) == 3


def test_a_task_of_the_processors_own_takes_what_it_says_it_needs(pipe, prompts):
    pipe("guten Tag", task="translate")
    pipe(["guten Tag", {"text": "guten Tag"}], task="translate", batch_size=2)
    assert len(set(prompts)) == 1 and "Translate." in prompts[0] and "guten Tag" in prompts[0]
    pipe(tone(0.2), task="match", text="a tone")
    assert "Match." in prompts[3] and "a tone<|begin_of_audio|>" in prompts[3]
    with pytest.raises(FileNotFoundError, match="there is no file 'a tone'"):
        pipe("a tone", task="match", text="a tone")


def test_a_stream_gives_pieces_that_join_to_the_answer(pipe):
    pieces = list(pipe(tone(0.3), stream=True))
    whole = pipe(tone(0.3))
    waveform = np.concatenate([piece["audio"] for piece in pieces if "audio" in piece])
    assert "".join(piece.get("text", "") for piece in pieces) == whole["text"]
    assert len(waveform) == len(whole["audio"])
    error = np.sqrt(np.mean((waveform - whole["audio"]) ** 2) / np.mean(whole["audio"] ** 2))
    assert error < 0.01  # -40 dB


def test_a_stream_that_is_left_early_stops_generating(pipe):
    stream = pipe(tone(0.3), stream=True)
    assert next(stream) == {"text": "h"}
    stream.close()
    assert_answer(pipe, pipe(tone(0.3)))


def test_an_error_while_streaming_reaches_the_reader(pipe):
    with pytest.raises(ValueError, match="audio_steps_per_block"):
        list(pipe(tone(0.3), stream=True, generate_kwargs={"audio_steps_per_block": 0}))


def test_generate_kwargs_are_passed_on(pipe):
    answer = pipe(tone(0.3), generate_kwargs={"max_audio_codes_per_span": 5, "audio_steps_per_block": 4})
    assert len(answer["audio"]) == 5 * 1280
    assert pipe(tone(0.3), generate_kwargs={"max_new_tokens": 1})["text"] == "h"


class Polite(TttAudioToAudioPipeline):
    pass


def test_a_pipeline_of_ones_own_is_saved_as_such(pipe, tmp_path):
    polite = Polite(model=pipe.model, processor=pipe.processor, device="cpu")
    polite.save_pretrained(tmp_path)
    named = AutoConfig.from_pretrained(tmp_path).custom_pipelines["audio-to-audio"]["impl"]
    assert named == "test_pipeline.Polite" and (tmp_path / "test_pipeline.py").exists()
    pipe.save_pretrained(tmp_path / "ours")
    named = AutoConfig.from_pretrained(tmp_path / "ours").custom_pipelines["audio-to-audio"]["impl"]
    assert named == "pipeline_ttt.TttAudioToAudioPipeline"


def test_a_pipeline_that_came_with_a_folder_saves_its_code_again(folder, tmp_path):
    loaded = pipeline("audio-to-audio", model=str(folder), trust_remote_code=True, device="cpu")
    assert type(loaded) is not TttAudioToAudioPipeline
    loaded.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {path.name for path in folder.glob("*.py")}
    assert loaded.model.config.custom_pipelines["audio-to-audio"]["impl"] == "pipeline_ttt.TttAudioToAudioPipeline"


def test_pushing_a_pipeline_uploads_a_repository_that_answers(pipe, tmp_path, monkeypatch):
    """The network calls are replaced by a local folder; everything else is what a real push does."""
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **kwargs):
            for operation in operations:
                path = tmp_path / repo_id / operation.path_in_repo
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(operation.path_or_fileobj, path)

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# tiny"))
    pipe.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="someone/tiny")
    pushed = pipeline("audio-to-audio", model=str(tmp_path / "someone" / "tiny"), trust_remote_code=True, device="cpu")
    assert_answer(pipe, pushed(tone(0.3)))


def test_one_answer_a_request_and_one_request_a_batch_at_least(pipe):
    with pytest.raises(ValueError, match="`num_return_sequences` is 2, but a request gets one answer"):
        pipe([tone(0.1)] * 2, generate_kwargs={"do_sample": True, "num_return_sequences": 2})
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}"):
            pipe([tone(0.1)], batch_size=batch_size)


def test_unusable_requests_are_named_by_position(pipe):
    with pytest.raises(ValueError, match="audio part 0 of input 2 is empty"):
        pipe([tone(0.1), tone(0.1), np.zeros(0)], batch_size=2)
    with pytest.raises(FileNotFoundError, match="audio part 0 of input 1: there is no file 'hello'"):
        pipe([tone(0.1), "hello"])
    with pytest.raises(ValueError, match="input 0: There is no task 'sing'"):
        pipe(tone(0.1), task="sing")
    with pytest.raises(ValueError, match="input 0: The task 'tts' takes `text` alone"):
        pipe([tone(0.1)], task="tts", text="two")
    with pytest.raises(ValueError, match="one request at a time"):
        pipe([tone(0.1), tone(0.1)], stream=True)
    with pytest.raises(ValueError, match="Pass a request"):
        pipe()


TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        ([None], {}, "input 0: There is nothing in it"),
        ({}, {}, "input 0: There is nothing in it"),
        ({"audio": None}, {}, "input 0: There is nothing in it"),
        ({"sound": [0.1]}, {}, "message 1 of input 0 has an audio part with `sound`"),
        ({"audio": "a.wav", "txt": "hi"}, {}, "message 1 of input 0 has an audio part with `txt`"),
        ({"text": "hi", "task": "tts"}, {}, "`task` is an option of the call, for all its requests"),
        ({"text": 3}, {}, "message 1 of input 0 has a text part without a string"),
        ({"messages": []}, {}, "input 0: `messages` must be a list of mappings with `role`"),
        ({"messages": [TURN], "text": "hi"}, {}, "input 0: `messages` stands alone"),
        ([TURN], {"text": "hi"}, "input 0: `text` goes with audio"),
        ([{"role": "user"}], {}, "message 0 of input 0 must be a mapping with `role` and `content`"),
        (["one"], {"task": "tts", "text": "two"}, "input 0: The request is the text of 'tts' itself"),
    ],
)
def test_errors_say_what_is_wrong_with_a_request(pipe, request_, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(request_, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": 3}, "`text` is 3; it must be a string"),
        ({"task": ["asr"]}, r"`task` is \['asr'\]; it must be a string"),
        ({"stream": "yes"}, "`stream` is 'yes'; it must be True or False"),
        ({"batch_size": "2"}, "`batch_size` is '2'; it must be an integer"),
        ({"batch_size": True}, "`batch_size` is True"),
        ({"system_prompt": 3}, "`system_prompt` is 3"),
        ({"sampling_rate": "8k"}, "`sampling_rate` is '8k'; it must be a number, in Hz"),
        ({"generate_kwargs": [("seed", 1)]}, "`generate_kwargs` is .*; it must be a mapping"),
        ({"max_new_tokens": 5}, "no argument `max_new_tokens`; options of `generate` go into `generate_kwargs`"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(pipe, options, message):
    with pytest.raises(TypeError, match=message):
        pipe(tone(0.1), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": "5"}, "^`max_new_tokens` is '5'; use an integer"),
        ({"audio_remasking": "best"}, "^`audio_remasking` is 'best'"),
        ({"temperature": "hot"}, "^`temperature` is 'hot'"),
        ({"num_beams": 2}, "^`num_beams=2` asks for beam search"),
        ({"no_such_option": 1}, "^The following `model_kwargs` are not used"),
        ({"input_ids": torch.ones(1, 3).long()}, "^`generate_kwargs` has `input_ids`, which the request becomes"),
    ],
)
def test_a_wrong_option_is_not_blamed_on_a_request(pipe, options, message):
    for request in (tone(0.1), [tone(0.1)] * 2, iter([tone(0.1)])):
        with pytest.raises(ValueError, match=message):
            pipe(request, generate_kwargs=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^`batch_size` is 0; use 1 or more"),
        ({"batch_size": "2"}, "^`batch_size` is '2'; it must be an integer"),
        ({"num_beams": 2}, "^`num_beams=2` asks for beam search"),
        ({"generate_kwargs": {"num_beams": 2}}, "^`num_beams=2` asks for beam search"),
        (
            {"generate_kwargs": {"num_return_sequences": 2, "do_sample": True}},
            "^`num_return_sequences` is 2, but a request",
        ),
        ({"stream": True}, "^`stream` belongs to a request"),
    ],
)
def test_a_wrong_option_is_refused_where_the_pipeline_is_made(pipe, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TttAudioToAudioPipeline(pipe.model, processor=pipe.processor, **options)


def test_a_call_may_override_what_the_checkpoint_asks_for(pipe):
    model = copy.deepcopy(pipe.model)
    model.generation_config.num_beams = 2
    other = TttAudioToAudioPipeline(model, processor=pipe.processor)
    with pytest.raises(ValueError, match="^`num_beams=2` asks for beam search"):
        other(tone(0.1))
    assert_answer(pipe, other(tone(0.1), generate_kwargs={"num_beams": 1}))
    assert_answer(pipe, other({"audio": tone(0.1), "task": None}, generate_kwargs={"num_beams": 1}))


def test_a_model_that_writes_no_answers_is_refused(pipe):
    with pytest.raises(ValueError, match="^`model` is a TttModel, which writes no answers"):
        TttAudioToAudioPipeline(model=pipe.model.model, processor=pipe.processor)


def test_the_any_to_any_pipeline_speaks(pipe):
    other = pipeline("any-to-any", model=pipe.model, processor=pipe.processor)
    request = [{"role": "user", "content": [{"type": "audio", "audio": tone(0.3)}]}]
    answer = other(request, generation_mode="audio", max_new_tokens=30)[0]["generated_audio"]
    expected = pipe(request, generate_kwargs={"max_new_tokens": 30})
    assert np.array_equal(answer, expected["audio"]) and len(answer)
    assert other(request, return_full_text=False, max_new_tokens=30)[0]["generated_text"] == expected["text"]


def test_a_stream_has_one_streamer(pipe):
    with pytest.raises(ValueError, match="^`generate_kwargs` has a `streamer`, but `stream=True` brings its own"):
        pipe(tone(0.1), stream=True, generate_kwargs={"streamer": pipe.processor.streamer()})


@pytest.mark.parametrize("bad", [np.zeros(0), tone(300)])  # refused by the processor, and by the model
@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_before_a_request_that_fails_are_not_lost(pipe, bad, batch_size):
    requests = [tone(0.1), tone(0.2), tone(0.3), tone(0.1), bad, tone(0.1)]
    answers = pipe(iter(requests), batch_size=batch_size)
    for _ in range(4):
        assert_answer(pipe, next(answers))
    with pytest.raises(ValueError, match="input 4"):
        next(answers)
    with pytest.raises(ValueError, match="input 4") as caught:
        pipe(requests, batch_size=batch_size)
    assert len(caught.value.results) == 4
    assert_answer(pipe, caught.value.results[3])
    assert "attribute `results`" in caught.value.__notes__[-1]


def test_pipeline_builds_everything_from_a_path(pipe, folder):
    loaded = pipeline("audio-to-audio", model=str(folder), trust_remote_code=True, device="cpu")
    assert_answer(pipe, loaded(tone(0.3)))


ALONE = """
import numpy as np
from transformers import AutoConfig, AutoModel, AutoModelForAudioTokenization, AutoProcessor, pipeline

folder = sys.argv[1]
pipe = pipeline("audio-to-audio", model=folder, trust_remote_code=True, device="cpu")
answer = pipe({"array": np.zeros(8000, dtype=np.float32), "sampling_rate": 8000})
print(type(pipe).__name__, answer["text"], len(answer["audio"]), answer["sampling_rate"])
pieces = list(pipe(np.zeros(8000), stream=True))
print("".join(p.get("text", "") for p in pieces), sum(len(p["audio"]) for p in pieces if "audio" in p))
for auto in (AutoConfig, AutoModel, AutoProcessor):
    print(type(auto.from_pretrained(folder, trust_remote_code=True)).__name__)
for options in ({"subfolder": "audio_tokenizer"}, {}):
    path = folder if options else folder + "/audio_tokenizer"
    print(type(AutoModelForAudioTokenization.from_pretrained(path, trust_remote_code=True, **options)).__name__)
"""


def test_the_folder_alone_is_enough(folder, tmp_path):
    assert run_without_packages(ALONE, folder, cwd=tmp_path) == [
        "TttAudioToAudioPipeline hi 51200 16000",
        "hi 51200",
        "TttConfig",
        "TttForConditionalGeneration",
        "TttProcessor",
        "TttCodecModel",
        "TttCodecModel",
    ]


def test_answers_before_requests_that_cannot_be_read_are_not_lost(pipe):
    def requests():
        yield from [tone(0.1)] * 5
        raise OSError("disk gone")

    answers = pipe(requests(), batch_size=3)
    for _ in range(5):
        assert_answer(pipe, next(answers))
    with pytest.raises(OSError, match="disk gone"):
        next(answers)


def test_an_offloaded_audio_tokenizer_stays_where_it_is(pipe):
    processor = copy.copy(pipe.processor)
    processor.audio_tokenizer = cpu_offload(
        copy.deepcopy(processor.audio_tokenizer), execution_device=torch.device("cpu")
    )
    away = pipeline("audio-to-audio", model=pipe.model, processor=processor, device="cpu")
    assert isinstance(away, TttAudioToAudioPipeline)
    assert np.array_equal(away(tone(0.5))["audio"], pipe(tone(0.5))["audio"])


def test_audio_that_no_context_holds_is_refused_before_it_is_encoded(pipe, monkeypatch):
    monkeypatch.setattr(pipe.processor.audio_tokenizer, "encode", lambda *args, **kwargs: pytest.fail("encoded"))
    seconds = pipe.model.config.text_config.max_position_embeddings / pipe.processor.audio_format.frame_rate
    with pytest.raises(ValueError, match=rf"audio part 0 of input 0 lasts .* Pass less than {seconds:.0f} s"):
        pipe(np.zeros(round(16_000 * (seconds + 1)), dtype=np.float32))


def test_a_dictionary_of_data_sets_is_refused_by_its_splits(pipe):
    splits = DatasetDict(train=HubDataset.from_dict({"audio": []}), test=HubDataset.from_dict({"audio": []}))
    with pytest.raises(ValueError, match="is a DatasetDict of several data sets: 'train', 'test'. Pass one of them"):
        pipe(splits)


def test_parts_that_the_processor_has_are_not_taken_by_name(pipe, folder):
    for name in ("tokenizer", "feature_extractor"):
        with pytest.raises(ValueError, match=f"`{name}` is '.*', but the pipeline takes the processor's own"):
            pipeline("audio-to-audio", model=pipe.model, processor=pipe.processor, **{name: str(folder)})


FINGERPRINT = """
import sys
import warnings
from datasets.fingerprint import Hasher
from transformers import AutoModel, AutoProcessor, pipeline
warnings.simplefilter("error")
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
fingerprint = Hasher.hash(processor)
processor(audio=[0.1] * 16_000)
print(Hasher.hash(processor) == fingerprint, fingerprint)
print(Hasher.hash(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)))
print(Hasher.hash(pipeline("audio-to-audio", model=sys.argv[1], trust_remote_code=True)))
"""


def test_a_data_set_is_mapped_with_the_same_objects_once(folder, tmp_path):
    first, again = (run_without_packages(FINGERPRINT, folder, cwd=tmp_path) for _ in range(2))
    assert first == again
    assert first[0].startswith("True ")


def test_an_answer_does_not_change_a_pipelines_fingerprint():
    processor = build_processor()
    pipe = pipeline("audio-to-audio", model=build_model(processor), processor=processor)
    fingerprint = Hasher.hash(pipe)
    pipe(tone(1))
    assert Hasher.hash(pipe) == fingerprint
