"""The study: what its arms are told, that it goes on where it stopped and ends its processes, its tables and plots."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_model, build_processor, tone, write_wav
from datasets import Dataset, DatasetDict

from modeling_ttt import TttConfig
from pipelines import save_repository
from training_examples.command_line import ScriptParser
from training_examples.evaluation.backends import TttBackend
from training_examples.evaluation.rows import EvaluationError, Listener
from training_examples.study import lists, measure_once, measure_run, report_study, run_study
from training_examples.study.arms import ARMS, setting_name, training_flags
from training_examples.study.counting import count
from training_examples.study.run_study import Processes, Stage, StudyArguments
from training_examples.study.samples import read_samples
from training_examples.training.arguments import CONFIG_OPTIONS, ModelArguments, parse_arguments
from training_examples.training.arguments import TttTrainingArguments as TrainingArguments
from training_examples.training.trainer import check_effect

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ROOT = Path(__file__).parent.parent
ROW = {"id": "0", "question": "", "answer": "one two", "kind": "random", "audio": None}


@pytest.fixture
def args(tmp_path):
    for name in lists.LISTS:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "start").mkdir()
    return StudyArguments(
        tmp_path / "start", "data", tmp_path, tmp_path / "study", arms=["ar", "ttt"], seeds=[0, 1], workers=2
    )


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_configuration_that_training_takes(name, tmp_path):
    words = ["--model", str(tmp_path), *training_flags(ARMS[name].options)]
    (parsed,) = ScriptParser(ModelArguments).parse_args_into_dataclasses(words)
    options = parsed.config_options()
    assert options == {
        key: list(value) if isinstance(value, tuple) else value for key, value in ARMS[name].options.items()
    }
    assert set(options) == set(CONFIG_OPTIONS), "an option that is left out would be that of the start"
    check_effect(parsed, TttConfig(**options))


@pytest.mark.parametrize("stage_of", [lambda args: run_study.measuring_stage(args, "ttt", 0), run_study.last_stage])
def test_an_arm_with_another_setting_is_measured_again(args, monkeypatch, stage_of):
    stage = stage_of(args)
    stage.remember(1.0, finished=True)
    assert stage_of(args).is_finished()
    monkeypatch.setitem(ARMS, "ttt", replace(ARMS["ttt"], settings=ARMS["ttt"].settings[:2]))
    assert not stage_of(args).is_finished()


def test_an_ablated_arm_differs_from_the_published_one_in_one_option():
    published = ARMS["ttt"].options
    for name in ("ttt_without_banom", "ttt_without_ppm", "ttt_without_sst"):
        changed = {key for key, value in ARMS[name].options.items() if published[key] != value}
        assert len(changed) == 1 and all(ARMS[name].options[key] == 0 for key in changed)


def test_arms_are_measured_at_the_papers_setting_and_at_one_code_a_forward():
    assert ARMS["ar"].ends == ("default", "default")
    for name, arm in ARMS.items():
        assert name == "ar" or arm.ends == ("26:2", "26:26")
    assert setting_name({"audio_block_size": 26, "audio_steps_per_block": 4}) == "26:4"


def test_all_arms_are_trained_alike_but_for_the_options_of_their_objective(args):
    """Seed, steps, tokens a step, rates, optimizer: word for word."""
    shared = set()
    for name, arm in ARMS.items():
        stages = [stage for stage in run_study.stages_of(args, name, seed=3) if stage.trained]
        steps = [int(stage.options[stage.options.index("--max_steps") + 1]) for stage in stages]
        assert sum(steps) == args.max_steps
        for stage in stages:
            words = " ".join(stage.options).replace(" ".join(training_flags(arm.options)), "")
            for flag in ("--model", "--output_dir", "--dataset", "--max_steps", "--warmup_steps"):
                before, _, after = words.partition(f"{flag} ")
                words = before + after[after.index("--") :]
            shared.add(words)
    assert len(shared) == 1 and "--seed 3" in shared.pop()


def test_training_takes_what_a_stage_is_told(args, monkeypatch):
    (stage,) = run_study.stages_of(args, "block_causal", seed=1)
    monkeypatch.setattr(sys, "argv", [stage.script, *stage.options])
    arguments, training = parse_arguments(ModelArguments)
    assert isinstance(training, TrainingArguments) and training.seed == 1 and training.max_steps == args.max_steps
    assert arguments.tokens_per_batch == args.tokens_per_batch and arguments.block_lengths == [8, 13, 26]


def test_a_gpu_is_said_to_every_stage_or_to_none(args):
    args.device = "cuda"
    stages = [*run_study.stages_of(args, "distilled", 0), run_study.measuring_stage(args, "ttt", 0)]
    for stage in [*stages, run_study.last_stage(args)]:
        words = " ".join(stage.options)
        if stage.trained:  # the Trainer takes the GPU by itself
            assert "--use_cpu" not in words and "--attn_implementation sdpa" in words
        else:
            assert "--device cuda" in words
    args.device = "cpu"
    for stage in [*run_study.stages_of(args, "distilled", 0), run_study.last_stage(args)]:
        assert "--device" not in stage.options and ("--use_cpu" in stage.options) == bool(stage.trained)


@pytest.mark.parametrize("device", ["gpu", pytest.param("cuda", marks=NO_GPU)])
def test_a_device_that_is_not_there_is_refused_at_once(args, device):
    with pytest.raises(ValueError, match=f"`--device` is {device}"):
        replace(args, device=device)


WORKER = """
    import json, os, signal, sys, time
    from pathlib import Path
    here = Path(__file__).parent
    with (here / "done").open("a") as file:
        file.write(sys.argv[1] + "\\n")
    order = json.loads((here / "orders.json").read_text()).get(sys.argv[1])
    if order == "fail":
        sys.exit("no space left")
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "wait":
        time.sleep(300)
