"""Lay a trained model out as its Hub repository, in half precision, with this package's own files as its code.

    python training_examples/ttt_tiny/export_tiny.py --model runs/tiny/ttt --audio_tokenizer runs/codec/decoder \
        --output_dir model_cards/ttt-tiny

Weights are stored in float16 and computed in float32. The code files are relative symbolic links to the package, so
the folder never drifts from it; `push_to_hub` and `--copy_code` follow them.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_ttt import TttForConditionalGeneration
from modeling_ttt.ttt_codec import TttCodecModel
from pipelines import save_repository
from processing import TttProcessor
from training_examples.command_line import ScriptParser
from training_examples.threads import threads_field, use_threads
from training_examples.user_errors import run_command

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("modeling_ttt", "modeling_ttt/ttt_codec", "processing", "pipelines")


@dataclass
class ExportArguments:
    model: Path = field(default=Path("runs/tiny/ttt"), metadata={"help": "Trained model with its processor."})
    processor: Path | None = field(default=None, metadata={"help": "Folder of the processor, if not the model's."})
    audio_tokenizer: Path | None = field(
        default=None, metadata={"help": "Audio tokenizer in place of the model's own."}
    )
    output_dir: Path = field(default=Path("model_cards/ttt-tiny"), metadata={"help": "The folder to write."})
    copy_code: bool = field(default=False, metadata={"help": "Copy code files instead of linking them."})
    block_size: int = field(default=4, metadata={"help": "Default codes per block."})
    steps: int = field(default=8, metadata={"help": "Default denoising steps per block."})
    threads: int = threads_field()


def halve(folder: Path) -> None:
    """Store a folder's weights in float16; its configuration still asks for float32."""
    weights = load_file(folder / "model.safetensors")
    halved = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    if "text_config" in config:
        config["text_config"]["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def link_code(folder: Path) -> None:
    """Replace every copied code file by a relative link to the package's file of the same name."""
    sources = {path.name: path for package in PACKAGES for path in (ROOT / package).glob("*.py")}
    for copy in folder.rglob("*.py"):
        source = sources[copy.name]
        copy.unlink()
        copy.symlink_to(os.path.relpath(source, copy.parent.resolve()))


def main() -> None:
    (args,) = ScriptParser(ExportArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    model = TttForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    model.generation_config.audio_block_size = args.block_size
    model.generation_config.audio_steps_per_block = args.steps
    processor = TttProcessor.from_pretrained(args.processor or args.model)
    if args.audio_tokenizer is not None:
        processor.audio_tokenizer = TttCodecModel.from_pretrained(args.audio_tokenizer).eval()
    for path in args.output_dir.glob("**/*.py"):
        path.unlink()
    save_repository(model, processor, args.output_dir)
    for folder in (args.output_dir, args.output_dir / "audio_tokenizer"):
        halve(folder)
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    if not args.copy_code:
        link_code(args.output_dir)
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*.safetensors"))
    print(f"{args.output_dir}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    run_command(main)
