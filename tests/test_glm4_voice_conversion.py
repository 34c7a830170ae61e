"""The conversion of GLM-4-Voice's published files: both spellings of everything, and errors that name the tensor."""

import json
import sys

import pytest
import torch
import yaml
from glm4_voice_goldens import GOLDENS, golden_model, write_published_folders
from safetensors.torch import load_file, save_file

from modeling_ttt.glm4_voice import Glm4VoiceConfig, Glm4VoiceModel
from modeling_ttt.glm4_voice.convert_glm4_voice_to_hf import (
    convert,
    fold_weight_norm,
    main,
    published_names,
    read_decoder_config,
)


def weight_and_bias(name, *shape, bias=True):
    """A layer's tensors by their names; the bias is as long as the weight's first dimension."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def published_encoder_shapes():
    """Every tensor of the published tokenizer's encoder, running means left out."""
    size, inner = 1280, 5120
    shapes = weight_and_bias("conv1", size, 128, 3) | weight_and_bias("conv2", size, size, 3)
    shapes |= {"embed_positions.weight": (1500, size), "embed_positions2.weight": (375, size)}
    shapes |= {"codebook.weight": (16384, size)}
    for layer in range(16):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= weight_and_bias(f"layers.{layer}.self_attn.{name}", size, size, bias=name != "k_proj")
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= weight_and_bias(f"layers.{layer}.{name}", size)
        shapes |= weight_and_bias(f"layers.{layer}.fc1", inner, size)
        shapes |= weight_and_bias(f"layers.{layer}.fc2", size, inner)
    return shapes


def published_flow_shapes():
    """Every tensor of the published flow.pt."""
    size, mel = 512, 80
    shapes = {"input_embedding.weight": (16384, size)} | weight_and_bias("spk_embed_affine_layer", mel, 192)
    shapes |= weight_and_bias("encoder.embed.out.0", size, size) | weight_and_bias("encoder.embed.out.1", size)
    for layer in range(6):
        prefix = f"encoder.encoders.{layer}"
        for name in ("linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"):
            shapes |= weight_and_bias(f"{prefix}.self_attn.{name}", size, size, bias=name != "linear_pos")
        shapes |= {f"{prefix}.self_attn.{name}": (8, 64) for name in ("pos_bias_u", "pos_bias_v")}
        shapes |= weight_and_bias(f"{prefix}.feed_forward.w_1", 2048, size)
        shapes |= weight_and_bias(f"{prefix}.feed_forward.w_2", size, 2048)
        shapes |= weight_and_bias(f"{prefix}.norm_ff", size) | weight_and_bias(f"{prefix}.norm_mha", size)
    shapes |= weight_and_bias("encoder.after_norm", size) | weight_and_bias("encoder_proj", mel, size)
    for layer in range(4):
        shapes |= weight_and_bias(f"length_regulator.model.{3 * layer}", mel, mel, 3)
        shapes |= weight_and_bias(f"length_regulator.model.{3 * layer + 1}", mel)
    shapes |= weight_and_bias("length_regulator.model.12", mel, mel, 1)
    shapes |= published_estimator_shapes("decoder.estimator")
    return shapes


