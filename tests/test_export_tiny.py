"""The script that writes ttt-tiny's Hub folder: half precision on disk, code linked or copied, a card that stays."""

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
    (folder / "old_code.py").write_text("")

    def run(*options):
        command = f"--model {tmp_path / 'model'} --audio_tokenizer {tmp_path / 'codec'} --output_dir {folder}"
        monkeypatch.setattr(sys, "argv", ["export_tiny.py", *command.split(), *options])
        export_tiny.main()
        return folder

    return run


@pytest.mark.parametrize("options", [[], ["--copy_code"]])
def test_the_folder_is_whole_small_and_talks(export, options):
    folder = export("--block_size", "4", "--steps", "2", *options)
    assert (folder / "README.md").read_text() == "# A card\n" and not (folder / "old_code.py").exists()
    code = list(folder.rglob("*.py"))
    assert {"pipeline_ttt.py", "modeling_ttt.py", "processing_ttt.py"} <= {path.name for path in code}
    assert all(path.is_symlink() == (options == []) and path.stat().st_size for path in code)
    for part in (folder, folder / "audio_tokenizer"):
        weights = load_file(part / "model.safetensors")
        assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}
    pipe = pipeline("audio-to-audio", model=str(folder), trust_remote_code=True, device="cpu")
    assert pipe.model.dtype == torch.float32
    exported = pipe.processor.audio_tokenizer.vocoder
    assert torch.allclose(next(exported.parameters()), 2 * next(build_codec().vocoder.parameters()), atol=1e-2)
    settings = pipe.model.generation_config
    assert (settings.audio_block_size, settings.audio_steps_per_block) == (4, 2)
    assert pipe(tone(0.4), generate_kwargs={"max_new_tokens": 30})["text"].startswith("hi")
