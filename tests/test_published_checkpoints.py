"""The published checkpoints, from their files to speech: miniature stand-ins of all of them, with random weights, go
through both conversion commands, and the folder that comes out talks without this package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_codec, build_model, build_tokenizer, run_without_packages
from conftest import FIXTURES
from glm4_voice_goldens import GOLDENS, golden_model, write_published_folders
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, EncodecFeatureExtractor

from modeling_ttt import TttGenerationConfig
from modeling_ttt.glm4_voice import Glm4VoiceModel, convert_glm4_voice_to_hf
from pipelines import convert_ttt_to_hf
from processing import TASKS, TttProcessor

ROOT = Path(__file__).resolve().parent.parent
NUM_CODES = json.loads((GOLDENS / "tokenizer/config.json").read_text())["quantize_vocab_size"]
NUM_SPOKEN = 30


def write_published_checkpoint(folder: Path) -> None:
    """A TtT checkpoint as it is published: Qwen2's config with four keys more, two shards of weights under Qwen2's
    names, and a Qwen2 tokenizer whose own end of text is not what ends a turn.

    The model is `build_model`'s: it answers "hi" and then the code 3 until it is stopped.
    """
    folder.mkdir(parents=True)
    tokenizer = build_tokenizer(NUM_CODES)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {**settings, "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    for name in ("auto_map", "processor_class", "backend"):
        settings.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=16_000)
    model = build_model(TttProcessor(extractor, tokenizer))
    config = model.config
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    published = json.loads((FIXTURES / "ttt_published/a/config.json").read_text())
    published |= {name: value for name, value in config.text_config.to_dict().items() if name in published}
    published |= {
        "architectures": ["Qwen2ForARDiffLM"],
        "model_type": "qwen2",
        "transformers_version": "4.52.4",
        "torch_dtype": "float32",
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "mask_token": config.mask_token_id,
        "audio_token_id_start": config.audio_token_id_start,
        "unmasked_audio_prob": 0.3,
        "prefix_preservation_ratio": 0.3,
    }
    (folder / "config.json").write_text(json.dumps(published))
    generation = {"eos_token_id": end_of_text, "max_new_tokens": 20, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))

    weights = {
        name.replace("model.language_model.", "model."): tensor.clone() for name, tensor in model.state_dict().items()
    }
    names = sorted(weights)
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


TALK = """
import numpy as np
from transformers import pipeline

