"""Turn GLM-4-Voice's published tokenizer and decoder folders into one that AutoModelForAudioTokenization loads.

python -m modeling_ttt.glm4_voice.convert_glm4_voice_to_hf \
    --tokenizer glm-4-voice-tokenizer --decoder glm-4-voice-decoder --output glm-4-voice-audio-tokenizer
"""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from ..published_ttt import load_weights
from . import Glm4VoiceConfig, Glm4VoiceEncoderConfig, Glm4VoiceFlowConfig, Glm4VoiceModel, Glm4VoiceVocoderConfig

ENCODER_PREFIX = "model.encoder."
IGNORED_TENSORS = ("ema_count", "ema_weight")  # running means of the codebook's training

# What the published configurations must say where they say it: nothing else is implemented.
ENCODER_REQUIREMENTS = {
    "activation_function": "gelu",
    "encoder_causal_convolution": True,
    "encoder_causal_attention": False,
    "quantize_causal_encoder": False,
    "quantize_encoder_only": True,
    "pooling_type": "avg",
    "scale_embedding": False,
}
FLOW_REQUIREMENTS = {
    "encoder.input_layer": "linear",
    "encoder.pos_enc_layer_type": "rel_pos_espnet",
    "encoder.selfattention_layer_type": "block_rel_selfattn",
    "encoder.normalize_before": True,
    "encoder.use_cnn_module": False,
    "encoder.macaron_style": False,
    "decoder.n_spks": 1,
    "decoder.cfm_params.solver": "euler",
    "decoder.cfm_params.t_scheduler": "cosine",
    "decoder.estimator.act_fn": "gelu",
}

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# Our names of tensors and the published ones, by part; applied one after the other.
ENCODER_NAMES: Rules = (
    (r"^quantizer\.codebook\.", "codebook."),
    (r"^quantizer\.embed_positions\.", "embed_positions2."),
    (r"^encoder\.", ""),
)
FLOW_NAMES: Rules = (
    (r"^flow\.", ""),
    (r"^speaker_proj\.", "spk_embed_affine_layer."),
    (r"^encoder\.embed_codes\.", "input_embedding."),
    (r"^encoder\.proj_in\.", "encoder.embed.out.0."),
    (r"^encoder\.layer_norm_in\.", "encoder.embed.out.1."),
    (r"^encoder\.layer_norm\.", "encoder.after_norm."),
    (r"^encoder\.layers\.", "encoder.encoders."),
    (r"(?<=self_attn\.)([qkv])_proj\.", r"linear_\1."),
    (r"(?<=self_attn\.)out_proj\.", "linear_out."),
    (r"(?<=self_attn\.)position_proj\.", "linear_pos."),
    (r"(?<=self_attn\.)content_bias$", "pos_bias_u"),
    (r"(?<=self_attn\.)position_bias$", "pos_bias_v"),
    (r"(?<=\d\.)self_attn_layer_norm\.", "norm_mha."),
    (r"(?<=\d\.)final_layer_norm\.", "norm_ff."),
    (r"^(encoder\.encoders\.\d+)\.fc([12])\.", r"\1.feed_forward.w_\2."),
    (r"^length_regulator\.layers\.(\d+)\.conv\.", lambda match: f"length_regulator.model.{3 * int(match[1])}."),
    (r"^length_regulator\.layers\.(\d+)\.norm\.", lambda match: f"length_regulator.model.{3 * int(match[1]) + 1}."),
    (r"^estimator\.proj_out\.", "decoder.estimator.final_proj."),
    (r"^estimator\.time_embedding\.", "decoder.estimator.time_mlp."),
    (r"^estimator\.", "decoder.estimator."),
    (r"\.(down|mid|up)_stages\.(\d+)\.resnet\.", r".\1_blocks.\2.0."),
    (r"\.(down|mid|up)_stages\.(\d+)\.layers\.", r".\1_blocks.\2.1."),
    (r"(?<=_block\.|block[12]\.)conv\.", "block.0."),
    (r"(?<=_block\.|block[12]\.)norm\.", "block.1."),
    (r"\.time_proj\.", ".mlp.1."),
    (r"\.shortcut\.", ".res_conv."),
    (r"\.layer_norm1\.", ".norm1."),
    (r"\.layer_norm2\.", ".norm3."),
    (r"\.([qkv])_proj\.", r".attn1.to_\1."),
    (r"\.out_proj\.", ".attn1.to_out.0."),
    (r"\.fc1\.", ".ff.net.0.proj."),
    (r"\.fc2\.", ".ff.net.2."),
)
VOCODER_NAMES: Rules = (
    (r"^vocoder\.", ""),
    (r"^pitch_predictor\.convs\.(\d+)\.", lambda match: f"f0_predictor.condnet.{2 * int(match[1])}."),
    (r"^pitch_predictor\.proj_out\.", "f0_predictor.classifier."),
    (r"^source_proj\.", "m_source.l_linear."),
    (r"^source_downsamples\.", "source_downs."),
    (r"^upsamples\.", "ups."),
    (r"^conv_in\.", "conv_pre."),
    (r"^conv_out\.", "conv_post."),
)


