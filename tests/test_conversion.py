"""The conversion of published checkpoints, held against numbers made with the published code."""

import json
import shutil
import sys

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from modeling_ttt import TttConfig, TttForConditionalGeneration
from modeling_ttt.objective_ttt import Noise
from pipelines.convert_ttt_to_hf import ID_NAMES, convert, main, read_token_ids, set_special_tokens
from processing import TttTokenIds
from processing.vocabulary_ttt import added_tokens

GOLDENS = FIXTURES / "ttt_published"


def published_tokenizer(omit=()):
    """A few words, then the published tokens in their order."""
    tokens = [*(f"word{index}" for index in range(7)), "<|endoftext|>"]
    tokens += [token for token in added_tokens(12) if token not in omit]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")))


@pytest.fixture(scope="module", params=["a", "b", "c"])
def golden(request, tmp_path_factory):
    """A converted golden checkpoint, loaded again, and the numbers that belong to it."""
    folder, output = GOLDENS / request.param, tmp_path_factory.mktemp(request.param)
    convert(folder, output, token_ids=folder / "generation.json")
    return AutoModel.from_pretrained(output), load_file(folder / "tensors.safetensors"), folder


def test_mask_is_the_published_one(golden):
    model, tensors, _ = golden
    seen = {}

    def catch(_, args, kwargs):
        seen["mask"] = kwargs["attention_mask"]["full_attention"]

    hook = model.model.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    model(tensors["input_ids"], attention_mask=tensors["attention_mask"])
    hook.remove()
    tokens = tensors["attention_mask"].bool()
    assert torch.equal(seen["mask"][:, 0][tokens], tensors["allowed"][:, 0][tokens])


@torch.no_grad()
def test_logits_are_the_published_ones(golden):
    model, tensors, _ = golden
    tokens, attention_mask = tensors["attention_mask"].bool(), tensors["attention_mask"]
    span_ids = model.model.get_span_ids(tensors["input_ids"], attention_mask)
    clean = model(tensors["input_ids"], attention_mask=attention_mask).logits
    noisy = model(tensors["noisy_input_ids"], attention_mask=attention_mask, span_ids=span_ids).logits
    torch.testing.assert_close(clean[tokens], tensors["logits_clean"][tokens], atol=1e-4, rtol=0)
    torch.testing.assert_close(noisy[tokens], tensors["logits_noisy"][tokens], atol=1e-4, rtol=0)


@torch.no_grad()
def test_losses_of_the_model_are_the_published_ones(golden, monkeypatch):
    """The training forward itself, with the published draw of noise in place of its own."""
    model, tensors, _ = golden
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "labels")}
    text_loss = model(**inputs).text_loss
    torch.testing.assert_close(text_loss, tensors["ar_loss_clean"], atol=1e-5, rtol=0)

    num_maskable, masked = tensors["answer_lengths"][:, 0], tensors["masked_indices"]
    audio = tensors["labels"] >= model.config.audio_token_id_start
    from_the_end = audio.flip(-1).cumsum(-1).flip(-1)  # prefix preservation keeps the last `num_maskable` of a sample
    maskable = audio & (from_the_end <= num_maskable[:, None])
    levels = tensors["p_mask"][:, :1].expand_as(masked)
    monkeypatch.setattr(model.config, "span_truncation_probability", 0.0)
    monkeypatch.setattr(
        "modeling_ttt.modeling_ttt.draw_noise",
        lambda batch, *_: Noise(batch, tensors["noisy_input_ids"], maskable, masked, levels),
    )
    model.train()
    outputs = model(**inputs)
    model.eval()
    torch.testing.assert_close(outputs.text_loss, tensors["ar_loss_noisy"], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.audio_loss, tensors["diffusion_loss"], atol=1e-5, rtol=0)


def test_config_takes_over_the_published_settings(golden):
    model, _, folder = golden
    published = json.loads((folder / "config.json").read_text())
    config = model.config
    assert type(config) is TttConfig and config.text_config.model_type == "qwen2"
    assert config.mask_token_id == published["mask_token"] == 175
    assert (config.clean_batch_probability, config.prefix_preservation_probability) == (0.3, 0.3)
    assert (config.begin_of_audio_token_id, config.end_of_prompt_audio_token_id) == (100, 101)
    assert config.tie_word_embeddings == published["tie_word_embeddings"]
    assert not hasattr(config.text_config, "unmasked_audio_prob")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (104, 105)


