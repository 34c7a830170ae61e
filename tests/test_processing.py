"""TttProcessor: prompts, training examples, answers, errors, saving and loading; audio is in test_audio_input.py."""

import json
import os
import pickle
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_codec, build_model, build_processor, build_tokenizer, tone, write_wav
from transformers import AutoProcessor, EncodecFeatureExtractor, pipeline

from pipelines import save_repository
from processing import TASKS, TttProcessor, TttTask, interleave

FIXTURES = Path(__file__).parent / "fixtures"
CODES = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def text_only():
    """Without an audio tokenizer, as in training."""
    return build_processor(audio_tokenizer=None, system_prompts={"spoken_chat": "Chat."})


def codes_text(codes):
    return "".join(f"<|audio_{code}|>" for code in codes)


# ---------------------------------------------------------------------- prompts


def test_default_system_prompts_are_the_published_ones():
    published = json.loads((FIXTURES / "ttt_published" / "system_prompts.json").read_text())
    assert TASKS["asr"].system_prompt == published["asr"]
    assert TASKS["spoken_chat"].system_prompt == TASKS["spoken_qa"].system_prompt == published["audio_chat"]
    assert TASKS["captioning"].system_prompt == published["audio_instruction"]
    assert len({task.system_prompt for task in TASKS.values()}) == 5


def test_default_system_prompts_tell_the_sizes_of_the_chunks():
    prompts = build_processor(audio_tokenizer=None, text_chunk_size=5, audio_chunk_size=9).system_prompts
    assert set(prompts) == set(TASKS)
    for name, prompt in prompts.items():
        assert prompt == TASKS[name].system_prompt.replace("13 text", "5 text").replace("26 audio", "9 audio")
    own = {"asr": "13 text tokens followed by 26 audio tokens {audio_chunk_size}"}
    processor = build_processor(audio_tokenizer=None, text_chunk_size=5, system_prompts=own)
    assert processor.system_prompts["asr"] == own["asr"]


def test_a_spoken_question_becomes_the_published_prompt(processor):
    sound = tone(1.0)
    inputs = processor(audio=sound)
    codes = processor.encode_audio(sound)[0].tolist()
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>system\n{TASKS['spoken_chat'].system_prompt}<|im_end|>\n"
        f"<|im_start|>user\n<|begin_of_audio|>{codes_text(codes)}<|end_of_audio|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert inputs["attention_mask"].all()


def test_tasks_choose_system_prompt_and_order_the_user_turn(processor):
    sound = tone(0.1)
    decode = processor.tokenizer.decode
    caption = decode(processor(text="What is heard?", audio=sound, task="captioning")["input_ids"][0])
    assert TASKS["captioning"].system_prompt in caption
    assert "<|im_start|>user\nWhat is heard?<|begin_of_audio|>" in caption
    assert "Describe this audio.<|begin" in decode(processor(audio=sound, task="captioning")["input_ids"][0])
    speech = decode(processor(text="one two", task="tts")["input_ids"][0])
    assert TASKS["tts"].system_prompt in speech and "<|im_start|>user\none two<|im_end|>" in speech
    custom = decode(processor(text="one", task="text_chat", system_prompt="Be brief.")["input_ids"][0])
    assert custom.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    bare = decode(processor(text="one", task="text_chat", system_prompt="")["input_ids"][0])
    assert bare.startswith("<|im_start|>user\none")


def test_system_prompts_can_be_replaced_and_tasks_added():
    processor = build_processor(audio_tokenizer=None, system_prompts={"asr": "Write.", "emotion": "Which emotion?"})
    messages = processor.build_messages("asr", audio_codes=CODES)
    assert messages[0] == {"role": "system", "content": "Write."}
    assert processor.build_messages("emotion", audio_codes=CODES)[0]["content"] == "Which emotion?"
    assert processor.system_prompts["tts"] == TASKS["tts"].system_prompt
    assert processor.get_task("asr") == TttTask("Write.", needs_audio=True)
    assert not processor.get_task("emotion").takes_text_alone


