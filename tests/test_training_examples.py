"""The scripts that made ttt-tiny, on data small enough to print: the domain's split, shards, examples and training."""

import dataclasses
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
from training_examples.ttt_tiny import (
    augmentation,
    build_examples,
    build_speech,
    domain,
    other_sentences,
    phonemes,
    speech,
    synthesis,
    train_codec,
    untrained,
)

SMALL = build_speech.BuildArguments(
    assistant=1500, questions=2000, dictations=300, digits=100, words=800, others=300, eval_items=60
)


def test_no_held_out_sentence_is_ever_drawn_for_training():
    plan = build_speech.plan_training(SMALL)
    asked = {row["text"] for row in plan["questions"]}
    held_out = build_speech.plan_evaluation(SMALL)
    for name in ("spoken_qa_seen", "spoken_qa_unheard", "text_qa", "other_seen", "other_unheard"):
        assert len(held_out[name]) == 60
        assert not asked & {row["question"] for row in held_out[name]}
    dictated = {row["text"] for row in plan["questions"]} | {row["text"] for row in plan["assistant"]}
    for name in ("tts", "asr_seen", "asr_unheard", "asr_unheard_natural"):
        assert not dictated & {row["answer"] for row in held_out[name]}


def test_voices_never_heard_are_in_no_mixture_and_in_no_development_list():
    trained = [row["voice"] for row in build_speech.plan_training(SMALL)["questions"]]
    held_out = build_speech.plan_evaluation(SMALL)
    trained += [
        row["voice"] for name, rows in held_out.items() if "unheard" not in name for row in rows if "voice" in row
    ]
    unheard = {name.partition(":")[2] for name in (*synthesis.UNHEARD_VOICES, synthesis.UNHEARD_NATURAL_VOICE)}
    parts = {part.partition(":")[0] for voice in trained for part in voice.partition(":")[2].split("+")}
    assert len(unheard) == 6 and not unheard & parts and len(parts & set(synthesis.KOKORO_VOICES)) >= 22
    for name in ("spoken_qa_unheard", "asr_unheard", "other_unheard"):
        assert {row["voice"] for row in held_out[name]} == set(synthesis.UNHEARD_VOICES)
    assert not any(":" in voice.partition(":")[2] for voice in synthesis.TRAINED_VOICES)


def test_training_speech_is_planned_in_an_order_that_may_be_cut_anywhere(tmp_path):
    plan = build_speech.plan_training(SMALL)
    answers = {row["text"]: place for place, row in enumerate(plan["assistant"])}
    asked = [row["answer"] for row in plan["questions"] if row["answer"] is not None]
    assert len(answers) == SMALL.assistant and len(plan["questions"]) == 3500
    # Every answer is spoken, before anything that answers nothing.
    needed = {item.answer for item in domain.fixed_items()} | set(asked) | {domain.NOT_HEARD, domain.NOT_KNOWN}
    assert {answers[answer] for answer in needed} == set(range(len(needed)))
    half = {row["kind"] for row in plan["questions"][:1750]}
    assert half == {row["kind"] for row in plan["questions"]} >= {"word", "digits", "dictation", "other", "repeat"}
    voices: dict[tuple, list[str]] = {}
    for row in plan["questions"]:
        if row["kind"] == "word":
            voices.setdefault((row["voice"], row["rate"], row["pitch"]), []).append(row["text"])
    assert sum(set(words) >= set(build_speech.LONE_WORDS) for words in voices.values()) == SMALL.words // 15
    for row in plan["questions"]:
        assert (row["answer"] == domain.NOT_KNOWN) == (row["kind"] == "other")
    jobs = [path.stem for path, _ in build_speech.training_jobs(dataclasses.replace(SMALL, output_dir=tmp_path))]
    assert jobs[:5] == ["assistant-0000", "questions-0000", "questions-0001", "questions-0002", "assistant-0001"]
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "questions-0000.safetensors").touch()
    rest = [path.stem for path, _ in build_speech.training_jobs(dataclasses.replace(SMALL, output_dir=tmp_path))]
    assert rest == [name for name in jobs if name != "questions-0000"]


