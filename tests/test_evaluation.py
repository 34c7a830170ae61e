"""Evaluation: figures, rows that survive a kill, reports and their comparison, the task set of ttt-tiny on a whole
(random) model."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from builders import build_codec, build_model, build_processor, tone
from transformers import EncodecFeatureExtractor

from modeling_ttt.ttt_codec import TttCodecConfig, TttCodecModel
from training_examples import evaluate_model
from training_examples.evaluation.backends import Answer, Sample, TttBackend, Turn
from training_examples.evaluation.figures import Figure, fingerprint, markdown_table, remember
from training_examples.evaluation.listening import open_listener
from training_examples.evaluation.measuring import Measured, of_median, of_ratio, of_scorer, share_of, speed_of
from training_examples.evaluation.options import EvaluationArguments, read_pairs
from training_examples.evaluation.reports import Report, Section, compare, verdict, write_report
from training_examples.evaluation.rows import EvaluationError, Listener, Run, append_rows, read_rows
from training_examples.evaluation.scoring import load_scorer
from training_examples.ttt_tiny import evaluate_codec, task_report, task_set
from training_examples.ttt_tiny.held_out import HeldOutLists
from training_examples.ttt_tiny.speech import read_audio, read_list


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
    for name in ("chat_template.jinja", "vocab.txt"):
        (tmp_path / name).write_text("what a prompt becomes")
        assert fingerprint(tmp_path) != before
        before = fingerprint(tmp_path)
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
    together, seconds, codes = evaluate_codec.reconstruct(codec, extractor, waveforms, "neural", batch_size=3)
    alone, _, _ = evaluate_codec.reconstruct(codec, extractor, waveforms, "neural", batch_size=1)
    assert [len(waveform) for waveform in together] == [len(waveform) for waveform in waveforms]
    assert [len(row) for row in codes] == [math.ceil(len(waveform) / 1280) for waveform in waveforms]
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(together, alone, strict=True))
    assert seconds["encode"] > 0 and seconds["decode"] > 0


def test_the_recogniser_is_told_the_rate_of_the_audio_tokenizer(tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 16, "num_encoder_blocks": 1, "num_code_blocks": 1, "num_mel_blocks": 1}
    frames = {"sampling_rate": 24_000, "hop_length": 1920, "mel_hop_length": 240, "n_fft": 960}
    vocoder = {"vocoder_hidden_size": 16, "num_vocoder_blocks": 1}
    TttCodecModel(TttCodecConfig(fsq_levels=[4, 4], **sizes, **frames, **vocoder)).save_pretrained(tmp_path / "codec")
    soundfile.write(tmp_path / "speech.wav", tone(0.4), 16_000)
    for name in evaluate_codec.LISTS:
        write_list(tmp_path, name, "tts", None)
    heard = []

    class Ear(Deaf):
        def transcribe(self, waveforms, sampling_rate, progress=False):
            heard.extend((len(waveform), sampling_rate) for waveform in waveforms)
            return super().transcribe(waveforms, sampling_rate)

    monkeypatch.setattr(evaluate_codec, "domain_recognizer", lambda *_: contextlib.nullcontext(Ear()))
    command = f"--model {tmp_path / 'codec'} --data_dir {tmp_path} --output_dir {tmp_path / 'out'} --vocoders neural"
    monkeypatch.setattr(sys, "argv", ["evaluate_codec.py", *command.split()])
    evaluate_codec.main()
    assert set(heard) == {(9600, 24_000)} and len(heard) == 2 * 2 * 2  # lists, originals and decoded, rows
    assert "held-out answers | neural | 0.0 %" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ rows on disk


class Echo:
    """Answers every sample with its text in capitals, and speaks for a second; notes what it was asked."""

    name = "echo"

    def __init__(self, fails_on=(), **settings):
        self.settings, self.fails_on, self.asked = settings, set(fails_on), []

    def answer(self, samples, task):
        if any(sample.id in self.fails_on for sample in samples):
            raise ValueError("this one cannot be answered")
        self.asked += [sample.id for sample in samples]
        return [
            Answer(s.turns[-1].text.upper(), tone(1.0), 16_000, 0.5, codes=8, forwards=4, speech_steps=2)
            for s in samples
        ]


class Deaf:
    """Hears the same everywhere."""

    def transcribe(self, waveforms, sampling_rate):
        return ["one"] * len(waveforms)


def samples(count=5):
    return [Sample(f"s{index}", (Turn(text=f"text {index}"),), (f"TEXT {index}",), "k") for index in range(count)]


def run_in(folder, backend, count=5):
    return Run(folder, "list", "tts", samples(count), backend.settings)


def test_answers_are_rows_as_they_come_and_a_second_run_asks_for_the_rest_alone(tmp_path):
    backend = Echo(model="a")
    run_in(tmp_path, backend, 3).answer(backend, 2)
    assert sorted(backend.asked) == ["s0", "s1", "s2"]
    rows = run_in(tmp_path, backend).answer(backend, 2)
    assert sorted(backend.asked) == ["s0", "s1", "s2", "s3", "s4"]
    assert [row["id"] for row in rows] == [f"s{index}" for index in range(5)]  # in their order
    assert rows[1] | {"audio": None, "sample": ""} == {
        "id": "s1", "sample": "", "kind": "k", "question": "text 1", "references": ["TEXT 1"], "text": "TEXT 1",
        "earlier": [],
        "audio": None, "codes": 8, "forwards": 4, "speech_steps": 2, "ended": None,
        "seconds": 0.5, "audio_seconds": 1.0,
    }  # fmt: skip


def test_a_line_that_a_kill_cut_off_is_answered_again(tmp_path):
    backend = Echo(model="a")
    run = run_in(tmp_path, backend)
    run.answer(backend, 5)
    path = run.folder / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    backend.asked.clear()
    assert len(run_in(tmp_path, backend).answer(backend, 5)) == 5
    assert backend.asked == ["s4"]
    assert len(read_rows(path)) == 5


def test_rows_of_other_settings_are_neither_taken_nor_overwritten(tmp_path):
    first, second = Echo(model="a"), Echo(model="b")
    one, other = run_in(tmp_path, first), run_in(tmp_path, second)
    one.answer(first, 5)
    other.answer(second, 5)
    assert one.folder != other.folder and len(second.asked) == 5
    assert one.stored_settings() == {"task": "tts", "model": "a"}


def test_a_sample_that_cannot_be_answered_is_a_row_with_its_error_and_is_asked_again(tmp_path):
    backend = Echo(fails_on=["s1"], model="a")
    rows = run_in(tmp_path, backend).answer(backend, 5)
    assert [row["id"] for row in rows if "error" in row] == ["s1"] and rows[1]["text"] == ""
    backend.fails_on.clear()
    backend.asked.clear()
    rows = run_in(tmp_path, backend).answer(backend, 5)
    assert backend.asked == ["s1"] and rows[1]["text"] == "TEXT 1"


def test_any_number_of_recordings_may_be_at_fault_and_the_others_are_asked(tmp_path):
    bad = [tmp_path / f"{index}.wav" for index in range(7)]
    for path in bad:
        path.write_bytes(b"RIFF nothing")
    spoken = [Sample(f"b{index}", (Turn(str(path), "x"),)) for index, path in enumerate(bad)]
    lost = Sample("lost", (Turn(text="x"),), problem="lost.wav is not there")
    backend = Echo(fails_on=[sample.id for sample in spoken], model="a")
    run = Run(tmp_path, "list", "asr", [*spoken, lost, *samples(2)], backend.settings)
    for _ in range(2):  # a second run says the same
        rows = run.answer(backend, 4)
        assert [row["id"] for row in rows if "unusable" not in row] == ["s0", "s1"] == backend.asked
        assert "0.wav' cannot be read as audio" in rows[0]["unusable"] and rows[7]["error"] == "lost.wav is not there"
        assert set(run.remember("length", {}, lambda row: len(row["text"]))) == {"s0", "s1"}
    assert sum(row["id"] == "lost" for row in read_rows(run.folder / "rows.jsonl")) == 1


def test_a_backend_that_fails_at_everything_ends_the_run(tmp_path):
    backend = Echo(fails_on=[f"s{index}" for index in range(9)], model="a")
    with pytest.raises(EvaluationError, match="5 samples failed .* cannot be answered"):
        run_in(tmp_path, backend, 9).answer(backend, 3)


def test_samples_that_fail_one_and_all_are_no_figures_however_few(tmp_path):
    backend = Echo(fails_on=["s0", "s1"], model="a")
    with pytest.raises(EvaluationError, match="none of 2 samples was answered, the first: .* cannot be answered"):
        run_in(tmp_path, backend, 2).answer(backend, 3)
    backend.fails_on = {"s1"}
    assert len(run_in(tmp_path, backend, 2).answer(backend, 3)) == 2


def test_a_sample_of_other_content_is_asked_again_and_listened_to_again(tmp_path):
    backend, listener = Echo(model="a"), Listener("deaf", Deaf, {})
    run = run_in(tmp_path, backend, 2)
    run.answer(backend, 5)
    run.listen(listener)
    changed = [Sample("s0", (Turn(text="other"),), ("OTHER",), "k"), *samples(2)[1:]]
    again = Run(tmp_path, "list", "tts", changed, backend.settings)
    assert [row["id"] for row in again.rows] == ["s1"] and again.data_hash != run.data_hash
    backend.asked.clear()
    assert [row["text"] for row in again.answer(backend, 5)] == ["OTHER", "TEXT 1"] and backend.asked == ["s0"]
    again.listen(listener)
    assert [row["id"] for row in read_rows(next(again.folder.glob("heard-*")))] == ["s0", "s1", "s0"]


def test_samples_that_share_an_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'s0'"):
        Run(tmp_path, "list", "tts", [*samples(1), *samples(1)], {})


def test_what_was_heard_is_remembered_and_recordings_may_go(tmp_path):
    backend, opened = Echo(model="a"), []
    run = run_in(tmp_path, backend)
    run.answer(backend, 5)

    def start():
        opened.append(1)
        return Deaf()

    listener = Listener("deaf", start, {})
    heard = run.listen(listener)
    assert heard == {f"s{index}": "one" for index in range(5)}
    run.drop_audio()
    assert run.listen(listener) == heard and len(opened) == 1
    assert not list((run.folder / "audio").glob("*"))


def test_another_recogniser_is_told_that_the_recordings_are_gone(tmp_path):
    backend = Echo(model="a")
    run = run_in(tmp_path, backend)
    run.answer(backend, 5)
    run.drop_audio()
    with pytest.raises(FileNotFoundError, match="keen cannot listen to 5 of 5 answers .* give another `--output_dir`"):
        run.listen(Listener("keen", Deaf, {"other": True}))


def test_details_are_those_of_now_and_what_is_made_of_them_is_made_anew(tmp_path):
    backend, made = Echo(model="a"), []

    def asked_as(words):
        details = [dataclasses.replace(sample, details={"asked": words}) for sample in samples(2)]
        run = Run(tmp_path, "list", "tts", details, backend.settings)
        run.answer(backend, 5)
        run.remember("judged", {}, lambda row: made.append(row["asked"]), made_of=lambda row: row["asked"])
        return {row["asked"] for row in run.rows}

    assert asked_as("a?") == {"a?"} and asked_as("b?") == {"b?"} and asked_as("b?") == {"b?"}
    assert len(backend.asked) == 2 and made == ["a?", "a?", "b?", "b?"]  # answered once, judged of both questions


@pytest.mark.parametrize("size", [3, 65_536])
def test_appending_cuts_off_what_a_kill_left(tmp_path, monkeypatch, size):
    monkeypatch.setattr("training_examples.evaluation.rows.TAIL_BYTES", size)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b')
    append_rows(path, [{"id": "c"}])
    assert read_rows(path) == [{"id": "a"}, {"id": "c"}]
    path.write_text('{"id": "b')
    append_rows(path, [{"id": "d"}])
    assert read_rows(path) == [{"id": "d"}]


# ------------------------------------------------------------------------------------------------ figures and reports


def test_speed_is_of_sums_and_of_what_rows_know():
    rows = [
        {"id": "a", "codes": 10, "forwards": 5, "speech_steps": 4, "seconds": 1.0, "audio_seconds": 2.0},
        {"id": "b", "codes": 20, "forwards": 5, "speech_steps": 2, "seconds": 1.0, "audio_seconds": 6.0},
        {"id": "c", "codes": None, "forwards": None, "seconds": None, "audio_seconds": 0.0},
    ]
    values = {measured.key: measured.figure.value for measured in speed_of(rows)}
    assert values == {"codes_per_forward": 3.0, "codes_per_step": 5.0, "forwards": 5.0, "real_time_factor": 0.25}
    assert speed_of(rows[2:]) == []


def test_a_median_has_an_interval():
    figure = of_median("m", "median", [1.0, 2.0, 9.0]).figure
    assert figure.value == 2.0 and figure.low == 1.0 and figure.high == 9.0 and figure.count == 3


def report_of(folder, name, flags, scorer=None):
    figures = [share_of("exact", "exact text", [(f"r{i}", flag) for i, flag in enumerate(flags)])]
    words = ["a b c d" if flag else "a b c x" for flag in flags]
    ids = [f"r{i}" for i in range(len(flags))]
    references = ["a b c d"] * len(flags)
    figures.append(of_scorer("wer", "word errors", "error_rate", ids, words, references, {"normalizer": "none"}))
    write_report(folder / name, f"report {name}", [Section("list", "A list", figures, ["A remark."], {"model": name})])
    return folder / name


def test_a_report_says_counts_intervals_and_settings_and_is_read_back(tmp_path):
    folder = report_of(tmp_path, "one", [True] * 30 + [False] * 10)
    text = (folder / "report.md").read_text()
    assert "| exact text | 75.0 % |" in text and "| 40 |" in text and "A remark." in text and "- model: one" in text
    report = Report.read(folder)
    measured = report.figures["list", "wer"]
    assert measured.figure.value == 10 / 160 and measured.lower_is_better and measured.scorer == "error_rate"
    assert measured.figure.low < 10 / 160 < measured.figure.high


def test_a_comparison_says_which_differences_exceed_their_intervals(tmp_path):
    base = [True, False] * 40
    better = [True] * 30 + base[30:]
    slightly = [True, True] + base[2:]
    folders = [report_of(tmp_path, name, flags) for name, flags in (("base", base), ("up", better), ("near", slightly))]
    table = compare([Report.read(folder) for folder in folders])
    exact = next(line for line in table.splitlines() if "exact text" in line)
    errors = next(line for line in table.splitlines() if "word errors" in line)
    for line in (exact, errors):
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[5] == "better" and cells[8] == "within chance", line
    assert "+18.8 (" in exact


def test_rows_of_other_data_are_not_compared_row_by_row_though_their_numbers_are_the_same(tmp_path):
    flags = [True] * 40 + [False] * 40
    few_more = [True] * 48 + [False] * 32

    def report(name, flags, data):
        figures = [share_of("exact", "exact", [(f"{i:06d}", flag) for i, flag in enumerate(flags)])]
        write_report(tmp_path / name, name, [Section("own_data", "Own data", figures, settings={"data": data})])
        return Report.read(tmp_path / name)

    first, same, other = report("a", flags, "1"), report("b", few_more, "1"), report("c", few_more, "2")
    assert "better" in compare([first, same]) and "Other data" not in compare([first, same])
    table = compare([first, other])
    assert "within chance" in table and "Other data than a's: own_data of c." in table


def test_what_has_no_interval_is_neither_better_nor_worse():
    nothing, one = of_ratio("k", "k", [("a", 0.0, 0.0)]), of_ratio("k", "k", [("a", 1.0, 5.0)])
    assert verdict(nothing, one) == verdict(one, nothing) == ("", "no intervals")


def test_a_mean_of_counts_is_no_share_though_every_row_counts_one():
    ones, zeros = ([(f"r{row}", value, 1.0) for row in range(2)] for value in (1.0, 0.0))
    forwards = of_ratio("forwards", "forwards an answer", ones)
    assert (forwards.figure.low, forwards.figure.high) == (1, 1)
    assert verdict(forwards, of_ratio("forwards", "forwards an answer", zeros))[0] == "-1.00 (-1.00 to -1.00)"
    share = share_of("exact", "exact text", [("r0", True), ("r1", True)]).figure
    assert (share.low, share.high) == (pytest.approx(0.025**0.5), 1)
    mean = of_scorer("rouge_l", "ROUGE-L", "rouge_l", ["a", "b"], ["hi", "hi"], ["hi", "hi"]).figure
    assert (mean.low, mean.high) == (1, 1)
    computed = load_scorer("rouge_l").compute(predictions=["hi", "hi"], references=["hi", "hi"])
    assert (computed["low"], computed["high"]) == (1, 1)


def test_reports_that_cannot_be_compared_are_refused_by_name(tmp_path):
    one = report_of(tmp_path, "one", [True, False])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Report.read(tmp_path / "nowhere")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json"):
        Report.read(tmp_path / "other.json")
    with pytest.raises(ValueError, match="two reports"):
        compare([Report.read(one)])
    write_report(tmp_path / "two", "t", [Section("another", "A list", [])])
    with pytest.raises(ValueError, match="no figure in common"):
        compare([Report.read(one), Report.read(tmp_path / "two")])


def test_a_figure_that_is_none_is_no_number_in_the_file(tmp_path):
    nothing = Measured("k", "t", Figure(math.nan, 0))
    write_report(tmp_path, "t", [Section("s", "S", [nothing])])
    assert json.loads((tmp_path / "report.json").read_text())["sections"][0]["figures"][0]["value"] is None
    assert "| t | none |" in (tmp_path / "report.md").read_text()


# ------------------------------------------------------------------------------------------------ options


def test_options_are_read_and_wrong_ones_refused_by_name():
    assert read_pairs("generation", ["a=1", "b=x", "c=null"]) == {"a": 1, "b": "x", "c": None}
    with pytest.raises(ValueError, match="--generation.* a: "):
        read_pairs("generation", ["a"])
    with pytest.raises(ValueError, match="--batch_size.* 0"):
        EvaluationArguments(batch_size=0)


def test_recognisers_are_opened_by_what_they_are(tmp_path):
    (tmp_path / "ctranslate").mkdir()
    (tmp_path / "ctranslate" / "model.bin").write_bytes(b"")
    (tmp_path / "ctranslate" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "asr").mkdir()
    (tmp_path / "asr" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "lines.txt").write_text("one two\n")
    for spec, kind, name in (
        ("base", "whisper", "whisper-base"),
        ("whisper:tiny.en", "whisper", "whisper-tiny.en"),
        (str(tmp_path / "ctranslate"), "whisper", "whisper-ctranslate"),
        (str(tmp_path / "asr"), "transformers", "asr"),
        ("transformers:openai/whisper-tiny", "transformers", "whisper-tiny"),
        (f"pocketsphinx:{tmp_path / 'lines.txt'}", "pocketsphinx", "lines"),
    ):
        listener = open_listener(spec)
        assert (listener.settings["kind"], listener.name) == (kind, name)
    with pytest.raises(ValueError, match="'vosk'.*pocketsphinx"):
        open_listener("vosk:small")
    (tmp_path / "nothing").mkdir()
    for spec in (str(tmp_path / "nothing"), f"whisper:{tmp_path / 'nothing'}"):
        with pytest.raises(ValueError, match="--recogniser.*model.bin"):
            open_listener(spec)


def test_pocketsphinx_hears_a_closed_domain(tmp_path):
    (tmp_path / "lines.txt").write_text("eleven minus four is seven\nten minus two is eight\n")
    recogniser = open_listener(f"pocketsphinx:{tmp_path / 'lines.txt'}").open()
    wave, rate = soundfile.read("tests/fixtures/recognition/eleven_minus_four_is_seven.flac", dtype="float32")
    assert recogniser.transcribe([wave], rate) == ["eleven minus four is seven"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="empty.txt"):
        open_listener(f"pocketsphinx:{tmp_path / 'empty.txt'}").open()


def test_a_task_set_is_found_by_file_and_by_name_and_a_wrong_one_refused(tmp_path):
    path = "training_examples/ttt_tiny/task_set.py"
    assert evaluate_model.load_task_set(path) is task_set
    assert evaluate_model.load_task_set("training_examples.ttt_tiny.task_set") is task_set
    own = tmp_path / "own_set.py"
    own.write_text("class Arguments: pass\ndef run(arguments): return 'done'\n")
    assert evaluate_model.load_task_set(str(own)).run(None) == "done"
    own.write_text("")
    for wrong in (str(own), str(tmp_path / "none.py"), "training_examples.nothing"):
        with pytest.raises(ValueError, match="--task_set"):
            evaluate_model.load_task_set(wrong)
    (tmp_path / "run.yaml").write_text("task_set: a.b\n")
    assert evaluate_model.chosen_task_set([str(tmp_path / "run.yaml")]) == "a.b"
    assert evaluate_model.chosen_task_set([str(tmp_path / "run.yaml"), "--task_set", "c"]) == "c"
    assert evaluate_model.chosen_task_set(["--model", "m"]) == evaluate_model.BENCHMARKS


def test_recognisers_of_one_name_are_told_apart(tmp_path):
    args = EvaluationArguments(recogniser=["whisper:base", "transformers:openai/whisper-base", "whisper:tiny"])
    assert [listener.name for listener in args.listeners()] == ["whisper-base", "whisper-base-2", "whisper-tiny"]


# ------------------------------------------------------------------------------------------------ ttt-tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model and its twin in folders, and held-out lists of two rows each."""
    folder = tmp_path_factory.mktemp("evaluation")
    processor = build_processor()
    model = build_model(processor)
    model.generation_config.max_new_tokens = 60
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model.config.audio_objective = "autoregressive"
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(folder / "twin")
    processor.save_pretrained(folder / "twin")
    lists = folder / "eval"
    lists.mkdir()
    soundfile.write(lists / "speech.wav", tone(0.4), 16_000)
    for split, count in (("", 2), ("development_", 3)):
        for name in ("spoken_qa_seen", "asr_seen", "other_seen", "not_heard"):
            task = "asr" if name.startswith("asr") else "spoken_qa"
            write_list(lists, split + name, task, "speech.wav", count)
        write_list(lists, f"{split}tts", "tts", None, count)
        turns = [turn("speech.wav"), turn(None)]
        write_rows(lists, f"{split}two_turns", [{"task": "spoken_qa", "kind": "k", "turns": turns}] * count)
    write_list(lists, "text_qa", "text_qa", None)
    write_list(lists, "human_digits", "asr", "speech.wav")
    write_list(lists, "codec_answers", "codec", None)
    return folder