def test_command_writes_weights_and_code(tmp_path, monkeypatch, capsys):
    folder = GOLDENS / "c"
    command = ["convert_ttt_to_hf", "--checkpoint", str(folder), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--token_ids", str(folder / "generation.json")])
    main()
    assert str(tmp_path) in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_ttt.TttForConditionalGeneration"
    code = {path.name for path in tmp_path.glob("*.py")}
    assert {"configuration_ttt.py", "modeling_ttt.py", "objective_ttt.py", "generation_ttt.py"} <= code
    assert (tmp_path / "model.safetensors").exists()


def test_a_mistake_of_the_command_ends_in_one_line(tmp_path, monkeypatch):
    options = ["--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["convert_ttt_to_hf.py", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert str(stop.value.code).startswith("convert_ttt_to_hf.py: error: ") and "nowhere" in stop.value.code
    assert len(stop.value.code.splitlines()) == 1
    shutil.copy(GOLDENS / "a/config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    options = ["--checkpoint", str(tmp_path), "--token_ids", str(GOLDENS / "a/generation.json")]
    monkeypatch.setattr(sys, "argv", ["convert_ttt_to_hf.py", *options, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^convert_ttt_to_hf.py: error: "):
        main()


def test_shards_are_read(tmp_path):
    source, sharded = GOLDENS / "a", tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(source / "config.json", sharded)
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    files = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    whole = convert(source, tmp_path / "whole", source / "generation.json")
    parts = convert(sharded, tmp_path / "parts", source / "generation.json")
    for (name, tensor), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_bfloat16_stays_bfloat16(tmp_path):
    source = tmp_path / "bf16"
    source.mkdir()
    shutil.copy(GOLDENS / "c/config.json", source)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(GOLDENS / "c/model.safetensors").items()}
    save_file(weights, source / "model.safetensors")
    assert convert(source, tmp_path / "out", GOLDENS / "c/generation.json").dtype == torch.bfloat16


def test_ids_come_from_the_tokenizer_where_there_is_one(tmp_path):
    tokenizer = published_tokenizer()
    checkpoint = tmp_path / "published"
    tokenizer.save_pretrained(checkpoint)
    config = json.loads((GOLDENS / "c/config.json").read_text())
    config |= {"vocab_size": 29, "mask_token": 26, "audio_token_id_start": 13, "pad_token_id": 0, "eos_token_id": 1}
    (checkpoint / "config.json").write_text(json.dumps(config))
    weights = load_file(GOLDENS / "c/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:29].clone()
    save_file(weights, checkpoint / "model.safetensors")

    model = convert(checkpoint, tmp_path / "out")
    assert model.config.mask_token_id == 26
    ids = TttTokenIds.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert ids == TttTokenIds.from_tokenizer(tokenizer)
    assert {name: getattr(model.config, name) for name in ids.config_arguments()} == ids.config_arguments()
    assert model.config.eos_token_id == ids.end_of_turn_token_id
    config["mask_token"] = 27
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`mask_token_id` is 27, the tokens say 26"):
        convert(checkpoint, tmp_path / "contradiction")


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        convert(tmp_path, tmp_path / "out")
    shutil.copy(GOLDENS / "a/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer: name a JSON file of token ids with --token_ids"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        convert(tmp_path, tmp_path / "out", GOLDENS / "a/generation.json")
    with pytest.raises(ValueError, match=r"no token `<\|mask_token\|>`.*--token_ids"):
        set_special_tokens(published_tokenizer(omit=["<|mask_token|>"]))
    names = [name for name in ID_NAMES.values() if name != "num_audio_tokens"]
    (tmp_path / "ids.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    with pytest.raises(ValueError, match="lacks num_audio_tokens"):
        read_token_ids(tmp_path / "ids.json")
    (tmp_path / "ids.json").write_text(json.dumps(dict.fromkeys(ID_NAMES.values(), 3) | {names[-1]: None}))
    with pytest.raises(ValueError, match=f"None under {names[-1]}; it must be an integer"):
        read_token_ids(tmp_path / "ids.json")
    (tmp_path / "ids.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a list; an object of names and ids"):
        read_token_ids(tmp_path / "ids.json")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = load_file(GOLDENS / "a/model.safetensors")
    del weights["model.norm.weight"]
    shutil.copy(GOLDENS / "a/config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.language_model.norm.weight"):
        convert(tmp_path, tmp_path / "out", GOLDENS / "a/generation.json")


def test_the_conversion_returns_the_model_it_saved(tmp_path):
    model = convert(GOLDENS / "b", tmp_path, GOLDENS / "b/generation.json")
    assert isinstance(model, TttForConditionalGeneration) and not model.training
    loaded = TttForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
