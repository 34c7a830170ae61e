"""Adapt a TtT checkpoint with LoRA: PEFT and the plain Transformers Trainer.

    python training_examples/finetune_lora.py --model model_cards/ttt-tiny --dataset data/skill/examples/dataset \
        --output_dir runs/skill --max_steps 400 --learning_rate 1e-3 --new_words kitten puppy

The output folder holds the adapter alone and names the model it belongs to: `pipeline("audio-to-audio", model=FOLDER)`,
`ttt-talk --model FOLDER`, `AutoPeftModelForCausalLM` and `model.load_adapter` find both. `--merge_to` also writes the
whole model, as if it had been trained. Data, objective, TrainingArguments, log and curves are those of train_ttt.py. A
run that was killed goes on from its last checkpoint when started again.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, TrainingArguments

from modeling_ttt import TttConfig, TttForConditionalGeneration
from pipelines import save_repository
from processing import TttProcessor
from training_examples.command_line import check_least
from training_examples.training.arguments import ModelArguments, parse_arguments
from training_examples.training.card import RunCard, write_card
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

# All linear layers of a decoder layer, as the published script adapts them. Qwen2, Qwen3 and Llama share the names.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoraArguments(ModelArguments):
    r: int = field(default=32, metadata={"help": "Rank of the adapter; 64 as published."})
    alpha: int = field(default=64, metadata={"help": "The adapter is scaled by alpha / r; 16 as published."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapter, as published."})
    target_modules: list[str] = field(
        default_factory=lambda: list(TARGET_MODULES),
        metadata={"help": "Linear layers to adapt, by the end of their names; all-linear for a backbone with others."},
    )
    adapter_strength: float = field(
        default=1.0,
        metadata={
            "help": "Save the adapter turned down (or up) to this share of what was trained: less keeps more of what "
            "the model could before. The rows of --new_words and --train_audio_tokens stay as trained. Started again "
            "with another strength, a finished run is not trained anew."
        },
    )
    new_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "Words the model has never met, or text files of them: the rows of the tokens that spell them are "
            "trained."
        },
    )
    train_audio_tokens: bool = field(
        default=False,
        metadata={
            "help": "Train the rows of codes, mask, begin and end tokens, for a model fresh from init_from_llm.py."
        },
    )
    quantize: bool = field(default=False, metadata={"help": "QLoRA: the frozen model in 4 bit (needs bitsandbytes)."})
    base_model_name: str | None = field(
        default=None,
        metadata={
            "help": "What the adapter calls its model: a Hub name, if others shall use it (default: the folder)."
        },
    )
    merge_to: Path | None = field(default=None, metadata={"help": "Folder for the merged model with its processor."})

    def __post_init__(self):
        super().__post_init__()
        check_least(self, r=1, alpha=1)
        if not self.adapter_strength > 0:
            raise ValueError(f"--adapter_strength is {self.adapter_strength}; it must be above 0.")
        self.new_words = [word for item in self.new_words or () for word in read_words(item)]
        if self.quantize and not find_spec("bitsandbytes"):
            raise ValueError(
                "--quantize keeps the model in 4 bit with bitsandbytes, which is not installed. `pip install "
                "bitsandbytes`, or leave it out to train the adapter on the unquantised model."
            )


@contextmanager
def no_false_alarm() -> Iterator[None]:
    """Leave out that PEFT asks for activation checkpointing by its former name, which no user can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def check_base_name(args: LoraArguments, training: TrainingArguments) -> None:
    """Raise a ValueError where an adapter would be pushed that names its model by a folder of this machine."""
    if training.push_to_hub and args.base_model_name is None:
        raise ValueError(
            "--push_to_hub would publish an adapter that names its model by a folder of this machine, where nobody "
            "finds it: push the model, and name it with --base_model_name OWNER/NAME."
        )


def check_merge_to(args: LoraArguments, training: TrainingArguments) -> None:
    """Raise a ValueError where the merged model would lie beside the adapter, which would be applied to it once more,
    or in the place of the model it was trained on."""
    taken = {"--output_dir": Path(training.output_dir), "--model": args.model}
    for option, folder in taken.items():
        if args.merge_to is not None and args.merge_to.resolve() == folder.resolve():
            raise ValueError(f"--merge_to {args.merge_to} is the folder of {option}; give the merged model its own.")


def read_words(item: str) -> list[str]:
    """
    Return the words of a text file, or the one word that `item` is.

    Raises:
        ValueError: If `item` looks like a file and there is none.
    """
    path = Path(item)
    if path.is_file():
        return path.read_text(encoding="utf-8").split()
    if path.suffix == ".txt" or len(path.parts) > 1:
        raise ValueError(f"--new_words {item}: there is no such file; build_skill.py writes one.")
    return [item]


