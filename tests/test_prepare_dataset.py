"""Preparing datasets: every kind of source and task, the published forms, bad records, and runs that were killed."""

import json
import os
import signal
import time
import zipfile
from multiprocessing import get_context

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import build_processor, tone, write_wav
from datasets import Audio, ClassLabel, Dataset, DatasetDict, disable_progress_bars

from processing import TttProcessor, deinterleave
from training_examples.preparation import preparing
from training_examples.preparation.arguments import PrepareArguments
from training_examples.preparation.preparing import prepare
from training_examples.preparation.shards import ShardFolder

TEXTS = ["one two three", "a somewhat longer sentence", "hi", "what is this"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a processor of 16 codes and one token per byte."""
    folder = tmp_path_factory.mktemp("model")
    build_processor(text_chunk_size=4, audio_chunk_size=6).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(model):
    return TttProcessor.from_pretrained(model)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Four recordings of 0.5 to 2 s with a JSONL list of them."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for index, text in enumerate(TEXTS):
        write_wav(folder / f"{index}.wav", tone(0.5 * (index + 1), frequency=200 + 100 * index))
        write_wav(folder / f"answer{index}.wav", tone(0.3 * (index + 1), frequency=900 - 100 * index))
        rows.append({"audio": f"{index}.wav", "text": text, "answer": f"reply {index}", "spoken": f"answer{index}.wav"})
    write_lines(folder / "list.jsonl", rows)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model, output, source=(), **options):
    """Prepares and returns the summary and the examples in order."""
    options.setdefault("max_length", 1024)
    sources = [str(source)] if not isinstance(source, (list, tuple)) else [str(item) for item in source]
    summary = prepare(PrepareArguments(model=str(model), output_dir=output, source=sources, **options))
    return summary, read_examples(output, options.get("output_split", "train"))


def read_examples(output, split="train"):
    return [row for shard in ShardFolder(output, split).shards() for row in pq.read_table(shard).to_pylist()]


def rejections(output, split="train"):
    return [json.loads(line) for line in (output / f"rejected-{split}.jsonl").read_text().splitlines()]


def content(example, processor):
    """The scored part of an example as text and codes."""
    ids = [label for label in example["labels"] if label != -100]
    text, codes = deinterleave(ids, processor.token_ids)
    return processor.tokenizer.decode(text), codes


# ------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    ("task", "options", "expected"),
    [
        ("asr", {}, {"task": "asr", "audio": 0, "answer": 0, "speech": "0.wav"}),
        ("asr", {"asr_speech": False}, {"task": "asr", "audio": 0, "answer": 0, "speech": None}),
        ("tts", {}, {"task": "tts", "text": TEXTS[0], "answer": 0, "speech": "0.wav"}),
        ("spoken_chat", {}, {"task": "spoken_chat", "audio": 0, "answer": "reply 0", "speech": "answer0.wav"}),
        ("spoken_qa", {}, {"task": "spoken_qa", "audio": 0, "answer": "reply 0", "speech": "answer0.wav"}),
        ("text_chat", {}, {"task": "text_chat", "text": TEXTS[0], "answer": "reply 0", "speech": "answer0.wav"}),
        (
            "captioning",
            {},
            {"task": "captioning", "audio": 0, "text": "Describe this audio.", "answer": "reply 0"}
            | {"speech": "answer0.wav"},
        ),
        (
            "emotion",
            {"questions": ["emotion=How do I feel?"], "columns": ["answer_audio=audio"]},
            {"task": "captioning", "audio": 0, "text": "How do I feel?", "answer": "reply 0", "speech": "0.wav"},
        ),
        (
            "scene",
            {"columns": ["scene.answer=text"]},
            {"task": "captioning", "audio": 0, "text": "Where was this audio recorded?", "answer": 0, "speech": None},
        ),
    ],
)
def test_a_task_becomes_what_the_processor_writes_for_it(task, options, expected, model, processor, speech, tmp_path):
    columns = options.pop("columns", ["answer_audio=spoken"])
    summary, examples = run(
        model, tmp_path, speech / "list.jsonl", tasks=[task], columns=columns, max_records=1, **options
    )
    audio = processor.encode_audio(str(speech / "0.wav"))[0] if "audio" in expected else None
    speech_file = expected["speech"]
    codes = processor.encode_audio(str(speech / speech_file))[0] if speech_file else None
    answer = TEXTS[0] if expected["answer"] == 0 else expected["answer"]
    wanted = processor.build_example(answer, codes, task=expected["task"], text=expected.get("text"), audio_codes=audio)
    assert len(examples) == summary["examples"] == 1
    assert {name: examples[0][name] for name in wanted} == wanted
    assert examples[0]["task"] == task and examples[0]["length"] == len(wanted["input_ids"])


def test_continuation_without_groups_is_text_with_its_speech_and_scored_throughout(model, processor, speech, tmp_path):
    _, examples = run(model, tmp_path, speech / "list.jsonl", tasks=["continuation"])
    assert [content(example, processor)[0] for example in examples] == TEXTS
    assert all(example["labels"] == example["input_ids"] for example in examples)
    ids = processor.build_response(TEXTS[1], processor.encode_audio(str(speech / "1.wav"))[0])
    assert examples[1]["input_ids"] == ids


def test_utterances_of_a_recording_become_documents_that_alternate_and_fit(model, processor, speech, tmp_path):
    rows = [json.loads(line) for line in (speech / "list.jsonl").read_text().splitlines()]
    rows = [{**row, "audio": str(speech / row["audio"]), "chapter": number} for number in (1, 2) for row in rows * 3]
    path = write_lines(tmp_path / "book.jsonl", rows)
    options = {"tasks": ["continuation"], "columns": ["group=chapter"]}
    summary, whole = run(model, tmp_path / "whole", path, **options)
    assert len(whole) == 2 and summary["rejected"] == 0
    ids = processor.token_ids
    for example in whole:
        text, codes = content(example, processor)
        written = [t for t in TEXTS * 3 if t in text]
        assert written and codes, "some utterances are written, some spoken"
        assert example["input_ids"].count(ids.begin_of_last_audio_token_id) == 1
        assert example["input_ids"].count(ids.end_of_last_audio_token_id) == 1
        begins, ends = ids.begin_of_audio_token_id, ids.end_of_audio_token_id
        assert example["input_ids"].count(begins) == example["input_ids"].count(ends)
    _, cut = run(model, tmp_path / "cut", path, max_length=60, **options)
    assert len(cut) > 2 and all(example["length"] <= 60 for example in cut)


def test_one_record_serves_several_tasks_and_its_audio_is_encoded_once(model, speech, tmp_path, monkeypatch):
    from training_examples.preparation import examples as room

    encoded = []
    encode = room.encode_waveforms
    monkeypatch.setattr(room, "encode_waveforms", lambda *args: encoded.extend(map(len, args[2])) or encode(*args))
    summary, examples = run(model, tmp_path, speech / "list.jsonl", tasks=["asr", "tts", "spoken_chat"])
    assert sorted(encoded) == [8000, 16000, 24000, 32000]
    assert [example["task"] for example in examples[:3]] == ["asr", "tts", "spoken_chat"]
    assert summary["audio_hours"] == pytest.approx(5 / 3600, abs=1e-4)
    assert summary["tasks"]["tts"]["examples"] == 4 and summary["examples"] == 12


def test_the_summary_counts_what_the_shards_hold(model, processor, speech, tmp_path):
    summary, examples = run(model, tmp_path, speech / "list.jsonl", tasks=["asr"], shard_size=3)
    start = processor.token_ids.audio_token_id_start
    assert summary == json.loads((tmp_path / "summary-train.json").read_text())
    assert summary["shards"] == 2 and summary["records"] == summary["examples"] == 4
    assert summary["audio_tokens"] == sum(i >= start for example in examples for i in example["input_ids"])
    assert summary["text_tokens"] + summary["audio_tokens"] == sum(example["length"] for example in examples)
    assert summary["scored_tokens"] == sum(label != -100 for example in examples for label in example["labels"])
    lengths = [example["length"] for example in examples]
    assert summary["length_quantiles"]["0%"] == min(lengths) and summary["length_quantiles"]["100%"] == max(lengths)
    assert (tmp_path / "rejected-train.jsonl").read_text() == ""


# ------------------------------------------------------------------ sources


def make_source(kind, speech, folder):
    rows = [json.loads(line) for line in (speech / "list.jsonl").read_text().splitlines()]
    absolute = [{**row, "audio": str(speech / row["audio"])} for row in rows]
    if kind == "jsonl":
        return speech / "list.jsonl"
    if kind == "json":
        (folder / "list.json").write_text(json.dumps(absolute))
        return folder / "list.json"
    if kind == "csv":
        Dataset.from_list(absolute).to_csv(folder / "list.csv")
        return folder / "list.csv"
    if kind == "wildcard":
        for part, some in enumerate((absolute[:1], absolute[1:])):
            write_lines(folder / f"part-{part}.jsonl", some)
        return folder / "part-*.jsonl"
    if kind == "folder with metadata":
        (folder / "train").mkdir()
        for row in rows:
            os.link(speech / row["audio"], folder / "train" / row["audio"])
        Dataset.from_list(rows).rename_column("audio", "file_name").to_csv(folder / "train" / "metadata.csv")
        return folder
    embedded = Dataset.from_list([{**row, "audio": {"bytes": (speech / row["audio"]).read_bytes()}} for row in rows])
    embedded = embedded.cast_column("audio", Audio())
    if kind == "parquet":
        embedded.to_parquet(folder / "list.parquet")
        return folder / "list.parquet"
    DatasetDict({"train": embedded}).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "wildcard", "folder with metadata", "parquet", "saved"])
def test_every_kind_of_source_gives_the_same_examples(kind, streaming, model, speech, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    options = {"tasks": ["asr"], "streaming": streaming}
    summary, examples = run(model, tmp_path / "out", make_source(kind, speech, source), **options)
    assert summary["rejected"] == 0
    _, expected = run(model, tmp_path / "expected", speech / "list.jsonl", tasks=["asr"])
    assert examples == expected


def test_class_labels_answer_with_their_names(model, processor, speech, tmp_path):
    dataset = Dataset.from_dict({"audio": [str(speech / "0.wav")] * 2, "label": [1, 0]})
    dataset.cast_column("label", ClassLabel(names=["calm", "angry"])).save_to_disk(tmp_path / "saved")
    _, examples = run(model, tmp_path / "out", tmp_path / "saved", tasks=["emotion"], columns=["answer=label"])
    assert [content(example, processor)[0] for example in examples] == ["angry", "calm"]


def test_bare_samples_need_their_rate(model, processor, tmp_path):
    samples = tone(0.8, 8000).tolist()
    path = write_lines(tmp_path / "list.jsonl", [{"audio": samples, "text": "hi"}])
    _, examples = run(model, tmp_path / "out", path, tasks=["tts"], sampling_rate=8000)
    assert content(examples[0], processor)[1] == processor.encode_audio(np.array(samples), 8000)[0].tolist()
    with pytest.raises(ValueError, match="No record gave an example"):
        run(model, tmp_path / "none", path, tasks=["tts"])
    assert "--sampling_rate" in rejections(tmp_path / "none")[0]["reason"]


def test_audio_in_an_archive_is_read_by_its_address(model, speech, tmp_path):
    with zipfile.ZipFile(tmp_path / "speech.zip", "w") as archive:
        archive.write(speech / "1.wav", "one.wav")
    rows = [{"audio": f"zip://one.wav::{tmp_path / 'speech.zip'}", "text": TEXTS[1]}]
    _, examples = run(model, tmp_path / "out", write_lines(tmp_path / "list.jsonl", rows), tasks=["asr"])
    assert examples == run(model, tmp_path / "expected", speech / "list.jsonl", tasks=["asr"])[1][1:2]


def test_the_folder_is_a_dataset_that_loads_by_its_name(model, speech, tmp_path):
    _, examples = run(model, tmp_path / "out", speech / "list.jsonl", tasks=["asr"], shard_size=3)
    run(model, tmp_path / "out", speech / "list.jsonl", tasks=["tts"], output_split="eval")
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert sorted(loaded) == ["eval", "train"] and loaded["train"].to_list() == examples
    assert loaded["eval"]["task"] == ["tts"] * 4
    stream = datasets.load_dataset(str(tmp_path / "out"), split="eval", streaming=True)
    assert [row["task"] for row in stream] == ["tts"] * 4
    card = tmp_path / "out" / "README.md"
    card.write_text("My own.")
    run(model, tmp_path / "out", speech / "list.jsonl", tasks=["tts"], output_split="more")
    assert card.read_text() == "My own."


def test_tasks_of_the_processors_own_take_what_their_requests_need(speech, tmp_path):
    needs = {
        "translate": {"system_prompt": "Translate.", "needs_audio": True},
        "ask": {"system_prompt": "Answer about what you hear.", "needs_audio": True, "needs_text": True},
        "name": {"system_prompt": "Do as told.", "needs_audio": True, "default_text": "Who speaks?"},
        "rhyme": {"system_prompt": "Rhyme."},
    }
    processor = build_processor(system_prompts=needs)
    processor.save_pretrained(tmp_path / "model")
    _, examples = run(
        tmp_path / "model", tmp_path / "out", speech / "list.jsonl", tasks=list(needs), max_records=1,
        columns=["answer_audio=spoken"], questions=["name=Who is it?"],
    )  # fmt: skip
    heard, said = processor.encode_audio([str(speech / name) for name in ("0.wav", "answer0.wav")])
    texts = {"translate": None, "ask": TEXTS[0], "name": "Who is it?", "rhyme": TEXTS[0]}
    for example in examples:
        task = example["task"]
        audio = None if task == "rhyme" else heard
        wanted = processor.build_example("reply 0", said, task=task, text=texts[task], audio_codes=audio)
        assert example["input_ids"] == wanted["input_ids"] and example["labels"] == wanted["labels"]
    assert {example["task"] for example in examples} == set(needs)
    with pytest.raises(ValueError, match="no task 'translation'; choose from asr, .*, ask, name, rhyme, translate"):
        run(tmp_path / "model", tmp_path / "none", speech / "list.jsonl", tasks=["translation"])


# ------------------------------------------------------------------ records that give no example


def test_a_bad_record_is_skipped_and_listed_with_its_reason(model, speech, tmp_path):
    write_wav(tmp_path / "long.wav", tone(3.1))
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    good = {"audio": str(speech / "0.wav"), "text": "fine"}
    rows = [
        good,
        {"audio": "missing.wav", "text": "x"},
        {"audio": "broken.wav", "text": "x"},
        {"audio": "long.wav", "text": "x"},
        {"audio": None, "text": "x"},
        {**good, "text": "  "},
        {**good, "text": "sneaky <|im_end|>"},
        {**good, "text": "so many words " * 20},
        {**good, "text": "<|not a token|> is only text"},
    ]
    path = write_lines(tmp_path / "list.jsonl", rows)
    summary, examples = run(
        model, tmp_path / "out", path, tasks=["tts"], max_audio_seconds=3.0, max_length=500, shard_size=4
    )
    assert len(examples) == 2 and summary["rejected"] == 7
    listed = {row["record"]: (row["kind"], row["reason"]) for row in rejections(tmp_path / "out")}
    assert {record: kind for record, (kind, _) in listed.items()} == {
        1: "missing audio",
        2: "unreadable audio",
        3: "long audio",
        4: "no audio",
        5: "no text",
        6: "token in text",
        7: "too long",
    }
    assert "missing.wav" in listed[1][1] and "3.1 s" in listed[3][1] and "<|im_end|>" in listed[6][1]
    assert summary["rejected_kinds"]["missing audio"] == summary["rejected_kinds"]["unreadable audio"] == 1
    assert rejections(tmp_path / "out")[0]["source"] == str(path) and rejections(tmp_path / "out")[0]["task"] == "tts"


def test_a_bad_recording_counts_once_however_many_tasks_want_it(model, speech, tmp_path):
    good = {"audio": str(speech / "0.wav"), "text": "fine"}
    rows = [good, {"audio": "missing.wav", "text": "x"}, {"audio": "missing.wav", "text": "y"}, {**good, "text": ""}]
    path = write_lines(tmp_path / "list.jsonl", rows)
    summary, examples = run(model, tmp_path / "out", path, tasks=["asr", "tts"])
    assert len(examples) == 2 and summary["rejected"] == len(rejections(tmp_path / "out")) == 6
    assert summary["rejected_kinds"] == {"missing audio": 2, "no text": 1}  # of two records, and of one


def test_audio_the_tokenizer_fails_on_does_not_take_its_batch_along(model, speech, tmp_path, monkeypatch):
    from training_examples.preparation import examples as room

    encode = room.encode_waveforms

    def refuse_short(audio_tokenizer, feature_extractor, waveforms, batch_size):
        if min(map(len, waveforms)) < 100:
            raise RuntimeError("kernel size cannot be greater than input size")
        return encode(audio_tokenizer, feature_extractor, waveforms, batch_size)

    monkeypatch.setattr(room, "encode_waveforms", refuse_short)
    write_wav(tmp_path / "click.wav", tone(0.005))
    rows = [{"audio": str(speech / f"{i}.wav"), "text": "x"} for i in range(3)] + [{"audio": "click.wav", "text": "x"}]
    summary, examples = run(model, tmp_path / "out", write_lines(tmp_path / "list.jsonl", rows), tasks=["tts"])
    assert len(examples) == 3
    assert [row["record"] for row in rejections(tmp_path / "out")] == [3]
    assert "kernel size" in rejections(tmp_path / "out")[0]["reason"]


# ------------------------------------------------------------------ published forms

HEARD = "<|begin_of_audio|><|audio_1|><|audio_2|><|end_of_audio|>"
SAID = (
    "four<|begin_of_audio|><|audio_3|><|end_of_audio_new|> more<|begin_of_quad|><|audio_4|><|end_of_audio_span_last|>"
)
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "listen " + HEARD}]
MESSAGES = [*TURNS, {"role": "assistant", "content": SAID, "text_content": None}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        {"messages": json.dumps(MESSAGES)},
        {
            "conversations": [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "listen " + HEARD},
                {"from": "gpt", "value": SAID},
            ]
        },
    ],
)
def test_published_conversations_keep_their_tokens_and_score_the_answers(record, model, processor, tmp_path):
    _, examples = run(model, tmp_path, write_lines(tmp_path / "list.jsonl", [record]))
    prompt = f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nlisten {HEARD}<|im_end|>\n"
    prompt_ids = processor.tokenizer(prompt + "<|im_start|>assistant\n")["input_ids"]
    answer_ids = processor.tokenizer(SAID + "<|im_end|>")["input_ids"]
    assert examples[0]["input_ids"] == prompt_ids + answer_ids
    assert examples[0]["labels"] == [-100] * len(prompt_ids) + answer_ids
    assert examples[0]["task"] == "conversation"


def test_published_documents_are_scored_throughout(model, processor, tmp_path):
    text = f"{HEARD.replace('<|end_of_audio|>', '<|end_of_audio_new|>')} and then {SAID} the rest"
    _, examples = run(model, tmp_path, write_lines(tmp_path / "list.jsonl", [{"text": text}]))
    assert examples[0]["input_ids"] == examples[0]["labels"] == processor.tokenizer(text)["input_ids"]


def test_prompt_and_response_are_a_conversation_of_one_turn(model, processor, tmp_path):
    path = write_lines(tmp_path / "list.jsonl", [{"prompt": "hello", "response": "hi", "task": "text_chat"}])
    _, examples = run(model, tmp_path, path)
    assert content(examples[0], processor) == ("hi", [])
    assert examples[0]["task"] == "text_chat"


def test_messages_may_bring_audio_to_encode(model, processor, speech, tmp_path):
    def turns(*audio):
        user = [{"type": "text", "text": "which word"}, {"type": "audio", **audio[0]}]
        answer = [{"type": "text", "text": "hi"}, {"type": "audio", **audio[1]}]
        return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    record = {"messages": turns({"audio": "0.wav"}, {"audio": "1.wav"})}
    path = write_lines(tmp_path / "list.jsonl", [record])
    _, examples = run(model, tmp_path / "out", path, audio_root=speech)
    codes = processor.encode_audio([str(speech / "0.wav"), str(speech / "1.wav")])
    wanted = processor.build_conversation_example(turns({"audio_codes": codes[0]}, {"audio_codes": codes[1]}))
    assert {name: examples[0][name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": "x <|begin_of_audio|><|audio_16|><|end_of_audio_new|>"}, "unknown code"),
        ({"text": "x <|audio_1|><|end_of_audio_new|>"}, "bad span"),
        ({"text": "x <|begin_of_audio|><|audio_1|><|mask_token|><|end_of_audio_new|>"}, "bad span"),
        ({"text": f"an answer that ends as a question does {HEARD}"}, "bad span"),
        ({"text": ""}, "malformed"),
        ({"messages": TURNS}, "malformed"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "malformed"),
        ({"messages": "not JSON"}, "malformed"),
    ],
)
def test_published_records_that_cannot_be_trained_on_are_rejected(record, kind, model, tmp_path):
    path = write_lines(tmp_path / "list.jsonl", [record, {**dict.fromkeys(record), "text": "good"}])
    summary, examples = run(model, tmp_path / "out", path)
    assert len(examples) == 1
    assert summary["rejected_kinds"] == {kind: 1}


def test_published_lists_need_no_audio_tokenizer(model, speech, tmp_path):
    processor = TttProcessor.from_pretrained(model, load_audio_tokenizer=False)
    processor.save_pretrained(tmp_path / "bare")
    path = write_lines(tmp_path / "list.jsonl", [{"messages": MESSAGES}])
    assert run(tmp_path / "bare", tmp_path / "out", path)[0]["examples"] == 1
    with pytest.raises(ValueError, match="no audio tokenizer"):
        run(tmp_path / "bare", tmp_path / "tasks", speech / "list.jsonl", tasks=["tts"])


def test_text_tokens_added_above_the_audio_range_count_as_text(tmp_path):
    processor = build_processor()
    processor.tokenizer.add_tokens(["<mood>"])
    processor.save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "list.jsonl", [{"text": "<mood><mood>"}])
    summary, _ = run(tmp_path / "model", tmp_path / "out", path)
    assert (summary["examples"], summary["text_tokens"], summary["audio_tokens"]) == (1, 2, 0)


def test_a_data_config_gives_each_file_its_share(model, tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(10)])
    write_lines(tmp_path / "b.jsonl", [{"messages": MESSAGES}] * 3)
    write_lines(tmp_path / "c.jsonl", [{"text": "never"}])
    entries = [{"path": "a.jsonl", "sample_ratio": 0.5, "data_type": "PT"}, {"path": "b.jsonl", "sample_ratio": 1}]
    config = tmp_path / "config.json"
    config.write_text(json.dumps([*entries, {"path": "c.jsonl", "sample_ratio": 0}]))
    summary, examples = run(model, tmp_path / "out", data_config=config)
    assert summary["tasks"]["document"]["examples"] == 5 and summary["tasks"]["conversation"]["examples"] == 3
    assert len({tuple(example["input_ids"]) for example in examples[:5]}) == 5
    assert read_examples(tmp_path / "out") == run(model, tmp_path / "again", data_config=config)[1]
    with pytest.raises(ValueError, match="a stream cannot be sampled"):
        run(model, tmp_path / "stream", data_config=config, streaming=True)
    config.write_text(json.dumps([{"path": "a.jsonl", "sample_ratio": 2}]))
    with pytest.raises(ValueError, match="larger weight"):
        run(model, tmp_path / "twice", data_config=config)


# ------------------------------------------------------------------ runs that stop


def prepare_until_stuck(options):
    """In a process of its own: finishes two shards, leaves a third half written and goes no further."""
    finish, done = preparing.finish, []

    def stuck(builder, folder, chunk):
        if len(done) == 2:
            (folder.data / f"{folder.split}-0000-{chunk.number:06d}.parquet.partial").write_bytes(b"half a shard")
            (folder.reports / "stuck").touch()
            time.sleep(600)
        done.append(chunk.number)
        return finish(builder, folder, chunk)

    preparing.finish = stuck
    prepare(options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_run_goes_on_with_the_first_missing_shard(streaming, model, speech, tmp_path):
    rows = [json.loads(line) for line in (speech / "list.jsonl").read_text().splitlines()]
    rows = [
        {**row, "audio": str(speech / row["audio"]), "text": f"{row['text']} {i}"} for i in range(3) for row in rows
    ]
    rows[5]["audio"] = "missing.wav"
    path = write_lines(tmp_path / "list.jsonl", rows)
    options = {"tasks": ["tts"], "shard_size": 2, "streaming": streaming}
    expected = run(model, tmp_path / "whole", path, **options)

    output = tmp_path / "killed"
    arguments = PrepareArguments(model=str(model), output_dir=output, source=[str(path)], max_length=1024, **options)
    process = get_context("fork").Process(target=prepare_until_stuck, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 60
    while not (output / ".train" / "stuck").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    written = {shard: shard.stat().st_mtime_ns for shard in ShardFolder(output, "train").shards()}
    assert len(written) == 2
    assert run(model, output, path, **options) == expected
    assert {shard: shard.stat().st_mtime_ns for shard in written} == written
    assert rejections(output) == rejections(tmp_path / "whole")
    assert not list(output.rglob("*.partial"))


def test_a_stream_goes_on_past_shards_finished_out_of_order(model, speech, tmp_path):
    options = {"tasks": ["tts"], "shard_size": 1, "streaming": True}
    expected = run(model, tmp_path, speech / "list.jsonl", **options)
    for missing in ("0000-000001", "0000-000003"):
        (tmp_path / ".train" / f"{missing}.json").unlink()
        (tmp_path / "data" / f"train-{missing}.parquet").unlink()
    assert run(model, tmp_path, speech / "list.jsonl", **options) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 512}, "--max_length was 1024 and is 512"),
        ({"columns": ["text=answer"]}, "--columns was"),
        ({"tasks": ["tts"]}, "--tasks was"),
    ],
)
def test_going_on_with_other_arguments_is_refused(change, message, model, speech, tmp_path):
    options = {"tasks": ["asr"]}
    run(model, tmp_path, speech / "list.jsonl", **options)
    run(model, tmp_path, speech / "list.jsonl", batch_size=2, **options)  # speed alone may change
    before = read_examples(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path, speech / "list.jsonl", **{**options, **change})
    assert read_examples(tmp_path) == before
    summary, _ = run(model, tmp_path, speech / "list.jsonl", **{**options, **change}, output_split="other")
    assert summary["examples"] == 4 and read_examples(tmp_path) == before


def test_going_on_with_another_audio_tokenizer_is_refused(model, speech, tmp_path):
    processor = TttProcessor.from_pretrained(model)
    processor.save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", speech / "list.jsonl", tasks=["asr"])
    processor.audio_tokenizer.encoder.proj_out.bias.data += 0.1
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="tokenizers was"):
        run(tmp_path / "model", tmp_path / "out", speech / "list.jsonl", tasks=["asr"])


def test_audio_beyond_the_limits_is_rejected_and_counted(model, speech, tmp_path):
    write_wav(tmp_path / "zeros.wav", np.zeros(3 * 16_000, dtype=np.float32))
    write_wav(tmp_path / "clipped.wav", np.clip(5 * tone(1.0), -1, 1))
    write_wav(tmp_path / "short.wav", tone(0.2))
    write_wav(tmp_path / "spoken.wav", tone(1.0))
    texts = {"zeros": "x", "clipped": "x", "short": "x", "spoken": "one two three"}
    rows = [{"audio": f"{name}.wav", "text": text} for name, text in texts.items()]
    rows += [{"audio": "spoken.wav", "text": "y"}, {"audio": "spoken.wav", "text": "so many words " * 5}]
    path = write_lines(tmp_path / "list.jsonl", rows)
    limits = {"min_audio_seconds": 0.3, "min_speaking_rate": 2.0, "max_speaking_rate": 30.0}
    kinds = ["silent audio", "clipped audio", "short audio", "slow speech", "fast speech"]
    for task in ("asr", "tts", "continuation"):
        summary, examples = run(model, tmp_path / task, path, tasks=[task], **limits)
        assert len(examples) == 1 and summary["rejected_kinds"] == dict.fromkeys(kinds, 1)
        assert [row["kind"] for row in rejections(tmp_path / task)] in (kinds, sorted(kinds, key=kinds.index))
        named = [row["reason"].rpartition("(")[2] for row in rejections(tmp_path / task)]
        assert named == ["zeros.wav)", "clipped.wav)", "short.wav)", "spoken.wav)", "spoken.wav)"]
    columns = ["answer=text", "answer_audio=audio"]  # what the user says is not known, what the answer says is
    summary, _ = run(model, tmp_path / "chat", path, tasks=["text_chat"], columns=columns, **limits)
    assert summary["rejected_kinds"] == dict.fromkeys(kinds, 1)
    summary, _ = run(model, tmp_path / "heard", path, tasks=["spoken_chat"], columns=["answer=text"], **limits)
    assert summary["rejected_kinds"] == dict.fromkeys(kinds[:3], 1)
    for name, value in (("min_audio_seconds", 40.0), ("min_speaking_rate", -1.0), ("max_clipping", 2.0)):
        with pytest.raises(ValueError, match=f"--{name}"):
            run(model, tmp_path / "wrong", path, tasks=["asr"], **{name: value})


def test_shards_shrink_so_that_every_process_has_work_and_a_run_keeps_its_own(model, tmp_path):
    def sizes(**options):
        args = PrepareArguments(model=str(model), output_dir=tmp_path, source=["x"], **options)
        return preparing.records_per_shard(args, [60, 9])

    assert sizes(num_proc=4) == 5 and sizes() == 18
    assert sizes(num_proc=4, shard_size=50) == 50
    assert sizes(num_proc=4, tasks=["continuation"]) == 1000  # utterances of a chapter stay together
    args = PrepareArguments(model=str(model), output_dir=tmp_path, source=["x"])
    assert preparing.records_per_shard(args, [10**6]) == 1000
    assert preparing.records_per_shard(args, [None]) == 1000

    path = write_lines(tmp_path / "list.jsonl", [{"text": f"a{i}"} for i in range(9)])
    summary, expected = run(model, tmp_path / "out", path)
    assert summary["shards"] == 3
    shards = ShardFolder(tmp_path / "out", "train").shards()
    shards[1].unlink()
    (tmp_path / "out" / ".train" / "0000-000001.json").unlink()
    arguments = PrepareArguments(model=str(model), output_dir=tmp_path / "out", source=[str(path)], max_length=1024)
    arguments.num_proc = 9  # would make other shards
    assert preparing.records_per_shard(arguments, [9]) == 1
    arguments.num_proc = 1
    assert ShardFolder(tmp_path / "out", "train").arguments()["records per shard"] == 3
    assert prepare(arguments)["shards"] == 3
    assert read_examples(tmp_path / "out") == expected


@pytest.mark.slow
def test_several_processes_make_the_same_shards(model, speech, tmp_path):
    options = {"tasks": ["asr", "tts"], "shard_size": 1}
    expected = run(model, tmp_path / "one", speech / "list.jsonl", **options)
    assert run(model, tmp_path / "two", speech / "list.jsonl", num_proc=2, **options) == expected


# ------------------------------------------------------------------ errors before any work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["asr"], "columns": ["text=transcript"]}, "`text` from the column `transcript`.*--columns text="),
        ({"tasks": ["spoken_chat"], "columns": ["answer_audio=reply"]}, "column `reply`"),
        ({"tasks": ["translation"]}, "no task 'translation'"),
        ({"tasks": ["asr"], "columns": ["words=text"]}, "--columns` words="),
        ({"tasks": ["asr"], "columns": ["text"]}, "KEY=VALUE"),
        ({"tasks": ["asr"], "questions": ["asr=What?"]}, "--questions` asr="),
        ({"tasks": ["asr"], "max_length": 0}, "--max_length` is 0"),
        ({"tasks": ["asr"], "output_split": "a-b"}, "--output_split"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(options, message, model, speech, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "out", speech / "list.jsonl", **options)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        run(model, tmp_path / "out", tmp_path / "nowhere.jsonl", tasks=["asr"])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="cannot read this type of file"):
        run(model, tmp_path / "out", tmp_path / "notes.txt", tasks=["asr"])
    with pytest.raises(ValueError, match="either `--source` or `--data_config`"):
        PrepareArguments(model=str(model), output_dir=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="`--device` is 'cuda'.*no GPU"):
            run(model, tmp_path / "out", "x", device="cuda")
    path = write_lines(tmp_path / "list.jsonl", [{"sound": "x.wav"}])
    with pytest.raises(ValueError, match="Without `--tasks` it needs one of messages"):
        run(model, tmp_path / "out", path)
    path = write_lines(tmp_path / "list.jsonl", [{"audio": "x.wav", "text": "x"}])
    with pytest.raises(ValueError, match="has audio with its text: say with `--tasks`"):
        run(model, tmp_path / "out", path)
