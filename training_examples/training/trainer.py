"""One training run of TtT with the plain Trainer: its data, its checks, its collator and metrics, and what it leaves
behind. The options are those of arguments.py."""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from modeling_ttt import TttConfig
from processing import TttDataCollator, TttProcessor, pack_examples
from training_examples.evaluation.listening import open_listener
from training_examples.preparation.mixtures import load_mixture, parse_source
from training_examples.preparation.records import RECIPES
from training_examples.preparation.shards import FEATURES
from training_examples.training.arguments import ModelArguments
from training_examples.training.batches import BatchCollator, TokenBatches, read_lengths
from training_examples.training.card import CardTrainer, RunCard
from training_examples.training.code_noise import CodeNoise
from training_examples.training.metrics import EvaluationMetrics, TrainingScores, plot_curves, write_log
from training_examples.training.resuming import (
    DataOrder,
    RankSeed,
    describe_resuming,
    gather_optimizer,
    last_complete_checkpoint,
    read_state,
    share_optimizer,
)
from training_examples.training.samples import Samples, choose_examples

STRATEGIES: tuple[str, ...] = (
    "clean_batch_probability",
    "prefix_preservation_probability",
    "block_masking_probability",
    "span_truncation_probability",
)
SPEECH_TASKS = tuple(name for name, recipe in RECIPES.items() if recipe.audio is not None or recipe.speech_needed)
LOOKED_AT = 200  # examples, evenly spaced
PACKED_FEATURES = Features(dict.fromkeys(("input_ids", "labels", "position_ids"), List(Value("int32"))))


def load_data(args: ModelArguments, training: TrainingArguments) -> tuple[Any, Dataset | None]:
    """
    Return training data and, if the run evaluates, evaluation data.

    Raises:
        ValueError: If a stream has no number of steps to end after; and as `load_mixture` does.
    """
    if args.streaming and training.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: the length of a stream is not known.")
    # A stream is one endless pass, since the Trainer resumes the first pass over one only.
    buffer_size = args.shuffle_buffer_size
    train: Any = load_mixture(
        args.dataset, args.streaming, training.seed, shuffle_buffer_size=buffer_size, endless=args.streaming
    )
    if training.eval_strategy == "no":
        return train, None
    return train, load_held_out(args)


def load_held_out(args: ModelArguments) -> Any:
    """Return the evaluation split, as `load_mixture` does."""
    sources = args.eval_dataset or [str(parse_source(source)[0]) for source in args.dataset]
    return load_mixture(sources, split=args.eval_split)


def check_vocabulary(config: TttConfig, processor: TttProcessor) -> None:
    """Raise a ValueError that names the first token on which model and processor disagree."""
    ours = {name: (value, getattr(config, name, value)) for name, value in vars(processor.token_ids).items()}
    differing = [
        f"`{name}` is {theirs}, the tokenizer's {value}" for name, (value, theirs) in ours.items() if value != theirs
    ]
    if len(processor.tokenizer) > config.vocab_size:
        differing.append(f"`vocab_size` is {config.vocab_size}, the tokenizer has {len(processor.tokenizer)} tokens")
    if differing:
        raise ValueError(
            f"--processor does not fit --model: its {differing[0]}. Use the processor that the model was made with."
        )


def check_effect(args: ModelArguments, config: TttConfig) -> None:
    """
    Raise a ValueError for a strategy that a run asks for and that has no part in its objective: in block-causal spans,
    whose training scores all blocks beside clean text, or where no audio, or text too, is diffused.
    """
    if config.audio_objective == "autoregressive":
        option, names, reason = "audio_objective", STRATEGIES, "no code is masked"
    elif config.text_objective == "diffusion":
        option, names, reason = "text_objective", STRATEGIES[:1], "a clean batch would score nothing"
    elif config.is_block_causal:
        option, names = "span_attention", STRATEGIES[:3]
        reason = "all blocks are scored in every step, beside clean text"
    else:
        return
    for name in names:
        value = args.config_options().get(name)
        if value:
            given = f"{getattr(config, option)}{'' if getattr(args, option) else ', as the model says'}"
            raise ValueError(
                f"--{name} is {value}, but has no effect where --{option} is {given}: {reason}. Leave it out, or train "
                f"with another --{option}."
            )


