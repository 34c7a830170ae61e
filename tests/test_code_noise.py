"""Noise on the codes that a model hears: which codes it may touch, how many, and by what it replaces them."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import build_model, build_processor
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from test_training_runs import start

from pipelines import save_repository
from training_examples import finetune_lora
from training_examples.training import trainer
from training_examples.training.batches import TokenBatches
from training_examples.training.card import CardTrainer
from training_examples.training.code_noise import CodeNoise
from training_examples.training.trainer import add_code_noise

pytestmark = pytest.mark.usefixtures("undrawn_curves")

LEVELS = (8, 5, 5, 5)


def digits_of(codes):
    found = []
    for level in LEVELS:
        found.append(codes % level)
        codes = codes // level
    return np.stack(found, -1)


def test_only_codes_that_are_heard_are_replaced_and_by_others():
    ids, labels = [3, 10, 12, 19, 20, 11, 13], [-100, -100, -100, -100, -100, 11, 13]  # codes are 10 to 19
    noise = CodeNoise(10, 10, 1.0)
    changed = np.zeros(7)
    for epoch in range(300):
        noise.epoch.fill_(epoch)
        batch = {"input_ids": [ids], "labels": [labels], "length": [7]}
        found = noise(batch)
        assert found["labels"] == [labels] and found["length"] == [7] and batch["input_ids"] == [ids]
        (row,) = found["input_ids"]
        assert all(10 <= row[place] < 20 for place in (1, 2, 3))
        changed += np.not_equal(row, ids)
    assert changed[[0, 4, 5, 6]].sum() == 0
    assert (abs(changed[[1, 2, 3]] / 300 - 0.5) < 0.1).all()  # uniform between 0 and 1


def test_codes_before_the_prompts_end_are_heard_where_there_are_no_labels():
    noise = CodeNoise(10, 10, 1.0)
    batch = {"input_ids": [[11] * 6] * 100, "prompt_length": [4] * 100}
    rows = noise(batch, range(100))["input_ids"]
    assert (np.array(rows)[:, 4:] == 11).all() and (np.array(rows)[:, :4] != 11).any(0).all()


def test_no_more_than_the_share_is_replaced_and_another_one_in_each_example():
    ids = np.arange(1000).repeat(2)
    batch = {"input_ids": [ids.tolist()] * 300, "labels": [[-100] * 2000] * 300}
    shares = (np.array(CodeNoise(0, 1000, 0.3, LEVELS)(batch, range(300))["input_ids"]) != ids).mean(1)
    assert abs(shares.mean() - 0.15) < 0.015 and shares.min() < 0.02 and 0.28 < shares.max() < 0.34


def test_two_of_three_are_replaced_by_codes_one_level_away():
    codes = np.arange(1000).repeat(20)
    found = CodeNoise(0, 1000, 1.0, LEVELS).replace(codes, np.random.default_rng(0))
    assert (found != codes).all() and found.min() == 0 and found.max() == 999
    distance = np.abs(digits_of(found) - digits_of(codes)).sum(-1)
    assert abs((distance == 1).mean() - 2 / 3) < 0.02
    # Every dimension and both directions have their part.
    steps = (digits_of(found) - digits_of(codes))[distance == 1]
    assert ((steps > 0).mean(0) > 0.08).all() and ((steps < 0).mean(0) > 0.08).all()


def test_the_noise_of_an_example_depends_on_seed_epoch_and_place_alone():
    batch = {"input_ids": [list(range(16)), list(range(1, 17))], "labels": [[-100] * 16] * 2}

    def draw(seed=0, epoch=0, indices=None):
        noise = CodeNoise(0, 17, 1.0, seed=seed)
        noise.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        found = noise(batch, indices)["input_ids"]
        torch.manual_seed(len(found[0]))
        assert found == noise(batch, indices)["input_ids"]
        return str(found)

    assert draw() == draw(epoch=0.5)
    assert len({draw(), draw(seed=1), draw(epoch=1.0), draw(indices=[1, 2]), draw(indices=[3, 4])}) == 5
    assert draw(indices=[0, 0]) == draw()


@pytest.mark.parametrize(
    ("most", "levels", "message"),
    [(0.0, None, "`most`"), (1.5, None, "`most`"), (0.2, (2, 3), r"`levels` \[2, 3\] make 6 codes, not 16")],
)
def test_what_makes_no_noise_is_refused(most, levels, message):
    with pytest.raises(ValueError, match=message):
        CodeNoise(0, 16, most, levels)


# ---------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A model (`model`), and 8 + 4 dictations of different codes (`data`)."""
    folder = tmp_path_factory.mktemp("noise")
    processor = build_processor()
    save_repository(build_model(processor), processor, folder / "model")
    rows = [
        processor.build_example("hi", task="asr", audio_codes=[index, *range(1, 16)], system_prompt="talk")
        for index in (*range(8), *[0] * 4)
    ]
    data = Dataset.from_list([row | {"length": len(row["input_ids"]), "task": "asr"} for row in rows])
    splits = {"train": data.select(range(8)), "eval": data.select(range(8, 12))}
    DatasetDict(splits).save_to_disk(str(folder / "data"))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "tokens_per_batch": 128},
        {"per_device_train_batch_size": 2, "packing": True, "max_length": 64},
        {"per_device_train_batch_size": 4, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"per_device_train_batch_size": 2, "streaming": True},
        {"per_device_train_batch_size": 4, "script": finetune_lora},
    ],
)
def test_a_run_hears_other_codes_in_every_epoch_and_an_evaluation_the_recorded_ones(
    workspace, tmp_path, monkeypatch, options
):
    seen = {True: [], False: []}
    forward = trainer.CardTrainer.compute_loss

    def watch(self, model, inputs, *args, **kwargs):
        seen[model.training].append(inputs["input_ids"].clone())
        return forward(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.CardTrainer, "compute_loss", watch)
    start(workspace, tmp_path / "run", code_noise=1.0, eval_strategy="steps", eval_steps=4, **options)
    row = DatasetDict.load_from_disk(str(workspace / "data"))["eval"][0]["input_ids"]
    evaluated = [ids[: len(row)].tolist() for batch in seen[False] for ids in batch]
    assert len(evaluated) == 4 and all(ids == row for ids in evaluated)
    trained = [tuple(ids[: len(row)].tolist()) for batch in seen[True] for ids in batch]
    assert len(trained) >= 4 and len(set(trained)) > 0.7 * len(trained)  # a small share may leave all as it was
    recorded = np.array(row)
    scored = np.array(DatasetDict.load_from_disk(str(workspace / "data"))["eval"][0]["labels"]) != -100
    assert all((np.array(ids) == recorded)[scored].all() for ids in trained)