def test_other_sentences_are_outside_the_domain_and_split_by_pattern_and_text():
    known = {item.question for item in domain.fixed_items()}
    rng = random.Random(0)
    trained = other_sentences.sample_sentences(rng, 2000, unseen_patterns=False, held_out=False)
    held_out = other_sentences.sample_sentences(rng, 200, unseen_patterns=False, held_out=True)
    unseen = other_sentences.sample_sentences(rng, 200, unseen_patterns=True, held_out=True)
    assert len(set(trained)) == 2000 and not known & {*trained, *held_out, *unseen}
    assert not set(trained) & {*held_out, *unseen}
    assert not any(map(domain.is_held_out, trained)) and all(map(domain.is_held_out, held_out))
    assert all(text == text.lower() and text.replace(" ", "").isalpha() for text in trained)
    assert not any(f" a {vowel}" in f" {text}" for text in trained for vowel in "aeiou")
    with pytest.raises(ValueError, match="fewer than 10"):
        other_sentences.sample_sentences(rng, 10, unseen_patterns=True, held_out=True, excluded=EVERYTHING)


class Everything:
    def __contains__(self, _):
        return True


EVERYTHING = Everything()


def test_what_is_read_aloud_and_repeated_has_content_words_only():
    content = set(domain.CONTENT)
    assert not content & set("a am an the is of to i do not you what which from and me".split())
    rng = random.Random(0)
    assert {word for _ in range(300) for word in domain.repeat_item(rng).answer.split()} <= content
    assert {word for row in build_speech.plan_evaluation(SMALL)["tts"] for word in row["answer"].split()} <= content


def sentences(rows):
    return {row["question"] or row["answer"] for row in rows}


def test_development_lists_are_held_out_and_share_no_sentence_with_the_evaluation_list_they_stand_for():
    plan = build_speech.plan_evaluation(build_speech.BuildArguments())
    for name in ("spoken_qa_seen", "asr_seen", "other_seen", "tts"):
        rows = plan[f"development_{name}"]
        assert len(rows) == 100
        assert all(domain.is_held_out(sentence) for sentence in sentences(rows))
        assert not sentences(rows) & sentences(plan[name])
        assert [row.keys() for row in rows] == [plan[name][0].keys()] * 100
    # Every kind of question is left, in about the evaluation's proportions, but for the few greetings.
    kinds = {name: {row["kind"] for row in plan[name]} for name in ("development_spoken_qa_seen", "spoken_qa_seen")}
    assert kinds["development_spoken_qa_seen"] | {"greetings"} == kinds["spoken_qa_seen"] == set(domain.KIND_WEIGHTS)


def test_evaluation_lists_do_not_depend_on_the_development_lists():
    few = build_speech.plan_evaluation(build_speech.BuildArguments(development_items=3))
    many = build_speech.plan_evaluation(build_speech.BuildArguments(development_items=30))
    for name in few:
        assert (few[name] == many[name]) != name.startswith("development_"), name
    # Published figures rest on these very draws.
    digest = hashlib.sha256(json.dumps([rows for name, rows in few.items() if "development" not in name]).encode())
    assert digest.hexdigest()[:16] == "5ab6ea2dc86e138c"


