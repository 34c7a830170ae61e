"""Train TtT, or one of its baselines, with the plain Transformers Trainer.

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
from typing import Any

from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

from modeling_ttt import TttConfig, TttForConditionalGeneration
from processing import TttProcessor
from training_examples.training.arguments import ModelArguments, parse_arguments
from training_examples.training.card import RunCard
from training_examples.training.resuming import last_complete_checkpoint
from training_examples.training.trainer import (
    check_effect,
    check_lengths,
    check_tokens,
    check_vocabulary,
    leave_group,
    load_data,
    make_trainer,
    run,
)
from training_examples.user_errors import run_command


@dataclass
class TrainArguments(ModelArguments):
    shard: bool = field(
        default=False,
        metadata={
            "help": "Spread weights, gradients and optimizer over the processes. It is FSDP2 as Transformers applies "
            "it, on CPUs too; accelerate's fsdp2.yaml is for GPUs."
        },
    )

    def sharding(self, training: TrainingArguments) -> dict[str, Any]:
        """
        Return what `from_pretrained` is given so that every process loads its share.

        Raises:
            ValueError: If there is one process.
        """
        if not self.shard:
            return {}
        if training.world_size == 1:
            raise ValueError("--shard spreads a model over several processes, and there is one: see accelerate launch.")
        return {"distributed_config": DistributedConfig(fsdp_size=training.world_size)}

    def weights(self, training: TrainingArguments) -> str | Path:
        """Return the folder to load from: a sharded run that goes on takes its weights from the checkpoint here."""
        resumed = training.resume_from_checkpoint or last_complete_checkpoint(training.output_dir)
        return resumed if self.shard and resumed else self.model


def main() -> None:
    arguments, training = parse_arguments(TrainArguments, __doc__)
    train_dataset, eval_dataset = load_data(arguments, training)
    config = TttConfig.from_pretrained(arguments.model, **arguments.config_options())
    vars(config.text_config).pop("_name_or_path", None)  # a folder of whatever machine the first checkpoint was made on
    processor = TttProcessor.from_pretrained(arguments.processor or arguments.model)
    check_vocabulary(config, processor)
    check_effect(arguments, config)
    train_dataset = check_lengths(arguments, config, train_dataset)
    eval_dataset = check_lengths(arguments, config, eval_dataset, "the evaluation split")
    train_dataset = check_tokens(processor, train_dataset)
    eval_dataset = check_tokens(processor, eval_dataset, "the evaluation split")
    model = TttForConditionalGeneration.from_pretrained(
        arguments.weights(training),
        config=config,
        dtype=arguments.dtype,
        attn_implementation=arguments.attn_implementation,
        **arguments.sharding(training),
    )
    data = train_dataset, eval_dataset
    card = RunCard(arguments, training)
    trainer = make_trainer(arguments, training, model, processor, data, card, processing_class=processor)
    run(trainer)
    leave_group(trainer)


if __name__ == "__main__":
    run_command(main)