def turn(audio):
    return {"question": "x", "answer": "hi", "kind": "k", "audio": audio, "answer_audio": "speech.wav"}


def write_list(folder, name, task, audio, count=2):
    question = "" if task in ("asr", "tts", "codec") else "one plus one"
    spoken = None if task == "asr" else "speech.wav"
    row = {"task": task, "question": question, "answer": "one", "kind": "k", "audio": audio, "answer_audio": spoken}
    write_rows(folder, name, [row] * count)


def write_rows(folder, name, rows):
    lines = [json.dumps({"id": f"{name}-{index}", **row}) for index, row in enumerate(rows)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def one_listener(monkeypatch):
    monkeypatch.setattr(task_set, "listeners", lambda args: [Listener("deaf", Deaf, {})])


def arguments(folder, output, **options):
    defaults = {"sweep_limit": 1, "blocks": [4], "steps": [2], "thresholds": [0.9], "prefixes": [0.5]}
    defaults |= {"order_biases": [0.0, 0.1], "timed": 1, "cold_runs": 0, "batch_size": 2}
    return task_set.Arguments(
        model=str(folder / "model"), data_dir=folder / "eval", output_dir=output, **(defaults | options)
    )


def test_ttt_tinys_task_set_measures_model_and_twin_and_goes_on_where_it_stopped(
    folder, tmp_path, one_listener, monkeypatch
):
    args = arguments(folder, tmp_path, twin=str(folder / "twin"))
    text = task_set.run(args)
    report = Report.read(tmp_path)
    values = {key: measured.figure for key, measured in report.figures.items()}
    for key in ("spoken_qa_seen/exact", "asr_seen/wer", "two_turns/exact", "human_digits/k/wer", "false_alarms"):
        assert values["model", key].count == values["twin", key].count == 2, key
    assert values["model", "spoken_qa_seen/exact"].value == 0  # it says "hi"
    assert values["model", "two_turns/exact"].value == values["model", "two_turns/first/exact"].value == 1
    assert values["original", "tts/speech/deaf"].value == 0  # "one" was to be said, and "one" is always heard
    assert values["codec", "codec_answers/speech/deaf"].count == 2
    assert values["model", "spoken_qa_seen/speech/deaf"].value == 1  # "hi" was said, and "one" heard
    # Every token of the twin takes a forward; 12 of them, of which the codes are fewer.
    assert values["model", "tts/codes_per_forward"].value > 1
    assert values["twin_speed", "speed/seconds"].count == 1
    assert values["model_speed", "speed/first_sound"].count == 1
    titles = [title for title in report.section_titles.values() if title.startswith("blocks of")]
    assert len(titles) == 2 * 2 + 1 and "blocks of 26, threshold 0.9, order 0.1" in titles
    assert values["sweep/blocks of 4, 2 steps", "tts/speech/deaf"].count == 1
    assert values["sweep/blocks of 26, prefix 0.5", "tts/speech/deaf"].count == 1
    for part in (
        "at least",
        "| autoregressive twin |",
        "by kind of question",
        "never heard by the codec",
        "rows are met",
    ):
        assert part in text
    assert "Not measured, for the lists are not there: spoken_qa_unheard," in text
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert not list(tmp_path.glob("sweep/*/audio/*")) and list(tmp_path.glob("model/tts-*/audio/*"))

    def refuse(*_, **__):
        raise AssertionError("a part that was measured is measured again")

    monkeypatch.setattr(TttBackend, "answer", refuse)
    assert task_set.run(args) == text


def test_the_development_split_reads_lists_of_its_own(folder, tmp_path, one_listener):
    text = task_set.run(arguments(folder, tmp_path, split="development", sweep=False, timed=0))
    assert "development lists" in text
    figures = Report.read(tmp_path).figures
    assert figures["model", "asr_seen/wer"].figure.count == 3
    assert ("model", "text_qa/exact") not in figures and ("codec", "codec_answers/speech/deaf") not in figures
    assert HeldOutLists(folder / "eval").name("tts") == "tts"


def test_fewer_rows_can_be_listened_to_than_are_answered(folder, tmp_path, one_listener):
    options = {"split": "development", "sweep": False, "timed": 0}
    task_set.run(arguments(folder, tmp_path, listen_limit=2, **options))
    counts = {key: measured.figure.count for key, measured in Report.read(tmp_path).figures.items()}
    for key in ("tts/exact", "tts/codes_per_step", "spoken_qa_seen/exact", "asr_seen/wer"):
        assert counts["model", key] == 3, key
    for section in ("original", "codec", "model"):
        assert counts[section, "tts/speech/deaf"] == 2, section
    task_set.run(arguments(folder, tmp_path, listen_limit=2, limit=1, **options))
    assert Report.read(tmp_path).figures["model", "tts/speech/deaf"].figure.count == 1
    with pytest.raises(ValueError, match="`--listen_limit` is 0; it must be at least 1"):
        arguments(folder, tmp_path, listen_limit=0)


def test_rows_whose_recording_cannot_be_read_are_named_and_in_no_figure(folder, tmp_path, one_listener):
    lists = shutil.copytree(folder / "eval", tmp_path / "eval")
    row = {"task": "asr", "question": "", "answer": "hi", "kind": "k", "answer_audio": None}
    broken = [{**row, "audio": name} for name in ("speech.wav", "lost.wav", "speech.wav")]
    write_rows(lists, "development_asr_seen", broken)
    options = {"split": "development", "lists": ["asr_seen"], "sweep": False, "timed": 0, "data_dir": lists}
    args = dataclasses.replace(arguments(folder, tmp_path / "out"), **options)
    text = task_set.run(args)
    assert "asr_seen: 1 of 3 rows have no recording that can be read" in text and "lost.wav" in text
    figure = Report.read(tmp_path / "out").figures["model", "asr_seen/wer"].figure
    assert figure.count == 2 and figure.value == 0  # it says "hi" wherever it is asked
    spoken = [{**row, "task": "spoken_qa", "answer_audio": "speech.wav"} for row in broken]
    write_rows(lists, "development_spoken_qa_seen", spoken)
    args = dataclasses.replace(args, lists=["spoken_qa_seen"], listen_limit=2, output_dir=tmp_path / "fewer")
    assert "spoken_qa_seen: 1 of 3 rows have no recording that can be read" in task_set.run(args)  # not of 2


def test_lists_that_are_all_missing_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="spoken_qa_unheard.*build_speech.py"):
        task_set.Evaluation(arguments(folder, tmp_path, lists=["spoken_qa_unheard"]))


