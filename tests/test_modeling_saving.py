"""Saving, loading, sharing and placing the model, with and without this package installed."""

import json
import logging
import shutil

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from builders import run_without_packages
from conftest import make_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from modeling_ttt import TttForConditionalGeneration, TttModel

IDS = torch.tensor([[1, 2, 100, 120, 121, 122, 176, 3]])


@torch.no_grad()
def logits_of(model):
    return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_saved_models_load_the_same(tied, max_shard_size, tmp_path):
    model = make_model({"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    loaded, report = TttForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


def test_a_class_of_a_notebook_is_saved_as_the_one_it_extends(tmp_path, caplog):
    class Mine(TttForConditionalGeneration):
        pass

    Mine.__module__ = "__main__"
    model = Mine(make_model().config)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, "transformers"):
            model.save_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert type(model) is Mine
    assert any("Mine is defined in a script or notebook" in record.getMessage() for record in caplog.records)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_ttt.TttForConditionalGeneration"
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_importing_the_package_registers_the_auto_classes(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
        assert type(auto_class.from_pretrained(tmp_path)) is TttForConditionalGeneration
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))) is TttForConditionalGeneration


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "device_map"])
def test_a_model_whose_weights_are_all_elsewhere_scores_and_answers(place, tied, tmp_path):
    model = make_model({"tie_word_embeddings": tied})
    options = {"max_new_tokens": 12, "audio_block_size": 4, "audio_guidance_scale": 0.5}
    expected, loss = model.generate(IDS, **options), model(IDS, labels=IDS).loss
    model.save_pretrained(tmp_path / "model")
    if place == "device_map":
        model = TttForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "weights"
        )
    elif place == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta" and model.device.type == "cpu"
    assert torch.equal(model.generate(IDS, **options), expected)
    torch.testing.assert_close(model(IDS, labels=IDS).loss, loss)


def test_the_backbone_alone_loads_from_a_full_checkpoint(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    backbone = TttModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden_states = backbone(IDS).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden_states), logits_of(model))


def test_the_backbone_alone_is_saved_with_its_code(tmp_path):
    whole = make_model()
    whole.save_pretrained(tmp_path / "whole")
    TttModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "backbone")
    named = json.loads((tmp_path / "backbone/config.json").read_text())["auto_map"]
    assert named["AutoModel"] == "modeling_ttt.TttModel"
    for reference in named.values():
        assert (tmp_path / "backbone" / f"{reference.split('.')[0]}.py").exists()
    whole.model.save_pretrained(tmp_path / "part")
    whole.save_pretrained(tmp_path / "again", True)  # `is_main_process`, by its place
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = TttForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(logits_of(loaded).cpu(), logits_of(model), atol=1e-4, rtol=0)
    assert "Qwen2DecoderLayer" in loaded._no_split_modules


def test_dtype_is_kept_and_can_be_asked_for(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert TttForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert TttForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_push_to_hub_uploads_a_folder_that_loads(tmp_path, monkeypatch):
    """The network calls are replaced by a local folder; everything else is what a real push does."""
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# tiny"))
    pushed = tmp_path / "hub"
    monkeypatch.setattr(
        TttForConditionalGeneration,
        "_upload_modified_files",
        lambda self, folder, repo_id, **kwargs: shutil.copytree(folder, pushed / repo_id),
    )
    model = make_model()
    model.push_to_hub("someone/tiny")
    auto_map = json.loads((pushed / "someone/tiny/config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_ttt.TttConfig",
        "AutoModel": "modeling_ttt.TttForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_ttt.TttForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_ttt.TttForConditionalGeneration",
    }
    assert torch.equal(logits_of(AutoModel.from_pretrained(pushed / "someone/tiny")), logits_of(model))


REMOTE = """
import json, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
classes = (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM)
models = [c.from_pretrained(folder, trust_remote_code=True) for c in classes]
assert "modeling_ttt" not in sys.modules, "the installed package was used"
assert {type(model).__name__ for model in models} == {"TttForConditionalGeneration"}
torch.save(models[0](ids).logits, folder + "/logits.pt")
models[0].save_pretrained(folder + "/again")
"""


def test_the_folder_alone_is_enough_without_this_package(tmp_path):
    model = make_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    run_without_packages(REMOTE, folder, IDS.tolist(), cwd=tmp_path)
    assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), logits_of(model))
    saved_again = json.loads((folder / "again/config.json").read_text())
    assert saved_again["auto_map"]["AutoModelForCausalLM"] == "modeling_ttt.TttForConditionalGeneration"
    assert {path.name for path in (folder / "again").glob("*.py")} == {path.name for path in folder.glob("*.py")}