def test_what_a_task_needs_is_told_with_its_prompt(tmp_path):
    own = {
        "translate": {"system_prompt": "Translate.", "needs_text": True},
        "ask": TttTask("Ask.", needs_audio=True, needs_text=True),
        "name": {"system_prompt": "Name.", "default_text": "Which?"},
        "captioning": {"default_text": "What is this?"},
    }
    build_processor(audio_tokenizer=None, system_prompts=own).save_pretrained(tmp_path)
    processor = TttProcessor.from_pretrained(tmp_path)
    assert set(processor.tasks) == {*TASKS, "translate", "ask", "name"}
    text_tasks = {task for task in processor.tasks if processor.get_task(task).takes_text_alone}
    assert text_tasks == {"tts", "text_chat", "translate"}
    assert processor.get_task("captioning") == replace(TASKS["captioning"], default_text="What is this?")
    assert processor.build_messages("translate", "hello")[0]["content"] == "Translate."
    assert len(processor.build_messages("ask", "hello", audio_codes=CODES)[1]["content"]) == 2
    assert processor.build_messages("name")[1]["content"] == [{"type": "text", "text": "Which?"}]
    for task, request, message in [
        ("translate", {"audio_codes": CODES}, "'translate' needs `text`"),
        ("translate", {"text": "a", "audio_codes": CODES}, "'translate' takes `text` alone"),
        ("ask", {"text": "a"}, "'ask' needs `audio`"),
        ("ask", {"audio_codes": CODES}, "'ask' needs `text`"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.build_messages(task, **request)
    with pytest.raises(ValueError, match="'emotion' needs `text` or `audio`"):
        build_processor(audio_tokenizer=None, system_prompts={"emotion": "Which?"}).build_messages("emotion")


@pytest.mark.parametrize("settings", [3, ["Translate."], {"system_prompt": "Translate.", "need_text": True}])
def test_settings_that_are_no_task_are_refused(settings):
    with pytest.raises(ValueError, match="`system_prompts` has .* for the task 'translate'; give a string, or a map"):
        build_processor(audio_tokenizer=None, system_prompts={"translate": settings})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("abc", "`system_prompts` is 'abc'; it must be a mapping"),
        ([], r"`system_prompts` is \[\]; it must be a mapping"),
        ({3: "x"}, "`system_prompts` is {3: 'x'}; it must be a mapping by names of tasks"),
        (
            {"translate": {"system_prompt": None}},
            "`system_prompt` of the task 'translate' is None; it must be a string",
        ),
        (
            {"translate": {"needs_text": "yes"}},
            "`needs_text` of the task 'translate' is 'yes'; it must be True or False",
        ),
        ({"translate": {"default_text": 3}}, "`default_text` of the task 'translate' is 3; it must be a string"),
    ],
)
def test_settings_of_tasks_of_a_wrong_type_are_refused_by_name(prompts, message):
    with pytest.raises(ValueError, match=message):
        build_processor(audio_tokenizer=None, system_prompts=prompts)


def test_a_batch_is_padded_on_the_left_and_has_the_rows_of_single_calls(processor):
    sounds = [tone(0.2), tone(1.0), tone(0.5)]
    batch = processor(audio=sounds, task="asr")
    for row, sound in enumerate(sounds):
        single = processor(audio=sound, task="asr")["input_ids"][0]
        length = len(single)
        assert torch.equal(batch["input_ids"][row, -length:], single)
        assert batch["attention_mask"][row].sum() == length and batch["attention_mask"][row, -length:].all()
    right = processor(audio=sounds, task="asr", padding_side="right", pad_to_multiple_of=64)
    assert right["attention_mask"][0, 0] == 1 and right["input_ids"].shape[1] % 64 == 0


def test_a_rendered_prompt_takes_its_audios_in_order(processor):
    sounds = [tone(0.2), tone(0.3, frequency=700)]
    messages = processor.build_messages(audio=sounds[0]) + [
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": [{"type": "audio"}]},
    ]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered.count("<|audio|>") == 2
    messages[-1]["content"] = [{"type": "audio", "audio": sounds[1]}]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert torch.equal(processor(text=rendered, audio=sounds)["input_ids"], expected["input_ids"])


