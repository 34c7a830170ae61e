"""Several processes: the losses and the model of one process with the same global batch, whatever shards it; every
process draws noise and data of its own; the accelerate configurations are ones that accelerate reads."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import distributed_training
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from builders import build_model, build_processor
from conftest import make_model
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers.integrations import is_deepspeed_available

from modeling_ttt import TttForConditionalGeneration
from pipelines import save_repository

CONFIGS = Path(__file__).parent.parent / "training_examples" / "accelerate_configs"
WORKER = Path(distributed_training.__file__)
PROCESSES = 2


def example(rng, first=1, num_codes=None):
    codes = [rng.randrange(111, 175) for _ in range(num_codes or rng.randint(12, 30))]
    prompt = [first, 2, 100, *codes[:7], 101, 3]
    answer = [rng.randrange(10, 90) for _ in range(5)] + [102, *codes, 177, 104]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def start(folder, part, launcher, *options, port_option):
    """Starts two processes of distributed_training.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(WORKER.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", launcher, *options, f"{port_option}={port}", str(WORKER), str(folder), part],
        env={**os.environ, **environment, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_configured(folder, part, config):
    options = [f"--config_file={CONFIGS / config}", f"--num_processes={PROCESSES}", "--num_machines=1"]
    return start(
        folder, part, "accelerate.commands.launch", *options, "--mixed_precision=no", port_option="--main_process_port"
    )


def results_of(folder, part, process):
    """By name of the run, what each process wrote."""
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, output
    ranks = [json.loads((folder / f"{part}-{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {name: [of_rank[name] for of_rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and results of all runs: those of two processes, by rank, and the same training in one."""
    folder = tmp_path_factory.mktemp("distributed")
    make_model({"tie_word_embeddings": True}).save_pretrained(folder / "model")
    rng = random.Random(0)
    Dataset.from_list([example(rng) for _ in range(40)]).save_to_disk(str(folder / "dataset"))
    numbered = Dataset.from_list([example(random.Random(0), first) for first in range(16)])
    numbered.save_to_disk(str(folder / "numbered"))
    (folder / "stream").mkdir()
    for shard in range(PROCESSES):
        numbered.shard(PROCESSES, shard).to_parquet(str(folder / "stream" / f"{shard}.parquet"))

    started = {  # side by side
        "plain": start(
            folder, "plain", "torch.distributed.run", f"--nproc_per_node={PROCESSES}", port_option="--master_port"
        ),
        "configured": start_configured(folder, "configured", "fsdp2.yaml"),
    }
    results = {"one": [distributed_training.train(folder, "one", accumulation=PROCESSES)]}
    for part, process in started.items():
        results |= results_of(folder, part, process)
    return folder, results


STRATEGIES = {
    "ddp": "DistributedDataParallel",
    "fsdp2_transformers": "FSDPTttForConditionalGeneration",
    "fsdp2_accelerate": "FSDPTttForConditionalGeneration",
}


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "wrapper"), STRATEGIES.items())
def test_two_processes_have_the_losses_of_one(runs, strategy, wrapper):
    _, results = runs
    (one,), two = results["one"], results[strategy]
    assert len(one["losses"]) == 10 and len(set(one["losses"])) == 10
    assert one["wrapper"] == "TttForConditionalGeneration"
    for of_rank in two:
        assert of_rank["wrapper"] == wrapper
        assert of_rank["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*STRATEGIES, "resumed"])
def test_two_processes_save_the_model_of_one(runs, strategy):
    folder, _ = runs
    model = TttForConditionalGeneration.from_pretrained(folder / strategy)
    expected = TttForConditionalGeneration.from_pretrained(folder / "one").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    config = json.loads((folder / strategy / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_ttt.TttForConditionalGeneration"
    assert (folder / strategy / "modeling_ttt.py").is_file() and (folder / strategy / "pipeline_ttt.py").is_file()
    assert not list((folder / strategy).glob("_fsdp*"))


@pytest.mark.slow
def test_a_resumed_sharded_run_goes_on_where_it_stopped(runs):
    _, results = runs
    assert results["resumed"][0]["losses"] == pytest.approx(results["one"][0]["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
def test_two_processes_of_deepspeed_have_the_losses_of_one(runs):
    folder, results = runs
    of_ranks = results_of(folder, "deepspeed", start_configured(folder, "deepspeed", "deepspeed_zero3.yaml"))["zero3"]
    for of_rank in of_ranks:
        assert of_rank["wrapper"] == "DeepSpeedEngine"
        assert of_rank["losses"] == pytest.approx(results["one"][0]["losses"], rel=1e-5)
    TttForConditionalGeneration.from_pretrained(folder / "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["map", "stream"])
def test_processes_share_the_data_and_draw_noise_of_their_own(runs, data):
    first, second = runs[1][data]
    assert sorted(first["seen"] + second["seen"]) == list(range(16))
    assert len(first["seen"]) == len(second["seen"]) == 8
    # All examples are alike but for their number, so that equal noise would mask the same positions.
    assert all(mine != other for mine, other in zip(first["masks"], second["masks"], strict=True) if mine or other)
    assert sum(map(bool, first["masks"] + second["masks"])) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "wrapper"),
    [
        ("script", "DistributedDataParallel"),
        ("sharded_script", "FSDPTttForConditionalGeneration"),
    ],
)
def test_the_script_trains_on_the_cpus_of_cpu_yaml_and_leaves_the_group(tmp_path, part, wrapper):
    """On packed rows; a sharded run that goes on from a checkpoint ends with the same weights. A group that is left to
    the end of the interpreter may abort it."""
    processor = build_processor()
    save_repository(build_model(processor), processor, tmp_path / "model")
    rng = random.Random(0)
    rows = []
    for _ in range(21):
        codes = [rng.randrange(16) for _ in range(rng.randrange(12, 30))]
        row = processor.build_example("hi", codes, text="hello", task="text_chat", system_prompt="talk")
        rows.append(row | {"length": len(row["input_ids"]), "task": "text_chat"})
    data = Dataset.from_list(rows)
    DatasetDict({"train": data, "eval": data.select(range(5))}).save_to_disk(str(tmp_path / "examples"))
    (of_ranks,) = results_of(tmp_path, part, start_configured(tmp_path, part, "cpu.yaml")).values()
    assert of_ranks == [{"left_the_group": True, "wrapper": wrapper}] * PROCESSES
    log = [json.loads(line) for line in (tmp_path / part / "log_history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    (evaluation,) = (entry for entry in log if "eval_loss" in entry)
    parts = evaluation["eval_text_loss"] + evaluation["eval_audio_loss"]
    assert parts == pytest.approx(evaluation["eval_loss"], rel=1e-5)
    # Five examples in batches of two by two processes: three of eight places are filled up, and count nowhere.
    model = TttForConditionalGeneration.from_pretrained(tmp_path / part).eval()
    with torch.no_grad():
        alone = [
            model(**{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}).loss.item()
            for row in rows[:5]
        ]
    assert evaluation["eval_loss"] == pytest.approx(sum(alone) / 5, rel=1e-4)
    assert (tmp_path / part / "pipeline_ttt.py").is_file()
    config = json.loads((tmp_path / part / "config.json").read_text())
    assert "distributed_config" not in config and "device_mesh" not in config
    TttForConditionalGeneration.from_pretrained(tmp_path / part)
    if part == "sharded_script":
        whole = load_file(tmp_path / part / "model.safetensors")
        for name, value in load_file(tmp_path / "resumed_script" / "model.safetensors").items():
            assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    assert config.num_processes == {"one_gpu": 1, "cpu": 2, "deepspeed_zero3": 16}.get(path.stem, 8)
    assert config.num_machines == (2 if path.stem == "deepspeed_zero3" else 1)