@pytest.mark.parametrize("trusts", [False, True])
def test_ttt_tinys_task_set_passes_on_whether_code_may_run(folder, tmp_path, one_listener, monkeypatch, trusts):
    told = []

    class Noting(TttBackend):
        def __init__(self, *args, **options):
            told.append(options["trust_remote_code"])
            super().__init__(*args, **options)

    monkeypatch.setattr(task_set, "TttBackend", Noting)
    monkeypatch.setattr(task_set.subprocess, "run", lambda command, **_: told.append("--trust_remote_code" in command))
    args = arguments(folder, tmp_path, twin=str(folder / "twin"), trust_remote_code=trusts, sweep=False, cold_runs=1)
    task_set.Evaluation(args).cold_command()
    assert told == [trusts] * 3


def test_options_of_the_sweep_are_refused_before_anything_is_answered(folder, tmp_path):
    args = arguments(folder, tmp_path, prefixes=[1.5])
    with pytest.raises(ValueError, match="`generation`: `audio_prefix_probability` is 1.5"):
        task_set.Evaluation(args)
    task_set.Evaluation(dataclasses.replace(args, sweep=False))


def test_an_answer_has_ended_when_its_turn_is_over_and_no_span_hit_its_limit(folder):
    sample = Sample("a", (Turn(text="x"),))
    (answer,) = TttBackend(str(folder / "model")).answer([sample], "text_chat")
    assert answer.text == "hi" and answer.codes == 40 and not answer.ended  # its span is cut at 40 codes
    (cut_off,) = TttBackend(str(folder / "model"), generation={"max_new_tokens": 5}).answer([sample], "text_chat")
    assert not cut_off.ended and cut_off.codes < 5
    options = {"max_audio_codes_per_span": 10}  # the call's limit, not the checkpoint's
    (shorter,) = TttBackend(str(folder / "model"), generation=options).answer([sample], "text_chat")
    assert shorter.codes == 10 and not shorter.ended


