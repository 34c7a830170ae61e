"""The evaluation scripts: their figures, that a killed run goes on, and that they run on a whole (random) model."""

import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile
from builders import build_codec, build_model, build_processor, tone
from transformers import EncodecFeatureExtractor

from training_examples.evaluation.figures import Figure, fingerprint, markdown_table, remember
from training_examples.ttt_tiny import evaluate_ttt
from training_examples.ttt_tiny.evaluate_codec import reconstruct
from training_examples.ttt_tiny.evaluate_ttt import (
    Evaluation,
    EvaluationArguments,
    plot,
    report,
)
from training_examples.ttt_tiny.speech import read_audio, read_list
from training_examples.ttt_tiny.talker import HeldOutLists, Talker, figures_of_list


def row(**values):
    return {"expected": "one two", "text": "one two", "ended": True, "heard": "one two"} | values


def test_figures_of_a_list_tell_wrong_answers_from_badly_spoken_ones():
    rows = [row(), row(text="one three", heard="one three"), row(heard="one"), row(ended=False)]
    figures = figures_of_list(rows)
    assert figures["exact"] == Figure(3 / 4, 4)
    assert figures["wer"] == Figure(1 / 8, 4)
    assert figures["speech_wer"] == Figure(1 / 8, 4)  # against the model's own text
    assert figures["spoken_wer"] == Figure(2 / 8, 4)  # against what should have been said
    assert figures["ended"] == Figure(3 / 4, 4)


def test_a_list_that_was_not_listened_to_has_no_figures_of_speech():
    assert "speech_wer" not in figures_of_list([row(heard=None)])


def test_figures_print_with_their_unit():
    assert str(Figure(0.1234, 9)) == "12.3 %"
    assert str(Figure(0.1234, 9, "s")) == "0.12 s"


def test_a_remembered_result_is_computed_again_only_for_other_settings(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": len(calls)}

    path = tmp_path / "part.json"
    assert remember(path, {"steps": 2}, compute) == {"value": 1}
    assert remember(path, {"steps": 2}, compute) == {"value": 1}
    assert remember(path, {"steps": 4}, compute) == {"value": 2}


def test_a_fingerprint_follows_weights_and_settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not part of the model")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert fingerprint(tmp_path) != before
    (tmp_path / "tts.jsonl").write_text("{}")
    of_lists = fingerprint(tmp_path / "tts.jsonl")
    (tmp_path / "asr.jsonl").write_text("{}")
    assert fingerprint(tmp_path / "tts.jsonl") == of_lists != fingerprint(tmp_path / "asr.jsonl")


def test_a_missing_list_says_which_script_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="build_speech.py"):
        read_list(tmp_path, "tts")


def test_audio_is_read_at_the_rate_asked_for_and_with_one_channel(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.1), 8_000)
    assert len(read_audio(tmp_path, "a.wav", 8_000)) == len(tone(0.1))
    assert len(read_audio(tmp_path, "a.wav", 24_000)) == 3 * len(tone(0.1))
    soundfile.write(tmp_path / "b.wav", np.zeros((100, 2)), 8_000)
    with pytest.raises(ValueError, match="one channel"):
        read_audio(tmp_path, "b.wav", 8_000)


def test_a_table_has_a_row_for_each_row():
    table = markdown_table(["a", "b"], [["x", 1], ["y", Figure(0.5, 2)]])
    assert table.splitlines() == ["| a | b |", "|---|---:|", "| x | 1 |", "| y | 50.0 % |"]


def test_reconstruction_keeps_lengths_and_does_not_depend_on_the_batch():
    codec, extractor = build_codec(), EncodecFeatureExtractor(feature_size=1, sampling_rate=16_000)
    waveforms = [tone(0.5), tone(0.9, frequency=200.0), tone(0.21)]
    together, seconds, codes = reconstruct(codec, extractor, waveforms, "neural", batch_size=3)
    alone, _, _ = reconstruct(codec, extractor, waveforms, "neural", batch_size=1)
    assert [len(waveform) for waveform in together] == [len(waveform) for waveform in waveforms]
    assert [len(row) for row in codes] == [math.ceil(len(waveform) / 1280) for waveform in waveforms]
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(together, alone, strict=True))
    assert seconds["encode"] > 0 and seconds["decode"] > 0