@dataclass
class ConversionArguments:
    """What to convert and where to put it."""

    tokenizer: Path = field(metadata={"help": "Published tokenizer folder: config.json, safetensors."})
    decoder: Path = field(metadata={"help": "Published decoder folder: config.yaml, flow.pt, hift.pt."})
    output: Path = field(metadata={"help": "Folder to write; made if missing."})


def convert(tokenizer: Path, decoder: Path, output: Path) -> Glm4VoiceModel:
    """
    Convert the published folders and save the model with its code, in float32.

    Args:
        tokenizer (`Path`): folder with config.json and safetensors weights; a preprocessor_config.json is heeded.
        decoder (`Path`): folder with config.yaml, flow.pt and hift.pt.
        output (`Path`): folder to write.

    Returns:
        [`Glm4VoiceModel`]: the converted model, in eval mode.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a configuration asks for what is not implemented, or tensors are missing, unexpected or of
            another shape; they are named as published.
    """
    config = convert_config(tokenizer, decoder)
    with torch.device("meta"):
        model = Glm4VoiceModel(config)
    published = {
        "encoder": read_encoder_weights(tokenizer, config.encoder_config.encoder_layers),
        "flow": read_decoder_weights(decoder / "flow.pt"),
        "vocoder": fold_weight_norm(read_decoder_weights(decoder / "hift.pt")),
    }
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for part, names in published_names(model).items():
        found, expected = published[part], {name: own_name for own_name, name in names.items()}
        problems += [f"{part}: {name} is missing" for name in expected.keys() - found.keys()]
        problems += [f"{part}: {name} is unexpected" for name in found.keys() - expected.keys()]
        for name in expected.keys() & found.keys():
            shape = shapes[expected[name]]
            if found[name].shape != shape:
                problems.append(f"{part}: {name} has shape {tuple(found[name].shape)}, expected {tuple(shape)}")
            weights[expected[name]] = found[name].float()
    if problems:
        raise ValueError(f"The weights do not fit the configuration. {'; '.join(sorted(problems))}.")
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(output)
    return model.eval()


def published_names(model: Glm4VoiceModel) -> dict[str, dict[str, str]]:
    """Published name of each of the model's tensors, by part ("encoder", "flow", "vocoder"); weight norm folded."""
    config = model.config
    regulator_out = f"length_regulator.model.{3 * config.flow_config.num_regulator_layers}."
    rules: dict[str, Rules] = {
        "encoder": ENCODER_NAMES,
        "flow": (*FLOW_NAMES, *_resample_names(config), (r"^length_regulator\.proj_out\.", regulator_out)),
        "vocoder": VOCODER_NAMES,
    }
    names: dict[str, dict[str, str]] = {part: {} for part in rules}
    for own_name in model.state_dict():
        part = own_name.split(".")[0].replace("quantizer", "encoder")
        name = own_name
        for pattern, replacement in rules[part]:
            name = re.sub(pattern, replacement, name)
        names[part][own_name] = name
    return names


def _resample_names(config: Glm4VoiceConfig) -> Rules:
    """Stages that change the frame rate keep their convolution one level deeper; the last of each side does not."""
    last = len(config.flow_config.unet_channels) - 1
    return (
        (rf"\.(down|up)_stages\.{last}\.resample\.", rf".\1_blocks.{last}.2."),
        (r"\.(down|up)_stages\.(\d+)\.resample\.", r".\1_blocks.\2.2.conv."),
    )


# ---------------------------------------------------------------------- weights


