"""What makes a run of the plain Trainer repeatable: which noise a process draws, in which order examples come, and the
checkpoint that a killed run goes on from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from training_examples.training.card import read_recipe


class RankSeed(TrainerCallback):
    """Gives every process its own noise: the Trainer seeds them all alike. A resumed run draws what its checkpoint
    says, which the Trainer restores later."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + 1000 * args.process_index + state.global_step)


class DataOrder(TrainerCallback):
    """
    Makes the order of the examples depend on the seed and the epoch alone.

    The Trainer's sampler by length takes its order from the global generator: processes then disagree on it, and a
    resumed run meets another one. The sampler of a resumed epoch is not told its epoch where several processes train.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader: Any = None, **kwargs):
        epoch = int(state.epoch or 0)
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while (inner := getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))) is not None:
            sampler = inner
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        elif hasattr(sampler, "generator"):
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed + epoch)


def gather_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """
    Return the states of a sharded model's optimizer, whole, on the CPU of the first process and empty in the others.
    All processes call it together. Parameters are named, so that the number of processes may change.
    """
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def share_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Load a file of `gather_optimizer`'s states: every process reads its share."""
    states = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    set_optimizer_state_dict(model, optimizer, states, options=StateDictOptions(full_state_dict=True))


def checkpoints(output_dir: str | Path) -> list[tuple[Path, bool]]:
    """
    Return the checkpoints of a run, the newest first, and whether each was written to its end: the Trainer writes its
    state last, so a checkpoint that a kill cut short has none that can be read.
    """
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    by_step = {int(step): folder for folder in folders if (step := folder.name.rpartition("-")[2]).isdigit()}
    return [(folder, _is_whole(folder)) for _, folder in sorted(by_step.items(), reverse=True)]


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint that was written to its end, or `None`."""
    return next((str(folder) for folder, whole in checkpoints(output_dir) if whole), None)


def read_state(folder: str | Path) -> dict[str, Any]:
    """Return the Trainer's state in a checkpoint or a run's folder, empty where there is none that can be read."""
    try:
        return json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def describe_resuming(
    output_dir: str | Path,
    checkpoint: str | None,
    options: Mapping[str, Any] | None = None,
    is_finished: bool = False,
) -> str | None:
    """
    Return what a run says before it goes on: from where, or that nothing is left to train; which half-written
    checkpoints it passes over; and which options are not those that the checkpoint's card names: of a run, or of a
    folder, that was another.
    """
    passed_over = []
    for folder, whole in checkpoints(output_dir):
        if whole:
            break
        passed_over.append(folder.name)
    if checkpoint is None and not passed_over:
        return None
    said = "Training starts anew" if checkpoint is None else f"Training goes on from {checkpoint}"
    if is_finished:
        said = (
            f"The run is finished, and nothing is trained: {checkpoint} has all of its steps. --max_steps or "
            "--num_train_epochs, raised, lets it go on; another --output_dir begins a new run"
        )
    if passed_over:
        are = "was not written to its end and is" if len(passed_over) == 1 else "were not written to their end and are"
        said += f"; {', '.join(passed_over)} {are} passed over"
    changed = changed_options(Path(checkpoint), options) if checkpoint is not None and options is not None else []
    return ". ".join([said, *([f"It was written under other options: {'; '.join(changed)}"] if changed else [])]) + "."


def changed_options(checkpoint: Path, options: Mapping[str, Any]) -> list[str]:
    """Return in words which options are not those of a checkpoint's recipe; none where its card has no recipe."""
    before = read_recipe(checkpoint)
    if before is None:
        return []
    now = yaml.safe_load(yaml.safe_dump(dict(options)))  # as a card has them
    return [
        f"--{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
