"""lmms-eval, in an environment of its own, finds the plugin by its entry point and runs an audio task with it."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from builders import build_model, build_processor
from datasets import Dataset
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
RECORDINGS = sorted((Path(__file__).parent / "fixtures" / "recognition").glob("*.flac"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What lmms-eval imports beside what these tests have: all that it asks for would be gigabytes, and other versions.
IMPORTED = (
    *(
        "loguru",
        "sacrebleu",
        "pytablewriter",
        "sqlitedict",
        "tenacity",
        "jsonlines",
        "tabledata",
        "typepy",
        "portalocker",
    ),
    *("dataproperty", "mbstrdecoder", "pathvalidate", "tcolorpy", "tabulate", "colorama", "lxml", "chardet", "pytz"),
    *("portalocker", "python-dotenv", "openpyxl", "et_xmlfile", "nltk", "zss", "numexpr"),
)
TASK = """\
task: stand_in
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.audio
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: 16
  do_sample: false
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
import soundfile


def audio(doc):
    samples, rate = soundfile.read(doc["file"], dtype="float32")
    return [{"array": samples, "sampling_rate": rate}]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def own_environment(folder: Path) -> Path:
    """Python of an environment that has lmms-eval, and sees this one's packages and this project's entry points."""
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    (packages / "outer.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    (extra,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["lmms"] if text.startswith("lmms-eval"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    if subprocess.run([*pip, str(extra), *IMPORTED], capture_output=True).returncode:
        pytest.skip("lmms-eval cannot be installed here")
    # What an installation of this project writes.
    entry_points = packages / "ttt_entry_points-0.dist-info"
    entry_points.mkdir()
    (entry_points / "METADATA").write_text("Metadata-Version: 2.1\nName: ttt-entry-points\nVersion: 0\n")
    lines = [f"{name} = {value}\n" for name, value in PROJECT["entry-points"]["lmms_eval.models"].items()]
    (entry_points / "entry_points.txt").write_text("[lmms_eval.models]\n" + "".join(lines))
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.mark.slow
def test_an_audio_task_of_lmms_eval_runs_the_model(tmp_path):
    python = own_environment(tmp_path / "environment")
    processor = build_processor()
    build_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    answers = ["hi", "no", "hi"]
    rows = [
        {"file": str(path), "question": "what is said?", "answer": answer}
        for path, answer in zip(RECORDINGS, answers, strict=True)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    (tmp_path / "tasks" / "stand_in.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "tasks" / "utils.py").write_text(UTILS)
    command = [python, "-m", "lmms_eval", "--model", "ttt", "--model_args", f"pretrained={tmp_path / 'model'}"]
    command += ["--tasks", "stand_in", "--include_path", tmp_path / "tasks", "--batch_size", "2"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), "--output_path", str(tmp_path / "out")],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    figures = json.loads(results.read_text())["results"]["stand_in"]
    assert next(value for name, value in figures.items() if name.startswith("right,")) == pytest.approx(2 / 3)


def test_the_entry_point_names_a_function_of_the_plugin():
    (target,) = PROJECT["entry-points"]["lmms_eval.models"].values()
    module, _, name = target.partition(":")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert f"def {name}() -> ModelManifest:" in source