def test_a_resumed_run_hears_what_the_whole_run_heard(workspace, tmp_path):
    options = {
        "code_noise": 0.5,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
    }
    whole = start(workspace, tmp_path / "whole", **options)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = start(workspace, tmp_path / "resumed", **options)
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(value, load_file(resumed / "model.safetensors")[name]), name


def test_the_audio_tokenizer_says_which_codes_are_near(workspace):
    processor = build_processor()
    levels = processor.audio_tokenizer.config.fsq_levels
    data = DatasetDict.load_from_disk(str(workspace / "data"))["train"]
    assert add_code_noise(data, processor, 0.5)[1].levels.tolist() == list(levels)
    processor.audio_tokenizer = None
    assert add_code_noise(data, processor, 0.5)[1].levels is None


def test_batches_by_length_are_made_without_reading_the_examples(workspace):
    data = DatasetDict.load_from_disk(str(workspace / "data"))["train"]
    read = []

    def transform(batch):
        read.append(batch)
        return batch

    batches = TokenBatches(data.with_transform(transform), 128)
    assert not read
    assert len(batches[0]) > 1 and len(read) == 1


@pytest.mark.parametrize("value", [0, -0.1, 1.1])
def test_a_share_of_no_codes_is_refused(workspace, tmp_path, value):
    with pytest.raises(ValueError, match=f"--code_noise is {float(value)}; a share"):
        start(workspace, tmp_path / "run", code_noise=value)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_lengths_are_read_without_the_noise_and_at_once(workspace, tmp_path, monkeypatch, strategy):
    """Else the codes of every example would be disturbed, and in each epoch, only to know its length."""
    disturbed = []
    noise = CodeNoise.__call__
    monkeypatch.setattr(
        CodeNoise, "__call__", lambda self, rows, *others: disturbed.append(rows) or noise(self, rows, *others)
    )
    samplers = []
    sample = CardTrainer._get_train_sampler
    monkeypatch.setattr(CardTrainer, "_get_train_sampler", lambda *args: samplers.append(sample(*args)) or samplers[-1])
    start(
        workspace,
        tmp_path,
        code_noise=0.5,
        train_sampling_strategy=strategy,
        max_steps=1,
        per_device_train_batch_size=2,
    )
    assert type(samplers[0].lengths) is list and len(samplers[0].lengths) == 8
    assert sum(len(rows["input_ids"]) for rows in disturbed) < 8
