"""The conversion of GLM-4-Voice's published files: both spellings of everything, and errors that name the tensor."""

import json
import sys

import pytest
import torch
import yaml
from glm4_voice_goldens import GOLDENS, golden_model, write_published_folders
from safetensors.torch import load_file, save_file

from modeling_ttt.glm4_voice import Glm4VoiceConfig, Glm4VoiceModel
from modeling_ttt.glm4_voice.convert_glm4_voice_to_hf import convert, main, published_names, read_decoder_config

# A few of the published shapes, as far as they are known, in the published names.
PUBLISHED_SHAPES = {
    "encoder": {
        "conv1.weight": (1280, 128, 3),
        "conv2.weight": (1280, 1280, 3),
        "embed_positions.weight": (1500, 1280),
        "layers.15.self_attn.k_proj.weight": (1280, 1280),
        "layers.15.self_attn.q_proj.bias": (1280,),
        "layers.0.self_attn_layer_norm.weight": (1280,),
        "layers.0.fc1.weight": (5120, 1280),
        "layers.0.fc2.weight": (1280, 5120),
        "layers.0.final_layer_norm.bias": (1280,),
        "codebook.weight": (16384, 1280),
        "embed_positions2.weight": (375, 1280),
    },
    "flow": {
        "input_embedding.weight": (16384, 512),
        "spk_embed_affine_layer.weight": (80, 192),
        "encoder.embed.out.0.weight": (512, 512),
        "encoder.embed.out.1.weight": (512,),
        "encoder.encoders.5.self_attn.linear_pos.weight": (512, 512),
        "encoder.encoders.5.self_attn.linear_out.bias": (512,),
        "encoder.encoders.0.self_attn.pos_bias_u": (8, 64),
        "encoder.encoders.0.feed_forward.w_1.weight": (2048, 512),
        "encoder.encoders.0.norm_mha.weight": (512,),
        "encoder.after_norm.weight": (512,),
        "encoder_proj.weight": (80, 512),
        "length_regulator.model.9.weight": (80, 80, 3),
        "length_regulator.model.10.weight": (80,),
        "length_regulator.model.12.weight": (80, 80, 1),
        "decoder.estimator.time_mlp.linear_1.weight": (1024, 320),
        "decoder.estimator.down_blocks.0.0.mlp.1.weight": (256, 1024),
        "decoder.estimator.down_blocks.0.0.block1.block.0.weight": (256, 320, 3),
        "decoder.estimator.down_blocks.0.2.conv.weight": (256, 256, 3),
        "decoder.estimator.down_blocks.1.2.weight": (256, 256, 3),
        "decoder.estimator.mid_blocks.11.1.3.attn1.to_q.weight": (512, 256),
        "decoder.estimator.mid_blocks.11.1.3.attn1.to_out.0.weight": (256, 512),
        "decoder.estimator.mid_blocks.0.1.0.ff.net.0.proj.weight": (1024, 256),
        "decoder.estimator.mid_blocks.0.1.0.ff.net.2.bias": (256,),
        "decoder.estimator.up_blocks.0.0.res_conv.weight": (256, 512, 1),
        "decoder.estimator.up_blocks.0.2.conv.weight": (256, 256, 4),
        "decoder.estimator.up_blocks.1.2.weight": (256, 256, 3),
        "decoder.estimator.final_block.block.0.weight": (256, 256, 3),
        "decoder.estimator.final_proj.weight": (80, 256, 1),
    },
    "vocoder": {
        "f0_predictor.condnet.8.weight": (512, 512, 3),
        "f0_predictor.classifier.weight": (1, 512),
        "m_source.l_linear.weight": (1, 9),
        "conv_pre.weight": (512, 80, 7),
        "ups.0.weight": (512, 256, 16),
        "ups.1.weight": (256, 128, 16),
        "source_downs.0.weight": (256, 18, 16),
        "source_downs.1.weight": (128, 18, 1),
        "source_resblocks.1.convs2.2.weight": (128, 128, 11),
        "resblocks.5.convs1.2.weight": (128, 128, 11),
        "resblocks.0.activations1.0.alpha": (256,),
        "conv_post.weight": (18, 128, 7),
    },
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
    with torch.device("meta"):
        model = Glm4VoiceModel(Glm4VoiceConfig())
    state = model.state_dict()
    shapes = {
        part: {published: tuple(state[own].shape) for own, published in names.items()}
        for part, names in published_names(model).items()
    }
    for part, expected in PUBLISHED_SHAPES.items():
        assert {name: shapes[part].get(name) for name in expected} == expected
    assert "layers.0.self_attn.k_proj.bias" not in shapes["encoder"]
    assert "layers.16.fc1.weight" not in shapes["encoder"]
    assert "encoder.encoders.0.self_attn.linear_pos.bias" not in shapes["flow"]

    def count(part):
        return sum(torch.Size(shape).numel() for shape in shapes[part].values())

    # Of the vocoder, the published number counts one magnitude for every row of a weight with weight norm.
    plain = ("alpha", "bias", "source_downs.0.weight", "source_downs.1.weight", "l_linear.weight", "classifier.weight")
    magnitudes = sum(shape[0] for name, shape in shapes["vocoder"].items() if not name.endswith(plain))
    assert len(shapes["flow"]) == 1185
    assert round(count("encoder") / 1e6, 1) == 343.6
    assert round(count("flow") / 1e6, 2) == 111.17
    assert round((count("vocoder") + magnitudes) / 1e6, 2) == 20.46


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
    with pytest.raises(Exception, match="[Ww]eights"):
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
        "streaming_glm4_voice.py",
        "vocoder_glm4_voice.py",
    }