def check_lengths(args: ModelArguments, config: TttConfig, dataset: Any, option: str = "--dataset") -> Any:
    """
    Return the dataset of an option (`None` where there is none), or raise a ValueError if an example, or a row of
    `max_length`, has more tokens than the model has positions. The examples of a stream are looked at as they come.
    """
    limit = config.text_config.max_position_embeddings
    if args.max_length is not None:
        if args.max_length > limit:
            raise ValueError(f"--max_length is {args.max_length}, but the model has {limit} positions.")
        return dataset
    if dataset is None:
        return None

    def check(example: dict[str, Any]) -> dict[str, Any]:
        if example["length"] > limit:
            raise ValueError(
                f"An example of {option} has {example['length']} tokens, but the model has {limit} positions: set "
                f"--max_length {limit} to cut it, or prepare the data with a smaller --max_length."
            )
        return example

    if isinstance(dataset, IterableDataset):
        return dataset.map(check)
    check({"length": pyarrow.compute.max(dataset.data.column("length")).as_py()})
    return dataset


def check_tokens(processor: TttProcessor, dataset: Any, option: str = "--dataset") -> Any:
    """
    Return the dataset of an option (`None` where there is none), or raise a ValueError if it was prepared with another
    tokenizer: an example has ids that this one lacks, or no example of speech has a code. The examples of a stream are
    looked at as they come, for ids alone.
    """
    limit, ids = len(processor.tokenizer), processor.token_ids
    first, end = ids.audio_code_id_start, ids.audio_code_id_start + ids.num_audio_codes
    remedy = "it was prepared with another model's processor: prepare it with that of --model (or --processor)."

    def check(example: dict[str, Any]) -> dict[str, Any]:
        if example["input_ids"] and max(example["input_ids"]) >= limit:
            raise ValueError(
                f"An example of {option} has the token {max(example['input_ids'])}, but the tokenizer has {limit}: "
                + remedy
            )
        return example

    if dataset is None or isinstance(dataset, IterableDataset):
        return None if dataset is None else dataset.map(check)
    if len(dataset):
        check(
            {"input_ids": [pyarrow.compute.max(pyarrow.compute.list_flatten(dataset.data.column("input_ids"))).as_py()]}
        )
        some = dataset.select(np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int)))
        spoken = [row for row in some if row["task"] in SPEECH_TASKS]
        if spoken and not any(first <= token < end for row in spoken for token in row["input_ids"]):
            raise ValueError(
                f"No example of {option} that was looked at has an audio code, {first} to {end - 1}; {remedy}"
            )
    return dataset


def describe_cutting(dataset: Any, max_length: int | None, name: str) -> str | None:
    """Return what is said of examples that lose their end, `None` where none does; those of a stream are not known."""
    if max_length is None or dataset is None or isinstance(dataset, IterableDataset):
        return None
    lengths = np.asarray(read_lengths(dataset), dtype=np.int64)
    cut = lengths[lengths > max_length]
    if not len(cut):
        return None
    lost = int((cut - max_length).sum())
    return (
        f"{len(cut):,} of {len(lengths):,} examples of {name} are longer than --max_length {max_length} and lose their "
        f"end: {lost:,} of {int(lengths.sum()):,} tokens."
    )


def pack(dataset: Any, max_length: int | None, training: TrainingArguments) -> Any:
    """
    Return training data, streamed or not, as rows of `max_length`, see `pack_examples`. Rows are full but for a few
    tokens and have no attention mask to count by, so all tokens count as seen.
    """
    assert max_length is not None
    if training.include_num_input_tokens_seen == "non_padding":
        training.include_num_input_tokens_seen = "all"
    with training.main_process_first(desc="packing"):
        return dataset.map(
            pack_examples,
            batched=True,
            fn_kwargs={"max_length": max_length},
            remove_columns=[name for name in FEATURES if dataset.column_names is None or name in dataset.column_names],
            features=PACKED_FEATURES,
        )


def add_code_noise(dataset: Any, processor: TttProcessor, most: float, seed: int = 0) -> tuple[Any, CodeNoise]:
    """
    Return training data, streamed or not, whose heard codes are disturbed whenever they are read, and the callback that
    tells the noise its epoch: `CodeNoise`.
    """
    ids = processor.token_ids
    levels = getattr(getattr(processor.audio_tokenizer, "config", None), "fsq_levels", None)
    noise = CodeNoise(ids.audio_code_id_start, ids.num_audio_codes, most, levels, seed)
    if isinstance(dataset, IterableDataset):
        return dataset.map(noise, batched=True, with_indices=True), noise
    return dataset.with_transform(noise), noise