"""


@pytest.fixture
def stages(args, tmp_path, monkeypatch):
    """
    Processes of a moment in place of training and measuring. Returns a function that tells some what to do, and one
    that says which were started.
    """
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))

    def stage(name, run, depends):
        return Stage(name, args.output_dir / run, str(script), [f"{run}/{name}"], depends)

    def order(**orders):
        (tmp_path / "orders.json").write_text(json.dumps({key.replace("__", "/"): how for key, how in orders.items()}))

    def started():
        path = tmp_path / "done"
        return sorted(path.read_text().splitlines()) if path.exists() else []

    replaced = {
        "stages_of": lambda args, name, seed, depends=None: [stage("train", f"{name}-{seed}", args.max_steps)],
        "measuring_stage": lambda args, name, seed, depends=None: stage("measured", f"{name}-{seed}", depends),
        "last_stage": lambda args, depends=None: stage("measured", "once", depends),
        "what_lies_there": lambda args: "these",
        "check_examples": lambda args: None,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(run_study, name, function)
    order()
    return order, started


def runs_of(names):
    return sorted(f"{run}/{stage}" for run in names for stage in ("train", "measured"))


def test_every_stage_runs_once_however_often_the_study_is_started(args, stages, capsys):
    _, started = stages
    run_study.run_all(args)
    expected = sorted([*runs_of(["ar-0", "ttt-0", "ar-1", "ttt-1"]), "once/measured"])
    assert started() == expected
    said = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in said] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "trained in 1 min, measured in 1 min; about 1 min to go" in said[0] and "to go" not in said[3]
    run_study.run_all(args)
    assert started() == expected and "4 of 4 runs are finished" in capsys.readouterr().out


def test_a_stage_that_fails_ends_its_run_alone_and_is_tried_again(args, stages, capsys):
    order, started = stages
    order(**{"ttt-0__train": "fail", "ar-1__measured": "die"})
    with pytest.raises(run_study.FailedError, match="2 of 4 runs failed") as error:
        run_study.run_all(args)
    assert "ttt-0: stage train ended with status 1: no space left" in str(error.value)
    assert "ar-1: stage measured was killed by signal 9" in str(error.value)
    first = started()
    assert first == sorted([*runs_of(["ar-0", "ar-1", "ttt-1"]), "ttt-0/train"]), "nor what rests on them"
    assert "ttt-0: FAILED" in capsys.readouterr().out
    order()
    run_study.run_all(args)
    assert started() == sorted([*first, *runs_of(["ttt-0"]), "ar-1/measured", "once/measured"])


def test_a_fault_of_the_study_itself_does_not_end_the_other_runs(args, stages):
    args.output_dir.mkdir()
    (args.output_dir / "ar-0").write_text("in the way")
    with pytest.raises(run_study.FailedError, match="1 of 4 runs failed.*ar-0"):
        run_study.run_all(args)
    assert stages[1]() == runs_of(["ttt-0", "ar-1", "ttt-1"])


def test_what_a_kill_left_half_written_is_not_taken_for_finished(args, stages):
    order, started = stages
    run_study.run_all(args)
    before = started()
    path = args.output_dir / "ttt-1" / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": False}))
    run_study.run_all(args)
    assert started() == sorted([*before, "ttt-1/train"])


def test_other_options_are_refused_before_anything_starts(args, stages):
    run_study.run_all(args)
    args.max_steps, before = 7, stages[1]()
    with pytest.raises(ValueError, match="ar-0 was begun otherwise, in stage train: other weights or examples"):
        run_study.run_all(args)
    assert stages[1]() == before


def test_a_changed_option_is_named(args):
    (stage,) = run_study.stages_of(args, "ttt", 0)
    stage.remember(0.0, finished=False)
    args.learning_rate = 1e-3
    with pytest.raises(ValueError, match="--learning_rate was 0.0005 and is 0.001"):
        run_study.check_unchanged(run_study.stages_of(args, "ttt", 0))


def test_an_option_that_was_left_out_is_named_as_the_study_knows_it(args):
    args.eval_steps = 0
    (stage,) = run_study.stages_of(args, "ttt", 0)
    stage.remember(0.0, finished=False)
    with pytest.raises(ValueError, match="stage train: --eval_steps was left out and is 100. Repeat"):
        run_study.check_unchanged(run_study.stages_of(replace(args, eval_steps=100), "ttt", 0))
    stage.remember(0.0, finished=False)
    run_study.check_unchanged(run_study.stages_of(args, "ttt", 0))


@pytest.mark.parametrize(("name", "value"), [("eval_steps", -1), ("tokens_per_batch", 0), ("save_steps", 0)])
def test_numbers_that_cannot_be_meant_are_refused(args, name, value):
    with pytest.raises(ValueError, match=f"`--{name}` is {value}; it must be at least {value + 1}"):
        replace(args, **{name: value})


def test_other_rows_are_measured_without_training_anew(args, stages):
    run_study.run_all(args)
    before = stages[1]()
    (args.data_dir / "tts.jsonl").write_text(json.dumps({**ROW, "answer": "three"}) + "\n")
    run_study.run_all(args)
    measured = [f"{run}/measured" for run in ("ar-0", "ar-1", "ttt-0", "ttt-1", "once")]
    assert stages[1]() == sorted([*before, *measured])


def test_a_missing_list_is_said_before_anything_starts(args, stages):
    (args.data_dir / "tts.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="--lists spoken_qa_seen spoken_qa_unheard asr_seen. does without"):
        run_study.run_all(args)
    assert stages[1]() == []
    args.lists = ["asr_seen"]
    run_study.run_all(args)
    assert len(stages[1]()) == 9


def test_examples_that_a_later_stage_misses_are_said_before_anything_starts(args, tmp_path):
    row = {"input_ids": [1, 2], "labels": [-100, 2], "length": 2}
    rows = {name: Dataset.from_list([{**row, "task": task}]) for name, task in (("train", "asr"), ("eval", "tts"))}
    DatasetDict(rows).save_to_disk(str(tmp_path / "data"))
    DatasetDict({"train": rows["eval"]}).save_to_disk(str(tmp_path / "all"))
    args.dataset, args.arms = str(tmp_path / "data"), ["ttt", "distilled"]
    with pytest.raises(ValueError, match="has examples of asr alone, .* distilled answers those of tts and spoken_qa"):
        run_study.run_all(args)
    args.arms = ["ttt"]
    run_study.check_examples(args)
    args.dataset, args.arms = str(tmp_path / "all"), ["distilled"]
    with pytest.raises(ValueError, match="`split` is 'eval'"):
        run_study.run_all(args)
    args.eval_steps = 0
    run_study.check_examples(args)
    assert not args.output_dir.exists()


CALLER = """
    import os, signal, sys
    from pathlib import Path
    from training_examples.study import run_study
    from training_examples.study.run_study import Stage
    from training_examples.user_errors import run_command
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    folder = Path(sys.argv[1])
    def stage(run):
        return Stage("train", folder / "study" / run, str(folder / "worker.py"), [f"{run}/train"], None)
    run_study.stages_of = lambda args, name, seed, depends=None: [stage(f"{name}-{seed}")]
    run_study.measuring_stage = lambda args, name, seed, depends=None: stage(f"{name}-{seed}")
    run_study.last_stage = lambda args, depends=None: stage("once")
    run_study.what_lies_there = lambda args: "these"
    run_study.check_examples = lambda args: None
    sys.argv = ["run_study.py", "--start", str(folder / "start"), "--dataset", "data", "--data_dir", str(folder),
                "--output_dir", str(folder / "study"), "--arms", "ar", "ttt", "--workers", "1"]
    run_command(run_study.main)