def test_conversations_take_audio_from_parts_or_in_order(processor, tmp_path):
    samples = np.round(tone(0.4) * 32768).astype(np.int16)
    path = write_wav(tmp_path / "sound.wav", samples)
    parts = [
        {"path": str(path)},
        {"url": path.as_uri()},
        {"audio": path},
        {"audio_codes": processor.encode_audio(path)[0]},
    ]
    parts += [{"array": samples, "sampling_rate": 16_000}, {}]
    ids = []
    for part in parts:
        messages = [{"role": "user", "content": [{"type": "audio", **part}, {"type": "text", "text": "and?"}]}]
        given = None if part else [path]
        ids.append(processor.apply_chat_template(messages, audio=given, add_generation_prompt=True, tokenize=True))
    assert all(torch.equal(row, ids[0]) for row in ids)
    assert processor.tokenizer.decode(ids[0][0]).endswith("<|end_of_audio|>and?<|im_end|>\n<|im_start|>assistant\n")


def test_an_assistants_turn_is_interleaved_as_the_model_writes_it(text_only):
    codes = [number % 16 for number in range(60)]
    answer = "this answer is long enough for two spans"
    messages = [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": [{"type": "text", "text": answer}, {"type": "audio", "audio_codes": codes}]},
        {"role": "user", "content": "again"},
    ]
    ids = text_only.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)[0].tolist()
    response = text_only.build_response(answer, codes)
    start = ids.index(response[0], ids.index(text_only.token_ids.end_of_turn_token_id) + 12)
    assert ids[start : start + len(response)] == response
    text_ids = text_only.tokenizer(answer)["input_ids"]
    assert response == interleave(text_ids, codes, text_only.token_ids, end_of_turn=True)
    assert response[13] == text_only.token_ids.begin_of_audio_token_id


def test_a_template_of_ones_own_may_know_other_roles(text_only):
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    rendered = text_only.apply_chat_template([{"role": "tool", "content": "4"}], chat_template=template)
    assert rendered == "<|im_start|>tool 4"


def test_conversations_get_a_tasks_system_turn_only_where_they_have_none(text_only):
    user = [{"role": "user", "content": "hello"}]
    system = [{"role": "system", "content": "Own."}, *user]
    rendered = text_only.apply_chat_template([user, system], task="spoken_chat")
    assert rendered[0].startswith("<|im_start|>system\nChat.<|im_end|>") and "Own." in rendered[1]
    assert "Chat." not in rendered[1]
    assert text_only.apply_chat_template(user) == "<|im_start|>user\nhello<|im_end|>\n"


