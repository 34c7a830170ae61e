"""Trains TtT, or one of its baselines, with the plain Transformers Trainer.

    python training_examples/train_ttt.py --model runs/tiny/initial --dataset data/ttt_tiny/examples/dataset \
        --output_dir runs/tiny/ttt --max_steps 10000

    python training_examples/train_ttt.py --model runs/start --dataset data/asr:2 data/chat:1 --packing \
        --max_length 2048 --output_dir runs/ttt --eval_strategy steps --eval_steps 500 --report_to tensorboard

Any TrainingArguments option works. A run that was killed goes on from its last checkpoint when started again, and ends
where it would have ended. The output folder gets the model with its processor, the log (log_history.jsonl) and its
curves (curves.png).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from modeling_ttt import TttConfig, TttForConditionalGeneration
from processing import TttDataCollator, TttProcessor
from training_examples.preparation.mixtures import load_mixture, parse_source
from training_examples.training.metrics import EvaluationMetrics, TrainingScores, plot_curves, write_log
from training_examples.training.resuming import DataOrder, RankSeed, last_complete_checkpoint

# Options of the configuration that a run may set.
CONFIG_OPTIONS = (
    "audio_objective",
    "text_objective",
    "clean_batch_probability",
    "prefix_preservation_probability",
    "prefix_preservation_unit",
    "span_truncation_probability",
    "noise_epsilon",
    "stratified_noise",
)
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
    packing: bool = field(default=False, metadata={"help": "Lay the examples of a batch into rows of --max_length."})
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
    noise_epsilon: float | None = field(
        default=None, metadata={"help": "Smallest noise level; by default the model's (a new one's 0.001)."}
    )
    stratified_noise: bool = field(default=True, metadata={"help": "Spread the noise levels of a batch evenly."})
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
    threads: int = field(default=0, metadata={"help": "Torch threads; 0 leaves torch's own choice."})

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
        for name in ("model", "processor"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise ValueError(f"--{name} {folder} is no folder; init_from_llm.py and create_tiny.py make one.")

    def config_options(self) -> dict[str, Any]:
        """The options of the configuration that the run sets."""
        return {name: getattr(self, name) for name in CONFIG_OPTIONS if getattr(self, name) is not None}


def parse_arguments(kind: type[Arguments]) -> tuple[Arguments, TrainingArguments]:
    """The command line, with what every run of these scripts has in common."""
    arguments, training = HfArgumentParser((kind, TrainingArguments)).parse_args_into_dataclasses()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    set_seed(training.seed)
    training.remove_unused_columns = False
    training.label_names = ["labels"]
    training.include_num_input_tokens_seen = "non_padding"  # logs tokens per second
    training.include_for_metrics.append("loss")
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False  # every step uses all parameters
    # A process of several reads its own share of a stream; batches of different lengths cannot be handed round.
    training.accelerator_config.dispatch_batches = False
    return arguments, training


def load_data(args: ModelArguments, training: TrainingArguments) -> tuple[Any, Dataset | None]:
    """Training data, and evaluation data if the run evaluates: its examples say so, which keeps them whole."""
    if args.streaming and training.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: the length of a stream is not known.")
    train: Any = load_mixture(args.dataset, args.streaming, training.seed)
    if isinstance(train, IterableDataset):
        # One endless pass, shuffled across its repetitions: the Trainer resumes the first pass over a stream only.
        train = train.repeat(None).shuffle(seed=training.seed, buffer_size=args.shuffle_buffer_size)
    if training.eval_strategy == "no":
        return train, None
    sources = args.eval_dataset or [str(parse_source(source)[0]) for source in args.dataset]
    evaluation = load_mixture(sources, split=args.eval_split)
    return train, evaluation.add_column("training", [False] * len(evaluation))


def check_vocabulary(config: TttConfig, processor: TttProcessor) -> None:
    """Raises a ValueError that names the first token on which model and processor disagree."""
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


def check_lengths(args: ModelArguments, config: TttConfig, dataset: Any) -> Any:
    """
    Raises a ValueError if an example, or a row of `max_length`, has more tokens than the model has positions. The
    examples of a stream are looked at as they come.
    """
    limit = config.text_config.max_position_embeddings
    if args.max_length is not None:
        if args.max_length > limit:
            raise ValueError(f"--max_length is {args.max_length}, but the model has {limit} positions.")
        return dataset

    def check(example: dict[str, Any]) -> dict[str, Any]:
        if example["length"] > limit:
            raise ValueError(
                f"An example of --dataset has {example['length']} tokens, but the model has {limit} positions: set "
                f"--max_length {limit} to cut it, or prepare the data with a smaller --max_length."
            )
        return example

    if isinstance(dataset, IterableDataset):
        return dataset.map(check)
    check({"length": pyarrow.compute.max(dataset.data.column("length")).as_py()})
    return dataset


def make_trainer(
    args: ModelArguments,
    training: TrainingArguments,
    model: torch.nn.Module,
    config: TttConfig,
    processor: TttProcessor,
    data: tuple[Any, Dataset | None],
    **options: Any,
) -> Trainer:
    """The plain Trainer with this repository's collator and metrics; `data` is that of `load_data`, `options` are the
    Trainer's own."""
    # Truncated spans teach the end from content to a model that writes whole blocks; the twin writes code by code.
    probability = config.span_truncation_probability if config.audio_objective == "diffusion" else 0.0
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data[0],
        eval_dataset=data[1],
        data_collator=TttDataCollator(
            processor.tokenizer,
            span_truncation_probability=probability,
            max_length=args.max_length,
            packing=args.packing,
            seed=training.seed,
        ),
        compute_metrics=EvaluationMetrics(),
        callbacks=[DataOrder(), *([RankSeed()] if training.world_size > 1 else [])],
        **options,
    )
    TrainingScores.attach_to(trainer)
    return trainer


def run(trainer: Trainer) -> None:
    """Trains to the end, from the last checkpoint if there is one; saves the model, the log and its curves."""
    output_dir = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint or last_complete_checkpoint(output_dir))
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.eval_dataset is not None and trainer.state.global_step not in evaluated:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_log(trainer.state.log_history, output_dir / "log_history.jsonl")
        plot_curves(trainer.state.log_history, output_dir / "curves.png")


def main() -> None:
    arguments, training = parse_arguments(ModelArguments)
    train_dataset, eval_dataset = load_data(arguments, training)
    config = TttConfig.from_pretrained(arguments.model, **arguments.config_options())
    processor = TttProcessor.from_pretrained(arguments.processor or arguments.model)
    check_vocabulary(config, processor)
    train_dataset = check_lengths(arguments, config, train_dataset)
    model = TttForConditionalGeneration.from_pretrained(
        arguments.model, config=config, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation
    )
    data = train_dataset, eval_dataset
    trainer = make_trainer(arguments, training, model, config, processor, data, processing_class=processor.tokenizer)
    run(trainer)
    if trainer.is_world_process_zero():
        processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
