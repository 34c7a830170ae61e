"""Train TtT, or one of its baselines, with the plain Transformers Trainer.

    python training_examples/train_ttt.py --model runs/tiny/initial --dataset data/ttt_tiny/examples/dataset \
        --output_dir runs/tiny/ttt --max_steps 10000

    python training_examples/train_ttt.py --model runs/start --dataset data/asr:2 data/chat:1 --packing \
        --max_length 2048 --output_dir runs/ttt --eval_strategy steps --eval_steps 500 --report_to tensorboard

Any TrainingArguments option works. A run that was killed goes on from its last checkpoint when started again, and ends
where it would have ended. The output folder gets the model with its processor, the log (log_history.jsonl) and its
curves (curves.png).
"""

from modeling_ttt import TttConfig, TttForConditionalGeneration
from processing import TttProcessor
from training_examples.training.arguments import ModelArguments, parse_arguments
from training_examples.training.trainer import (
    check_lengths,
    check_vocabulary,
    leave_group,
    load_data,
    make_trainer,
    run,
)
from training_examples.user_errors import run_command


def main() -> None:
    arguments, training = parse_arguments(ModelArguments, __doc__)
    train_dataset, eval_dataset = load_data(arguments, training)
    config = TttConfig.from_pretrained(arguments.model, **arguments.config_options())
    processor = TttProcessor.from_pretrained(arguments.processor or arguments.model)
    check_vocabulary(config, processor)
    train_dataset = check_lengths(arguments, config, train_dataset)
    model = TttForConditionalGeneration.from_pretrained(
        arguments.model, config=config, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation
    )
    data = train_dataset, eval_dataset
    trainer = make_trainer(arguments, training, model, processor, data, processing_class=processor)
    run(trainer)
    leave_group(trainer)


if __name__ == "__main__":
    run_command(main)