def test_input_that_does_not_fit_its_task_is_refused(processor):
    sound = tone(0.1)
    for options, message in [
        ({"audio": [sound, sound], "task": ["asr", "asr"]}, "`task` is .*; it must be a string"),
        ({"audio": sound, "task": "sing"}, "There is no task 'sing'; choose one of spoken_chat"),
        ({"text": "hello", "task": "asr"}, "'asr' needs `audio`"),
        ({"audio": sound, "task": "tts"}, "'tts' needs `text`"),
        ({"text": "hello", "audio": sound, "task": "tts"}, "takes `text` alone"),
        ({}, "Pass `text`, `audio` or both"),
        ({"audio": []}, "`audio` is an empty list"),
        ({"audio": [sound, None]}, "audio 1 is None"),
        ({"text": []}, "`text` is an empty list"),
        ({"text": 3}, "text 0 is a int, not a string"),
        ({"text": ["a", "b"], "audio": [sound] * 3, "task": "captioning"}, "`text` has 2 items, but .* has 3"),
        ({"text": [sound], "task": "tts"}, "text 0 is a ndarray, not a string"),
        (
            {"text": "<|audio|><|audio|>", "audio": [sound]},
            "text 0 has more `<|audio|>` placeholders".replace("|", r"\|"),
        ),
        ({"text": "plain", "audio": [sound]}, "There are 1 more audios than audio parts"),
        ({"text": ["a", "a\ud83d"]}, r"text 1 holds '\\ud83d', half of a surrogate pair"),
        ({"text": "a\ud83d", "task": "tts"}, r" holds '\\ud83d', half of a surrogate pair"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(**options)


def test_codes_that_are_none_are_named_by_where_they_stand(processor):
    good, bad = {"audio_codes": CODES}, {"audio_codes": [0, 10_000]}
    for options, message in [
        ({"audio": [good, bad]}, "audio part 0 of item 1: code 10000 at position 1"),
        ({"text": "<|audio|>" * 2, "audio": [good, bad]}, "audio 1: code 10000 at position 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor(**options)
    turns = [{"role": "user", "content": [{"type": "audio", **codes} for codes in (good, bad)]}]
    with pytest.raises(ValueError, match="audio part 1 of conversation 0: code 10000 at position 1"):
        processor.apply_chat_template(turns, tokenize=True)


def test_speech_is_not_continued_as_a_text(processor):
    answer = [{"type": "text", "text": "hi"}, {"type": "audio", "audio_codes": CODES}]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    with pytest.raises(ValueError, match="the last message of conversation 0 ends with audio"):
        processor.apply_chat_template(turns, tokenize=True, continue_final_message=True)
    turns[1] = {"role": "assistant", "content": answer[:1]}
    assert processor.apply_chat_template(turns, continue_final_message=True).endswith("assistant\nhi")


def test_conversations_with_too_many_or_too_few_audios_are_refused(processor):
    sound = tone(0.1)
    part, filled = {"type": "audio"}, {"type": "audio", "audio": sound}
    first = [{"role": "user", "content": [filled]}]
    for messages, audio, message in [
        ([first, [{"role": "user", "content": [filled, part]}]], None, "audio part 1 of conversation 1 has no audio"),
        ([first, [{"role": "user", "content": [part, part]}]], [sound], "audio part 1 of conversation 1 has no audio"),
        ([first], [sound], "`audio` holds 1 more audios than"),
        (
            [first, [{"role": "user", "content": "<|audio|>"}]],
            None,
            r"message 0 of conversation 1 has `<\|audio\|>` in a",
        ),
        ([[{"role": "user", "content": [{"type": "video"}]}]], None, "message 0 of conversation 0 has a part of type"),
        ([[{"role": "user"}]], None, "message 0 of conversation 0 must be a mapping with `role` and `content`"),
        ([[{"role": "asistant", "content": "a"}]], None, "`role` 'asistant'; use 'system', 'user', 'assistant', or a"),
        (
            [[{"role": "user", "content": [{**part, "audioo": sound}]}]],
            None,
            "an audio part with `audioo`; it may have",
        ),
        ([[{"role": "user", "content": [{"type": "text", "txt": "a"}]}]], None, "a text part with `txt`; it may have"),
        ([[{"role": "assistant", "content": [filled, filled]}]], None, "message 0 of conversation 0: an assistant's"),
        ([[{"role": "assistant", "content": [filled, {"type": "text", "text": "a"}]}]], None, "its text and then at"),
        ([first, []], None, "conversation 1 has no messages"),
        ([[{"role": "user", "content": [{"type": "audio", "audio": np.zeros(0)}]}]], None, "audio part 0 .* is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(messages, audio=audio, tokenize=True)


# ---------------------------------------------------------------------- training examples and answers


def test_an_example_is_prompt_and_response_with_only_the_response_scored(text_only):
    example = text_only.build_example("four", CODES, task="spoken_chat", audio_codes=[7, 8])
    prompt = text_only.apply_chat_template(
        text_only.build_messages("spoken_chat", audio_codes=[7, 8]), add_generation_prompt=True, tokenize=True
    )[0].tolist()
    response = text_only.build_response("four", CODES)
    assert example["input_ids"] == prompt + response
    assert example["labels"] == [-100] * len(prompt) + response
    assert text_only.tokenizer.decode(response) == (
        f"four<|begin_of_quad|>{codes_text(CODES)}<|end_of_audio_span_last|><|im_end|>"
    )


def test_an_example_without_speech_is_text_to_the_end_of_the_turn(text_only):
    example = text_only.build_example("four", task="text_chat", text="two and two")
    assert text_only.tokenizer.decode([i for i in example["labels"] if i != -100]) == "four<|im_end|>"
    assert example["labels"][-1] == example["input_ids"][-1]


def test_every_assistant_turn_of_a_conversation_is_scored(text_only):
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio_codes": [1]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}, {"type": "audio", "audio_codes": [2, 3]}]},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "two"},
    ]
    example = text_only.build_conversation_example(messages)
    scored = [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    assert scored == text_only.build_response("one", [2, 3]) + text_only.build_response("two")


def test_examples_are_written_with_the_tokens_there_are():
    processor = build_processor(audio_tokenizer=None)
    messages = [{"role": "user", "content": "so<mood>"}, {"role": "assistant", "content": "<mood>so"}]
    before = processor.build_conversation_example(messages)
    assert processor.build_conversation_example(messages) == before
    processor.tokenizer.add_tokens(["<mood>"])
    after = processor.build_conversation_example(messages)
    fresh = build_processor(audio_tokenizer=None)
    fresh.tokenizer.add_tokens(["<mood>"])
    assert after == fresh.build_conversation_example(messages) != before
    for copy in (pickle.loads(pickle.dumps(processor)), deepcopy(processor)):  # as for the workers of a dataset's map
        assert copy.build_conversation_example(messages) == after
    assert pickle.dumps(copy) == pickle.dumps(deepcopy(copy))


def test_an_answer_comes_back_as_its_text_codes_and_speech(processor):
    answers = [("four is the answer – naïve ☃", [n % 16 for n in range(50)]), ("text alone", []), ("", [1, 2])]
    prompt = [5] * 7
    rows = [prompt + processor.build_response(text, codes) for text, codes in answers]
    results = processor.post_process(rows, prompt_length=7)
    for (text, codes), result in zip(answers, results, strict=True):
        assert result["text"] == text and result["audio_codes"].tolist() == codes
        assert result["sampling_rate"] == 16_000
        assert result["audio"].dtype == np.float32 and len(result["audio"]) == 1280 * len(codes)
        if codes:
            expected = processor.audio_tokenizer.decode(torch.tensor(codes)[None, None]).audio_values
            assert np.allclose(result["audio"], expected.detach().numpy().reshape(-1), atol=1e-5)
    alone = processor.post_process(torch.tensor(rows[0]), prompt_length=7)
    assert len(alone) == 1 and np.allclose(alone[0]["audio"], results[0]["audio"], atol=1e-5)
    assert processor.post_process([rows[0]], prompt_length=7, decode_audio=False)[0]["audio"] is None


def test_an_answer_cut_off_anywhere_gives_what_it_holds(processor):
    text, codes = "a longer answer in words", [n % 16 for n in range(60)]
    response = processor.build_response(text, codes)
    for length in range(0, len(response), 7):
        result = processor.post_process([response[:length]], decode_audio=False)[0]
        assert text.startswith(result["text"]) and codes[: len(result["audio_codes"])] == result["audio_codes"].tolist()
    unfinished = response[:20] + [processor.token_ids.mask_token_id] * 6
    assert len(processor.post_process([unfinished])[0]["audio"]) == 1280 * 6


@pytest.mark.parametrize("ids", ["hi", [[71.0, 72.0]], [[[71, 72]]], [None]])
def test_answers_that_are_no_rows_of_ids_are_refused(processor, ids):
    with pytest.raises(ValueError, match="Row 0 of `generated_ids` is .*; pass token ids"):
        processor.post_process(ids)
    with pytest.raises(ValueError, match="`prompt_length` is -1"):
        processor.post_process([[71, 72]], prompt_length=-1)


def test_codes_outside_the_codebook_are_refused_by_name(processor):
    with pytest.raises(ValueError, match="audio_codes 1: code 16 at position 2 is outside the codebook"):
        processor.decode_audio([[1], [0, 1, 16]])
    with pytest.raises(ValueError, match="code -1 at position 0 is outside"):
        processor.build_response("a", [-1])
    for codes in ([1.5], [[1, 2]], torch.tensor([[1, 2]]), "12"):
        with pytest.raises(ValueError, match=r"codes must be integers in one dimension, \(codes,\)"):
            processor.build_response("a", codes)
    with pytest.raises(ValueError, match="code 99 at position 0 is outside"):
        processor.build_messages(audio_codes=[99]) and processor.apply_chat_template(
            processor.build_messages(audio_codes=[99]), tokenize=True
        )


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.0])
def test_a_batch_size_that_is_none_is_refused(processor, batch_size):
    for convert in (
        lambda: processor.encode_audio(tone(0.1), batch_size=batch_size),
        lambda: processor.decode_audio([1, 2], batch_size=batch_size),
    ):
        with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}; use an integer of at least 1"):
            convert()


def test_a_processor_without_audio_tokenizer_says_so_when_it_needs_one(text_only):
    with pytest.raises(ValueError, match="has no audio tokenizer"):
        text_only(audio=tone(0.1))
    with pytest.raises(ValueError, match="has no audio tokenizer"):
        text_only.decode_audio([[1]])


def test_wrong_parts_are_refused():
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=16_000)
    with pytest.raises(TypeError, match="must be a Transformers audio codec, .* got Linear"):
        TttProcessor(extractor, build_tokenizer(), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="has 16 codes, but .* only 8"):
        TttProcessor(extractor, build_tokenizer(num_codes=8), build_codec())
    with pytest.raises(ValueError, match="at least 1, got 0 and 26"):
        build_processor(text_chunk_size=0)
    plain = build_tokenizer()
    plain.get_vocab = lambda: {"a": 0}
    with pytest.raises(ValueError, match=r"no token .*`<\|audio_0\|>`"):
        TttProcessor(extractor, plain)


# ---------------------------------------------------------------------- saving and loading


def assert_same(first, second):
    assert second.system_prompts == first.system_prompts and second.chat_template == first.chat_template
    assert (second.text_chunk_size, second.audio_chunk_size) == (first.text_chunk_size, first.audio_chunk_size)
    sound = tone(0.4)
    assert torch.equal(first(audio=sound)["input_ids"], second(audio=sound)["input_ids"])
    assert np.allclose(first.decode_audio([CODES])[0], second.decode_audio([CODES])[0], atol=1e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    processor = build_processor(text_chunk_size=5, audio_chunk_size=9, system_prompts={"asr": "Write."})
    processor.save_pretrained(folder)
    return processor, folder


def test_a_saved_processor_loads_with_its_audio_tokenizer(saved):
    processor, folder = saved
    assert {"config.json", "model.safetensors"} <= {path.name for path in (folder / "audio_tokenizer").iterdir()}
    assert_same(processor, TttProcessor.from_pretrained(folder))
    assert_same(processor, AutoProcessor.from_pretrained(folder))
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["auto_map"]["AutoProcessor"] == "processing_ttt.TttProcessor"
    assert "audio_tokenizer" not in settings and settings["text_chunk_size"] == 5


@pytest.mark.parametrize(
    "name, meant",
    [
        ("audio_chunk_sise", "audio_chunk_size"),
        ("system_prompt", "system_prompts"),
        ("load_audio_tokeniser", "load_audio_tokenizer"),
    ],
)
def test_a_misspelled_setting_is_refused_where_a_processor_is_loaded(saved, name, meant):
    with pytest.raises(TypeError, match=f"no option `{name}`; did you mean `{meant}`"):
        AutoProcessor.from_pretrained(saved[1], **{name: False})
    loaded = AutoProcessor.from_pretrained(saved[1], text_chunk_size=7, padding_side="right", use_fast=True)
    assert loaded.text_chunk_size == 7 and loaded.tokenizer.padding_side == "right"  # parts take options of their own


def test_code_of_processor_and_audio_tokenizer_lies_flat_beside_the_settings(saved):
    names = {path.name for path in saved[1].glob("*.py")}
    assert {"processing_ttt.py", "interleaving_ttt.py", "streaming_ttt.py", "modeling_ttt_codec.py"} <= names
    assert "configuration_ttt_codec.py" in names and "collator_ttt.py" not in names


def test_the_audio_tokenizer_can_be_left_out_or_replaced(saved, tmp_path):
    processor, folder = saved
    assert TttProcessor.from_pretrained(folder, load_audio_tokenizer=False).audio_tokenizer is None
    other = build_codec()
    assert TttProcessor.from_pretrained(folder, audio_tokenizer=other).audio_tokenizer is other
    build_processor(audio_tokenizer=None).save_pretrained(tmp_path / "bare")
    assert TttProcessor.from_pretrained(tmp_path / "bare").audio_tokenizer is None
    shutil.copytree(folder, tmp_path / "partial", ignore=shutil.ignore_patterns("audio_tokenizer"))
    with pytest.raises(OSError, match="has no audio tokenizer in `audio_tokenizer/`"):
        TttProcessor.from_pretrained(tmp_path / "partial")


def test_settings_that_are_missing_are_not_taken_for_the_defaults(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "partial", ignore=shutil.ignore_patterns("processor_config.json"))
    with pytest.raises(OSError, match="processor_config.json"):
        TttProcessor.from_pretrained(tmp_path / "partial")


def test_the_audio_tokenizer_loads_in_float32_whatever_it_was_saved_in(saved, tmp_path):
    processor = build_processor(audio_tokenizer=build_codec().half())
    processor.save_pretrained(tmp_path)
    assert TttProcessor.from_pretrained(tmp_path).audio_tokenizer.dtype == torch.float32
    assert TttProcessor.from_pretrained(tmp_path, dtype="auto").audio_tokenizer.dtype == torch.float32
    assert TttProcessor.from_pretrained(tmp_path, dtype=torch.bfloat16).audio_tokenizer.dtype == torch.bfloat16


def test_a_pipeline_in_bfloat16_keeps_its_audio_tokenizer_in_float32(tmp_path):
    processor = build_processor(audio_tokenizer=build_codec())
    save_repository(build_model(processor), processor, tmp_path)
    pipe = pipeline("audio-to-audio", model=str(tmp_path), dtype=torch.bfloat16, trust_remote_code=True)
    assert pipe.model.dtype == torch.bfloat16 and pipe.processor.audio_tokenizer.dtype == torch.float32


def test_a_processor_is_shown_without_its_thousands_of_tokens():
    processor = build_processor(audio_tokenizer=build_codec())
    shown = repr(processor)
    assert f"of {len(processor.tokenizer)} tokens, {processor.num_codebooks * 16} of them codes" in shown
    assert "in torch.float32" in shown and '"system_prompts"' in shown and "AddedToken" not in shown
    assert "- audio_tokenizer: None" in repr(build_processor(audio_tokenizer=None))


class Hub:
    """Takes what would be uploaded."""

    def __init__(self):
        self.uploaded = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            self.uploaded[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()


def test_pushing_uploads_the_audio_tokenizer_too(saved, tmp_path, monkeypatch):
    import sys

    processor, _ = saved
    for repeat in range(2):  # the second time the folder exists already
        if repeat:  # a folder whose time stamp does not tell that files in it were rewritten
            os.utime(tmp_path / "local" / "audio_tokenizer", (4e9, 4e9))
        hub = Hub()
        for module in ("transformers.utils.hub", "transformers.processing_utils"):
            monkeypatch.setattr(sys.modules[module], "hf_api", lambda hub=hub: hub)
        processor.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="someone/talker")
        assert {"audio_tokenizer/config.json", "audio_tokenizer/model.safetensors"} <= set(hub.uploaded), repeat
    copy = tmp_path / "copy"
    processor.save_pretrained(tmp_path / "fresh", push_to_hub=True, repo_id="someone/talker")
    for name, content in hub.uploaded.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert_same(processor, TttProcessor.from_pretrained(copy))