def read_encoder_weights(folder: Path, num_layers: int) -> dict[str, torch.Tensor]:
    """Return the tokenizer's tensors by bare names. Where names have the prefix `model.encoder.`, everything else in
    the file, later layers and the final norm are left out, as the published loader does."""
    weights = load_weights(folder)
    if any(name.startswith(ENCODER_PREFIX) for name in weights):
        weights = {
            name.removeprefix(ENCODER_PREFIX): tensor
            for name, tensor in weights.items()
            if name.startswith(ENCODER_PREFIX)
        }
        weights = {name: tensor for name, tensor in weights.items() if not _is_later(name, num_layers)}
    return {name: tensor for name, tensor in weights.items() if name not in IGNORED_TENSORS}


def _is_later(name: str, num_layers: int) -> bool:
    layer = re.match(r"layers\.(\d+)\.", name)
    return name.startswith("layer_norm") or (layer is not None and int(layer[1]) >= num_layers)


def read_decoder_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch file, which may hold nothing but tensors by name."""
    _check_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message goes on to say how to run whatever is in the file.
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; it is not read, since that could run code that it brings. "
            "Download it again from where it was published."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} does not hold tensors by name.")
    return weights


def fold_weight_norm(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace magnitudes g and directions v, in either of PyTorch's spellings, by weights g v / |v|; the norm is over
    all dimensions but the first."""
    folded = dict(weights)
    for magnitude, direction in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        for name in [name for name in folded if name.endswith(f".{magnitude}")]:
            stem = name.removesuffix(magnitude)
            if stem + direction in folded:
                g, v = folded.pop(name).float(), folded.pop(stem + direction).float()
                folded[f"{stem}weight"] = g * v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
    return folded


# ---------------------------------------------------------------------- configuration


def convert_config(tokenizer: Path, decoder: Path) -> Glm4VoiceConfig:
    """Return the configuration of two published folders; see `convert`."""
    published = read_decoder_config(decoder / "config.yaml")
    vocoder = convert_vocoder_config(published)
    return Glm4VoiceConfig(
        encoder_config=convert_encoder_config(tokenizer),
        flow_config=convert_flow_config(published, vocoder.sampling_rate, vocoder.hop_length),
        vocoder_config=vocoder,
    )


def convert_encoder_config(folder: Path) -> Glm4VoiceEncoderConfig:
    """From a published config.json (Whisper's, plus keys of its own) and, if there, preprocessor_config.json."""
    published = _read_json(folder / "config.json")
    _require(published, ENCODER_REQUIREMENTS, "config.json")
    depth = _get(published, "quantize_position", "config.json")
    _require(published, {"pooling_position": depth}, "config.json")
    settings = {
        "encoder_layers": depth,
        "attention_block_size": _get(published, "quantize_causal_block_size", "config.json"),
        "codebook_size": _get(published, "quantize_vocab_size", "config.json"),
    }
    for name in (
        "num_mel_bins",
        "d_model",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "max_source_positions",
        "pooling_kernel_size",
    ):
        settings[name] = _get(published, name, "config.json")
    if (folder / "preprocessor_config.json").is_file():
        features = _read_json(folder / "preprocessor_config.json")
        _require(features, {"feature_size": settings["num_mel_bins"]}, "preprocessor_config.json")
        names = ("sampling_rate", "n_fft", "hop_length", "chunk_length")
        settings |= {name: features[name] for name in names if name in features}
    return Glm4VoiceEncoderConfig(**settings)


def convert_flow_config(published: Mapping[str, Any], sampling_rate: int, hop_length: int) -> Glm4VoiceFlowConfig:
    """From the `flow` section of a published config.yaml."""
    flow = _Section(published, "flow")
    num_mel_bins = flow["output_size"]
    ratios = flow["length_regulator.sampling_ratios"]
    _require(
        flow.values,
        {
            **FLOW_REQUIREMENTS,
            "decoder.estimator.in_channels": 4 * num_mel_bins,
            "decoder.estimator.out_channels": num_mel_bins,
            "length_regulator.channels": num_mel_bins,
            "length_regulator.sampling_ratios": [1] * len(ratios),
        },
        "config.yaml, flow",
    )
    return Glm4VoiceFlowConfig(
        codebook_size=flow["vocab_size"],
        code_rate=flow["input_frame_rate"],
        sampling_rate=sampling_rate,
        hop_length=hop_length,
        num_mel_bins=num_mel_bins,
        speaker_embedding_size=flow["spk_embed_dim"],
        embedding_size=flow["input_size"],
        hidden_size=flow["encoder.output_size"],
        num_hidden_layers=flow["encoder.num_blocks"],
        num_attention_heads=flow["encoder.attention_heads"],
        intermediate_size=flow["encoder.linear_units"],
        attention_block_size=flow["encoder.block_size"],
        num_regulator_layers=len(ratios),
        unet_channels=flow["decoder.estimator.channels"],
        unet_num_layers=flow["decoder.estimator.n_blocks"],
        unet_num_mid_stages=flow["decoder.estimator.num_mid_blocks"],
        unet_num_attention_heads=flow["decoder.estimator.num_heads"],
        unet_head_dim=flow["decoder.estimator.attention_head_dim"],
        guidance_scale=flow["decoder.cfm_params.inference_cfg_rate"],
    )