def published_estimator_shapes(prefix):
    """The U-Net's tensors."""
    size, inner, time = 256, 512, 1024
    shapes = weight_and_bias(f"{prefix}.time_mlp.linear_1", time, 320)
    shapes |= weight_and_bias(f"{prefix}.time_mlp.linear_2", time, time)
    stages = {"down_blocks.0": 320, "down_blocks.1": size, "up_blocks.0": 2 * size, "up_blocks.1": 2 * size}
    stages |= {f"mid_blocks.{stage}": size for stage in range(12)}
    for stage, in_size in stages.items():
        resnet = f"{prefix}.{stage}.0"
        shapes |= weight_and_bias(f"{resnet}.mlp.1", size, time)
        shapes |= weight_and_bias(f"{resnet}.res_conv", size, in_size, 1)
        for block, block_in_size in (("block1", in_size), ("block2", size)):
            shapes |= weight_and_bias(f"{resnet}.{block}.block.0", size, block_in_size, 3)
            shapes |= weight_and_bias(f"{resnet}.{block}.block.1", size)
        for layer in (f"{prefix}.{stage}.1.{index}" for index in range(4)):
            for name in ("to_q", "to_k", "to_v"):
                shapes |= weight_and_bias(f"{layer}.attn1.{name}", inner, size, bias=False)
            shapes |= weight_and_bias(f"{layer}.attn1.to_out.0", size, inner)
            shapes |= weight_and_bias(f"{layer}.norm1", size) | weight_and_bias(f"{layer}.norm3", size)
            shapes |= weight_and_bias(f"{layer}.ff.net.0.proj", time, size)
            shapes |= weight_and_bias(f"{layer}.ff.net.2", size, time)
    shapes |= weight_and_bias(f"{prefix}.down_blocks.0.2.conv", size, size, 3)
    shapes |= weight_and_bias(f"{prefix}.down_blocks.1.2", size, size, 3)
    shapes |= weight_and_bias(f"{prefix}.up_blocks.0.2.conv", size, size, 4)
    shapes |= weight_and_bias(f"{prefix}.up_blocks.1.2", size, size, 3)
    shapes |= weight_and_bias(f"{prefix}.final_block.block.0", size, size, 3)
    shapes |= weight_and_bias(f"{prefix}.final_block.block.1", size)
    return shapes | weight_and_bias(f"{prefix}.final_proj", 80, size, 1)


def published_vocoder_shapes():
    """Every tensor of the published hift.pt, with weight norm as magnitudes and directions."""

    def normed(name, *shape, out_size=None):
        magnitude = (shape[0], *[1] * (len(shape) - 1))
        return {f"{name}.weight_g": magnitude, f"{name}.weight_v": shape, f"{name}.bias": (out_size or shape[0],)}

    shapes = weight_and_bias("m_source.l_linear", 1, 9) | weight_and_bias("f0_predictor.classifier", 1, 512)
    for index, in_size in enumerate((80, 512, 512, 512, 512)):
        shapes |= normed(f"f0_predictor.condnet.{2 * index}", 512, in_size, 3)
    shapes |= normed("conv_pre", 512, 80, 7) | normed("conv_post", 18, 128, 7)
    for stage, (size, source_kernel, downsampling) in enumerate(((256, 7, 16), (128, 11, 1))):
        shapes |= normed(f"ups.{stage}", 2 * size, size, 16, out_size=size)
        shapes |= weight_and_bias(f"source_downs.{stage}", size, 18, downsampling)
        blocks = {f"resblocks.{3 * stage + index}": kernel for index, kernel in enumerate((3, 7, 11))}
        for block, kernel in (blocks | {f"source_resblocks.{stage}": source_kernel}).items():
            for index in range(3):
                for half in (1, 2):
                    shapes |= normed(f"{block}.convs{half}.{index}", size, size, kernel)
                    shapes |= {f"{block}.activations{half}.{index}.alpha": (size,)}
    return shapes


PUBLISHED_SHAPES = {
    "encoder": published_encoder_shapes(),
    "flow": published_flow_shapes(),
    "vocoder": published_vocoder_shapes(),
}


@pytest.fixture
def published(tmp_path):
    """The tokenizer and decoder folder of the goldens, free to be changed."""
    return write_published_folders(tmp_path / "published")


def change_weights(path, change):
    """Applies `change` to the tensors of a safetensors or PyTorch file."""
    is_safetensors = path.suffix == ".safetensors"
    weights = change(load_file(path) if is_safetensors else torch.load(path, weights_only=True))
    if is_safetensors:
        save_file(weights, path)
    else:
        torch.save(weights, path)


def assert_same_weights(model, other):
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)


def test_every_published_name_of_the_goldens_has_its_tensor():
    """Names and shapes, both ways; weight norm and running means are the only other tensors in the files."""
    model = golden_model()
    names, state = published_names(model), model.state_dict()
    files = {
        "encoder": GOLDENS / "tokenizer/model.safetensors",
        "flow": GOLDENS / "flow/flow.safetensors",
        "vocoder": GOLDENS / "hift/hift.safetensors",
    }
    for part, file in files.items():
        shapes = {
            name.replace("weight_v", "weight"): tensor.shape
            for name, tensor in load_file(file).items()
            if not name.startswith("ema_") and not name.endswith("weight_g")
        }
        assert {published: state[own].shape for own, published in names[part].items()} == shapes


