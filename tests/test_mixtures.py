"""Mixtures of prepared examples: shares, concatenation, streams, and what cannot be mixed."""

from collections import Counter
from itertools import islice

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, disable_progress_bars

from training_examples.preparation.mixtures import load_mixture, parse_source
from training_examples.preparation.shards import FEATURES, ShardFolder
from training_examples.preparation.sources import Chunk


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # at the end of every mixed stream


def rows(task, count):
    return [{"input_ids": [i, i + 1], "labels": [-100, i + 1], "length": 2, "task": task} for i in range(count)]


def prepared(folder, task, count, shards=2, split="train"):
    """A folder as prepare_dataset.py leaves it."""
    target = ShardFolder(folder, split)
    target.begin({})
    for number in range(shards):
        target.write(Chunk(0, number, 0, []), rows(task, count)[number::shards], {})
    return str(folder)


def saved(folder, task, count):
    """A DatasetDict of wider types and with a column of its own, saved to disk."""
    dataset = Dataset.from_list([{**row, "note": "x"} for row in rows(task, count)])
    DatasetDict({"train": dataset, "eval": dataset.select(range(2))}).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_weights_every_example_occurs_once(streaming, tmp_path):
    sources = [prepared(tmp_path / "a", "asr", 10), saved(tmp_path / "b", "tts", 6)]
    mixture = load_mixture(sources, streaming)
    assert isinstance(mixture, IterableDataset if streaming else Dataset)
    assert [row["task"] for row in mixture] == ["asr"] * 10 + ["tts"] * 6
    assert sorted(row["input_ids"][0] for row in mixture if row["task"] == "asr") == list(range(10))
    assert mixture.features == FEATURES


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_the_shares_of_the_sources(streaming, tmp_path):
    sources = [f"{prepared(tmp_path / 'a', 'asr', 300)}:0.7", f"{prepared(tmp_path / 'b', 'tts', 300)}:0.3"]
    mixture = load_mixture(sources, streaming, seed=1)
    counts = Counter(row["task"] for row in islice(mixture, 400))
    assert 0.62 < counts["asr"] / 400 < 0.78
    assert [row["input_ids"] for row in islice(load_mixture(sources, streaming, seed=1), 50)] == [
        row["input_ids"] for row in islice(mixture, 50)
    ]
    assert [row["task"] for row in islice(load_mixture(sources, streaming, seed=2), 50)] != [
        row["task"] for row in islice(mixture, 50)
    ]


def test_streams_and_whole_mixtures_hold_the_same(tmp_path):
    sources = [prepared(tmp_path / "a", "asr", 20), f"{saved(tmp_path / 'b', 'tts', 9)}:2"]
    whole, stream = load_mixture(sources), load_mixture(sources, streaming=True)
    for task, count in (("asr", 20), ("tts", 9)):
        for mixture in (whole, stream):
            assert {row["input_ids"][0] for row in mixture if row["task"] == task} == set(range(count))


def test_the_stopping_strategy_decides_where_a_mixture_ends(tmp_path):
    sources = [f"{prepared(tmp_path / 'a', 'asr', 40)}:1", f"{prepared(tmp_path / 'b', 'tts', 4)}:1"]
    first = Counter(load_mixture(sources, stopping_strategy="first_exhausted")["task"])
    every = Counter(load_mixture(sources)["task"])
    once = Counter(load_mixture(sources, stopping_strategy="all_exhausted_without_replacement")["task"])
    assert first["tts"] <= 4 and first["asr"] < 20
    assert every["asr"] >= 40 and every["tts"] > 20
    assert once == {"asr": 40, "tts": 4}


def test_a_stream_is_shuffled_where_asked(tmp_path):
    source = prepared(tmp_path / "a", "asr", 40, shards=4)
    plain = [row["input_ids"][0] for row in load_mixture([source], streaming=True)]
    shuffled = [row["input_ids"][0] for row in load_mixture([source], streaming=True, shuffle_buffer_size=16)]
    assert sorted(shuffled) == sorted(plain) and shuffled != plain


@pytest.mark.parametrize("weights", [("", ""), (":3", ":1")])
def test_an_endless_stream_begins_small_sources_again_without_a_pause(weights, tmp_path, monkeypatch):
    """At the end of a mixture `datasets` waits for its threads: a mixture that ends would wait again and again."""
    pauses = []
    monkeypatch.setattr("datasets.iterable_dataset.time.sleep", pauses.append)
    folders = [prepared(tmp_path / name, name, 4) for name in ("asr", "tts")]
    sources = [folder + weight for folder, weight in zip(folders, weights, strict=True)]
    stream = iter(load_mixture(sources, streaming=True, endless=True, shuffle_buffer_size=100))
    counts = Counter((row["task"], row["input_ids"][0]) for row in islice(stream, 400))
    assert len(counts) == 8 and not pauses
    del stream
    assert len(pauses) <= 3  # once a source, and once for the mixture
    assert sum(count for (task, _), count in counts.items() if task == "asr") > (250 if weights[0] else 150)
    assert len(list(islice(load_mixture(sources[:1], streaming=True, endless=True), 50))) == 50
    with pytest.raises(ValueError, match="`endless` is True, which streams alone can be"):
        load_mixture(sources, endless=True)


def test_splits_are_kept_apart(tmp_path):
    source = prepared(tmp_path / "a", "asr", 4)
    prepared(tmp_path / "a", "tts", 2, split="eval")
    assert load_mixture([source], split="eval")["task"] == ["tts"] * 2
    assert len(load_mixture([saved(tmp_path / "b", "tts", 5)], split="eval")) == 2
    with pytest.raises(ValueError, match="'dev', but .* has eval, train"):
        load_mixture([source], split="dev")
    with pytest.raises(ValueError, match="'dev', but .* has train, eval"):
        load_mixture([str(tmp_path / "b")], split="dev")


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("data/a", ("data/a", None)),
        ("data/a:0.25", ("data/a", 0.25)),
        ("data/a:1e1", ("data/a", 10.0)),
        ("data/a:b", ("data/a:b", None)),
        ("c:/a:2", ("c:/a", 2.0)),
    ],
)
def test_a_source_is_a_path_and_perhaps_a_weight(source, parsed):
    path, weight = parse_source(source)
    assert (str(path), weight) == parsed


def test_what_cannot_be_mixed_is_named(tmp_path):
    source = prepared(tmp_path / "a", "asr", 4)
    with pytest.raises(ValueError, match="`sources` is empty"):
        load_mixture([])
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="above 0"):
            load_mixture([f"{source}:{weight}"])
    with pytest.raises(ValueError, match="`stopping_strategy` is 'never'"):
        load_mixture([source], stopping_strategy="never")
    with pytest.raises(FileNotFoundError, match="no folder of examples"):
        load_mixture([str(tmp_path / "nowhere")])


def test_what_holds_no_prepared_examples_is_named(tmp_path):
    recordings = Dataset.from_dict({"audio": ["a.wav"], "text": ["hello"]})
    recordings.to_parquet(tmp_path / "folder" / "data" / "train-00000-of-00001.parquet")
    DatasetDict({"train": recordings}).save_to_disk(str(tmp_path / "saved"))
    for name in ("folder", "saved"):
        for streaming in (False, True):
            with pytest.raises(
                ValueError, match="no column input_ids, labels, length, task, but audio, text: these are"
            ):
                load_mixture([str(tmp_path / name)], streaming)
