"""Trains TtT, or its autoregressive twin, with the plain Transformers Trainer.

    python training_examples/train_ttt.py --model runs/tiny/initial --dataset data/ttt_tiny/examples/dataset \
        --output_dir runs/tiny/ttt --audio_objective diffusion --max_steps 10000

Any TrainingArguments option works. A run that was killed goes on from its last checkpoint when started again.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_ttt import TttForConditionalGeneration
from processing import TttDataCollator, TttProcessor


@dataclass
class ModelArguments:
    model: Path = field(metadata={"help": "Folder to start from: model and processor."})
    processor: Path | None = field(default=None, metadata={"help": "Folder of the processor, if not the model's."})
    dataset: Path = field(default=Path("data/ttt_tiny/examples/dataset"), metadata={"help": "Saved DatasetDict."})
    audio_objective: str = field(
        default="diffusion",
        metadata={"help": "diffusion (TtT) or autoregressive (the twin).", "choices": ["diffusion", "autoregressive"]},
    )
    clean_batch_probability: float = field(default=0.3, metadata={"help": "BANOM, the paper's p_mix."})
    prefix_preservation_probability: float = field(default=0.3, metadata={"help": "PPM, the paper's p_prefix."})
    span_truncation_probability: float = field(default=0.5, metadata={"help": "SST, the paper's p_trunc."})
    noise_epsilon: float = field(default=1e-3, metadata={"help": "Smallest noise level."})
    stratified_noise: bool = field(default=True, metadata={"help": "Spread the noise levels of a batch evenly."})
    threads: int = field(default=0, metadata={"help": "Torch threads; 0 leaves torch's own choice."})


class RankSeed(TrainerCallback):
    """Gives every process its own noise: the Trainer seeds them all alike."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + 1000 * args.process_index + state.global_step)


def main() -> None:
    arguments, training = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    set_seed(training.seed)
    model = TttForConditionalGeneration.from_pretrained(
        arguments.model,
        audio_objective=arguments.audio_objective,
        clean_batch_probability=arguments.clean_batch_probability,
        prefix_preservation_probability=arguments.prefix_preservation_probability,
        span_truncation_probability=arguments.span_truncation_probability,
        noise_epsilon=arguments.noise_epsilon,
        stratified_noise=arguments.stratified_noise,
    )
    processor = TttProcessor.from_pretrained(arguments.processor or arguments.model)
    dataset = load_from_disk(str(arguments.dataset))
    # Truncated spans teach the end from content to a model that writes whole blocks; the twin writes code by code.
    probability = arguments.span_truncation_probability if arguments.audio_objective == "diffusion" else 0.0
    collator = TttDataCollator(processor.tokenizer, span_truncation_probability=probability)
    training.remove_unused_columns = False
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=dataset["train"],
        eval_dataset=dataset["eval"],
        data_collator=collator,
        processing_class=processor.tokenizer,
        callbacks=[RankSeed()] if training.world_size > 1 else None,
    )
    checkpoint = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main()