def test_the_limit_of_a_span_is_held_against_each_span(folder, monkeypatch):
    backend = TttBackend(str(folder / "model"))  # whose limit is 40
    ids, model = backend.processor.token_ids, backend.pipe.model
    code = ids.audio_code_id_start + 3

    def written(*sizes):
        turn = []
        for size in sizes:
            turn += [ids.begin_of_audio_token_id, *[code] * size, ids.end_of_audio_token_id]
        return [*turn, ids.end_of_turn_token_id]

    def ended(*sizes):
        def generate(input_ids, **_):
            new = torch.tensor([written(*sizes)])
            return types.SimpleNamespace(sequences=torch.cat([input_ids, new], dim=1))

        monkeypatch.setattr(model, "generate", generate)
        (answer,) = backend.answer([Sample("a", (Turn(text="x"),))], "text_chat")
        assert answer.codes == sum(sizes)
        return answer.ended

    assert ended(26, 30) and not ended(26, 40) and ended()
    monkeypatch.setattr(model.config, "audio_objective", "autoregressive")  # which is not limited
    assert ended(41)


def test_an_answer_that_ends_with_its_last_span_has_ended(folder):
    """As ttt-tiny's do: there is no end of the turn to be found."""
    backend = TttBackend(str(folder / "model"))
    ids = backend.processor.token_ids
    head = backend.pipe.model.get_output_embeddings().weight
    with torch.no_grad():  # every code could be the end as well
        head[ids.end_of_last_audio_token_id] = head[ids.audio_code_id_start + 3]
        head[ids.audio_code_id_start + 3] *= 0.9
    eos = [ids.end_of_turn_token_id, ids.end_of_last_audio_token_id]
    short = Sample("a", (Turn(text="x"),))
    for generation, ended in (({}, True), ({"max_new_tokens": 4}, False)):
        (answer,) = backend.with_generation(eos_token_id=eos, **generation).answer([short], "text_chat")
        assert answer.ended is ended, answer


