"""The scripts that made ttt-tiny, on data small enough to print: the domain's split, shards, examples and training."""

import hashlib
import json
import random
import sys

import numpy as np
import pytest
import torch
from builders import build_codec, build_processor
from datasets import Dataset, DatasetDict

from modeling_ttt import TttConfig, TttForConditionalGeneration
from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel
from training_examples import train_ttt
from training_examples.files import whole_file, write_text
from training_examples.ttt_tiny import build_examples, build_speech, create_tiny, domain, speech, train_codec


def test_no_held_out_sentence_is_ever_drawn_for_training():
    plan = build_speech.plan_training(build_speech.BuildArguments(sequences=300, questions=2000, dictations=300))
    asked = {row["text"] for row in plan["questions"]}
    held_out = build_speech.plan_evaluation(build_speech.BuildArguments(eval_items=60))
    for name in ("spoken_qa_seen", "spoken_qa_unheard", "text_qa"):
        assert len(held_out[name]) == 60
        assert not asked & {row["question"] for row in held_out[name]}
    dictated = {row["text"] for row in plan["questions"]} | {row["text"] for row in plan["assistant"]}
    assert not dictated & {row["answer"] for row in held_out["tts"]}
    assert {row["voice"] for row in plan["questions"]}.isdisjoint(row["voice"] for row in held_out["asr_unheard"])


def sentences(rows):
    return {row["question"] or row["answer"] for row in rows}


def test_development_lists_are_held_out_and_share_no_sentence_with_the_evaluation_list_they_stand_for():
    plan = build_speech.plan_evaluation(build_speech.BuildArguments())
    for name in ("spoken_qa_seen", "asr_seen", "tts"):
        rows = plan[f"development_{name}"]
        assert len(rows) == 100
        assert all(domain.is_held_out(sentence) for sentence in sentences(rows))
        assert not sentences(rows) & sentences(plan[name])
        assert [row.keys() for row in rows] == [plan[name][0].keys()] * 100
    # Every kind of question is left, in about the evaluation's proportions.
    assert {row["kind"] for row in plan["development_spoken_qa_seen"]} == {
        row["kind"] for row in plan["spoken_qa_seen"]
    }


def test_evaluation_lists_do_not_depend_on_the_development_lists():
    few = build_speech.plan_evaluation(build_speech.BuildArguments(development_items=3))
    many = build_speech.plan_evaluation(build_speech.BuildArguments(development_items=30))
    for name in few:
        assert (few[name] == many[name]) != name.startswith("development_"), name
    # Published figures rest on these very draws.
    digest = hashlib.sha256(json.dumps([rows for name, rows in few.items() if "development" not in name]).encode())
    assert digest.hexdigest()[:16] == "9a01384e56ac8a28"


def test_the_same_seed_plans_the_same_speech():
    args = build_speech.BuildArguments(sequences=50, questions=50, dictations=50)
    assert build_speech.plan_training(args) == build_speech.plan_training(args)


def test_every_question_has_one_answer_in_known_words():
    words, answers = set(domain.vocabulary()), {}
    for item in domain.fixed_items():
        assert set((item.question + " " + item.answer).split()) <= words
        assert answers.setdefault(item.question, item.answer) == item.answer


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what is seven plus eight", "seven plus eight is fifteen"),
        ("take three from twelve", "twelve minus three is nine"),
        ("if today is sunday what is tomorrow", "tomorrow is monday"),
        ("what month comes before january", "december comes before january"),
        ("count down from five to two", "five four three two"),
        ("what is the opposite of early", "the opposite of early is late"),
        ("name the capital of peru", "the capital of peru is lima"),
        ("which is smaller nine or four", "four is smaller"),
    ],
)
def test_the_domain_answers_correctly(question, answer):
    assert {item.question: item.answer for item in domain.fixed_items()}[question] == answer


def test_every_word_is_one_token_and_typed_text_is_read_as_spoken():
    tokenizer = create_tiny.build_tokenizer(num_codes=8)
    for word in domain.vocabulary():
        assert len(tokenizer(word)["input_ids"]) == len(tokenizer(f"one {word}")["input_ids"]) - 1 == 1
    assert tokenizer("What is 3+4?")["input_ids"] == tokenizer("what is three plus four")["input_ids"]
    assert tokenizer("12 - 5")["input_ids"] == tokenizer("twelve minus five")["input_ids"]
    assert tokenizer.decode(tokenizer("an unknown zebra")["input_ids"]).strip() == "an unknown zebra"


def write_shard(folder, kind, texts):
    rng = np.random.default_rng(0)
    waves = [rng.integers(-3000, 3000, 16_000 + 1600 * index, dtype=np.int16) for index in range(len(texts))]
    rows = [{"text": text, "answer": text, "kind": "repeat", "voice": "none"} for text in texts]
    speech.write_shard(folder / f"{kind}-0000.safetensors", rows, waves)
    return rows, waves


def test_shards_are_read_back_as_written(tmp_path):
    rows, waves = write_shard(tmp_path, "assistant", ["one", "two three"])
    read_rows, read_waves = speech.read_shard(tmp_path / "assistant-0000.safetensors")
    assert read_rows == rows
    assert all(np.array_equal(a, b) for a, b in zip(waves, read_waves, strict=True))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "shard.parquet"
    write_text(path, "first")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert list(path.parent.glob("*.parquet")) == [path]  # what a kill leaves is not taken for a shard
    write_text(path, "second")
    assert [file.read_text() for file in path.parent.iterdir()] == ["second"]


