"""What ttt-tiny learns from: the conversations made of encoded speech, and the examples made of a handful of shards."""

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import build_codec

from training_examples.ttt_tiny import build_examples, domain, speech, synthesis
from training_examples.ttt_tiny.conversations import Mixture, MixtureArguments
from training_examples.ttt_tiny.phonemes import build_head, pronunciations


def question(text, answer, kind="addition"):
    return {"text": text, "answer": answer, "kind": kind, "codes": [1], "other_codes": [[2], [2]]}


@pytest.fixture
def rows():
    """Two answers that are spoken and one that is not yet; a dictation, another's sentence, a splice and a sound."""
    answers = ["two", "three", domain.NOT_KNOWN, domain.NOT_HEARD]
    return {
        "assistant": [{"text": text, "codes": [10 + index]} for index, text in enumerate(answers)],
        "questions": [
            question("one plus one", "two"),
            question("one plus two", "three"),
            question("one plus three", "four"),
            question("where is my hat", domain.NOT_KNOWN, "other"),
            question("cat dog", None, "dictation"),
        ],
        "spliced": [{"text": "five five", "codes": [3]}],
        "sounds": [{"codes": [4]}],
    }


def heard(message):
    """What a user's message holds: codes or text."""
    (part,) = message["content"]
    return part.get("audio_codes", part.get("text"))


def said(message):
    """Text and codes of an assistant's message."""
    text, *audio = message["content"]
    return text["text"], audio[0]["audio_codes"] if audio else None


def test_questions_are_asked_clean_and_recorded_and_answered_in_text_and_speech(rows):
    mixture = Mixture(rows, MixtureArguments(text_share=1.0), random.Random(0))
    turns = [(task, heard(asked), *said(answer)) for task, (asked, answer) in mixture.single_turns()]
    for text, answer, codes in (
        ("one plus one", "two", [10]),
        ("one plus two", "three", [11]),
        ("where is my hat", domain.NOT_KNOWN, [12]),
    ):
        assert ("text_chat", text, answer, codes) in turns
        assert turns.count(("spoken_qa", [1], answer, codes)) == 1
        assert turns.count(("spoken_qa", [2], answer, codes)) == 2
    assert ("spoken_qa", [4], domain.NOT_HEARD, [13]) in turns
    assert len(turns) == 3 * 4 + 1  # the question whose answer is not spoken yet waits


def test_what_is_taken_down_is_words_of_the_domain_answered_in_text_alone(rows):
    found = Mixture(rows, MixtureArguments(), random.Random(0)).dictations()
    assert {task for task, _ in found} == {"asr"}
    texts = [said(answer)[0] for _, (_, answer) in found]
    assert sorted(texts) == sorted(
        ["one plus one", "one plus two", "one plus three", "cat dog", "cat dog", "cat dog", "five five"]
    )
    assert all(said(answer)[1] is None for _, (_, answer) in found)


def test_several_turns_are_of_every_kind_in_every_order(rows):
    mixture = Mixture(rows, MixtureArguments(not_heard_share=0.2), random.Random(0))
    kinds = set()
    for _ in range(300):
        messages = mixture.several_turns(2)
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        kinds.add(
            tuple(
                "typed"
                if isinstance(heard(message), str)
                else {1: "clean", 2: "recorded", 4: "nobody"}[heard(message)[0]]
                for message in messages[::2]
            )
        )
        for asked, answer in zip(messages[::2], messages[1::2], strict=True):
            assert (heard(asked) == [4]) == (said(answer)[0] == domain.NOT_HEARD)
    assert kinds == {
        (a, b) for a in ("typed", "clean", "recorded", "nobody") for b in ("typed", "clean", "recorded", "nobody")
    }