def test_the_published_size_has_the_published_names_and_shapes():
    """Every tensor of the three published files, written out from what is known of them, and their numbers."""
    with torch.device("meta"):
        model = Glm4VoiceModel(Glm4VoiceConfig())
        published = {
            part: {name: torch.empty(shape) for name, shape in shapes.items()}
            for part, shapes in PUBLISHED_SHAPES.items()
        }
    state = model.state_dict()
    published_vocoder = published["vocoder"]
    published["vocoder"] = fold_weight_norm(published_vocoder)
    for part, names in published_names(model).items():
        found = {name: state[own_name].shape for own_name, name in names.items()}
        assert found == {name: tensor.shape for name, tensor in published[part].items()}, part

    def millions(tensors):
        return sum(tensor.numel() for tensor in tensors.values()) / 1e6

    assert len(published["flow"]) == 1185
    assert round(millions(published["encoder"]), 1) == 343.6
    assert round(millions(published["flow"]), 2) == 111.17
    assert round(millions(published_vocoder), 2) == 20.46


def test_a_tokenizer_with_prefixes_converts_to_the_same(published, tmp_path):
    """The prefix selects: later layers, the final norm and the rest of the Whisper model are left out."""

    def add_prefix(weights):
        weights = {f"model.encoder.{name}": tensor for name, tensor in weights.items()}
        layer = {name: tensor.clone() for name, tensor in weights.items() if "layers.1." in name}
        weights |= {name.replace("layers.1.", "layers.2."): tensor for name, tensor in layer.items()}
        weights |= {"model.encoder.layer_norm.weight": torch.ones(32), "model.decoder.embed.weight": torch.ones(3)}
        return weights

    change_weights(published[0] / "model.safetensors", add_prefix)
    assert_same_weights(convert(*published, tmp_path / "out"), golden_model())


def test_the_other_spelling_of_weight_norm_converts_to_the_same(published, tmp_path):
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}

    def respell(weights):
        return {
            name.removesuffix(name.split(".")[-1]) + new.get(name.split(".")[-1], name.split(".")[-1]): tensor
            for name, tensor in weights.items()
        }

    change_weights(published[1] / "hift.pt", respell)
    assert_same_weights(convert(*published, tmp_path / "out"), golden_model())


def test_weight_norm_is_folded_as_pytorch_applies_it(published):
    weights = load_file(GOLDENS / "hift/hift.safetensors")
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(32, 16, 16))
    conv.parametrizations.weight.original0.data = weights["ups.0.weight_g"]
    conv.parametrizations.weight.original1.data = weights["ups.0.weight_v"]
    torch.testing.assert_close(golden_model().vocoder.upsamples[0].weight, conv.weight)