def test_encoding_in_batches_keeps_order_and_lengths(tmp_path):
    _, waves = write_shard(tmp_path, "assistant", ["one"] * 5)
    codec = build_codec()
    codes = build_examples.encode(codec, waves[::-1])
    assert [len(row) for row in codes] == [-(-len(wave) // 1280) for wave in waves[::-1]]
    alone = codec.encode(torch.from_numpy(waves[2] / np.float32(32767))[None].float()).audio_codes[0, 0]
    assert codes[2] == alone.tolist()


def conversations(count):
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        codes = [rng.randrange(16) for _ in range(30)]
        turn = [
            {"role": "user", "content": [{"type": "audio", "audio_codes": codes[:7]}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "a b"}, {"type": "audio", "audio_codes": codes}],
            },
        ]
        text = [{"role": "user", "content": [{"type": "text", "text": "c d"}]}]
        written = [{"role": "assistant", "content": [{"type": "text", "text": "e"}]}]
        rows += [("spoken_qa", turn), ("asr", turn[:1] + written), ("text_chat", text + turn[1:] + turn)]
    return rows


def test_examples_are_written_as_the_processor_writes_them():
    processor = build_processor(audio_tokenizer=None)
    dataset = build_examples.write_examples(processor, conversations(2))  # raises where they differ
    assert dataset["length"] == [len(ids) for ids in dataset["input_ids"]]
    first = dataset[0]
    assert [i for i, label in zip(first["input_ids"], first["labels"], strict=True) if label != -100] == [
        label for label in first["labels"] if label != -100
    ]
    processor.tokenizer.add_tokens(["<|im_start|>assistant"])  # a tokenizer that now splits the prompt differently
    processor.text_chunk_size = 1
    with pytest.raises(RuntimeError, match="disagree"):
        build_examples.write_examples(processor, conversations(1))


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_training_lowers_the_loss_and_goes_on_after_a_stop(tmp_path, monkeypatch, objective):
    processor = build_processor()
    ids = processor.token_ids
    config = TttConfig(
        text_config={"vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 64}
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
        **{name: getattr(ids, name) for name in TttConfig().to_dict() if hasattr(ids, name)},
    )
    folder = tmp_path / "model"
    TttForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    dataset = build_examples.write_examples(processor, conversations(8))
    DatasetDict({"train": dataset, "eval": dataset.select(range(4))}).save_to_disk(str(tmp_path / "dataset"))

    def train(steps):
        options = f"--model {folder} --dataset {tmp_path / 'dataset'} --output_dir {tmp_path / 'run'} --threads 1"
        options += f" --audio_objective {objective} --max_steps {steps} --save_steps 10 --learning_rate 1e-2 --use_cpu"
        options += " --per_device_train_batch_size 8 --logging_steps 5 --report_to none --disable_tqdm true"
        monkeypatch.setattr(sys, "argv", ["train_ttt.py", *options.split()])
        train_ttt.main()
        return json.loads((tmp_path / "run" / f"checkpoint-{steps}" / "trainer_state.json").read_text())

    train(10)
    state = train(30)
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [5, 10, 15, 20, 25, 30]
    assert logged[-1] < 0.8 * logged[0]
    trained = TttForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert trained.config.audio_objective == objective


@pytest.mark.parametrize("stage", ["tokenizer", "vocoder", "decoder"])
def test_every_stage_of_the_codec_training_trains_what_it_says(tmp_path, stage, monkeypatch):
    speech = tmp_path / "speech"
    speech.mkdir()
    for kind in ("assistant", "questions"):
        write_shard(speech, kind, ["one two", "three", "say four"])
    small = TttCodecConfig(hidden_size=16, vocoder_hidden_size=16, num_code_blocks=1, num_mel_blocks=1)
    for earlier in ("tokenizer", "vocoder"):
        TttCodecModel(small).save_pretrained(tmp_path / "codec" / earlier)
    before = TttCodecModel.from_pretrained(tmp_path / "codec" / "tokenizer").state_dict()
    if stage != "decoder":
        before = TttCodecModel.from_pretrained(tmp_path / "codec" / stage).state_dict()
    options = f"--stage {stage} --speech_dir {speech} --output_dir {tmp_path / 'codec'} --max_steps 2 --batch_size 4"
    monkeypatch.setattr(sys, "argv", ["train_codec.py", *options.split()])
    train_codec.main()
    after = TttCodecModel.from_pretrained(tmp_path / "codec" / stage).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    trained = {"tokenizer": {"encoder", "decoder"}, "vocoder": {"vocoder"}, "decoder": {"decoder", "vocoder"}}
    assert changed == trained[stage]
    state = torch.load(tmp_path / "codec" / stage / "training_state.pt", weights_only=True)
    assert state["step"] == 2


def test_dataset_of_examples_has_what_the_trainer_groups_by():
    dataset = build_examples.write_examples(build_processor(audio_tokenizer=None), conversations(1))
    assert isinstance(dataset, Dataset)
    assert set(dataset.column_names) == {"input_ids", "labels", "length", "task"}
