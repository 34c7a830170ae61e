"""A model that has code saves all of it, whoever saves: the folder talks where this package is not installed, and so
does what is saved there."""

import copy

import pytest
import torch
from builders import build_model, build_processor, run_without_packages, tone
from datasets import Dataset
from transformers import Trainer, TrainingArguments, pipeline

from modeling_ttt import TttForConditionalGeneration
from pipelines import TttAudioToAudioPipeline, save_repository
from processing import TttDataCollator


@pytest.fixture(scope="module")
def parts():
    processor = build_processor()
    return build_model(processor), processor


def save_plainly(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_the_processor_first(model, processor, folder):
    processor.save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="10KB")


def save_by_trainer(model, processor, folder):
    """The folder is its first checkpoint."""
    example = processor.build_example("hi", [3] * 12, text="hello", task="text_chat")
    options = {"max_steps": 1, "save_steps": 1, "learning_rate": 0.0, "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        model=copy.deepcopy(model),
        args=TrainingArguments(output_dir=str(folder.parent / "run"), **options),
        train_dataset=Dataset.from_list([example]),
        data_collator=TttDataCollator(processor.tokenizer),
        processing_class=processor,
    )
    trainer.train()
    (folder.parent / "run" / "checkpoint-1").rename(folder)


def save_merged(model, processor, folder):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    save_plainly(adapted.merge_and_unload(), processor, folder)


def save_what_was_loaded(model, processor, folder):
    save_repository(model, processor, folder.parent / "loaded")
    loaded = TttForConditionalGeneration.from_pretrained(folder.parent / "loaded")
    save_plainly(loaded, processor, folder)


def save_purely_diffused(model, processor, folder):
    """The baseline that writes text and audio alike as one diffused span: codes up to its limit, from this model."""
    model = copy.deepcopy(model)
    model.config.text_objective = "diffusion"
    model.generation_config.max_new_tokens = 30
    save_repository(model, processor, folder)


SAVERS = [save_plainly, save_the_processor_first, save_by_trainer, save_merged, save_what_was_loaded, save_repository]

TALK = """
import os, shutil
import numpy as np
from transformers import AutoModel, AutoProcessor, pipeline

def answer(**parts):
    answer = pipeline("audio-to-audio", device="cpu", **parts)(np.zeros(8000))
    return f"{answer['text']} {len(answer['audio']) // 1280}"

folders = sys.argv[1:]
model = AutoModel.from_pretrained(folders[0], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folders[0], trust_remote_code=True)
print(answer(model=model, processor=processor))
for folder in folders:
    print(answer(model=folder, trust_remote_code=True))
code = sorted(name for name in os.listdir(folders[0]) if name.endswith(".py"))
shutil.rmtree(folders[0])  # what was loaded from it is saved all the same
model.save_pretrained("again")
processor.save_pretrained("again")
assert code == sorted(name for name in os.listdir("again") if name.endswith(".py"))
print(answer(model="again", trust_remote_code=True))
"""


def test_every_folder_talks_alone_and_so_does_what_is_saved_from_it(parts, tmp_path):
    savers = [*SAVERS, save_purely_diffused]
    folders = [tmp_path / save.__name__ for save in savers]
    for save, folder in zip(savers, folders, strict=True):
        save(*parts, folder)
    answers = ["hi 40"] * (1 + len(SAVERS)) + [" 30", "hi 40"]
    assert run_without_packages(TALK, *folders, cwd=tmp_path) == answers


CODE_OF = """
from transformers import AutoModel, pipeline

for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    pipe = pipeline("audio-to-audio", model=folder, trust_remote_code=True, device="cpu")
    for part in (model, pipe, pipe.model, pipe.processor, pipe.processor.audio_tokenizer):
        print(getattr(sys.modules[type(part).__module__], "CODE_OF", None))
"""


def test_folders_in_one_process_run_their_own_code_each(parts, tmp_path):
    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        save_repository(*parts, folder)
        for path in folder.glob("*.py"):
            path.write_text(f"{path.read_text()}\nCODE_OF = {folder.name!r}\n")
    assert run_without_packages(CODE_OF, *folders, cwd=tmp_path) == ["old"] * 5 + ["new"] * 5


def test_a_pipeline_that_is_not_there_is_not_named(parts, tmp_path, caplog):
    model = copy.deepcopy(parts[0])
    theirs = {"text-to-speech": {"impl": "their_pipeline.Theirs", "pt": ["AutoModel"], "type": "multimodal"}}
    elsewhere = {"asr": {"impl": "owner/repository--pipeline_other.Other", "pt": ["AutoModel"], "type": "multimodal"}}
    model.config.custom_pipelines = {**theirs, **elsewhere}
    model.save_pretrained(tmp_path)
    ours = {"audio-to-audio": {"impl": "pipeline_ttt.TttAudioToAudioPipeline", "pt": ["AutoModel"]}}
    ours["audio-to-audio"]["type"] = "multimodal"
    assert model.config.custom_pipelines == ours | elsewhere  # one of another task does not replace ours
    assert (tmp_path / "pipeline_ttt.py").exists()
    (tmp_path / "their_pipeline.py").write_text("from .their_tools import x\n")
    (tmp_path / "their_tools.py").write_text("x = 1\n")
    model.config.custom_pipelines = theirs
    model.save_pretrained(tmp_path)
    loaded = TttForConditionalGeneration.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.config.custom_pipelines == ours | theirs
    assert (tmp_path / "again" / "their_tools.py").read_text() == "x = 1\n"


def test_loaded_objects_make_a_pipeline(parts):
    model, processor = parts
    pipe = pipeline("audio-to-audio", model=model, processor=processor, device="cpu")
    assert type(pipe) is TttAudioToAudioPipeline and pipe(tone(0.2))["text"] == "hi"


def test_a_folder_that_could_not_talk_is_refused(parts, tmp_path):
    model, processor = parts
    silent = copy.copy(processor)
    silent.audio_tokenizer = None
    with pytest.raises(ValueError, match="`processor` has no audio tokenizer"):
        save_repository(model, silent, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_card_is_written_once(parts, tmp_path):
    for card in ("first", "second"):
        save_repository(*parts, tmp_path, card=card)
    assert (tmp_path / "README.md").read_text() == "first"
    assert torch.equal(TttForConditionalGeneration.from_pretrained(tmp_path).lm_head.weight, parts[0].lm_head.weight)
