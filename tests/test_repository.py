"""Promises of the repository itself: README, pinned versions, direction of imports, the layout of model folders."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from serving import serve

from pipelines import ttt_talk
from processing.tasks_ttt import CHAT_TEMPLATE
from training_examples.evaluation.recognisers import word_error_rate
from training_examples.ttt_tiny.judge import domain_recognizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
FOLDERS = ("pipelines", "training_examples", "tests")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *CARDS,
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.md"))),
]
TALK = "pip install -c constraints.txt -e . && ttt-talk tests/fixtures/question.wav reply.wav"
TEST = 'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile'
OWN_ENVIRONMENT = ("lmms",)  # extras that hold packages below the versions pinned here
PACKAGES = ["modeling_ttt", "processing", "pipelines"]  # each may import those before it
# Everything else may travel with a model's weights, but for SERVING.
LOCAL_CODE = ("__init__", "convert_", "ttt_talk", "ttt_live", "ttt_serve")
SERVING = ROOT / "pipelines" / "serving"
MODEL_FOLDERS = [path.parent for path in sorted((ROOT / "model_cards").glob("*/config.json"))]
TINY = ROOT / "model_cards" / "ttt-tiny"
needs_tiny = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="the default model is not there")
QUESTION = ROOT / "tests" / "fixtures" / "question.wav"  # "how much is seven plus eight"
ANSWER = "seven plus eight is fifteen"
SERVED = "http://127.0.0.1:8000"  # where ttt-serve answers


def test_readme_gives_the_two_commands_and_ci_takes_them_from_there():
    lines = README.splitlines()
    assert TALK in lines and TEST in lines
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script and os.access(ROOT / ".ci" / "run", os.X_OK)


def prose(path: Path) -> str:
    """Return the text of a page without its code."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Return what a page's headings are linked by, as GitHub and the Hub name them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_readme_lists_what_can_be_imported(name):
    package = importlib.import_module(name)
    table = README[README.index("| from | names | for |") :]
    rows = [row.split(" | ") for row in table[: table.index("\n\n")].splitlines()[2:]]
    folder, listed = "", {}
    for row in rows:
        folder = row[0].strip("| `") or folder
        listed.setdefault(folder, []).extend(re.findall(r"`(\w+)`", row[1]))
    assert sorted(listed[name]) == sorted(package.__all__)
    assert all(getattr(package, public).__doc__ for public in package.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_of_a_page_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not target.startswith("http")]
    for target in targets:
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", CARDS, ids=lambda page: page.parent.name)
def test_a_card_links_to_nothing_outside_its_folder(page):
    """On the Hub nothing else is there."""
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not target.startswith("http")]
    assert [target for target in targets if target.startswith(("..", "/"))] == []


def test_constraints_pin_every_direct_dependency_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version and "+" not in version, f"{line!r} does not pin a public version"
            pins[canonicalize_name(name)] = version
    extras = project["optional-dependencies"]
    assert {"serve", "train", "test"} <= set(extras)
    for name, text in [("", text) for text in project["dependencies"]] + [
        (name, text) for name, extra in extras.items() for text in extra
    ]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            continue
        assert requirement.specifier, f"{text!r} has no range"
        if name in OWN_ENVIRONMENT:
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(level, module) of each import in a file; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    later = PACKAGES[PACKAGES.index(package) + 1 :] + ["training_examples", "tests"]
    wrong = [
        (path.name, module)
        for path in (ROOT / package).rglob("*.py")
        for level, module in imports_of(path)
        if level == 0 and module.split(".")[0] in later
    ]
    assert wrong == []


def test_no_script_is_a_library_and_nothing_imports_how_ttt_tiny_was_made():
    folder = ROOT / "training_examples"
    scripts = {path for path in folder.rglob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in scripts}
    assert "training_examples.train_ttt" in names and "training_examples.ttt_tiny.build_speech" in names
    wrong = []
    for path in folder.rglob("*.py"):
        is_tiny = "ttt_tiny" in path.relative_to(folder).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                modules = {module, *(f"{module}.{name.name}" for name in node.names)}
                of_tiny = module.startswith(".") or (module.startswith("training_examples.ttt_tiny") and not is_tiny)
                if of_tiny or modules & names:
                    wrong.append((path.name, module))
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_remote_code_imports_only_flat_siblings_and_public_packages(package):
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        if path.name.startswith(LOCAL_CODE) or SERVING in path.parents:
            continue
        for level, module in imports_of(path):
            is_sibling = level == 1 and "." not in module and (path.parent / f"{module}.py").exists()
            if not (is_sibling or (level == 0 and module.split(".")[0] not in PACKAGES)):
                wrong.append((path.name, level, module))
    assert wrong == []


@pytest.mark.parametrize("folder", MODEL_FOLDERS, ids=lambda folder: folder.name)
def test_code_in_a_model_folder_is_the_packages_own(folder):
    sources = {path.name: path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    drifted = [path.name for path in folder.rglob("*.py") if path.read_bytes() != sources[path.name].read_bytes()]
    assert drifted == []
    imported = {f"{module}.py" for path in folder.glob("*.py") for level, module in imports_of(path) if level == 1}
    assert [name for name in sorted(imported) if not (folder / name).exists()] == []


@pytest.mark.parametrize("folder", MODEL_FOLDERS, ids=lambda folder: folder.name)
def test_the_chat_template_in_a_model_folder_is_the_packages_own(folder):
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


@needs_tiny
def test_the_default_model_stays_small():
    size = sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file())
    assert size <= 60_000_000  # what a model may weigh here


@needs_tiny
def test_the_readmes_tour_runs_as_written(tmp_path, monkeypatch):
    for name in ("model_cards", "tests"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 5
    namespace: dict = {}
    local = [snippet for snippet in snippets if SERVED not in snippet]
    for snippet in local:
        exec(compile(snippet, "README.md", "exec"), namespace)
    with serve(namespace["model"], namespace["processor"]) as server:  # as ttt-serve does, on a free port
        for snippet in snippets:
            if SERVED in snippet:
                exec(compile(snippet.replace(SERVED, server.url), "README.md", "exec"), namespace)
    assert len(local) < len(snippets) and len(soundfile.read("answer.wav")[0]) > 8000
    assert namespace["answer"]["text"].strip() and len(namespace["spoken"]["audio"]) > 8000
    assert len(namespace["messages"]) == 4 and sum(map(len, namespace["chunks"])) > 8000


def test_the_question_is_a_short_recording():
    info = soundfile.info(QUESTION)
    assert info.samplerate >= 16_000 and info.channels == 1 and 1 <= info.duration <= 4
    samples, _ = soundfile.read(QUESTION)
    assert np.sqrt(np.mean(samples**2)) > 0.01 and np.abs(samples).max() <= 1


@needs_tiny
def test_the_first_command_answers_the_question_in_text_and_in_speech(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ttt_talk.main([str(QUESTION), "reply.wav", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == ANSWER
    reply, rate = soundfile.read(tmp_path / "reply.wav", dtype="float32")
    with domain_recognizer(num_workers=1) as recognizer:
        (heard,) = recognizer.transcribe([reply], rate)
    assert word_error_rate([ANSWER], [heard]) <= 0.34, heard


def test_nothing_large_is_tracked_outside_model_folders():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    large = [str(p) for p in paths if p.exists() and p.stat().st_size > 2 * 2**20 and "model_cards" not in p.parts]
    assert large == []
