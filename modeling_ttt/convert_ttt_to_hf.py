"""Turn a published TtT checkpoint folder into a Hub repository. What is audio-tokenizer specific is not here.

python -m modeling_ttt.convert_ttt_to_hf --checkpoint TtT-3B --audio_tokenizer glm-4-voice --output TtT-3B-hf

With an audio tokenizer the output is all that `pipeline("audio-to-audio")` needs: model, processor, audio tokenizer,
generation settings, code and a model card. Without one it is model and tokenizer only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from . import TttConfig, TttForConditionalGeneration, TttGenerationConfig
from .generation_config_ttt import AUDIO_DEFAULTS

CARD = Path(__file__).with_name("model_card_ttt_3b.md")  # model_cards/ttt-3b/README.md is a link to it
END_OF_TURN, MASK = "<|im_end|>", "<|mask_token|>"
# TttConfig's argument, the token's string in a published tokenizer, its name in a --token_ids file.
TOKENS = (
    ("audio_token_id_start", "<|audio|>", "audio_token_id_start"),
    ("audio_code_id_start", "<|audio_0|>", "audio_0"),
    ("mask_token_id", MASK, "mask_token"),
    ("begin_of_audio_token_id", "<|begin_of_audio|>", "begin_of_audio"),
    ("end_of_prompt_audio_token_id", "<|end_of_audio|>", "end_of_audio"),
    ("begin_of_last_audio_token_id", "<|begin_of_quad|>", "begin_of_quad"),
    ("end_of_audio_token_id", "<|end_of_audio_new|>", "end_of_audio_new"),
    ("end_of_last_audio_token_id", "<|end_of_audio_span_last|>", "end_of_audio_span_last"),
)
# The published config's own keys beside its backbone's, and what they are called here.
PUBLISHED_KEYS = {
    "mask_token": "mask_token_id",
    "audio_token_id_start": "audio_token_id_start",
    "unmasked_audio_prob": "clean_batch_probability",
    "prefix_preservation_ratio": "prefix_preservation_probability",
}
# The defaults of the published sampler's script.
PUBLISHED_SAMPLER = {**AUDIO_DEFAULTS, "audio_guidance_scale": 0.1, "do_sample": True, "top_k": 10, "top_p": 0.95}
MAX_NEW_TOKENS = 2048  # not published; some two minutes of speech
PUBLISHED_PREFIX, PREFIX = "model.", "model.language_model."


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
    audio tokenizer, the whole Hub repository.

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
        ids = ids_from_tokenizer(tokenizer)
        published |= set_special_tokens(tokenizer)
    else:
        tokenizer, ids = None, ids_from_file(token_ids)
    config = convert_config(published, ids)
    processor = None if audio_tokenizer is None else build_processor(tokenizer, audio_tokenizer)
    model = load_model(checkpoint, config)
    if processor is not None:
        save_repository(model, processor, output)
    else:
        model.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    return model.eval()


def set_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """
    Give a published tokenizer its mask token and, where it has it, `<|im_end|>` as end-of-sequence token; the former
    one pads where there is no padding token.

    Returns:
        `dict`: what the config must say of it, `eos_token_id` and `pad_token_id`; nothing without `<|im_end|>`.
    """
    tokenizer.mask_token = MASK
    if END_OF_TURN not in tokenizer.get_vocab():
        return {}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or END_OF_TURN
    tokenizer.eos_token = END_OF_TURN
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def load_model(checkpoint: Path, config: TttConfig) -> TttForConditionalGeneration:
    """The model with a published folder's weights, which must fit, and the published sampler's settings."""
    state_dict = {
        PREFIX + name.removeprefix(PUBLISHED_PREFIX) if name.startswith(PUBLISHED_PREFIX) else name: tensor
        for name, tensor in load_weights(checkpoint).items()
    }
    model, report = TttForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state_dict, dtype="auto", output_loading_info=True
    )
    problems = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        raise ValueError(f"The weights in {checkpoint} do not fit the config: {problems}.")
    model.generation_config = TttGenerationConfig(
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        max_new_tokens=min(MAX_NEW_TOKENS, config.text_config.max_position_embeddings // 2),  # the prompt needs room
        **PUBLISHED_SAMPLER,
    )
    return model


# A whole repository takes all three packages. Those that build on this one are imported when the command runs, never
# when this module is imported.


def build_processor(tokenizer: PreTrainedTokenizerBase, audio_tokenizer: Path) -> Any:
    """The processor of a published tokenizer, whose chat template is set, and an audio tokenizer's folder.

    Raises:
        FileNotFoundError: if there is no audio tokenizer in the folder.
        ValueError: if it has other codes than the tokenizer.
    """
    from processing import TttAudioFormat, TttProcessor, TttTokenIds, load_audio_codec, load_feature_extractor

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
    processor.encode_audio(np.zeros(extractor.sampling_rate, dtype=np.float32))  # do they fit? a second of silence
    tokenizer.chat_template = processor.chat_template
    return processor


def save_repository(model: TttForConditionalGeneration, processor: Any, output: Path) -> None:
    """Saves model, processor, audio tokenizer, pipeline, their code and the model card as one Hub repository."""
    from pipelines import TttAudioToAudioPipeline

    TttAudioToAudioPipeline(model=model, processor=processor, device="cpu").save_pretrained(output)
    if not (output / "README.md").exists():
        (output / "README.md").write_text(CARD.read_text(encoding="utf-8"), encoding="utf-8")


def convert_config(published: Mapping[str, Any], ids: Mapping[str, int]) -> TttConfig:
    """
    The TttConfig of a published config.json.

    Args:
        published (`Mapping`): the published config.
        ids (`Mapping`): TttConfig's token id arguments and `num_audio_codes`.

    Raises:
        ValueError: if the published config states another mask id or start of the audio range than `ids`.
    """
    own = {name: published[key] for key, name in PUBLISHED_KEYS.items() if published.get(key) is not None}
    for name in ids.keys() & own.keys():
        if own[name] != ids[name]:
            raise ValueError(f"config.json says `{name}` is {own[name]}, the tokens say {ids[name]}.")
    model_type = published.get("model_type", "qwen2")
    # Keep what the backbone knows: a published config also carries many settings that Transformers has dropped since.
    known = AutoConfig.for_model(model_type).to_dict().keys() | {"rope_theta", "rope_scaling"}
    known -= {"architectures", "auto_map", "dtype", "model_type", "transformers_version"}
    backbone = {key: value for key, value in published.items() if key in known}
    text_config = AutoConfig.for_model(model_type, **backbone)
    return TttConfig(text_config=text_config, **{**own, **ids})


def ids_from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """
    Look up the special ids and the size of the codebook by the published token strings.

    Raises:
        ValueError: if a token is missing, or codes do not follow each other.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for _, token, _ in TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"The tokenizer has no {', '.join(missing)}: give their ids with --token_ids.")
    ids = {name: vocabulary[token] for name, token, _ in TOKENS}
    num_codes = 0
    while f"<|audio_{num_codes}|>" in vocabulary:
        if vocabulary[f"<|audio_{num_codes}|>"] != ids["audio_code_id_start"] + num_codes:
            raise ValueError(f"<|audio_{num_codes}|> has the id {vocabulary[f'<|audio_{num_codes}|>']}: out of order.")
        num_codes += 1
    return {**ids, "num_audio_codes": num_codes}


def ids_from_file(path: Path) -> dict[str, int]:
    """
    Read the special ids from a JSON file: the keys of TOKENS' third column and `num_audio_tokens`, at the top level or
    under "vocab".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a key is missing.
    """
    content = _read_json(path)
    content = content.get("vocab", content)
    missing = [key for _, _, key in (*TOKENS, ("", "", "num_audio_tokens")) if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    return {name: int(content[key]) for name, _, key in TOKENS} | {"num_audio_codes": int(content["num_audio_tokens"])}


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors file or shards, under their published names."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [SAFE_WEIGHTS_NAME]
    weights: dict[str, torch.Tensor] = {}
    for name in files:
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{checkpoint / name} is missing: weights are read from safetensors files.")
        weights.update(load_file(checkpoint / name))
    return weights


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
        description="Turn a published TtT checkpoint folder into a Hub repository.",
        epilog="Example: python -m modeling_ttt.convert_ttt_to_hf --checkpoint TtT-3B --audio_tokenizer glm-4-voice "
        "--output TtT-3B-hf",
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    convert(arguments.checkpoint, arguments.output, arguments.token_ids, arguments.audio_tokenizer)
    print(f"Converted {arguments.checkpoint} to {arguments.output}")


if __name__ == "__main__":
    main()
