"""Trains tiny models in every process that torchrun or accelerate starts it in, and writes what happened.

    torchrun --nproc_per_node 2 tests/distributed_training.py FOLDER plain

FOLDER holds `model` and the datasets; see test_distributed.py, which also calls `train` in one process.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import load_dataset, load_from_disk
from transformers import Trainer, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from modeling_ttt import TttForConditionalGeneration
from processing import TttDataCollator, TttTokenIds
from training_examples import train_ttt
from training_examples.training.resuming import RankSeed

TOKEN_IDS = TttTokenIds(110, 111, 64, 175, 100, 101, 102, 176, 177, end_of_turn_token_id=104)


class SeededNoise(TttDataCollator):
    """Hands the model a generator seeded by the examples of the batch, so that a batch has the same loss whichever
    process it is given to."""

    def __call__(self, features):
        seed = random.Random(str([feature["input_ids"] for feature in features])).getrandbits(32)
        return super().__call__(features) | {"generator": torch.Generator().manual_seed(seed)}


class AcceleratorsAreCpus:
    """While active, accelerate takes the CPU processes for those of an accelerator: it applies FSDP to no others,
    although PyTorch's FSDP2 runs on CPUs too."""

    def __enter__(self):
        self.original = original = PartialState.__init__

        def init(state, *args, **kwargs):
            original(state, *args, **kwargs)
            if state.distributed_type == DistributedType.MULTI_CPU:
                state.distributed_type = DistributedType.MULTI_XPU

        PartialState.__init__ = init

    def __exit__(self, *_):
        PartialState.__init__ = self.original


def make_trainer(folder: Path, output: Path, dataset: Any, collator: Any, model: Any = None, **options) -> Trainer:
    """A Trainer as the training scripts make it, two examples a process and micro-batch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    set_seed(0)
    training = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=2,
        logging_steps=1,
        ddp_backend="gloo" if torch.distributed.is_torchelastic_launched() else None,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        accelerator_config={"dispatch_batches": False},
        **{"learning_rate": 1e-2, "max_steps": 10, "save_strategy": "no", "use_cpu": True, **options},
    )
    return Trainer(
        model=TttForConditionalGeneration.from_pretrained(folder / "model") if model is None else model,
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[RankSeed()] if training.world_size > 1 else None,
    )


def train(folder: Path, name: str, accumulation: int = 1, **options) -> dict[str, Any]:
    """Ten steps with seeded noise, the model saved to FOLDER/name; returns the losses and the class that wrapped it."""
    output = folder / name
    model = None
    if name == "fsdp2_transformers":
        model = TttForConditionalGeneration.from_pretrained(
            folder / "model", distributed_config=DistributedConfig(fsdp_size=torch.distributed.get_world_size())
        )
    collator = SeededNoise(pad_token_id=105)
    dataset = load_from_disk(str(folder / "dataset"))
    trainer = make_trainer(
        folder, output, dataset, collator, model, gradient_accumulation_steps=accumulation, **options
    )
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "wrapper": type(trainer.model_wrapped).__name__}


def watch_draws(folder: Path, name: str, dataset: Any, steps: int) -> dict[str, Any]:
    """Trains without seeded noise; returns which examples this process saw and which of their positions it masked."""
    model = TttForConditionalGeneration.from_pretrained(folder / "model", clean_batch_probability=0.0)
    seen: list[int] = []
    masks: list[list[int]] = []

    def record(module, args, kwargs):
        for row in kwargs["input_ids"]:
            seen.append(int(row[0]))
            masks.append((row == TOKEN_IDS.mask_token_id).nonzero().flatten().tolist())

    model.model.register_forward_pre_hook(record, with_kwargs=True)
    collator = TttDataCollator(pad_token_id=105)
    make_trainer(folder, folder / name, dataset, collator, model, max_steps=steps).train()
    return {"seen": seen, "masks": masks}


def plain(folder: Path) -> dict[str, Any]:
    """What torchrun starts: DDP, FSDP2 as Transformers applies it on loading, and what each process draws."""
    numbered = load_from_disk(str(folder / "numbered"))
    files = sorted(str(path) for path in (folder / "stream").glob("*.parquet"))
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
    steps = len(numbered) // 4
    return {
        "ddp": train(folder, "ddp"),
        "fsdp2_transformers": train(folder, "fsdp2_transformers"),
        "map": watch_draws(folder, "map", numbered, steps),
        "stream": watch_draws(folder, "streamed", stream, steps),
    }


def configured(folder: Path) -> dict[str, Any]:
    """What `accelerate launch` starts: FSDP2 by its configuration, with a checkpoint and a run resumed from it."""
    with AcceleratorsAreCpus():
        return {
            "fsdp2_accelerate": train(folder, "fsdp2_accelerate", save_strategy="steps", save_steps=5),
            "resumed": train(
                folder, "resumed", resume_from_checkpoint=str(folder / "fsdp2_accelerate" / "checkpoint-5")
            ),
        }


def deepspeed(folder: Path) -> dict[str, Any]:
    """What `accelerate launch` starts with DeepSpeed, to which DS_ACCELERATOR says that CPUs are accelerators."""
    return {"zero3": train(folder, "zero3", use_cpu=False)}


def script(folder: Path, name: str = "script", more: str = "", leaves: bool = True) -> dict[str, Any]:
    """What a user starts: train_ttt.py, on packed rows and with an evaluation."""
    wrappers: list[str] = []
    leave = train_ttt.leave_group

    def leave_group(trainer):
        wrappers.append(type(trainer.model_wrapped).__name__)
        if leaves:
            leave(trainer)

    options = f"--model {folder / 'model'} --dataset {folder / 'examples'} --output_dir {folder / name} {more}"
    options += " --packing --max_length 128 --per_device_train_batch_size 1 --max_steps 3 --logging_steps 1"
    options += " --eval_strategy steps --eval_steps 3 --per_device_eval_batch_size 2 --threads 1"
    sys.argv = ["train_ttt.py", *options.split(), "--report_to", "none", "--disable_tqdm", "true"]
    train_ttt.leave_group = leave_group
    train_ttt.main()
    train_ttt.leave_group = leave
    return {"script": {"left_the_group": not torch.distributed.is_initialized(), "wrapper": wrappers[0]}}


def sharded_script(folder: Path) -> dict[str, Any]:
    """The same with --shard, and once more from a checkpoint of it."""
    script(folder, "sharded_script", "--shard --save_steps 2", leaves=False)
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "sharded_script" / "checkpoint-2", folder / "resumed_script" / "checkpoint-2")
    torch.distributed.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
    return script(folder, "resumed_script", "--shard --save_steps 2")


def main(folder: Path, part: str) -> None:
    torch.set_num_threads(1)
    parts = {"plain": plain, "configured": configured, "deepspeed": deepspeed, "script": script}
    parts["sharded_script"] = sharded_script
    results = parts[part](folder)
    (folder / f"{part}-{os.environ['RANK']}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():  # threads of the group must not outlive the interpreter
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
