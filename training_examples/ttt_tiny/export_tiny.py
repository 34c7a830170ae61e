"""Lay a trained model out as its Hub repository, in half precision, with this package's own files as its code.

    python training_examples/ttt_tiny/export_tiny.py --model runs/tiny/d --audio_tokenizer runs/codec/decoder \
        --generation audio_block_size=26 audio_prefix_probability=0.8 --output_dir model_cards/ttt-tiny

`--generation` is how the model answers where its user says nothing: any option of TttGenerationConfig, chosen on the
development lists, with null for one that the checkpoint is to lose. Weights are stored in float16 and computed in
float32. The code files are relative symbolic links to the package, so the folder never drifts from it; `push_to_hub`
and `--copy_code` follow them.
"""

import difflib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from modeling_ttt import TttForConditionalGeneration, TttGenerationConfig
from modeling_ttt.generation_config_ttt import AUDIO_OPTIONS
from modeling_ttt.ttt_codec import TttCodecModel
from pipelines import save_repository
from processing import TttProcessor
from training_examples.command_line import ScriptParser
from training_examples.evaluation.options import read_pairs
from training_examples.threads import threads_field, use_threads
from training_examples.ttt_tiny.phonemes import describe_other_encoder
from training_examples.user_errors import run_command

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("modeling_ttt", "modeling_ttt/ttt_codec", "processing", "pipelines")


@dataclass
class ExportArguments:
    model: Path = field(default=Path("runs/tiny/ttt"), metadata={"help": "Trained model with its processor."})
    average_with: Path | None = field(
        default=None,
        metadata={"help": "Another training of the same model: the mean of both, weight by weight, is exported."},
    )
    processor: Path | None = field(default=None, metadata={"help": "Folder of the processor, if not the model's."})
    audio_tokenizer: list[Path] | None = field(
        default=None,
        metadata={
            "help": "Audio tokenizer in place of the model's own; of several with the same encoder, the mean of their "
            "decoders."
        },
    )
    output_dir: Path = field(default=Path("model_cards/ttt-tiny"), metadata={"help": "The folder to write."})
    copy_code: bool = field(default=False, metadata={"help": "Copy code files instead of linking them."})
    generation: list[str] = field(
        default_factory=list,
        metadata={"help": "OPTION=VALUE of generation_config.json, such as audio_block_size=8 audio_order_bias=0.05."},
    )
    threads: int = threads_field()


def set_defaults(config: TttGenerationConfig, options: Mapping[str, Any]) -> None:
    """
    Write options into a checkpoint's generation settings.

    Raises:
        ValueError: If there is no such option, or it does not take such a value.
    """
    known = vars(TttGenerationConfig())
    for name in options:
        if name not in known or name.startswith("_"):
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean `{close[0]}`?" if close else "."
            raise ValueError(f"`--generation` {name}: TttGenerationConfig has no such option{hint}")
        setattr(config, name, options[name])
    config.validate()


def average(model: torch.nn.Module, other: torch.nn.Module, share: float = 0.5, option: str = "average_with") -> None:
    """
    Give `model` the mean of its weights and those of `other` ("model soup", Wortsman et al., 2022, arXiv 2203.05482).

    Args:
        model, other (`torch.nn.Module`): of one shape.
        share (`float`, *optional*, defaults to 0.5): what `other` counts.
        option (`str`, *optional*): that names `other`, for the error.

    Raises:
        ValueError: If the two have other weights, naming one.
    """
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())  # tied weights once
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            shapes = [tuple(state[name].shape) if name in state else "none" for state in (ours, theirs)]
            before = "--model" if option == "average_with" else "the one before"
            raise ValueError(f"`--{option}`: weight {name} is {shapes[0]} in {before} and {shapes[1]} there")
    with torch.no_grad():
        for name, value in ours.items():
            value.lerp_(theirs[name], share)


def mean_audio_tokenizer(folders: Sequence[Path]) -> TttCodecModel:
    """
    Return the mean of audio tokenizers, which differ in their decoders alone.

    Raises:
        ValueError: If their encoders make other codes, or they have other weights.
    """
    codec = TttCodecModel.from_pretrained(folders[0]).eval()
    for count, folder in enumerate(folders[1:], start=2):
        other = TttCodecModel.from_pretrained(folder)
        difference = describe_other_encoder(other, codec)
        if difference is not None:
            raise ValueError(
                f"`--audio_tokenizer` {folder} makes other codes than {folders[0]}: {difference}; only decoders of one "
                "encoder have a mean"
            )
        average(codec, other, 1 / count, "audio_tokenizer")
    return codec


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


def forget_machine(path: Path) -> None:
    """Take out of a tokenizer's configuration where it was loaded from, which the library writes into it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def code_files(folder: Path) -> dict[Path, Path]:
    """
    Return the code files of the exported `folder` and of its audio tokenizer, with the package's files that they are.

    Raises:
        ValueError: If `folder` is one of the package's own, whose files they would replace.
    """
    if folder.resolve() in [ROOT / package for package in PACKAGES]:
        raise ValueError(f"`--output_dir` {folder} holds the code itself; give another folder")
    sources = {path.name: path for package in PACKAGES for path in (ROOT / package).glob("*.py")}
    places = [part / name for part in (folder, folder / "audio_tokenizer") for name in sources]
    return {path: sources[path.name] for path in places if path.is_symlink() or path.exists()}


def link_code(folder: Path) -> None:
    """Replace every copied code file by a relative link to the package's file of the same name."""
    for copy, source in code_files(folder).items():
        copy.unlink()
        copy.symlink_to(os.path.relpath(source, copy.parent.resolve()))


def main() -> None:
    (args,) = ScriptParser(ExportArguments, __doc__).parse_args_into_dataclasses()
    use_threads(args.threads)
    model = TttForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.average_with is not None:
        average(model, TttForConditionalGeneration.from_pretrained(args.average_with, dtype=torch.float32))
    set_defaults(model.generation_config, read_pairs("generation", args.generation))
    processor = TttProcessor.from_pretrained(args.processor or args.model)
    if args.audio_tokenizer is not None:
        processor.audio_tokenizer = mean_audio_tokenizer(args.audio_tokenizer)
    for path in code_files(args.output_dir):
        path.unlink()
    save_repository(model, processor, args.output_dir)
    for folder in (args.output_dir, args.output_dir / "audio_tokenizer"):
        halve(folder)
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    forget_machine(args.output_dir / "tokenizer_config.json")
    if not args.copy_code:
        link_code(args.output_dir)
    written = json.loads((args.output_dir / "generation_config.json").read_text(encoding="utf-8"))
    defaults = ", ".join(f"{name} {value}" for name, value in written.items() if name in AUDIO_OPTIONS)
    size = sum(path.stat().st_size for path in args.output_dir.rglob("*.safetensors"))
    print(f"{args.output_dir}: {size / 1e6:.1f} MB of weights; it answers with {defaults}")


if __name__ == "__main__":
    run_command(main)