class DeafRecognizer:
    """Hears the same everywhere."""

    def transcribe(self, waveforms, progress=False):
        return ["one"] * len(waveforms)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A random model in a folder, and held-out lists of two rows each."""
    folder = tmp_path_factory.mktemp("evaluation")
    processor = build_processor()
    build_model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    lists = folder / "eval"
    lists.mkdir()
    soundfile.write(lists / "speech.wav", tone(0.4), 16_000)
    for task, suffixes in (("spoken_qa", "seen unheard unheard_natural"), ("asr", "seen unheard unheard_natural")):
        for suffix in suffixes.split():
            write_list(lists, f"{task}_{suffix}", task, "speech.wav")
    write_list(lists, "development_spoken_qa_seen", "spoken_qa", "speech.wav", count=3)
    write_list(lists, "development_asr_seen", "asr", "speech.wav", count=3)
    write_list(lists, "development_tts", "tts", None, count=3)
    write_list(lists, "text_qa", "text_qa", None)
    write_list(lists, "tts", "tts", None)
    return EvaluationArguments(
        model=str(folder / "model"),
        data_dir=lists,
        output_dir=folder / "report",
        steps=[2, 8],
        thresholds=[0.9],
        comparison_limit=1,
        timed=1,
        cold_runs=0,
        max_new_tokens=12,
        batch_size=2,
    )


def write_list(folder, name, task, audio, count=2):
    question = "" if task in ("asr", "tts") else "one plus one"
    row = {
        "task": task,
        "question": question,
        "answer": "one",
        "kind": "k",
        "audio": audio,
        "answer_audio": "speech.wav",
    }
    lines = [json.dumps({"id": f"{name}-{index}", **row}) for index in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


def test_the_whole_evaluation_runs_and_goes_on_where_it_stopped(arguments, monkeypatch):
    evaluation = Evaluation(arguments, DeafRecognizer())
    evaluation.run()
    figures = evaluation.figures
    for key in ("spoken_qa_seen/exact", "asr_unheard/wer", "tts/speech_wer", "end_of_audio", "originals/tts"):
        assert figures[key].count == (4 if key == "end_of_audio" else 2), key
    assert figures["2 steps/tts/speech_wer"].count == figures["8 steps/tts/speech_wer"].count == 1
    assert figures["originals/tts"].value == 0  # "one" was expected and heard
    text = report(arguments, figures, evaluation.kinds)
    assert "2 steps" in text and "threshold 0.9" in text and "| k |" in text
    plot(arguments, figures, arguments.output_dir / "steps.png")
    assert (arguments.output_dir / "steps.png").stat().st_size > 1000

    def refuse(*_, **__):
        raise AssertionError("a part that was measured is measured again")

    monkeypatch.setattr(Talker, "answer", refuse)
    again = Evaluation(arguments, DeafRecognizer())
    again.run()
    assert again.figures.keys() == figures.keys()


def test_the_development_split_reads_and_writes_files_of_its_own(arguments):
    arguments = dataclasses.replace(arguments, split="development", output_dir=arguments.output_dir.parent / "choices")
    evaluation = Evaluation(arguments, DeafRecognizer())
    evaluation.run()
    for name in ("spoken_qa_seen/exact", "asr_seen/wer", "tts/speech_wer"):
        assert evaluation.figures[name].count == 3
    assert "asr_unheard/wer" not in evaluation.figures
    assert "development lists" in report(arguments, evaluation.figures, evaluation.kinds)
    parts = list(arguments.output_dir.rglob("*.json"))
    assert parts and all(path.name.startswith("development_") for path in parts)
    assert HeldOutLists(arguments.data_dir).name("tts") == "tts"


def test_an_answer_has_ended_when_its_turn_is_over_and_no_span_hit_its_limit(arguments):
    talker = arguments.talker(arguments.model)
    end = talker.processor.token_ids.end_of_turn_token_id
    limit = talker.model.generation_config.max_audio_codes_per_span
    assert talker.has_ended([1, 2, end], 5)
    assert not talker.has_ended([1, 2], 5)  # cut off
    assert not talker.has_ended([1, 2, end], 0)  # never spoke
    assert not talker.has_ended([1, 2, end], limit)  # closed at the limit


def test_every_goal_of_the_report_has_a_measured_figure(arguments):
    evaluation = Evaluation(arguments, DeafRecognizer())
    evaluation.run()
    missing = [key for key, *_ in evaluate_ttt.GOALS if key not in evaluation.figures and key != "cold_command"]
    assert missing == []