"""


@pytest.fixture
def call(args, tmp_path, stages):
    """Starts a study in a process of its own, whose first stage waits, and returns it once that stage is at work."""
    stages[0](**{"ar-0__train": "wait"})
    started = []

    def begin():
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", textwrap.dedent(CALLER), str(tmp_path)]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        while not stages[1]():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def child_of(process: subprocess.Popen) -> int:
    """The process that another one has started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:  # has ended meanwhile
            continue
        if int(words[1]) == process.pid:
            return int(path.parent.name)
    raise AssertionError("there is none")


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found in /proc")


@needs_proc
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_what_was_started_and_starts_no_more(call, stages, sent):
    process = call()
    child = child_of(process)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said
    assert not Path(f"/proc/{child}").exists() and stages[1]() == ["ar-0/train"]


@needs_proc
def test_the_stage_of_a_study_that_was_killed_is_waited_for(call, args, stages):
    process = call()
    child = child_of(process)
    process.kill()
    process.wait()
    processes = Processes()
    processes.stop.set()  # as if interrupted, so that it does not wait for long
    with pytest.raises(run_study.StoppedError), run_study.held(args.output_dir / "ar-0", processes.stop):
        pass
    os.kill(child, signal.SIGKILL)
    with run_study.held(args.output_dir / "ar-0", Processes().stop):
        pass


