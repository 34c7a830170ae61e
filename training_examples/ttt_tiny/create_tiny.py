"""Create the untrained ttt-tiny (untrained.py) around a trained audio tokenizer.

python training_examples/ttt_tiny/create_tiny.py --output_dir runs/tiny/initial
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from modeling_ttt.ttt_codec import TttCodecModel
from pipelines import save_repository
from training_examples.command_line import ScriptParser, check_least
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny.untrained import build_model
from training_examples.user_errors import run_command


@dataclass
class CreateArguments:
    audio_tokenizer: Path = field(default=Path("runs/codec/tokenizer"), metadata={"help": "Trained TttCodecModel."})
    output_dir: Path = field(default=Path("runs/tiny/initial"), metadata={"help": "The folder to write."})
    hidden_size: int = field(default=384, metadata={"help": "Width of the backbone."})
    intermediate_size: int = field(default=1024, metadata={"help": "Width of its feed-forward layers."})
    num_layers: int = field(default=4, metadata={"help": "Layers of the backbone."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads of the backbone."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights."})
    threads: int = threads_field()

    def __post_init__(self) -> None:
        check_least(self, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"`--hidden_size` is {self.hidden_size}, no multiple of `--num_heads` {self.num_heads}.")


def main() -> None:
    (args,) = ScriptParser(CreateArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    set_seed(args.seed)
    codec = TttCodecModel.from_pretrained(args.audio_tokenizer)
    sizes = args.hidden_size, args.intermediate_size, args.num_layers, args.num_heads
    model, processor = build_model(codec, *sizes)
    save_repository(model, processor, args.output_dir)
    vocabulary = model.config.text_config.vocab_size
    print(f"{args.output_dir}: {model.num_parameters() / 1e6:.2f} M parameters, {vocabulary} tokens")


if __name__ == "__main__":
    run_command(main)