def test_the_mixture_holds_all_of_it_and_the_seed_decides(rows):
    args = MixtureArguments(turns_share=10.0, tts_copies=3)
    found = Mixture(rows, args, random.Random(1)).conversations()
    assert found == Mixture(rows, args, random.Random(1)).conversations()
    assert found != Mixture(rows, args, random.Random(2)).conversations()
    tasks = [task for task, _ in found]
    assert tasks.count("tts") == 3 * 4 and tasks.count("asr") == 7
    turns = [len(messages) // 2 for _, messages in found]
    assert turns.count(2) + turns.count(3) == 30 and turns.count(2) > turns.count(3) > 0


def test_sentences_are_read_and_said_from_several_beginnings(rows):
    rows["assistant"][0]["other_codes"] = [[20], [21]]
    mixture = Mixture(rows, MixtureArguments(tts_copies=4, shifted_share=0.5), random.Random(0))
    read = [said(answer)[1] for _, (asked, answer) in mixture.readings() if heard(asked) == "two"]
    assert read == [[10], [20], [21], [10]]
    answers = [said(mixture.answer("two"))[1] for _ in range(400)]
    assert 150 < answers.count([10]) < 250 and min(answers.count([20]), answers.count([21])) > 60
    assert said(mixture.answer("three"))[1] == [11]
    mixture.args.shifted_share = 0.0
    assert {tuple(said(mixture.answer("two"))[1]) for _ in range(50)} == {(10,)}


def test_without_the_sentence_for_it_nobody_is_never_answered(rows):
    rows["assistant"] = rows["assistant"][:3]
    mixture = Mixture(rows, MixtureArguments(not_heard_share=1.0), random.Random(0))
    assert all(heard(messages[0]) != [4] for _, messages in mixture.single_turns())
    assert all(heard(message) != [4] for message in mixture.several_turns(3)[::2])


def write_shard(folder, name, rows):
    rng = np.random.default_rng(len(name))
    waves = [(3000 * rng.standard_normal(12_000 + 500 * index)).astype(np.int16) for index in range(len(rows))]
    speech.write_shard(folder / f"{name}.safetensors", rows, waves)


def test_shards_become_codes_once_and_examples_of_every_task(tmp_path, monkeypatch):
    # tests/test_workers.py looks at workers that are processes.
    monkeypatch.setattr(build_examples, "worker_pool", lambda workers, *_: ThreadPoolExecutor(workers))
    (tmp_path / "speech").mkdir()
    delivery = {"voice": "kokoro:am_adam", "rate": 1.0, "pitch": 1.0, "phrasing": "statement"}
    texts = ["two", domain.NOT_HEARD]
    write_shard(tmp_path / "speech", "assistant-0000", [{"text": text, **delivery} for text in texts])
    heard = [{"text": word, "answer": None, "kind": "word", **delivery} for word in ("one", "five", "plus", "cat")]
    heard.append({"text": "one plus one", "answer": "two", "kind": "addition", **delivery})
    write_shard(tmp_path / "speech", "questions-0000", heard)
    build_codec().save_pretrained(tmp_path / "model" / "audio_tokenizer")
    args = build_examples.ExampleArguments(
        model=tmp_path / "model", data_dir=tmp_path, output_dir=tmp_path / "out", sounds=12, splices=20, workers=1
    )
    rows = build_examples.encode_all(args)
    assert [row["text"] for row in rows["assistant"]] == texts and len(rows["sounds"]) == 12
    assert all(row["codes"] and len(row["other_codes"]) == 2 for row in rows["questions"])
    for row in rows["assistant"]:
        assert [len(codes) - len(row["codes"]) in (0, 1) for codes in row["other_codes"]] == [True] * 3
    assert len(rows["spliced"]) > 5
    for row in rows["spliced"]:
        assert set(row["text"].split()) <= {"one", "five", "plus", "cat"}
        assert " " not in row["text"] or not domain.is_held_out(row["text"])
    monkeypatch.setattr(build_examples, "load_codec", None)  # all is there: nothing is encoded again
    assert build_examples.encode_all(args) == rows
    with pytest.raises(ValueError, match="made otherwise: `recordings` was 2 and is 5. Give another --output_dir"):
        build_examples.encode_all(dataclasses.replace(args, recordings=5))  # what is there would stay as it is
    tasks = {task for task, _ in Mixture(rows, args, random.Random(0)).conversations()}
    assert tasks >= {"spoken_qa", "asr", "tts"}


@pytest.fixture
def cuts(tmp_path, monkeypatch):
    """What encode_cut_splices is told of a codec with an untrained head, and of three sentences of one voice."""
    codec, (_, count) = build_codec(), pronunciations()
    codec.save_pretrained(tmp_path / "codec")
    torch.save({"head": build_head(codec, count).state_dict()}, tmp_path / "codec" / "training_state.pt")
    delivery = {"voice": "kokoro:am_adam", "rate": 1.0, "pitch": 1.0, "phrasing": "statement"}
    heard = [
        ("one plus two is three", "three", "addition"),
        ("cat dog five", None, "dictation"),
        ("a train is late", "i do not know that", "other"),
        ("dog is cat", "i do not know that", "other"),  # of words that are known
    ]
    rows = [{"text": text, "answer": answer, "kind": kind, **delivery} for text, answer, kind in heard]
    write_shard(tmp_path, "questions-0000", rows)
    monkeypatch.setattr(build_examples, "MANY_WORDS", 5)
    return tmp_path / "codec", tmp_path / "codec", [tmp_path / "questions-0000.safetensors"], tmp_path / "cut.parquet"


@pytest.fixture
def sure(monkeypatch):
    """An untrained head is sure of nothing: all words are cut out all the same."""
    monkeypatch.setattr("training_examples.ttt_tiny.alignment.LEAST_CONFIDENCE", 0.0)


def test_an_aligner_of_another_audio_tokenizer_is_refused_before_anything_is_encoded(cuts, tmp_path, monkeypatch):
    monkeypatch.setattr(build_examples, "worker_pool", None)
    codec = build_codec()
    with torch.no_grad():
        codec.encoder.proj_out.weight[0] *= 1.2
    codec.save_pretrained(tmp_path / "model" / "audio_tokenizer")
    (tmp_path / "speech").mkdir()
    for kind in ("assistant", "questions"):
        write_shard(tmp_path / "speech", f"{kind}-0000", [{"text": "two"}])
    args = build_examples.ExampleArguments(
        model=tmp_path / "model", data_dir=tmp_path, output_dir=tmp_path / "out", aligner=cuts[1]
    )
    with pytest.raises(ValueError, match=f"{cuts[1]} is of another audio tokenizer"):
        build_examples.encode_all(args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["cut_splices", "cut_questions"])
def test_splices_of_cut_words_want_an_aligner(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{option}` 5 has no effect without `--aligner`"):
        build_examples.ExampleArguments(**{option: 5})
    with pytest.raises(ValueError, match=f"--{option}` is -1; it must be at least 0"):
        build_examples.ExampleArguments(aligner=tmp_path, **{option: -1})


def test_nothing_is_spliced_of_words_that_the_head_is_not_sure_of(cuts):
    with pytest.raises(ValueError, match="no word could be cut out"):
        build_examples.encode_cut_splices(*cuts, 12, False, [0])


def test_dictations_are_spliced_of_words_cut_out_of_sentences(cuts, sure, monkeypatch):
    monkeypatch.setattr(build_examples, "CHUNK", 50)  # waveforms of some are held at a time
    rows = pq.read_table(build_examples.encode_cut_splices(*cuts, 120, False, [0])).to_pylist()
    assert len(rows) == 120 and len({row["text"] for row in rows}) > 60
    said = {word for row in rows for word in row["text"].split()}
    assert said == {"one", "plus", "two", "is", "three", "cat", "dog", "five"}
    assert all(row["codes"] for row in rows)
    assert not any(domain.is_held_out(row["text"]) for row in rows if " " in row["text"])


def test_questions_are_spliced_of_cut_words_with_their_answers(cuts, sure):
    rows = pq.read_table(build_examples.encode_cut_splices(*cuts, 20, True, [0])).to_pylist()
    assert [(row["text"], row["answer"], row["kind"]) for row in rows] == [
        ("one plus two is three", "three", "addition")
    ] * 20
    assert len({tuple(row["codes"]) for row in rows}) > 10  # other gaps, other recordings


def test_lists_of_words_that_the_assistant_says_are_asked_to_be_repeated(cuts, sure, tmp_path):
    said = ["cat dog", "dog five cat", "one plus two is three", "cat dog five dog cat five", "cat mouse"]
    write_shard(tmp_path, "assistant-0000", [{"text": text} for text in said])
    voice = {"voice": "kokoro:am_adam", "rate": 1.0, "pitch": 1.0, "phrasing": "statement"}
    row = {"text": "please repeat after me say", "answer": None, "kind": "dictation", **voice}
    write_shard(tmp_path, "questions-0001", [row])
    shards, spoken = [*cuts[2], tmp_path / "questions-0001.safetensors"], [tmp_path / "assistant-0000.safetensors"]
    rows = pq.read_table(
        build_examples.encode_cut_splices(*cuts[:2], shards, cuts[3], 40, True, [0], spoken)
    ).to_pylist()
    repeated = {(row["text"], row["answer"]) for row in rows if row["kind"] == "repeat"}
    # "plus" and "is" are no content words, six words are too many, and no recording says "mouse".
    assert {answer for _, answer in repeated} == {"cat dog", "dog five cat"}
    for question, answer in repeated:
        assert question.removesuffix(answer) in domain.REPEAT_OPENINGS and not domain.is_held_out(question)


def test_questions_whose_words_no_voice_says_end_in_an_error(cuts, sure, monkeypatch):
    monkeypatch.setattr(build_examples, "MOST_DRAWS", 3)
    shards = cuts[2]
    rows, waves = speech.read_shard(shards[0], 24_000)
    rows = [{**row, "answer": None} for row in rows]
    speech.write_shard(shards[0], rows, waves)
    with pytest.raises(ValueError, match="no question can be spliced"):
        build_examples.encode_cut_splices(*cuts, 20, True, [0])


def installed(voice):
    try:
        return len(synthesis.speak("one", voice)) > 0
    except (OSError, ValueError):
        return False


@pytest.mark.skipif(not (installed("flite:slt") and installed("espeak:en-us")), reason="Flite or eSpeak NG is missing")
def test_quick_voices_say_dictations_and_questions(cuts, monkeypatch):
    monkeypatch.setattr(build_examples, "CHUNK", 25)
    voices = []
    monkeypatch.setattr(
        build_examples, "speak", lambda text, delivery: voices.append(delivery) or synthesis.speak(text, delivery)
    )
    codec, _, shards, target = cuts
    rows = pq.read_table(build_examples.encode_quick_voices(codec, shards, target, 40, False, [0])).to_pylist()
    assert len(rows) == 40 and len({row["text"] for row in rows}) > 30 and all(row["codes"] for row in rows)
    assert not any(domain.is_held_out(row["text"]) for row in rows if " " in row["text"])
    assert {delivery.voice.partition(":")[0] for delivery in voices} == {"flite", "espeak"}
    assert {delivery.voice for delivery in voices} <= set(synthesis.TRAINED_VOICES)
    pitches = [delivery.pitch for delivery in voices if delivery.voice.startswith("flite")]
    assert min(pitches) < 0.86 and max(pitches) > 1.14  # wider than elsewhere
    asked = pq.read_table(build_examples.encode_quick_voices(codec, shards, target, 10, True, [0])).to_pylist()
    assert [(row["text"], row["answer"], row["kind"]) for row in asked] == [
        ("one plus two is three", "three", "addition")
    ] * 10


def test_recordings_are_played_slower_and_faster():
    tone = (np.sin(np.arange(24_000) * 2 * np.pi * 440 / 24_000) * 9_000).astype(np.int16)
    assert build_examples.play([tone], 24_000, (1.0, 1.0), [0])[0] is tone
    played = build_examples.play([tone] * 40, 24_000, (0.8, 1.25), [0])
    for wave in played:
        assert wave.dtype == np.int16
        peak = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))).argmax() * 24_000 / len(wave)
        assert peak == pytest.approx(440 * 24_000 / len(wave), abs=2)  # a shorter wave is a higher one
    lengths = [len(wave) for wave in played]
    assert min(lengths) < 20_500 and max(lengths) > 28_000