def test_missing_unexpected_and_misshapen_tensors_are_named(published, tmp_path):
    def spoil(weights):
        weights["layers.0.fc3.weight"] = weights.pop("layers.0.fc1.weight")
        return weights

    def spoil_norm(weights):
        weights.pop("conv_pre.weight_g")
        return weights

    change_weights(published[0] / "model.safetensors", spoil)
    change_weights(published[1] / "flow.pt", lambda weights: {**weights, "encoder_proj.bias": torch.zeros(7)})
    change_weights(published[1] / "hift.pt", spoil_norm)
    with pytest.raises(ValueError) as error:
        convert(*published, tmp_path / "out")
    for message in (
        "encoder: layers.0.fc1.weight is missing",
        "encoder: layers.0.fc3.weight is unexpected",
        r"flow: encoder_proj.bias has shape (7,), expected (80,)",
        "vocoder: conv_pre.weight is missing",
        "vocoder: conv_pre.weight_v is unexpected",
    ):
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_with_anything_but_tensors_are_not_loaded(published, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"weight": Payload()}, published[1] / "flow.pt")
    with pytest.raises(ValueError, match="flow.pt holds more than tensors, or is damaged; it is not read"):
        convert(*published, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    torch.save({"state": {"weight": torch.ones(1)}}, published[1] / "flow.pt")
    with pytest.raises(ValueError, match="flow.pt does not hold tensors by name"):
        convert(*published, tmp_path / "out")


def test_configurations_are_read_without_constructing_anything(published, tmp_path):
    path = published[1] / "config.yaml"
    path.write_text(
        "seed: !apply:random.seed [1986]\nwidth: 80\nflow: !new:some.Flow\n  size: !ref <width>\n"
        "  params: !new:some.DictConfig\n    content:\n      solver: euler\n  sizes: [!ref <width>, 2]\n"
    )
    assert read_decoder_config(path) == {
        "seed": [1986],
        "width": 80,
        "flow": {"size": 80, "params": {"solver": "euler"}, "sizes": [80, 2]},
    }
    path.write_text(f"flow: !!python/object/apply:os.mkdir ['{tmp_path / 'pwned'}']\n")
    with pytest.raises(yaml.YAMLError):
        read_decoder_config(path)
    assert not (tmp_path / "pwned").exists()


def test_settings_that_are_not_implemented_are_refused(published, tmp_path):
    config = json.loads((published[0] / "config.json").read_text())
    for name, value in (("pooling_type", "max"), ("pooling_position", 1), ("encoder_causal_attention", True)):
        (published[0] / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=rf"config.json: `{name}` is {value!r}; only .* is implemented"):
            convert(*published, tmp_path / "out")
    (published[0] / "config.json").write_text(json.dumps(config))
    path = published[1] / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("use_cnn_module: false", "use_cnn_module: true"))
    with pytest.raises(ValueError, match="config.yaml, flow: `encoder.use_cnn_module` is True; only False"):
        convert(*published, tmp_path / "out")
    path.write_text(text.replace("num_mid_blocks", "mid_blocks"))
    with pytest.raises(ValueError, match="config.yaml, flow: there is no `decoder.estimator.num_mid_blocks`"):
        convert(*published, tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer/config.json", "tokenizer/model.safetensors", "decoder/hift.pt"])
def test_missing_files_are_named(published, tmp_path, name):
    (published[0].parent / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.split("/")[1]):
        convert(*published, tmp_path / "out")


def test_settings_are_taken_over(published, tmp_path):
    config = golden_model().config
    assert (config.encoder_config.encoder_layers, config.encoder_config.attention_block_size) == (2, 20)
    assert (config.codebook_size, config.flow_config.codebook_size) == (64, 96)
    assert config.flow_config.unet_channels == [24, 24] and config.flow_config.attention_block_size == 10
    assert (config.vocoder_config.num_harmonics, config.vocoder_config.hop_length) == (5, 256)
    features = json.loads((published[0] / "preprocessor_config.json").read_text())
    (published[0] / "preprocessor_config.json").write_text(json.dumps({**features, "feature_size": 80}))
    with pytest.raises(ValueError, match="`feature_size` is 80; only 128"):
        convert(*published, tmp_path / "out")
    (published[0] / "preprocessor_config.json").unlink()
    assert convert(*published, tmp_path / "out").config.encoder_config.n_fft == 400


def test_command_writes_weights_and_code(published, tmp_path, monkeypatch, capsys):
    tokenizer, decoder = map(str, published)
    arguments = ["--tokenizer", tokenizer, "--decoder", decoder, "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["convert_glm4_voice_to_hf", *arguments])
    main()
    assert str(tmp_path / "out") in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_glm4_voice.Glm4VoiceConfig",
        "AutoModelForAudioTokenization": "modeling_glm4_voice.Glm4VoiceModel",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "configuration_glm4_voice.py",
        "encoder_glm4_voice.py",
        "flow_glm4_voice.py",
        "modeling_glm4_voice.py",
        "vocoder_glm4_voice.py",
    }


def test_a_mistake_of_the_command_ends_in_one_line(tmp_path, monkeypatch):
    options = ["--tokenizer", str(tmp_path / "nowhere"), "--decoder", str(tmp_path), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["convert_glm4_voice_to_hf.py", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert str(stop.value.code).startswith("convert_glm4_voice_to_hf.py: error: ")
    assert len(stop.value.code.splitlines()) == 1