def trainable_tokens(processor: TttProcessor, words: Iterable[str] = (), audio: bool = False) -> list[int]:
    """
    Return the ids of the tokens whose rows are trained whole, sorted.

    Args:
        words (`Iterable[str]`): the tokens that spell them, at the start of a text and within one, are taken.
        audio (`bool`, *optional*, defaults to `False`):
            Whether to take the codes, the mask, and the tokens that begin and end audio.
    """
    tokenizer, ids = processor.tokenizer, processor.token_ids
    found: set[int] = set()
    for word in words:
        for text in (word, f" {word}"):
            found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    if audio:
        found.update(range(ids.audio_token_id_start, ids.audio_code_id_start + ids.num_audio_codes))
        found.update((ids.mask_token_id, ids.end_of_audio_token_id, ids.end_of_last_audio_token_id))
        found.update(ids.structural - {ids.end_of_turn_token_id})
    return sorted(found)


def lora_config(args: LoraArguments, config: TttConfig, tokens: list[int]) -> LoraConfig:
    """Return the adapter of the arguments. A tied head shares the embedding's trained rows, any other gets its own."""
    rows = {"embed_tokens": tokens} if config.tie_word_embeddings else {"embed_tokens": tokens, "lm_head": tokens}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.r,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
        trainable_token_indices=rows if tokens else None,
    )


def load_config(args: LoraArguments) -> TttConfig:
    """
    Return the model's configuration with the run's options.

    Raises:
        ValueError: If a run asks for another objective or span attention than the model's, under whose configuration
            the adapter will be used.
    """
    config = TttConfig.from_pretrained(args.model)
    for name, value in args.config_options().items():
        # What decides how a model is used, and not only how it learns.
        decides_use = name.endswith("_objective") or name == "span_attention"
        if decides_use and value != getattr(config, name):
            raise ValueError(
                f"--{name} is {value}, but {args.model} was trained with {getattr(config, name)}, and an adapter is "
                "used under its model's configuration. Leave the option out, or train the whole model with "
                "train_ttt.py."
            )
        setattr(config, name, value)
    return config


def load_base(args: LoraArguments, config: TttConfig) -> TttForConditionalGeneration:
    """Load the frozen model by its full path, which is what the adapter will call it."""
    path = args.model.resolve()
    options = {"config": config, "dtype": args.dtype, "attn_implementation": args.attn_implementation}
    if not args.quantize:
        return TttForConditionalGeneration.from_pretrained(path, **options)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantised = TttForConditionalGeneration.from_pretrained(path, quantization_config=four_bit, **options)
    with no_false_alarm():
        return prepare_model_for_kbit_training(quantised, gradient_checkpointing_kwargs={"use_reentrant": False})


def save_merged(args: LoraArguments, adapter: str, folder: Path, card: str | None = None) -> None:
    """Write a whole Hub folder of the model with the adapter's change in its weights, the configuration it was trained
    under, the processor, and a card."""
    base = TttForConditionalGeneration.from_pretrained(args.model, config=load_config(args))
    with no_false_alarm():
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    save_repository(merged, TttProcessor.from_pretrained(args.processor or args.model), folder)
    if card is not None:
        write_card(folder, card)


def main() -> None:
    arguments, training = parse_arguments(LoraArguments, __doc__)
    check_base_name(arguments, training)
    check_merge_to(arguments, training)
    train_dataset, eval_dataset = load_data(arguments, training)
    # What is trained on are codes; speech is for those who listen.
    speaks = arguments.sample_steps > 0
    processor = TttProcessor.from_pretrained(arguments.processor or arguments.model, load_audio_tokenizer=speaks)
    config = load_config(arguments)
    check_vocabulary(config, processor)
    check_effect(arguments, config)
    train_dataset = check_lengths(arguments, config, train_dataset)
    eval_dataset = check_lengths(arguments, config, eval_dataset, "the evaluation split")
    train_dataset = check_tokens(processor, train_dataset)
    eval_dataset = check_tokens(processor, eval_dataset, "the evaluation split")
    tokens = trainable_tokens(processor, arguments.new_words or (), arguments.train_audio_tokens)
    with no_false_alarm():
        model = get_peft_model(load_base(arguments, config), lora_config(arguments, config, tokens))
    # No token is added, so the embedding stays the base model's. Else PEFT asks the Hub whether one was, at every save,
    # and warns where the base model is not there yet or the Hub is out of reach.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    if arguments.base_model_name is not None:
        model.peft_config["default"].base_model_name_or_path = arguments.base_model_name
    model.print_trainable_parameters()
    card = RunCard(arguments, training, arguments.base_model_name, adapter=True)
    trainer = make_trainer(arguments, training, model, processor, (train_dataset, eval_dataset), card)
    run(trainer)
    if arguments.adapter_strength != 1.0:
        # What was trained is scaled by alpha / r when it is loaded; the checkpoints keep the full strength.
        model.peft_config["default"].lora_alpha = arguments.alpha * arguments.adapter_strength
        trainer.save_model()
    if arguments.merge_to is not None and trainer.is_world_process_zero():
        whole = replace(card, adapter=False)
        text = whole.text(trainer, arguments.merge_to)
        save_merged(arguments, training.output_dir, arguments.merge_to, text)
    leave_group(trainer)


if __name__ == "__main__":
    run_command(main)