def convert_vocoder_config(published: Mapping[str, Any]) -> Glm4VoiceVocoderConfig:
    """From the `hift` section of a published config.yaml."""
    hift = _Section(published, "hift")
    return Glm4VoiceVocoderConfig(
        sampling_rate=hift["sampling_rate"],
        num_mel_bins=hift["in_channels"],
        hidden_size=hift["base_channels"],
        upsample_rates=hift["upsample_rates"],
        upsample_kernel_sizes=hift["upsample_kernel_sizes"],
        resblock_kernel_sizes=hift["resblock_kernel_sizes"],
        resblock_dilation_sizes=hift["resblock_dilation_sizes"],
        source_resblock_kernel_sizes=hift["source_resblock_kernel_sizes"],
        source_resblock_dilation_sizes=hift["source_resblock_dilation_sizes"],
        n_fft=hift["istft_params.n_fft"],
        istft_hop_length=hift["istft_params.hop_len"],
        pitch_hidden_size=hift["f0_predictor.cond_channels"],
        num_harmonics=hift["nb_harmonics"],
        sine_amplitude=hift["nsf_alpha"],
        noise_amplitude=hift["nsf_sigma"],
        voiced_threshold=hift["nsf_voiced_threshold"],
        leaky_relu_slope=hift["lrelu_slope"],
        max_amplitude=hift["audio_limit"],
    )


class _PlainLoader(yaml.SafeLoader):
    """Reads tags such as `!new:some.Class` as the plain mapping, list or text under them; nothing is constructed."""


def _construct_plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_PlainLoader.add_multi_constructor("!", _construct_plain)


def read_decoder_config(path: Path) -> dict[str, Any]:
    """Return a published config.yaml as plain values; references `!ref <key>` to keys of the top level are followed."""
    _check_file(path)
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506, a subclass of SafeLoader

    def follow(value: Any) -> Any:
        if isinstance(value, dict):
            # A mapping that some tag carries as its only argument stands for its contents.
            return follow(value["content"]) if set(value) == {"content"} else {k: follow(v) for k, v in value.items()}
        if isinstance(value, list):
            return [follow(item) for item in value]
        reference = re.fullmatch(r"<(\w+)>", value) if isinstance(value, str) else None
        return follow(content[reference[1]]) if reference and reference[1] in content else value

    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings by name.")
    return follow(content)


class _Section:
    """A section of a config.yaml, read by dotted keys."""

    def __init__(self, published: Mapping[str, Any], name: str):
        self.name = f"config.yaml, {name}"
        self.values = _get(published, name, "config.yaml")

    def __getitem__(self, key: str) -> Any:
        return _get(self.values, key, self.name)


def _get(values: Any, key: str, source: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            raise ValueError(f"{source}: there is no `{key}`.")
        values = values[name]
    return values


def _require(values: Mapping[str, Any], requirements: Mapping[str, Any], source: str) -> None:
    for key, expected in requirements.items():
        try:
            value = _get(values, key, source)
        except ValueError:
            continue  # left to its default
        if value != expected:
            raise ValueError(f"{source}: `{key}` is {value!r}; only {expected!r} is implemented.")


def _read_json(path: Path) -> dict[str, Any]:
    _check_file(path)
    return json.loads(path.read_text(encoding="utf-8"))


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")


def main() -> None:
    parser = HfArgumentParser(
        ConversionArguments,
        description="Turn GLM-4-Voice's published tokenizer and decoder into one audio tokenizer.",
        epilog="Example: python -m modeling_ttt.glm4_voice.convert_glm4_voice_to_hf "
        "--tokenizer glm-4-voice-tokenizer --decoder glm-4-voice-decoder --output glm-4-voice-audio-tokenizer",
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        convert(arguments.tokenizer, arguments.decoder, arguments.output)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: error: {error}") from error
    print(f"Converted {arguments.tokenizer} and {arguments.decoder} to {arguments.output}")


if __name__ == "__main__":
    main()