def test_the_twin_takes_a_forward_a_token(folder):
    (answer,) = TttBackend(str(folder / "twin")).answer([Sample("a", (Turn(text="x"),))], "text_chat")
    assert answer.forwards == 12 and answer.codes <= answer.speech_steps < 12  # a forward a code and an end token


def test_an_option_that_is_none_takes_off_what_the_checkpoint_sets(folder):
    backend = TttBackend(str(folder / "model"))
    backend.pipe.model.generation_config.audio_confidence_threshold = 0.5
    backend.pipe.model.generation_config.audio_steps_per_block = 4
    sample = Sample("a", (Turn(text="x"),))
    options = {"audio_block_size": 4}  # asked for steps, too, a call takes no threshold from the checkpoint
    (sure,) = backend.with_generation(**options).answer([sample], "text_chat")
    (steps,) = backend.with_generation(**options, audio_confidence_threshold=None).answer([sample], "text_chat")
    assert steps.forwards > 2 * sure.forwards  # sure of everything at once
    assert steps.speech_steps == 40 and sure.speech_steps == 10
    assert backend.pipe.model.generation_config.audio_confidence_threshold == 0.5
    said = backend.with_generation(audio_block_size=8, audio_steps_per_block=3).decoding()
    assert (said["audio_block_size"], said["audio_steps_per_block"], said["audio_confidence_threshold"]) == (8, 3, None)
    assert backend.decoding()["audio_confidence_threshold"] == 0.5