class ShardedTrainer(CardTrainer):
    """
    The Trainer of a model that Transformers has sharded over the processes (`from_pretrained(distributed_config=...)`):
    its checkpoints have the optimizer's states of all of them. The plain Trainer would write those of the first, and so
    refuses to write any.

    Args:
        args (`TrainingArguments`), options: the Trainer's own.
    """

    def __init__(self, *, args: TrainingArguments, **options: Any):
        wanted, args.save_only_model = args.save_only_model, True
        super().__init__(args=args, **options)
        args.save_only_model = wanted

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = gather_optimizer(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(states, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Leave the weights: the model was loaded from the checkpoint, since whole ones cannot be put into a share."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        share_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def make_trainer(
    args: ModelArguments,
    training: TrainingArguments,
    model: torch.nn.Module,
    processor: TttProcessor,
    data: tuple[Any, Dataset | None],
    card: RunCard,
    **options: Any,
) -> CardTrainer:
    """
    Return the plain Trainer with this repository's collator, metrics and model cards.

    Args:
        data (`tuple`): from `load_data`.
        card (`RunCard`): writes the cards.
        options: the Trainer's own.
    """
    if training.process_index == 0:
        for dataset, name in zip(data, ("--dataset", "the evaluation split"), strict=True):
            if (said := describe_cutting(dataset, args.max_length, name)) is not None:
                print(said, flush=True)
    train_dataset = pack(data[0], args.max_length, training) if args.packing else data[0]
    callbacks: list[TrainerCallback] = [DataOrder(), *([RankSeed()] if training.world_size > 1 else [])]
    if args.code_noise is not None:
        train_dataset, noise = add_code_noise(train_dataset, processor, args.code_noise, training.seed)
        callbacks.append(noise)
    collator: Any = TttDataCollator(processor, max_length=args.max_length)
    if args.tokens_per_batch is not None:
        train_dataset = TokenBatches(train_dataset, args.tokens_per_batch, training.seed, args.max_length)
        collator = BatchCollator(collator)
    sharded = getattr(model, "is_distributed_loading_by_transformers", False)
    trainer = (ShardedTrainer if sharded else CardTrainer)(
        card=card,
        model=model,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=data[1],
        data_collator=collator,
        compute_metrics=EvaluationMetrics(),
        callbacks=callbacks,
        **options,
    )
    scores = TrainingScores.attach_to(trainer)
    if args.sample_steps:
        make_samples(args, training, model, processor).attach_to(trainer, scores.skip_time)
    return trainer


def make_samples(args: ModelArguments, training: TrainingArguments, model: Any, processor: TttProcessor) -> Samples:
    """
    Return the callback that answers held-out examples.

    Raises:
        ValueError: If no process has the whole model, or there are no held-out examples to answer.
    """
    if is_sharded(model):
        raise ValueError("--sample_steps needs the whole model in one process; leave it out where it is sharded.")
    longest = model.config.text_config.max_position_embeddings // 2
    examples = choose_examples(load_held_out(args), args.num_samples, longest)
    if not examples:
        raise ValueError(f"--sample_steps: no held-out example has at most {longest} tokens and an answer.")
    # The recogniser is for the process that answers, and for it alone.
    wanted = args.recogniser is not None and training.process_index == 0
    recogniser = None
    if wanted:
        device = str(training.device)
        recogniser = open_listener(args.recogniser, args.language, device, max(1, args.threads)).open()  # type: ignore[arg-type]
    folder = Path(training.output_dir)
    return Samples(processor, examples, args.sample_steps, folder, recogniser, training.seed, args.language)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process will hold a share of the model alone."""
    accelerate_shards = any(
        os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )
    return accelerate_shards or bool(getattr(model, "is_distributed_loading_by_transformers", False))


def run(trainer: CardTrainer) -> None:
    """
    Train to the end, from the last checkpoint if there is one, and say so; save the model, the log and its curves, and
    push them where `--push_to_hub` asks for it. A run that has ended is not trained further.
    """
    output_dir = Path(trainer.args.output_dir)
    checkpoint = trainer.args.resume_from_checkpoint or last_complete_checkpoint(output_dir)
    steps = 0 if checkpoint is None else read_state(checkpoint)["global_step"]
    trainer.is_finished = checkpoint is not None and trainer.planned_steps() <= steps
    said = describe_resuming(output_dir, checkpoint, trainer.card.options(), trainer.is_finished)
    if said is not None and trainer.is_world_process_zero():
        print(said, flush=True)
    before = read_state(output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_finished:  # the log of what was trained, without a line for what was not
        complete = before.get("global_step") == steps
        trainer.state.log_history = before["log_history"] if complete else trainer.state.log_history[:-1]
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    if trainer.state.best_model_checkpoint is not None:  # only checkpoints, which are resumed from, need the whole path
        trainer.state.best_model_checkpoint = Path(trainer.state.best_model_checkpoint).name
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_log(trainer.state.log_history, output_dir / "log_history.jsonl")
        plot_curves(trainer.state.log_history, output_dir / "curves.png")
    trainer.save_model()  # last, so that the card, and what is pushed, has all of it


def leave_group(trainer: Trainer) -> None:
    """
    Leave the group of processes after the last step.

    The wrapped model goes first, and the processes meet once more: if it were the last to hold the group, the group
    would end while a thread of it still waits for the interpreter, and neither would go on.
    """
    trainer.model_wrapped = trainer.model
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
