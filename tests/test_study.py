"""The study: what its arms are told, that a run goes on where it stopped, and its table and plots."""

import json
import sys

import numpy as np
import pytest

from modeling_ttt import TttConfig
from training_examples.command_line import ScriptParser
from training_examples.study import measure_run, report_study, run_study
from training_examples.study.arms import ARMS, training_flags
from training_examples.study.run_study import StudyArguments
from training_examples.training.arguments import ModelArguments


@pytest.fixture
def args(tmp_path):
    return StudyArguments(
        start=tmp_path, dataset="data", output_dir=tmp_path / "study", arms=["ar", "ttt"], seeds=[0, 1]
    )


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_configuration_that_training_takes(name, tmp_path):
    words = ["--model", str(tmp_path), *training_flags(ARMS[name].options)]
    (parsed,) = ScriptParser(ModelArguments).parse_args_into_dataclasses(words)
    options = parsed.config_options()
    assert {key: options[key] for key in ARMS[name].options} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in ARMS[name].options.items()
    }
    TttConfig(**options)


def test_an_ablated_arm_differs_from_the_published_one_in_one_option():
    published = ARMS["ttt"].options
    for name in ("ttt_without_banom", "ttt_without_ppm", "ttt_without_sst"):
        changed = {key for key, value in ARMS[name].options.items() if published[key] != value}
        assert len(changed) == 1 and all(ARMS[name].options[key] == 0 for key in changed)


def test_all_arms_take_as_many_steps(args):
    for name in ARMS:
        steps = 0
        for _, command in run_study.stages_of(args, name, seed=3):
            if command[1].endswith("train_ttt.py"):
                steps += int(command[command.index("--max_steps") + 1])
                assert command[command.index("--seed") + 1] == "3"
        assert steps == args.max_steps


def test_runs_go_on_where_they_stopped_and_failures_are_named(args, monkeypatch):
    """Commands of a moment stand in for training: what is looked at is which of them run."""
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True); "
    script += "sys.exit(3) if 'bad' in sys.argv[1] else pathlib.Path(sys.argv[1]).write_text('{}')"

    def command(target):
        return target, [sys.executable, "-c", script, str(target)]

    asked = []

    def stages(args, name, seed):
        asked.append((name, seed))
        return [command(args.output_dir / f"{name}-{seed}" / ("bad" if (name, seed) == ("ttt", 0) else "model"))]

    monkeypatch.setattr(run_study, "stages_of", stages)
    monkeypatch.setattr(
        run_study,
        "measuring_command",
        lambda args, name, seed: command(args.output_dir / f"{name}-{seed}" / "figures.json"),
    )
    with pytest.raises(RuntimeError, match="ttt with seed 0 ended with status 3"):
        run_study.run_all(args)
    assert asked == [("ar", 0), ("ttt", 0), ("ar", 1), ("ttt", 1)], "seed after seed"
    finished = sorted(path.parent.name for path in args.output_dir.glob("*/figures.json"))
    assert finished == ["ar-0", "ar-1", "ttt-1"]
    before = (args.output_dir / "ar-0" / "figures.json").stat().st_mtime_ns
    with pytest.raises(RuntimeError):
        run_study.run_all(args)
    assert (args.output_dir / "ar-0" / "figures.json").stat().st_mtime_ns == before


def test_unknown_arms_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'tttt'"):
        StudyArguments(start=tmp_path, dataset="data", arms=["tttt"])


def test_an_interval_holds_seeds_and_rows():
    counts = [np.array([[1, 10]] * 20), np.array([[3, 10]] * 20)]
    middle, low, high = report_study.with_interval(counts)
    assert (middle, low, high) == pytest.approx((0.2, 0.1, 0.3)), "rows are alike, so only the seeds differ"
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(0, 2, 400), np.ones(400, int)], 1)
    middle, low, high = report_study.with_interval([rows])
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.15)


