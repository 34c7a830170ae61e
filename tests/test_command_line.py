"""The command line of the scripts: run files, flags over them, and a help of one screen."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from training_examples.command_line import ScriptParser
from training_examples.finetune_lora import LoraArguments
from training_examples.train_ttt import TrainArguments
from training_examples.training.arguments import TttTrainingArguments

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "training_examples").rglob("*.py")
    if "ScriptParser(" in (text := path.read_text(encoding="utf-8")) and "def main(" in text
    if path.name != "command_line.py"
) + [Path("training_examples/train_ttt.py"), Path("training_examples/finetune_lora.py")]

READ_FIRST = ["init_from_llm", "prepare_dataset"]


@dataclass
class Options:
    folder: Path = field(metadata={"help": "Where it is. More than that is said in the long help."})
    rate: float = field(default=0.5, metadata={"help": "How fast."})
    names: list[str] = field(default_factory=list, metadata={"help": "Who."})
    loud: bool = field(default=False, metadata={"help": "Whether to shout."})
    settings: str | None = field(default=None, metadata={"help": "JSON."})
    size: int | None = field(default=None, metadata={"help": "How large."})


def parse(*words, kinds=Options):
    return ScriptParser(kinds).parse_args_into_dataclasses([str(word) for word in words])


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_run_file_holds_what_flags_say(tmp_path, suffix):
    options = {"folder": "a/b", "rate": -0.25, "names": ["x", "y z"], "loud": True, "settings": {"a": 1}, "size": None}
    text = json.dumps(options)  # which is YAML, too
    (tmp_path / f"run.{suffix}").write_text(text)
    (parsed,) = parse(tmp_path / f"run.{suffix}")
    assert parsed == Options(Path("a/b"), -0.25, ["x", "y z"], True, '{"a": 1}')


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    (tmp_path / "run.yaml").write_text("folder: here\nrate: 2e-5\n")
    assert parse(tmp_path / "run.yaml")[0].rate == 2e-5


def test_a_flag_replaces_what_a_run_file_says_and_a_later_file_an_earlier_one(tmp_path):
    (tmp_path / "first.yaml").write_text("folder: one\nnames: [a, b]\nrate: 1\n")
    (tmp_path / "second.json").write_text('{"rate": 2, "loud": true}')
    (parsed,) = parse(tmp_path / "first.yaml", tmp_path / "second.json", "--names", "c", "--loud", "false")
    assert parsed == Options(Path("one"), 2.0, ["c"], False)


def test_a_run_file_may_hold_the_trainers_options(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"folder: here\noutput_dir: {tmp_path}\nmax_steps: 7\nlearning_rate: 1e-3\nuse_cpu: true\n"
    )
    _, training = parse(tmp_path / "run.yaml", "--max_steps", "9", kinds=(Options, TttTrainingArguments))
    assert (training.max_steps, training.learning_rate, training.use_cpu) == (9, 1e-3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder: a\nrates: 1\n", r"run.yaml: there is no option `rates`; did you mean `rate`\?"),
        ("folder: a\nzzz: 1\n", "there is no option `zzz`; --help_all lists all"),
        ("- folder\n", "must hold options by name"),
        ("folder: [unclosed\n", "cannot be read as yaml"),
        ("folder: a\nnames: []\n", "`names` is an empty list; leave it out"),
    ],
)
def test_a_run_file_that_cannot_be_used_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(tmp_path / "run.yaml")


def test_a_run_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="There is no run file nowhere.yaml"):
        parse("nowhere.yaml", "--folder", "a")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--foldr", "a"], r"There is no option --foldr; did you mean --folder\?"),  # the required one is misspelled
        (["--foldr=a"], r"There is no option --foldr; did you mean --folder\?"),
        (["--rates", "1"], r"There is no option --rates; did you mean --rate\?"),  # beside a required one left out
        (["--folder", "a", "--zzz", "1"], "There is no option --zzz; --help_all lists all"),
        (["--folder", "a", "b"], "`b` belongs to no option; run files come first"),
        (["--folder", "a", "run.yaml"], "`run.yaml` belongs to no option; run files come first"),
    ],
)
def test_an_option_that_there_is_not_is_named_first_and_the_closest_with_it(words, message):
    with pytest.raises(ValueError, match=message):
        parse(*words)


def test_options_may_be_cut_short_and_values_may_hold_dashes():
    (parsed,) = parse("--fold", "a", "--rate", "-0.5", "--settings", "-- {x}")
    assert parsed == Options(Path("a"), -0.5, settings="-- {x}")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("study/measure_run.py --run r --arm ttt --limit 0", "limit"),
        ("study/measure_once.py --study s --cost_rows 0", "cost_rows"),
        ("ttt_tiny/best_answers.py --model m --dataset d --aligner a --output_dir o --batch_size 0", "batch_size"),
        ("ttt_tiny/build_skill.py --eval_items -1", "eval_items"),
        ("ttt_tiny/build_speech.py --shard_size 0", "shard_size"),
        ("ttt_tiny/compare_voices.py --whisper base --sentences 0", "sentences"),
        ("ttt_tiny/create_tiny.py --num_heads 0", "num_heads"),
        ("ttt_tiny/evaluate_skill.py --adapter a --limit 0", "limit"),
        ("ttt_tiny/human_lists.py --strings 0", "strings"),
    ],
)
def test_numbers_too_low_are_refused_before_anything_is_done(words, option, monkeypatch):
    script, *flags = words.split()
    main = importlib.import_module("training_examples." + script.removesuffix(".py").replace("/", ".")).main
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(ValueError, match=f"`--{option}` is -?[01]; it must be at least [01]"):
        main()


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_is_a_screen_of_our_options(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(".".join(script.with_suffix("").parts)).main()
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    assert lines[2] and not lines[2].startswith("  --")  # what the script is for
    ours = [index for index, line in enumerate(lines) if re.match(r"  --\w+ +\w", line)]
    trainers = [index for index, line in enumerate(lines) if line.startswith("The Trainer's")]
    assert ours and all(index > max(ours[:1]) for index in trainers)


@pytest.mark.parametrize("path", sorted((ROOT / "training_examples" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_run_file_of_ours_is_one_of_the_script_it_names(path):
    script = re.search(r"#   python training_examples/(\w+)\.py training_examples/configs/(\S+)", path.read_text())
    assert script.group(2) == path.name
    kind = {"train_ttt": TrainArguments, "finetune_lora": LoraArguments}[script.group(1)]
    namespace, unknown = ScriptParser((kind, TttTrainingArguments)).parse_known_args([str(path)])
    assert not unknown and namespace.tokens_per_batch == 1024 and namespace.max_steps > 0


@pytest.mark.parametrize("script", READ_FIRST)
def test_options_are_read_before_pytorch_is_loaded(script):
    """Which takes seconds, and a minute on a busy machine: for --help, and for an option that is misspelled."""
    loaded = "print([name for name in ('torch', 'transformers.modeling_utils', 'processing') if name in sys.modules])"
    program = f"import sys; from training_examples import {script}; {loaded}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_help_all_has_every_option_whole(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse("--help_all", kinds=(Options, TttTrainingArguments))
    everything = capsys.readouterr().out
    assert "More than that is said in the long help" in everything and "--ddp_timeout" in everything
    with pytest.raises(SystemExit):
        parse("--help", kinds=(Options, TttTrainingArguments))
    short = capsys.readouterr().out
    assert "More than that" not in short and "--ddp_timeout" not in short and "--max_steps" in short
    assert "(required)" in short and "(0.5)" in short