def test_unknown_and_repeated_arms_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'tttt'"):
        StudyArguments(tmp_path, "data", arms=["tttt"])
    with pytest.raises(ValueError, match="named twice"):
        StudyArguments(tmp_path, "data", seeds=[1, 1])
    with pytest.raises(ValueError, match="no folder"):
        StudyArguments(tmp_path / "none", "data")


def test_an_interval_holds_seeds_and_rows():
    counts = np.array([[[1, 10]] * 20, [[3, 10]] * 20], float)
    assert report_study.with_interval(counts) == pytest.approx((0.2, 0.1, 0.3)), "rows are alike: only seeds differ"
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(0, 2, 400), np.ones(400, int)], 1).astype(float)
    width = 2 * 1.96 * (0.25 / 400) ** 0.5
    for seeds in (1, 3):  # the same sentences again are no more sentences
        _, low, high = report_study.with_interval(np.stack([rows] * seeds))
        assert high - low == pytest.approx(width, rel=0.1)
    _, low, high = report_study.with_interval(np.ones((3, 20, 2)))
    assert 0.8 < low < 0.85 and high == 1, "twenty rows that are all right are no certainty"


def test_rows_without_words_leave_a_figure_out():
    assert report_study.show(report_study.with_interval(np.zeros((2, 3, 2)))) == "none"