def write_run(folder, arm, seed, exact, settings):
    run = folder / f"{arm}-{seed}"
    (run / "train").mkdir(parents=True)
    counts = {
        "exact": [[exact, 1]] * 4,
        "speech_wer base": [[1, 5]] * 4,
        "codes_per_step": [[20, 4]] * 4,
        "codes_per_forward": [[20, 5]] * 4,
    }
    counts |= {"forwards": [[5, 1]] * 4, "time": [[0.1, 2.0]] * 4, "wer": [[0, 5]] * 4}
    lists = {name: counts for name in ("spoken_qa_seen", "spoken_qa_unheard", "asr_seen", "tts")}
    content = {"arm": arm, "split": "evaluation", "settings": {setting: lists for setting in settings}}
    (run / "figures.json").write_text(json.dumps(content))
    lines = [json.dumps({"step": step, "loss": 3.0 / step + seed}) for step in (1, 2, 3)]
    (run / "train" / "log_history.jsonl").write_text("\n".join(lines))


def test_table_and_plots_show_what_was_measured(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        write_run(tmp_path, "ar", seed, 1, ["default"])
        write_run(tmp_path, "ttt", seed, seed, ["26:2", "26:4"])
    monkeypatch.setattr(sys, "argv", ["report_study.py", "--output_dir", str(tmp_path)])
    report_study.main()
    text = capsys.readouterr().out
    assert "| pure autoregressive | 2 | 100.0 % (100.0 to 100.0) |" in text
    assert "| TtT as published | 2 | 50.0 % (0.0 to 100.0) |" in text
    assert "| TtT as published | 26:4 | 20.0 % (20.0 to 20.0) | 20.0 % (20.0 to 20.0) | 5.00 (5.00 to 5.00) |" in text
    figures = json.loads((tmp_path / "study.json").read_text())
    assert figures["ar/speech WER, TTS"]["value"] == pytest.approx(0.2)
    for name in ("quality.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_study_without_runs_says_what_comes_first(tmp_path):
    with pytest.raises(FileNotFoundError, match="run_study.py"):
        report_study.read_runs(tmp_path)


def test_held_out_lists_become_samples_and_answers_counts(tmp_path):
    rows = [
        {"id": "0", "question": "", "answer": "one two", "kind": "random", "audio": None},
        {"id": "1", "question": "what is it", "answer": "snow is white", "kind": "facts", "audio": "1.flac"},
        {"id": "2", "question": "who", "answer": "me", "kind": "facts", "audio": None},
    ]
    (tmp_path / "tts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = measure_run.read_samples(tmp_path, "tts", 2)
    assert [sample.turns[0].text for sample in samples] == ["one two", None]
    assert samples[1].turns[0].audio == str(tmp_path / "1.flac") and samples[1].references == ("snow is white",)
    with pytest.raises(FileNotFoundError, match="build_speech.py"):
        measure_run.read_samples(tmp_path, "asr", 2)
    answered = [
        {"id": "0", "text": "One two", "references": ["one two"], "codes": 20, "forwards": 5, "speech_steps": 4}
        | {"seconds": 0.2, "audio_seconds": 1.6},
        {
            "id": "1",
            "text": "snow is blue",
            "references": ["snow is white"],
            "codes": None,
            "forwards": None,
            "speech_steps": None,
        }
        | {"seconds": 0.1, "audio_seconds": 0.0},
    ]
    counts = measure_run.count(answered, {"base": {"0": "one too", "1": "snow"}})
    assert counts["exact"] == [[1, 1], [0, 1]]
    assert [tuple(pair) for pair in counts["wer"]] == [(0, 2), (1, 3)]
    assert [tuple(pair) for pair in counts["speech_wer base"]] == [(0, 2), (2, 3)], "too and two sound alike"
    assert (
        counts["codes_per_forward"] == [[20, 5], [0, 0]]
        and counts["codes_per_step"] == [[20, 4], [0, 0]]
        and counts["time"][0] == [0.2, 1.6]
    )
    assert measure_run.setting_name({}) == "default"
    assert measure_run.setting_name({"audio_block_size": 26, "audio_steps_per_block": 4}) == "26:4"
