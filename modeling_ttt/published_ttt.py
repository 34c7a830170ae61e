"""The published checkpoints as ours: names of settings and tensors, and the defaults of the published sampler. Token
ids come as arguments; the command that writes a Hub folder is `pipelines.convert_ttt_to_hf`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .configuration_ttt import TttConfig
from .generation_config_ttt import AUDIO_DEFAULTS, TttGenerationConfig
from .modeling_ttt import TttForConditionalGeneration

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


def convert_config(published: Mapping[str, Any], ids: Mapping[str, int]) -> TttConfig:
    """
    Return the TttConfig of a published config.json.

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


def load_model(checkpoint: Path, config: TttConfig) -> TttForConditionalGeneration:
    """
    Return the model with a published folder's weights and the published sampler's settings.

    Raises:
        FileNotFoundError: if weights are missing.
        ValueError: if they do not fit the config.
    """
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
    return model.eval()


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors file or shards, under their published names.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    files = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for name in files:
        if not (checkpoint / name).is_file():
            raise FileNotFoundError(f"{checkpoint / name} is missing: weights are read from safetensors files.")
        weights.update(load_file(checkpoint / name))
    return weights


__all__ = ["convert_config", "load_model", "load_weights"]