def test_a_streamed_answer_is_timed_at_the_settings_of_a_whole_one(folder, tmp_path, monkeypatch):
    backend = TttBackend(str(folder / "model"), generation={"audio_prefix_probability": None})
    model, seen = backend.pipe.model, []
    model.generation_config.audio_prefix_probability = 0.4
    generate = model.generate

    def noting(*args, **kwargs):
        seen.append(model.generation_config.audio_prefix_probability)
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", noting)
    sample = Sample("a", (Turn(str(folder / "eval" / "speech.wav")),))
    assert len(task_set.time_first_sound(backend, [sample])) == 1
    backend.answer([sample], "spoken_qa")
    assert seen == [None, None] and model.generation_config.audio_prefix_probability == 0.4


def test_samples_of_different_numbers_of_turns_are_not_one_batch(folder):
    one, two = Sample("a", (Turn(text="x"),)), Sample("b", (Turn(text="x"), Turn(text="y")))
    with pytest.raises(ValueError, match="number of turns"):
        TttBackend(str(folder / "model")).answer([one, two], "text_chat")


def test_the_goals_of_the_report_have_measured_figures(folder, tmp_path, one_listener):
    for name in ("spoken_qa_unheard", "spoken_qa_unheard_natural", "asr_unheard", "asr_unheard_natural"):
        write_list(folder / "eval", name, name[:3] if name[0] == "a" else "spoken_qa", "speech.wav")
    for name in ("other_unheard", "human_other", "control_digits", "human_words"):
        write_list(folder / "eval", name, "spoken_qa" if "other" in name else "asr", "speech.wav")
    try:
        task_set.run(arguments(folder, tmp_path, sweep=False))
    finally:
        for name in ("spoken_qa_unheard", "spoken_qa_unheard_natural", "asr_unheard", "asr_unheard_natural"):
            (folder / "eval" / f"{name}.jsonl").unlink()
    found = {key for section, key in Report.read(tmp_path).figures if section in ("model", "model_speed")}
    kinds = ("dictation", "spoken then typed", "after_spoken")  # these lists have one kind, "k"
    listened = {asked.key for asked in task_report.ASKED if asked.of == "codec"}
    wanted = {asked.key.format("deaf") for asked in task_report.ASKED if asked.key not in listened}
    wanted |= {key for key, _ in task_report.FURTHER}
    wanted = {key for key in wanted if not any(kind in key for kind in kinds)}
    assert wanted - found == {"speed/cold_command"}