def write_run(folder, arm, seed, exact, rows="abc"):
    run = folder / f"{arm}-{seed}"
    (run / "train").mkdir(parents=True)
    counts = {
        "exact": exact,
        "speech_wer base": [[1, 5]] * 4,
        "codes_per_forward": [[20, 5]] * 4,
        "codes_per_step": [[20, 4]] * 4,
    }
    counts |= {"forwards": [[5, 1]] * 4, "wer": [[0, 5]] * 4, "speech_exact base": exact}
    found = {name: counts for name in lists.LISTS}
    settings = {setting_name(setting): found for setting in ARMS[arm].settings}
    content = {"arm": arm, "lists": {"tts": rows}, "judges": {"base": {}}, "settings": settings}
    (run / "figures-evaluation.json").write_text(json.dumps(content))
    lines = [
        json.dumps({"step": step, "loss": 1.0, "eval_text_loss": 1 / step + seed, "eval_audio_loss": 3 / step + seed})
        for step in (1, 2, 3)
    ]
    (run / "train" / "log_history.jsonl").write_text("\n".join(lines))
    (run / "train.json").write_text(
        json.dumps(
            {
                "seconds": 90,
                "finished": True,
                "asked": {"options": "--max_steps 7 --tokens_per_batch 64 --learning_rate 0.1".split()},
            }
        )
    )


def write_once(folder):
    (folder / "once").mkdir()
    row = {"seconds": 0.5, "duration": 2.0, "codes": 25, "forwards": 10, "positions": 300}
    recordings = {"recordings": {"tts": {"speech_wer base": [[1, 20]] * 4}}}
    content = {"cost": {"ar": {"default": [row] * 2}}, "recordings": recordings}
    (folder / "once" / "once-evaluation.json").write_text(json.dumps(content))


def test_tables_and_plots_show_what_was_measured(tmp_path, monkeypatch, capsys):
    right, wrong, half = [[1, 1]] * 4, [[0, 1]] * 4, [[1, 1], [0, 1]] * 2
    for seed in (0, 1):
        write_run(tmp_path, "ar", seed, right)
        write_run(tmp_path, "ttt", seed, half)
    write_run(tmp_path, "nar", 0, wrong)
    write_once(tmp_path)
    begun = tmp_path / "ar-2"
    begun.mkdir()
    (begun / "train.json").write_text(json.dumps({"seconds": 0, "finished": False}))  # still at work: no figure of it
    readme = tmp_path / "docs" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"before\n{report_study.BEGIN}\nnothing\n{report_study.END}\nafter\n")
    words = ["report_study.py", "--output_dir", str(tmp_path), "--readme", str(readme)]
    monkeypatch.setattr(sys, "argv", words)
    report_study.main()
    text = capsys.readouterr().out
    assert "7 steps of at most 64 tokens" in text
    assert "| pure autoregressive | default | 2 | 100.0 % (39.8 to 100.0) |" in text
    assert "| TtT as published | 26:26 | 2 | 50.0 % (0.0 to 100.0) |" in text
    questions = " | ".join(["50.0 % (0.0 to 100.0)"] * 2)
    assert f"| TtT as published | 34.68 % | {questions} | 12.53 % | 0.0 % " in text, "the paper's beside ours"
    cost = "5.00 (5.00 to 5.00) | 4.00 (4.00 to 4.00) | 5.00 (5.00 to 5.00)"
    assert f"| TtT as published | 26:4 | 20.0 % (20.0 to 20.0) | {cost} |" in text
    assert "| pure autoregressive | default | 25.0 | 10.0 | 300.0 | 0.250 | 1.5 |" in text
    assert "| recordings |  | 5.0 % (5.0 to 5.0) |" in text
    speech = "20.0 % (20.0 to 20.0)"
    assert f"| TtT as published | {speech} | {speech} | +0.0 (+0.0 to +0.0) | 5.00 (5.00 to 5.00) | " in text
    figures = json.loads((tmp_path / "study.json").read_text())
    assert figures["ar/default/texts read aloud, WER"]["value"] == pytest.approx(0.2)
    filled = readme.read_text()
    assert filled.startswith("before\n") and filled.endswith("after\n") and text.strip() in filled
    report_study.main()
    assert readme.read_text() == filled, "a second time replaces the first"
    for name in ("quality.png", "curves.png"):
        assert (readme.parent / name).read_bytes().startswith(b"\x89PNG")