def test_the_same_seed_plans_the_same_speech():
    args = SMALL
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
    tokenizer = untrained.build_tokenizer(num_codes=8)
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
    read_rows, read_waves = speech.read_shard(tmp_path / "assistant-0000.safetensors", synthesis.SAMPLING_RATE)
    assert read_rows == rows
    assert all(np.array_equal(a, b) for a, b in zip(waves, read_waves, strict=True))
    _, slower = speech.read_shard(tmp_path / "assistant-0000.safetensors", synthesis.SAMPLING_RATE // 2)
    assert [len(wave) for wave in slower] == [len(wave) // 2 for wave in waves]


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
    rows = conversations(2)
    dataset = build_examples.write_examples(processor, rows)
    assert dataset["length"] == [len(ids) for ids in dataset["input_ids"]]
    for (task, messages), example in zip(rows, dataset, strict=True):
        system = {"role": "system", "content": processor.system_prompts[task]}
        expected = build_processor(audio_tokenizer=None).build_conversation_example([system, *messages])
        assert {name: example[name] for name in expected} == expected


@pytest.mark.usefixtures("undrawn_curves")
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


@pytest.mark.parametrize("stage", ["tokenizer", "vocoder", "decoder", "head"])
def test_every_stage_of_the_codec_training_trains_what_it_says(tmp_path, stage, monkeypatch):
    speech = tmp_path / "speech"
    speech.mkdir()
    for kind in ("assistant", "questions"):
        write_shard(speech, kind, ["one two", "three", "say four"])
    small = TttCodecConfig(hidden_size=16, vocoder_hidden_size=16, num_code_blocks=1, num_mel_blocks=1)
    for earlier in ("tokenizer", "vocoder"):
        TttCodecModel(small).save_pretrained(tmp_path / "codec" / earlier)
    before = TttCodecModel.from_pretrained(tmp_path / "codec" / "tokenizer").state_dict()
    if stage in ("tokenizer", "vocoder"):
        before = TttCodecModel.from_pretrained(tmp_path / "codec" / stage).state_dict()
    options = f"--stage {stage} --speech_dir {speech} --output_dir {tmp_path / 'codec'} --max_steps 2 --batch_size 4"
    monkeypatch.setattr(sys, "argv", ["train_codec.py", *options.split()])
    train_codec.main()
    after = TttCodecModel.from_pretrained(tmp_path / "codec" / stage).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    trained = {"tokenizer": {"encoder", "decoder"}, "vocoder": {"vocoder"}, "decoder": {"decoder", "vocoder"}}
    assert changed == trained.get(stage, set())
    state = torch.load(tmp_path / "codec" / stage / "training_state.pt", weights_only=True)
    assert state["step"] == 2
    assert ("head" in state) == (stage in ("tokenizer", "head"))
    if stage == "head":
        codec = TttCodecModel.from_pretrained(tmp_path / "codec" / "head")
        head = phonemes.load_head(tmp_path / "codec" / "head", codec, phonemes.pronunciations()[1])
        assert len(state["optimizer"]["state"]) == len(list(head.parameters()))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_the_codec_training_says_early_that_a_device_is_not_there(device):
    with pytest.raises(ValueError, match=f"--device is {device}, which cannot be used here .*leave it out"):
        train_codec.CodecArguments(stage="tokenizer", device=device)


def test_a_head_is_trained_for_an_audio_tokenizer_that_was_published_without_one(tmp_path, monkeypatch):
    speech = tmp_path / "speech"
    speech.mkdir()
    for kind in ("assistant", "questions"):
        write_shard(speech, kind, ["one two", "three", "say four"])
    told = f"train_codec.py --stage head --speech_dir {speech} --output_dir {tmp_path / 'aligner'} --max_steps 2"
    monkeypatch.setattr(sys, "argv", told.split())
    with pytest.raises(ValueError, match="goes on from .*tokenizer, or from --model"):
        train_codec.main()
    published = TttCodecModel(
        TttCodecConfig(hidden_size=16, vocoder_hidden_size=16, num_code_blocks=1, num_mel_blocks=1)
    )
    published.save_pretrained(tmp_path / "published")
    monkeypatch.setattr(sys, "argv", [*told.split(), "--model", str(tmp_path / "published"), "--batch_size", "4"])
    train_codec.main()
    kept = TttCodecModel.from_pretrained(tmp_path / "aligner" / "head").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in published.state_dict().items())


def test_a_phoneme_head_takes_part_in_the_decoders_training_and_stays_as_it_was(tmp_path, monkeypatch):
    speech = tmp_path / "speech"
    speech.mkdir()
    for kind in ("assistant", "questions"):
        write_shard(speech, kind, ["one two", "three", "say four"])
    small = TttCodecConfig(hidden_size=16, vocoder_hidden_size=16, num_code_blocks=1, num_mel_blocks=1)
    codec = TttCodecModel(small)
    codec.save_pretrained(tmp_path / "published")
    aligner = tmp_path / "codec" / "head"

    def train(stage, *options):
        shared = (
            f"--model {tmp_path / 'published'} --speech_dir {speech} --output_dir {tmp_path / 'codec'} --max_steps 2"
        )
        monkeypatch.setattr(sys, "argv", ["train_codec.py", "--stage", stage, *shared.split(), *options])
        train_codec.main()

    train("head", "--batch_size", "4")
    words, count = phonemes.pronunciations()
    answers = train_codec.Speech(speech, "assistant", small.sampling_rate, 0, words)
    batch = next(answers.batches(2))
    losses = {}
    for weight in (0.0, 3.0):
        listener = train_codec.Listener(aligner, codec, count, words, weight)
        random.seed(0)
        losses[weight] = train_codec.decoder_step(codec, batch, None, listener)
    assert losses[3.0]["clarity"] == losses[0.0]["clarity"] > 0
    torch.testing.assert_close(losses[3.0]["loss"] - losses[0.0]["loss"], 3 * losses[0.0]["clarity"])
    losses[3.0]["clarity"].backward()
    assert codec.decoder.proj_out.weight.grad.abs().sum() > 0  # it is the decoder that shall speak more clearly
    assert all(p.grad is None for p in listener.head.parameters())

    before = torch.load(aligner / "training_state.pt", weights_only=True)["head"]
    train("decoder", "--aligner", str(aligner), "--batch_size", "2")
    after = torch.load(aligner / "training_state.pt", weights_only=True)["head"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for steps in ("3", "4"):  # the discriminator goes on where it stopped
        train("decoder", "--batch_size", "2", "--max_steps", steps, "--adversarial_steps", "2")
    state = torch.load(tmp_path / "codec" / "decoder" / "training_state.pt", weights_only=True)
    assert {int(moments["step"]) for moments in state["critic"]["optimizer"]["state"].values()} == {2}
    with pytest.raises(ValueError, match="--aligner takes part in the stage decoder alone"):
        train("vocoder", "--aligner", str(aligner))
    with pytest.raises(ValueError, match="--adversarial_steps takes part in the stage decoder alone"):
        train("vocoder", "--adversarial_steps", "1")
    with pytest.raises(ValueError, match="--clarity_weight 2.0 has no effect without --aligner"):
        train("decoder", "--clarity_weight", "2")


def test_dataset_of_examples_has_what_the_trainer_groups_by():
    dataset = build_examples.write_examples(build_processor(audio_tokenizer=None), conversations(1))
    assert isinstance(dataset, Dataset)
    assert set(dataset.column_names) == {"input_ids", "labels", "length", "task"}


def test_held_out_sounds_are_of_every_kind_and_made_anew_from_their_seed(tmp_path):
    plan = build_speech.plan_evaluation(SMALL)
    rows = [row for row in plan["not_heard"] if row["kind"] != "babble"][:10]  # babble wants synthesisers
    assert {row["kind"] for row in plan["not_heard"]} == set(augmentation.NO_SPEECH)
    assert {row["answer"] for row in plan["not_heard"]} == {domain.NOT_HEARD}
    seeds = [row["sound_seed"] for name in ("not_heard", "development_not_heard") for row in plan[name]]
    assert len(set(seeds)) == len(seeds)
    for row in rows:
        wave = speech.make_sound(row)
        assert len(wave) == int(row["seconds"] * synthesis.SAMPLING_RATE)
        assert np.array_equal(wave, speech.make_sound(row))


def test_two_turns_are_spoken_and_typed_in_every_order():
    rows = [
        {"id": str(number), "question": f"q {number}", "answer": f"a {number}", "kind": "days", "rate": 1.0}
        | {"audio": f"{number}.flac", "answer_audio": f"{number}-answer.flac"}
        for number in range(5)
    ]
    pairs = speech.pair_turns(rows, 9, seed=0)
    assert [row["kind"] for row in pairs[:3]] == ["spoken then spoken", "spoken then typed", "typed then spoken"]
    for row in pairs:
        first, second = row["turns"]
        assert first["question"] != second["question"]
        assert [("typed", "spoken")[turn["audio"] is not None] for turn in row["turns"]] == row["kind"].split(" then ")
        assert first["answer_audio"] == first["question"].replace("q ", "") + "-answer.flac"
    assert pairs == speech.pair_turns(rows, 9, seed=0) != speech.pair_turns(rows, 9, seed=1)