@pytest.mark.parametrize("speeds", [[1.0], [1.2, 0.8], [0.1, 1.0], [1.0, 3.0]])
def test_impossible_speeds_are_refused(speeds):
    with pytest.raises(ValueError, match="--speeds` .*give two numbers"):
        build_examples.ExampleArguments(speeds=speeds)
    with pytest.raises(ValueError, match="--speeds` has no effect with `--recordings 0"):
        build_examples.ExampleArguments(speeds=[0.9, 1.1], recordings=0)


def test_sentences_begin_elsewhere_within_a_code():
    wave = np.ones(5000, dtype=np.int16)
    shifted = build_examples.shift_all([wave] * 50, 1920, [0])
    starts = [len(other) - len(wave) for other in shifted]
    assert 192 <= min(starts) < 400 and 1500 < max(starts) <= 1728
    assert all(
        (other[:start] == 0).all() and (other[start:] == 1).all() for other, start in zip(shifted, starts, strict=True)
    )


def test_a_folder_without_both_kinds_of_shards_says_what_makes_them(tmp_path):
    (tmp_path / "speech").mkdir()
    with pytest.raises(SystemExit, match="build_speech.py"):
        build_examples.encode_all(build_examples.ExampleArguments(data_dir=tmp_path, output_dir=tmp_path))
