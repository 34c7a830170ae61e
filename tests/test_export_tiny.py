"""The script that writes ttt-tiny's Hub folder: half precision on disk, code linked or copied, a card that stays."""

import json
import sys

import pytest
import torch
from builders import build_codec, build_model, build_processor, tone
from safetensors.torch import load_file
from transformers import pipeline

from training_examples.ttt_tiny import export_tiny


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Exports a model with its processor and another audio tokenizer; returns the folder."""
    processor = build_processor()
    build_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    codec = build_codec()
    with torch.no_grad():
        next(codec.vocoder.parameters()).mul_(2)
    codec.save_pretrained(tmp_path / "codec")
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "README.md").write_text("# A card\n")
    (folder / "modeling_ttt.py").write_text("")
    for own in (folder / "own.py", folder / "samples" / "processing_ttt.py"):
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")

    def run(*options):
        command = f"--model {tmp_path / 'model'} --audio_tokenizer {tmp_path / 'codec'} --output_dir {folder}"
        monkeypatch.setattr(sys, "argv", ["export_tiny.py", *command.split(), *options])
        export_tiny.main()
        return folder

    return run


@pytest.mark.parametrize("options", [[], ["--copy_code"]])
def test_the_folder_is_whole_small_and_talks(export, options):
    chosen = {"audio_block_size": 4, "audio_steps_per_block": 2, "audio_order_bias": 0.05}
    chosen |= {"audio_confidence_threshold": 0.9, "max_audio_codes_per_span": None}
    folder = export("--generation", *(f"{name}={json.dumps(value)}" for name, value in chosen.items()), *options)
    assert (folder / "README.md").read_text() == "# A card\n"
    own = [folder / "own.py", folder / "samples" / "processing_ttt.py"]
    assert [path.read_text() for path in own] == ["mine", "mine"]
    code = [path for path in folder.rglob("*.py") if path not in own]
    assert {"pipeline_ttt.py", "modeling_ttt.py", "processing_ttt.py"} <= {path.name for path in code}
    assert all(path.is_symlink() == (options == []) and path.stat().st_size for path in code)
    for part in (folder, folder / "audio_tokenizer"):
        weights = load_file(part / "model.safetensors")
        assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    assert not {"is_local", "local_files_only"} & set(json.loads((folder / "tokenizer_config.json").read_text()))
    pipe = pipeline("audio-to-audio", model=str(folder), trust_remote_code=True, device="cpu")
    assert pipe.model.dtype == torch.float32
    exported = pipe.processor.audio_tokenizer.vocoder
    assert torch.allclose(next(exported.parameters()), 2 * next(build_codec().vocoder.parameters()), atol=1e-2)
    settings = pipe.model.generation_config
    assert {name: getattr(settings, name) for name in chosen} == chosen
    assert pipe(tone(0.4), generate_kwargs={"max_new_tokens": 30})["text"].startswith("hi")


def test_the_code_itself_is_never_replaced():
    folder = export_tiny.ROOT / "modeling_ttt"
    with pytest.raises(ValueError, match="modeling_ttt holds the code itself"):
        export_tiny.code_files(folder)
    assert export_tiny.code_files(export_tiny.ROOT) == {}


def test_without_a_word_the_folder_keeps_the_checkpoints_settings(export, capsys):
    folder = export()
    written = json.loads((folder / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if "audio" in name} == {"max_audio_codes_per_span": 40}
    assert "it answers with max_audio_codes_per_span 40" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_the_mean_of_two_trainings_is_exported(export, tied, tmp_path):
    processor = build_processor()
    models = [build_model(processor, tie_word_embeddings=tied) for _ in range(2)]
    with torch.no_grad():
        for number, model in enumerate(models):
            for parameter in model.parameters():
                parameter.fill_(number * 3.0)
    models[0].save_pretrained(tmp_path / "model")
    models[1].save_pretrained(tmp_path / "other")
    folder = export("--average_with", str(tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in str(list(weights))) != tied
    assert all((value == 1.5).all() for value in weights.values())
    build_model(processor, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="--average_with.*weight .* is .* in --model and .* there"):
        export("--average_with", str(tmp_path / "small"))


def test_the_mean_of_several_decoders_of_one_encoder_is_exported(export, tmp_path):
    folders = [tmp_path / f"codec-{number}" for number in range(3)]
    for number, folder in enumerate(folders):
        codec = build_codec()
        with torch.no_grad():
            for part in (codec.decoder, codec.vocoder):
                for parameter in part.parameters():
                    parameter.fill_(number**2)
        codec.save_pretrained(folder)
    weights = load_file(export("--audio_tokenizer", *map(str, folders)) / "audio_tokenizer" / "model.safetensors")
    expected = build_codec().encoder.state_dict()
    for name, value in weights.items():
        if name.startswith("encoder."):
            assert torch.equal(value, expected[name.removeprefix("encoder.")].half()), name
        elif name.startswith(("decoder.", "vocoder.")):
            assert torch.allclose(value.float(), torch.tensor(5 / 3), atol=1e-3), name
    with torch.no_grad():
        next(codec.encoder.parameters()).add_(1)
    codec.save_pretrained(folders[2])
    with pytest.raises(ValueError, match="codec-2 makes other codes than .*codec-0: their encoders' weights differ"):
        export("--audio_tokenizer", *map(str, folders))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("audio_steps_block=4", "audio_steps_block: .*did you mean `audio_steps_per_block`"),
        ("audio_block_size=0", "`audio_block_size` is 0"),
        ("audio_confidence_threshold=2", "`audio_confidence_threshold` is 2"),
        ("audio_block_size", "NAME=VALUE"),
    ],
)
def test_a_setting_that_is_none_is_refused_before_anything_is_written(export, option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export("--generation", option)
    assert not (tmp_path / "card" / "config.json").exists()
