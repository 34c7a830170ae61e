"""What a training run may be told: the options that train_ttt.py and finetune_lora.py share, and the Trainer's own with
what TtT needs of them. What is done with them lives in trainer.py."""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments, set_seed

from training_examples.command_line import ScriptParser, check_least
from training_examples.evaluation.listening import LANGUAGE_HELP
from training_examples.files import without_folders
from training_examples.threads import threads_field, use_threads
from training_examples.training.resuming import read_state

# Options of the configuration that a run may set.
CONFIG_OPTIONS = (
    "audio_objective",
    "text_objective",
    "clean_batch_probability",
    "prefix_preservation_probability",
    "prefix_preservation_unit",
    "span_truncation_probability",
    "span_attention",
    "block_masking_probability",
    "block_lengths",
    "block_filling_weight",
    "full_block_probability",
    "noise_epsilon",
    "stratified_noise",
)
BY_LENGTH = ("group_by_length", "batch_rebalance")  # sampling strategies of the Trainer
OBJECTIVES = ["diffusion", "autoregressive"]
Arguments = TypeVar("Arguments", bound="ModelArguments")


@dataclass
class ModelArguments:
    model: Path = field(metadata={"help": "Folder to start from: model and processor."})
    processor: Path | None = field(default=None, metadata={"help": "Folder of the processor, if not the model's."})
    dataset: list[str] = field(
        default_factory=lambda: ["data/ttt_tiny/examples/dataset"],
        metadata={
            "help": "Saved DatasetDict or folder of prepare_dataset.py; several are mixed, by weight with PATH:WEIGHT."
        },
    )
    eval_dataset: list[str] | None = field(
        default=None, metadata={"help": "Where the evaluation split is, if not in the folders of --dataset."}
    )
    eval_split: str = field(default="eval", metadata={"help": "Name of the evaluation split."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training data as it is needed; with --max_steps."}
    )
    shuffle_buffer_size: int = field(default=1_000, metadata={"help": "Examples among which a stream is shuffled."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longer examples lose their end; with --packing the length of a row, in tokens."},
    )
    packing: bool = field(default=False, metadata={"help": "Train on rows of --max_length with several examples."})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Train on batches of like length with at most so many tokens, padding included. Takes the place of "
            "--per_device_train_batch_size."
        },
    )
    code_noise: float | None = field(
        default=None,
        metadata={
            "help": "Replace in training up to this share of the audio codes that the model hears, at most 1; another "
            "share in each example. Less is learnt by heart."
        },
    )
    # None: as the model's configuration says; a new model's says what was published.
    audio_objective: str | None = field(
        default=None,
        metadata={
            "help": "diffusion (TtT) or autoregressive (the twin); by default the model's.",
            "choices": OBJECTIVES,
        },
    )
    text_objective: str | None = field(
        default=None,
        metadata={
            "help": "autoregressive (TtT) or diffusion (the purely diffused model); by default the model's.",
            "choices": OBJECTIVES,
        },
    )
    clean_batch_probability: float | None = field(
        default=None, metadata={"help": "BANOM, the paper's p_mix; 0 is off; by default the model's (a new one's 0.3)."}
    )
    prefix_preservation_probability: float | None = field(
        default=None, metadata={"help": "PPM, p_prefix; 0 is off; by default the model's (a new one's 0.3)."}
    )
    prefix_preservation_unit: str | None = field(
        default=None,
        metadata={
            "help": "Where a kept prefix may end: before a span, or at any token; by default the model's (span).",
            "choices": ["span", "token"],
        },
    )
    span_truncation_probability: float | None = field(
        default=None, metadata={"help": "SST, the paper's p_trunc; 0 is off; by default the model's (a new one's 0.5)."}
    )
    span_attention: str | None = field(
        default=None,
        metadata={
            "help": "Who sees whom in a span: all as published, or blocks only those before; by default the model's.",
            "choices": ["bidirectional", "block_causal"],
        },
    )
    block_masking_probability: float | None = field(
        default=None,
        metadata={
            "help": "How often a sample is cut after a block, which alone is masked; by default the model's (0)."
        },
    )
    block_lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens of a block in training, one of these at random; by default the model's."},
    )
    block_filling_weight: float | None = field(
        default=None,
        metadata={"help": "How much an end token that fills a block counts; by default the model's (0.2)."},
    )
    full_block_probability: float | None = field(
        default=None, metadata={"help": "How often a block is masked as a whole; by default the model's (0)."}
    )
    noise_epsilon: float | None = field(
        default=None, metadata={"help": "Smallest noise level; by default the model's (a new one's 0.001)."}
    )
    stratified_noise: bool | None = field(
        default=None,
        metadata={"help": "Spread the noise levels of a batch evenly; by default the model's (a new one's false)."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the weights; --bf16 computes in bfloat16 beside it.",
            "choices": ["float32", "bfloat16", "auto"],
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention backend.", "choices": ["sdpa", "flex_attention", "eager"]}
    )
    threads: int = threads_field()
    sample_steps: int = field(
        default=0,
        metadata={
            "help": "Answer a few held-out examples every so many steps. Text and speech go to samples/ and to "
            "TensorBoard; 0 is never."
        },
    )
    num_samples: int = field(default=4, metadata={"help": "How many held-out examples --sample_steps answers."})
    recogniser: str | None = field(
        default=None,
        metadata={
            "help": "Who reads the speech of --sample_steps: faster-whisper folder or name (base); transformers:NAME."
        },
    )
    language: str = field(default="en", metadata={"help": LANGUAGE_HELP})
    license: str | None = field(
        default=None, metadata={"help": "Licence that the model card names, such as apache-2.0; by default --model's."}
    )

    def __post_init__(self):
        for name, value in self.config_options().items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"--{name} is {value}; a probability lies between 0 and 1.")
        if self.noise_epsilon is not None and not 0 < self.noise_epsilon < 1:
            raise ValueError(f"--noise_epsilon is {self.noise_epsilon}; it lies between 0 and 1, both excluded.")
        if self.text_objective == "diffusion" and self.audio_objective == "autoregressive":
            raise ValueError("--text_objective diffusion needs --audio_objective diffusion: all is diffused, or audio.")
        if self.packing and self.max_length is None:
            raise ValueError("--packing needs --max_length, the length of a row; for example --max_length 2048.")
        if self.tokens_per_batch is not None and (self.packing or self.streaming):
            other = "--packing" if self.packing else "--streaming"
            raise ValueError(
                f"--tokens_per_batch and {other} do not go together: batches by length need the lengths of all "
                "examples, and packed rows are of one length. With --packing, --max_length times the batch size is "
                "the budget."
            )
        if self.code_noise is not None and not 0 < self.code_noise <= 1:
            raise ValueError(
                f"--code_noise is {self.code_noise}; a share of codes is above 0 and at most 1. Leave it out for none."
            )
        check_least(self, sample_steps=0, num_samples=1)
        if self.recogniser is not None and not self.sample_steps:
            raise ValueError("--recogniser reads what --sample_steps answers; give that, too.")
        for name in ("model", "processor"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise ValueError(f"--{name} {folder} is no folder; init_from_llm.py and create_tiny.py make one.")

        if (self.model / "adapter_config.json").is_file() and not (self.model / "config.json").is_file():
            raise ValueError(
                f"--model {self.model} is an adapter, and a whole model is trained on: give the folder that "
                "finetune_lora.py --merge_to wrote. The same finetune_lora.py command, started again, writes it."
            )

    def config_options(self) -> dict[str, Any]:
        """Return the options of the configuration that the run sets."""
        return {name: getattr(self, name) for name in CONFIG_OPTIONS if getattr(self, name) is not None}


@dataclass
class TttTrainingArguments(TrainingArguments):
    """
    The Trainer's arguments, with other defaults where TtT has reasons: tokens per second are logged, and every step
    uses all parameters. Short runs show their loss, too.

    Raises:
        ValueError: for an option under which the Trainer would train something else than TtT.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns that the model does not take, `length` among them."}
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={"help": "Tokens counted for tokens per second.", "choices": ["non_padding", "all", "no"]},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two logs; below 1, a share of all steps."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient; TtT has none."}
    )

    def __post_init__(self):
        # Processes without an accelerator make a group only if they are told that they are CPUs.
        sharded_elsewhere = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        if num_launched() > 1 and not torch.accelerator.is_available() and not sharded_elsewhere:
            self.use_cpu = True
        super().__post_init__()
        check_group(self)
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"--label_smoothing_factor is {self.label_smoothing_factor}, but the Trainer then computes a loss of "
                "its own, that of the next token everywhere, in audio spans that see themselves, too. Leave it at 0: "
                "the model's own loss, with its noise and strategies, is the one to train on."
            )
        # A process of several reads its own share of a stream; batches of different lengths cannot be handed round.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        if not torch.accelerator.is_available():  # PyTorch would warn that there is nothing to pin memory for
            self.dataloader_pin_memory = False

    def to_dict(self) -> dict[str, Any]:
        """Return the options as reporters are told them, TensorBoard's files too: without folders of the machine."""
        return without_folders(super().to_dict())

    def __getstate__(self) -> dict[str, Any]:
        """Return what `training_args.bin` holds, which is pushed with the model: no token, no folder of the machine."""
        return {name: None if name.endswith("_token") else without_folders(value) for name, value in vars(self).items()}

    def __copy__(self) -> "TttTrainingArguments":
        """Return a copy that, unlike what is pickled, has everything."""
        copied = object.__new__(type(self))
        copied.__dict__.update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "TttTrainingArguments":
        """Return the same of everything in it."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(vars(self), memo))
        return copied


def num_launched() -> int:
    """Return how many processes a launcher says that it started, 1 without one."""
    sizes = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    return next((int(os.environ[name]) for name in sizes if os.environ.get(name, "").isdigit()), 1)


def check_group(training: TrainingArguments) -> None:
    """
    Raise a ValueError unless this process trains in one group with all that were launched with it: else every one would
    train a model of its own into the same folder.
    """
    launched = num_launched()
    if training.world_size != launched:
        raise ValueError(
            f"{launched} processes were launched, but this one trains in a group of {training.world_size}: each would "
            "train a model of its own into the same folder. On CPUs start them with `accelerate launch --config_file "
            "training_examples/accelerate_configs/cpu.yaml --num_processes N`."
        )
    # `accelerate launch --cpu` starts one process, whatever --num_processes says.
    if launched == 1 and os.environ.get("MASTER_ADDR") and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise ValueError(
            "`accelerate launch --cpu` starts a single process, though several were asked for. Leave --cpu out and "
            "take `--config_file training_examples/accelerate_configs/cpu.yaml --num_processes N`."
        )
    if launched > 1 and training.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "accelerate shards over accelerators only, and these processes are on CPUs. Take `--config_file "
            "training_examples/accelerate_configs/cpu.yaml` and the script's own --shard, which is FSDP2, too."
        )


def parse_arguments(kind: type[Arguments], description: str | None = None) -> tuple[Arguments, TttTrainingArguments]:
    """Read the command line; set threads and seed as it says."""
    arguments, training = ScriptParser((kind, TttTrainingArguments), description).parse_args_into_dataclasses()
    use_threads(arguments.threads)
    set_seed(training.seed)
    check_together(arguments, training)
    return arguments, training


def check_together(arguments: ModelArguments, training: TrainingArguments) -> None:
    """
    Settle what the script's and the Trainer's options say together.

    Raises:
        ValueError: If they contradict each other.
    """
    resumed = training.resume_from_checkpoint
    if resumed is not None and not read_state(resumed):
        raise ValueError(
            f"--resume_from_checkpoint {resumed} is no checkpoint: it has no trainer_state.json that can be read. "
            "Leave the option out to go on from the last one in --output_dir."
        )
    if arguments.attn_implementation == "flex_attention" and training.device.type == "cpu":
        raise ValueError(
            "--attn_implementation flex_attention trains on GPUs only: on CPUs PyTorch has no backward pass for it. "
            "Use --attn_implementation sdpa, which gives the same losses."
        )
    pushes_checkpoints = training.push_to_hub and "checkpoint" in training.hub_strategy.value
    if pushes_checkpoints and training.metric_for_best_model is not None and Path(training.output_dir).is_absolute():
        raise ValueError(
            f"--hub_strategy {training.hub_strategy.value} would push checkpoints that name the best of them by a "
            f"folder of this machine: give --output_dir relative to the folder you are in, not {training.output_dir}."
        )
    evaluates, listens = training.eval_strategy != "no", bool(arguments.sample_steps)
    for name, given, needed, has in (
        ("eval_steps", training.eval_steps is not None, "--eval_strategy steps", evaluates),
        ("eval_dataset", arguments.eval_dataset is not None, "--eval_strategy or --sample_steps", evaluates or listens),
        ("eval_split", arguments.eval_split != "eval", "--eval_strategy or --sample_steps", evaluates or listens),
        ("num_samples", arguments.num_samples != ModelArguments.num_samples, "--sample_steps", listens),
        (
            "shuffle_buffer_size",
            arguments.shuffle_buffer_size != ModelArguments.shuffle_buffer_size,
            "--streaming",
            arguments.streaming,
        ),
    ):
        if given and not has:
            raise ValueError(f"--{name} has no effect without {needed}: give that, too, or leave it out.")
    if training.train_sampling_strategy in BY_LENGTH:
        reasons = {"streaming": "a stream is read in its own order", "packing": "packed rows are of one length"}
        reasons["tokens_per_batch"] = "it puts like lengths together itself"
        for name, reason in reasons.items():
            if getattr(arguments, name):
                raise ValueError(
                    f"--train_sampling_strategy {training.train_sampling_strategy} has no effect with --{name}: "
                    f"{reason}. Leave it out."
                )
    if arguments.tokens_per_batch is not None:
        size = training.per_device_train_batch_size
        if size not in (1, TrainingArguments.per_device_train_batch_size):
            raise ValueError(
                f"--tokens_per_batch takes the place of --per_device_train_batch_size, which is {size}; leave it out."
            )
        training.per_device_train_batch_size = 1  # batch