def test_differences_are_of_the_same_rows_and_seeds(tmp_path):
    hard_rows_wrong = [[1, 1], [1, 1], [0, 1], [0, 1]]
    one_more_right = [[1, 1], [1, 1], [1, 1], [0, 1]]
    for seed in (0, 1, 2):
        write_run(tmp_path, "ttt", seed, hard_rows_wrong)
    write_run(tmp_path, "block_causal", 0, hard_rows_wrong)
    write_run(tmp_path, "distilled", 1, one_more_right)
    figures = report_study.Figures(report_study.read_runs(tmp_path))
    column = ("spoken_qa_seen", "exact")
    settings = ("26:26", "26:26")
    assert figures.difference("block_causal", "ttt", settings, *column) == (0, 0, 0), (
        "not even drawing tells them apart"
    )
    value, low, high = figures.difference("distilled", "ttt", settings, *column)
    assert value == 0.25 and low == 0 and 0.5 <= high <= 1
    assert figures.difference("ttt", "ttt", settings, "tts", "no such count") is None


def test_a_transcript_that_repeats_itself_counts_as_one_wrong_row(tmp_path):
    write_run(tmp_path, "ttt", 0, [[1, 1]] * 4)
    path = tmp_path / "ttt-0" / "figures-evaluation.json"
    content = json.loads(path.read_text())
    content["settings"]["26:2"]["tts"] |= {"speech_wer base": [[1, 5], [200, 5], [0, 5], [0, 5]], "wer": [[7, 5]] * 4}
    path.write_text(json.dumps(content))
    figures = report_study.Figures(report_study.read_runs(tmp_path))
    assert figures.figure("ttt", "26:2", "tts", "speech_wer *")[0] == pytest.approx(6 / 20)
    assert figures.figure("ttt", "26:2", "tts", "wer")[0] == pytest.approx(7 / 5), "what a model writes is its own"


def test_runs_that_were_measured_on_other_rows_are_not_compared(tmp_path):
    write_run(tmp_path, "ar", 0, [[1, 1]] * 4)
    write_run(tmp_path, "ttt", 0, [[1, 1]] * 4, rows="other")
    with pytest.raises(ValueError, match="differ in their lists: run run_study.py again"):
        report_study.read_runs(tmp_path)


def test_a_copy_of_a_run_is_named(tmp_path):
    write_run(tmp_path, "ttt", 0, [[1, 1]] * 4)
    shutil.copytree(tmp_path / "ttt-0", tmp_path / "ttt-0-old")
    with pytest.raises(ValueError, match="ttt-0-old is no folder ARM-SEED, as runs have: move it out of"):
        report_study.read_runs(tmp_path)


