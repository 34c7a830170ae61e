"""The command that turns a published TtT checkpoint folder into a Hub folder. What published names and weights are
called here lives in modeling_ttt/published_ttt.py.

python -m pipelines.convert_ttt_to_hf --checkpoint TtT-3B --audio_tokenizer glm-4-voice --output TtT-3B-hf

With an audio tokenizer the output is all that `pipeline("audio-to-audio")` needs: model, processor, audio tokenizer,
generation settings, code and a model card. Without one it is model and tokenizer only.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from modeling_ttt import TttForConditionalGeneration
from modeling_ttt.published_ttt import convert_config, load_model
from processing import TttAudioFormat, TttProcessor, TttTokenIds, load_audio_codec, load_feature_extractor
from processing.vocabulary_ttt import END_OF_TURN, MASK, TOKENS

from .pipeline_ttt import save_repository

CARD = Path(__file__).with_name("model_card_ttt_3b.md")  # model_cards/ttt-3b/README.md is a link to it
# Names of the ids in a --token_ids file, as in the goldens' `vocab`: mostly the token's string without its brackets.
ID_NAMES = {
    **{name: token.strip("<|>") for name, token in TOKENS.items()},
    "audio_token_id_start": "audio_token_id_start",
    "num_audio_codes": "num_audio_tokens",
}


@dataclass
class ConversionArguments:
    """What to convert and where to put it."""

    checkpoint: Path = field(metadata={"help": "Published checkpoint folder: config.json, safetensors, tokenizer."})
    output: Path = field(metadata={"help": "Folder to write; made if missing."})
    audio_tokenizer: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of the audio tokenizer whose codes the checkpoint speaks in, as "
            "`modeling_ttt.glm4_voice.convert_glm4_voice_to_hf` writes it; without it, no processor is written."
        },
    )
    token_ids: Path | None = field(
        default=None,
        metadata={"help": "JSON file with the ids of the special tokens, for a checkpoint without tokenizer."},
    )


def convert(
    checkpoint: Path, output: Path, token_ids: Path | None = None, audio_tokenizer: Path | None = None
) -> TttForConditionalGeneration:
    """
    Convert a published checkpoint folder and save the model, its code and, where there is one, its tokenizer; with an
    audio tokenizer, the whole Hub folder.

    Of a published generation_config.json nothing is kept: the published sampler does not read it. Its own defaults are
    written instead, and a turn ends with `<|im_end|>` whatever the backbone's end-of-sequence token is.

    Args:
        checkpoint (`Path`): folder with config.json (Qwen2's, plus the published keys) and safetensors weights.
        output (`Path`): folder to write. A README.md that is there already is kept.
        token_ids (`Path`, *optional*):
            JSON file that names the ids as the goldens' `vocab` does; needed where the folder holds no tokenizer.
        audio_tokenizer (`Path`, *optional*):
            folder of an audio tokenizer with as many codes as the checkpoint has tokens for.

    Returns:
        [`TttForConditionalGeneration`]: the converted model, in eval mode and the checkpoint's precision.

    Raises:
        FileNotFoundError: if config, weights, audio tokenizer or both tokenizer and `token_ids` are missing.
        ValueError: if the ids contradict the published config, the audio tokenizer has other codes, or the weights do
            not fit.
    """
    if audio_tokenizer is not None and token_ids is not None:
        raise ValueError("--audio_tokenizer needs the checkpoint's own tokenizer; leave --token_ids out.")
    published = _read_json(checkpoint / "config.json")
    if token_ids is None:
        tokenizer = _load_tokenizer(checkpoint)
        ids = set_special_tokens(tokenizer)
        published |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    else:
        tokenizer, ids = None, read_token_ids(token_ids)
    config = convert_config(published, ids.config_arguments())
    processor = None if audio_tokenizer is None else build_processor(tokenizer, audio_tokenizer)
    model = load_model(checkpoint, config)
    if processor is not None:
        save_repository(model, processor, output, card=CARD.read_text(encoding="utf-8"))
    else:
        model.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    return model


def set_special_tokens(tokenizer: PreTrainedTokenizerBase) -> TttTokenIds:
    """
    Give a published tokenizer its mask token and `<|im_end|>` as end-of-sequence token; the former one pads where there
    is no padding token.

    Raises:
        ValueError: if a token is missing, or codes do not follow each other.
    """
    try:
        ids = TttTokenIds.from_tokenizer(tokenizer)
    except ValueError as error:
        raise ValueError(f"{error} Or give the ids with --token_ids.") from error
    tokenizer.mask_token = MASK
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or END_OF_TURN
    tokenizer.eos_token = END_OF_TURN
    return ids


def build_processor(tokenizer: PreTrainedTokenizerBase, audio_tokenizer: Path) -> Any:
    """
    Return the processor of a published tokenizer, whose chat template is set, and an audio tokenizer's folder.

    Raises:
        FileNotFoundError: if there is no audio tokenizer in the folder.
        ValueError: if it has other codes than the tokenizer.
    """
    if not (audio_tokenizer / "config.json").is_file():
        raise FileNotFoundError(f"{audio_tokenizer} has no config.json: name an audio tokenizer's converted folder.")
    codec = load_audio_codec(audio_tokenizer, dtype=torch.float32)
    found = TttAudioFormat.from_config(codec.config).num_codes
    expected = TttTokenIds.from_tokenizer(tokenizer).num_audio_codes
    if found != expected:
        raise ValueError(
            f"The audio tokenizer in {audio_tokenizer} has {found} codes, the checkpoint {expected}: "
            "convert it with the one it was trained with."
        )
    extractor = load_feature_extractor(codec, [(audio_tokenizer, "")])
    processor = TttProcessor(extractor, tokenizer, codec)
    rate = extractor.sampling_rate
    processor.encode_audio(np.zeros(rate, dtype=np.float32), rate)  # do they fit? a second of silence
    tokenizer.chat_template = processor.chat_template
    return processor


def read_token_ids(path: Path) -> TttTokenIds:
    """
    Read the ids from a JSON file with the names of `ID_NAMES`, at the top level or under "vocab".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a name is missing.
    """
    content = _read_json(path)
    content = content.get("vocab", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; an object of names and ids is expected.")
    missing = [key for key in ID_NAMES.values() if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    wrong = [key for key in ID_NAMES.values() if type(content[key]) is not int]
    if wrong:
        raise ValueError(f"{path} has {content[wrong[0]]!r} under {wrong[0]}; it must be an integer.")
    return TttTokenIds(**{name: content[key] for name, key in ID_NAMES.items()})


def _load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    if not any((checkpoint / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise FileNotFoundError(f"{checkpoint} has no tokenizer: name a JSON file of token ids with --token_ids.")
    return AutoTokenizer.from_pretrained(checkpoint)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = HfArgumentParser(
        ConversionArguments,
        description="Turn a published TtT checkpoint folder into a Hub folder.",
        epilog="Example: python -m pipelines.convert_ttt_to_hf --checkpoint TtT-3B --audio_tokenizer glm-4-voice "
        "--output TtT-3B-hf",
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        convert(arguments.checkpoint, arguments.output, arguments.token_ids, arguments.audio_tokenizer)
    except (OSError, SafetensorError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: error: {error}") from error
    print(f"Converted {arguments.checkpoint} to {arguments.output}")


if __name__ == "__main__":
    main()