folder, num_spoken = sys.argv[1], int(sys.argv[2])
pipe = pipeline("audio-to-audio", model=folder, trust_remote_code=True, device="cpu")
question = {"array": np.sin(np.arange(9000) / 9), "sampling_rate": 16000}
options = {"max_audio_codes_per_span": num_spoken}
answer = pipe(question, generate_kwargs=options)
print(answer["text"], answer["sampling_rate"])
np.save("answer.npy", answer["audio"])
pieces = list(pipe(question, stream=True, generate_kwargs=options))
print("".join(piece.get("text", "") for piece in pieces), sum(len(p["audio"]) for p in pieces if "audio" in p))
"""


def commands(folder: Path, output: Path) -> list[tuple]:
    """Both conversions of the stand-ins in a folder, the audio tokenizer's first: module and arguments. They write the
    folders `codec` and `hub` in `output`."""
    codec = ["--tokenizer", folder / "tokenizer", "--decoder", folder / "decoder", "--output", output / "codec"]
    whole = ["--checkpoint", folder / "checkpoint", "--audio_tokenizer", output / "codec", "--output", output / "hub"]
    return [(convert_glm4_voice_to_hf, *map(str, codec)), (convert_ttt_to_hf, *map(str, whole))]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a stand-in of every published file."""
    folder = tmp_path_factory.mktemp("published")
    write_published_folders(folder)
    write_published_checkpoint(folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def hub(published):
    """The repository that both commands make of them."""
    with pytest.MonkeyPatch.context() as patch:
        for module, *arguments in commands(published, published):
            patch.setattr(sys, "argv", [module.__name__, *arguments])
            module.main()
    return published / "hub"


def assert_talks(hub: Path, folder: Path) -> None:
    """The repository speaks 30 codes at 22,050 Hz as its audio tokenizer speaks them; a stream lacks the published
    scheme's one frame."""
    frames = 441 * NUM_SPOKEN // 64
    assert run_without_packages(TALK, hub, NUM_SPOKEN, cwd=folder) == ["hi 22050", f"hi {256 * (frames - 1)}"]
    speech = np.load(folder / "answer.npy", allow_pickle=False)
    expected = golden_model().decode(torch.full((1, NUM_SPOKEN), 3)).audio_values[0, 0].numpy()
    assert len(speech) == 256 * frames and speech.std() > 0
    assert np.allclose(speech, expected, atol=5e-3)


def test_the_converted_files_talk_without_this_package(hub, tmp_path):
    assert_talks(hub, tmp_path)


@pytest.mark.slow
def test_the_commands_as_a_user_runs_them(published, tmp_path):
    for module, *arguments in commands(published, tmp_path):
        command = [sys.executable, "-m", module.__name__, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Converted ") and done.stdout.endswith(f" to {arguments[-1]}\n")
    assert_talks(tmp_path / "hub", tmp_path)


def test_the_repository_holds_all_parts(hub):
    names = {path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.suffix != ".py"}
    assert names - {"special_tokens_map.json", "added_tokens.json"} == {
        "README.md",
        "audio_tokenizer",
        "audio_tokenizer/config.json",
        "audio_tokenizer/model.safetensors",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    code = {path.name for path in hub.glob("*.py")}
    assert {"modeling_ttt.py", "processing_ttt.py", "pipeline_ttt.py", "modeling_glm4_voice.py"} <= code
    config = json.loads((hub / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_ttt.TttForConditionalGeneration"
    assert config["custom_pipelines"]["audio-to-audio"]["impl"] == "pipeline_ttt.TttAudioToAudioPipeline"
    assert (hub / "README.md").read_text() == (ROOT / "model_cards/ttt-3b/README.md").read_text()


def test_the_published_samplers_defaults_are_written(hub):
    settings = AutoModel.from_pretrained(hub).generation_config
    assert isinstance(settings, TttGenerationConfig)
    assert (settings.audio_block_size, settings.audio_steps_per_block) == (26, 2)
    assert settings.max_audio_codes_per_span == 2600
    assert (settings.do_sample, settings.top_k, settings.top_p) == (True, 10, 0.95)
    assert (settings.audio_temperature, settings.audio_remasking) == (0.0, "low_confidence")
    assert settings.audio_guidance_scale == 0.1


def test_a_turn_ends_with_its_own_token_whatever_ends_the_backbones_text(hub):
    model, processor = AutoModel.from_pretrained(hub), AutoProcessor.from_pretrained(hub)
    end_of_turn, end_of_text = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for settings in (model.config, model.config.text_config, model.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id) == (end_of_turn, end_of_text)


def test_the_processor_speaks_as_the_published_weights_expect(hub):
    processor = AutoProcessor.from_pretrained(hub)
    assert type(processor.audio_tokenizer) is Glm4VoiceModel
    assert (processor.text_chunk_size, processor.audio_chunk_size) == (13, 26)
    assert processor.system_prompts == {name: task.system_prompt for name, task in TASKS.items()}
    assert (processor.feature_extractor.sampling_rate, processor.sampling_rate) == (16_000, 22_050)
    tokenizer = AutoTokenizer.from_pretrained(hub)
    assert (tokenizer.mask_token, tokenizer.eos_token) == ("<|mask_token|>", "<|im_end|>")
    messages = [{"role": "user", "content": "hi"}]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected


def test_a_card_that_is_there_is_kept(hub, published, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    convert_ttt_to_hf.convert(published / "checkpoint", tmp_path, audio_tokenizer=published / "codec")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_does_not_belong_together_is_refused_before_weights_are_read(hub, published, tmp_path):
    convert, checkpoint, output = convert_ttt_to_hf.convert, published / "checkpoint", tmp_path / "out"
    with pytest.raises(ValueError, match="leave --token_ids out"):
        convert(checkpoint, output, tmp_path / "ids.json", published / "codec")
    with pytest.raises(FileNotFoundError, match="elsewhere has no config.json: name an audio tokenizer's converted"):
        convert(checkpoint, output, audio_tokenizer=tmp_path / "elsewhere")
    build_codec().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has 16 codes, the checkpoint 64: convert it with the one"):
        convert(checkpoint, output, audio_tokenizer=tmp_path / "other")
    assert not output.exists()