def test_the_curve_of_a_distilled_run_has_both_halves(tmp_path):
    for name, losses in (("half", {5: 3.0, 10: 2.0}), ("train", {5: 1.5, 10: 1.0})):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "eval_text_loss": loss}) for step, loss in losses.items()]
        (tmp_path / name / "log_history.jsonl").write_text("\n".join(lines))
    assert report_study.read_curve(tmp_path, "eval_text_loss") == {5: 3.0, 10: 2.0, 15: 1.5, 20: 1.0}


def test_a_study_without_runs_says_what_comes_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="run_study.py"):
        report_study.read_runs(tmp_path)


def test_the_studys_readme_takes_results():
    text = (ROOT / "training_examples" / "study" / "README.md").read_text(encoding="utf-8")
    assert text.index(report_study.BEGIN) < text.index(report_study.END)


def test_held_out_lists_become_samples(tmp_path):
    rows = [
        {**ROW, "answer_audio": "0-answer.flac"},
        {"id": "1", "question": "what is it", "answer": "snow is white", "kind": "facts", "audio": "1.flac"},
        {**ROW, "id": "2"},
    ]
    (tmp_path / "development_tts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(tmp_path, "development", "tts", 2)
    assert [sample.turns[0].text for sample in samples] == ["one two", None]
    assert samples[0].details["answer_audio"] == str(tmp_path / "0-answer.flac")
    assert samples[1].turns[0].audio == str(tmp_path / "1.flac") and samples[1].references == ("snow is white",)
    assert "spoken_qa_unheard" not in [name for name, kind in lists.LISTS.items() if "development" in kind.splits]
    before = lists.hash_lists(tmp_path, "development", ["tts"], 2)
    (tmp_path / "development_tts.jsonl").open("a").write("{}\n")
    assert lists.hash_lists(tmp_path, "development", ["tts"], 2) == before, "a row that is not used"


def test_speech_is_held_against_the_text_that_it_was_given():
    answered = [
        {"id": "0", "text": "One two", "references": ["one two"], "codes": 20, "forwards": 5, "speech_steps": 4},
        {
            "id": "1",
            "text": "snow is blue",
            "references": ["snow is white"],
            "codes": None,
            "forwards": None,
            "speech_steps": None,
        },
    ]
    heard = {"base": {"0": "one too", "1": "snow is white"}}
    counts = count(answered, "spoken_qa", heard)
    assert counts["exact"] == [[1, 1], [0, 1]] and counts["wer"] == [[0, 2], [1, 3]]
    assert counts["speech_wer base"] == [[0, 2], [1, 3]], "too and two sound alike; it wrote blue"
    assert counts["speech_exact base"] == [[1, 1], [1, 1]]
    assert counts["codes_per_forward"] == [[20, 5], [0, 0]] and counts["codes_per_step"] == [[20, 4], [0, 0]]
    silent = [{**row, "text": ""} for row in answered]  # texts read aloud are not written again
    assert count(silent, "tts", heard)["speech_wer base"] == [[0, 2], [0, 3]]
    assert count(silent, "tts", {"base": {"0": "", "1": ""}})["speech_wer base"] == [[2, 2], [3, 3]]
    assert "exact" not in count(silent, "tts", heard)


class Ears:
    """Hears the same words in everything, and remembers how often it was asked."""

    def __init__(self):
        self.heard = 0

    def transcribe(self, waveforms, sampling_rate):
        self.heard += len(waveforms)
        return ["one two"] * len(waveforms)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A study whose one run has a model that answers everything with "hi" and 40 codes, and two lists."""
    root = tmp_path_factory.mktemp("study")
    processor = build_processor()
    save_repository(build_model(processor), processor, root / "study" / "ttt-0" / "train")
    write_wav(root / "a.wav", tone(0.4))
    spoken = {**ROW, "id": "1", "answer": "hi", "audio": "a.wav"}
    (root / "development_tts.jsonl").write_text(json.dumps({**ROW, "answer_audio": "a.wav"}) + "\n")
    (root / "development_spoken_qa_seen.jsonl").write_text(json.dumps(spoken) + "\n")
    return root


CHOSEN = {"split": "development", "lists": ["tts", "spoken_qa_seen"]}


def test_a_run_is_measured_at_its_settings_and_listened_to_once(measured):
    ears = Ears()
    arguments = measure_run.MeasureArguments(measured / "study" / "ttt-0", "ttt", measured, **CHOSEN, threads=1)
    found = measure_run.measure(arguments, [Listener("ears", lambda: ears, {})])
    assert list(found) == ["26:2", "26:4", "26:8", "8:8", "26:p0.4", "26:26"]
    assert {name: set(counts) for name, counts in found.items() if "spoken_qa_seen" in counts} == {
        "26:2": {"tts", "spoken_qa_seen"},
        "26:p0.4": {"tts", "spoken_qa_seen"},
        "26:26": {"tts", "spoken_qa_seen"},
    }
    assert found["26:2"]["spoken_qa_seen"]["exact"] == [[1, 1]]
    assert found["26:2"]["tts"]["speech_wer ears"] == [[0, 2]], "against the text that was to be read"
    assert found["26:2"]["tts"]["codes_per_step"] == [[40, 4]]
    assert found["26:26"]["tts"]["codes_per_step"] == [[40, 52]], "what is dropped of the last block was work, too"
    assert ears.heard == 9
    assert measure_run.measure(arguments, [Listener("ears", lambda: ears, {})]) == found and ears.heard == 9
    other = Ears()
    measure_run.measure(arguments, [Listener("other", lambda: other, {})])
    assert other.heard == 9, "another recogniser can still listen"


def test_what_an_answer_costs_is_counted(measured):
    backend = TttBackend(str(measured / "study" / "ttt-0" / "train"))
    samples = measure_run.read_samples(measured, "development", "tts", 1)
    (fast,), (slow,) = (
        measure_once.cost_of(backend.with_generation(audio_block_size=20, audio_steps_per_block=steps), samples, "tts")
        for steps in (2, 20)
    )
    assert fast["codes"] == slow["codes"] == 40 and slow["forwards"] - fast["forwards"] == 2 * 18
    assert slow["positions"] > fast["positions"] and fast["seconds"] > 0
    assert fast["duration"] == pytest.approx(40 / backend.processor.audio_format.frame_rate)


def test_recordings_are_heard_as_they_are_and_through_the_audio_tokenizer(measured):
    arguments = measure_once.OnceArguments(measured / "study", ["ttt"], 0, measured, **CHOSEN, threads=1)
    ears = Ears()
    found = measure_once.measure_recordings(arguments, CHOSEN["lists"], [Listener("ears", lambda: ears, {})])
    counts = {"tts": {"speech_wer ears": [[0, 2]], "speech_exact ears": [[1, 1]]}}
    assert found == {"recordings": counts, "through the audio tokenizer": counts}, "one list has no recorded answers"
    assert ears.heard == 2


def test_a_recording_that_cannot_be_read_is_named(measured, tmp_path):
    write_wav(tmp_path / "there.wav", tone(0.2))
    rows = [{**ROW, "id": name, "answer_audio": f"{name}.wav"} for name in ("there", "gone")]
    (tmp_path / "development_tts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = measure_once.OnceArguments(
        tmp_path / "study", ["ttt"], 0, tmp_path, split="development", lists=["tts"], threads=1
    )
    shutil.copytree(measured / "study" / "ttt-0" / "train", tmp_path / "study" / "ttt-0" / "train")
    with pytest.raises(EvaluationError, match="1 recordings cannot be read.*gone.wav"):
        measure_once.measure_recordings(arguments, ["tts"], [])
