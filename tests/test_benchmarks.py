"""evaluate_model.py on stand-ins: every benchmark's layout with a few rows in its columns, data of one's own, models
and judges behind real addresses. No figure of a stand-in is the benchmark's."""

import json
import shutil
import sys
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
from builders import build_model, build_processor, tone
from datasets import Dataset, Features, Value
from serving import serve
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from training_examples import evaluate_model
from training_examples.evaluation import benchmarks, openai_backend, tasks
from training_examples.evaluation.backends import Sample, TttBackend, Turn
from training_examples.evaluation.judging import AGREE_PROMPT, RATE_PROMPT, Judgement
from training_examples.evaluation.listening import open_listener
from training_examples.evaluation.openai_backend import AddressError, OpenAIBackend
from training_examples.evaluation.reports import Report
from training_examples.evaluation.rows import Run, read_rows
from training_examples.evaluation.scoring import load_scorer
from training_examples.evaluation.tasks import TASKS, read_samples, references_of

SPEECH = Path(__file__).parent / "fixtures" / "recognition"
RECORDINGS = sorted(SPEECH.glob("*.flac"))
WORDS = [path.stem.replace("_", " ") for path in RECORDINGS]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A whole model that answers everything with "hi" and 40 codes."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_processor()
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backend(model_folder):
    return TttBackend(str(model_folder))


@pytest.fixture
def answering(backend, monkeypatch):
    """Every evaluation of the test is of that model, which is loaded once."""
    monkeypatch.setattr(benchmarks.Arguments, "backend", lambda self: backend)


def parquet(folder, columns):
    """A table whose audio is in it, as datasets on the Hub have it."""
    rows = {"audio": [{"bytes": path.read_bytes(), "path": path.name} for path in RECORDINGS], **columns}
    features = {"audio": {"bytes": Value("binary"), "path": Value("string")}}
    features |= {name: Features.from_dict({"x": _feature(values[0])})["x"] for name, values in columns.items()}
    Dataset.from_dict(rows, features=Features(features)).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def _feature(value):
    text = {"dtype": "string", "_type": "Value"}
    return {"feature": text, "_type": "List"} if isinstance(value, list) else text


def csv_with_files(folder, columns, audio="audio_filename", below="audios"):
    """A CSV file and a folder of recordings beside it, as OpenAudioBench and Clotho have them."""
    (folder / below).mkdir()
    names = [shutil.copy(path, folder / below / path.name).name for path in RECORDINGS]
    Dataset.from_dict({audio: names, **columns}).to_csv(folder / "rows.csv", index=False)
    return folder


def kaldi(folder):
    (folder / "wav").mkdir()
    for path in RECORDINGS:
        shutil.copy(path, folder / "wav" / path.name)
    (folder / "wav.scp").write_text("".join(f"u{i}\twav/{path.name}\n" for i, path in enumerate(RECORDINGS)))
    (folder / "trans.txt").write_text("u0\t你好世界\nu1\t我有12个\nu2\t打开WIFI\n", encoding="utf-8")
    return folder


def macs(folder):
    (folder / "audio").mkdir()
    entries = []
    for path in RECORDINGS:
        shutil.copy(path, folder / "audio" / path.name)
        notes = [{"annotator_id": n, "sentence": f"hi there {n}", "tags": ["adults_talking"]} for n in range(2)]
        entries.append({"filename": path.name, "annotations": notes})
    (folder / "MACS.yaml").write_text(json.dumps({"files": entries}))  # JSON is YAML
    return folder


def uro(folder, sets):
    for name in sets:
        (folder / "basic" / name / "wav").mkdir(parents=True)
        shutil.copy(RECORDINGS[0], folder / "basic" / name / "wav" / "0.flac")
        row = {"id": 0, "source_wav": "wav/0.flac", "source_text": "say hi", "target_text": "hi"}
        (folder / "basic" / name / "test.jsonl").write_text(json.dumps(row) + "\n")
    return folder


CHINESE = {"text": ["你好世界", "我有十二个", "打开WIFI"]}
STAND_INS = {
    "aishell1": (lambda f: parquet(f, CHINESE), {"text/cer": 1.0}),
    "aishell2": (kaldi, {"text/cer": 1.0}),
    "wenetspeech_meeting": (lambda f: parquet(f, CHINESE), {"text/cer": 1.0}),
    "wenetspeech_net": (lambda f: parquet(f, CHINESE), {"text/cer": 1.0}),
    "librispeech": (lambda f: parquet(f, {"text": ["HI", "HI THERE", "OH HI"]}), {"text/wer": 2 / 5}),
    "llama_questions": (
        lambda f: parquet(f, {"Questions": ["a?", "b?", "c?"], "Answer": ["Hi", "no", "hi"]}),
        {"text/accuracy": 2 / 3},
    ),
    "trivia_qa": (
        lambda f: csv_with_files(f, {"question": ["a?", "b?", "c?"], "answer": ["['no', 'hi']", "x", "y"]}),
        {"text/accuracy": 1 / 3},
    ),
    "web_questions": (
        lambda f: parquet(f, {"question": ["a?", "b?", "c?"], "answers": [["hi"], ["no", "Hi."], ["x"]]}),
        {"text/accuracy": 2 / 3},
    ),
    "alpaca_eval": (lambda f: parquet(f, {"instruction": ["a?", "b?", "c?"], "output": ["x", "y", "z"]}), {}),
    "clotho": (
        lambda f: csv_with_files(
            f, {f"caption_{n}": [f"hi {n}", f"a dog {n}", "rain"] for n in range(1, 6)}, "file_name", "evaluation"
        ),
        {"text/cider_d": None, "text/rouge_l": None},
    ),
    "macs": (macs, {"text/cider_d": 0.0, "text/rouge_l": None}),
    "uro_basic": (
        lambda f: uro(f, ["Repeat", "GaokaoEval", "Summary", "AlpacaEval"]),
        {"text/Repeat/repeat": 100.0},
    ),
    "uro_pro": (lambda f: uro(f, ["UnderEmotion-en", "ClothoEval-en"]), {}),
}


def test_every_row_of_the_seed_has_a_task_and_a_stand_in():
    assert set(STAND_INS) == set(TASKS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_stand_in_of_every_benchmark_is_answered_and_scored(name, tmp_path, answering):
    (tmp_path / "data").mkdir()
    write, expected = STAND_INS[name]
    data = write(tmp_path / "data")
    text = benchmarks.run(benchmarks.Arguments(task=[name], data=str(data), output_dir=tmp_path / "out"))
    figures = {key: measured.figure for (_, key), measured in Report.read(tmp_path / "out").figures.items()}
    for key, value in expected.items():
        assert value is None or figures[key].value == pytest.approx(value), key
    assert not [key for key in figures if key.startswith("judged")] and not [k for k in figures if "/own" in k]
    rows = read_rows(next((tmp_path / "out" / "rows").glob("*/rows.jsonl")))
    assert {row["text"] for row in rows} == {"hi"} and not [row for row in rows if "error" in row]
    assert f"Data in the layout of {TASKS[name].title}" in text and "not the benchmark" in text
    assert "Published" not in text and "real_time_factor" in figures and "codes_per_forward" in figures
    assert ("not judged" in text) == (name in ("alpaca_eval", "uro_basic", "uro_pro"))
    assert "speech not scored" in text and "- system_prompt: " in text and "- data: " in text


def test_a_benchmark_is_called_by_its_name_only_when_all_of_it_was_measured(tmp_path, answering, monkeypatch):
    data = parquet(tmp_path, CHINESE)
    monkeypatch.setitem(TASKS, "aishell1", replace(TASKS["aishell1"], rows=3))
    args = {"task": ["aishell1"], "data": str(data), "output_dir": tmp_path / "out"}
    whole = benchmarks.run(benchmarks.Arguments(**args))
    assert "## AISHELL-1, test\n" in whole and "Published for the 3B model: 5.78" in whole
    part = benchmarks.run(benchmarks.Arguments(**args, limit=2))
    assert "(2 of 3 rows): not the benchmark" in part and "Published" not in part


# ------------------------------------------------------------------------------------------------ data of one's own


def own_data(folder):
    rows = [{"file": str(path), "said": words} for path, words in zip(RECORDINGS, WORDS, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, words)])
    evaluate_model.main()


def test_data_of_ones_own_is_measured_and_compared_by_the_command(tmp_path, model_folder, monkeypatch, capsys):
    data = own_data(tmp_path)
    options = [
        "--model",
        model_folder,
        "--data",
        data,
        "--columns",
        "audio=file",
        "text=said",
        "--scorer",
        "wer",
        "exact",
    ]
    command(monkeypatch, *options, "--output_dir", tmp_path / "one", "--limit", 2)
    assert "## Own data" in capsys.readouterr().out
    rows = next((tmp_path / "one" / "rows").glob("*/rows.jsonl"))
    before = rows.read_bytes()
    command(monkeypatch, *options, "--output_dir", tmp_path / "one")  # goes on with the rest
    assert rows.read_bytes().startswith(before) and len(read_rows(rows)) == 3
    figures = {key: m.figure for (_, key), m in Report.read(tmp_path / "one").figures.items()}
    assert figures["text/wer"].value == 1 and figures["text/wer"].count == 3 and figures["text/exact"].value == 0

    (tmp_path / "lines.txt").write_text("\n".join(WORDS))
    listen = ["--recogniser", f"pocketsphinx:{tmp_path / 'lines.txt'}"]
    command(monkeypatch, *options, *listen, "--output_dir", tmp_path / "two")
    figures = {key: m.figure for (_, key), m in Report.read(tmp_path / "two").figures.items()}
    assert {"speech/lines/wer", "own_speech/lines"} <= set(figures)
    capsys.readouterr()
    command(monkeypatch, "--compare", tmp_path / "one", tmp_path / "two", "--output_dir", tmp_path / "both")
    out = capsys.readouterr().out
    assert "own_data: word error rate, text" in out and "within chance" in out
    assert (tmp_path / "both" / "comparison.md").read_text() in out


def test_answers_without_a_word_have_no_errors_of_their_speech():
    rows = [{"id": name, "text": "Hmm.", "audio": "a.flac"} for name in "ab"]
    heard = {"a": "him", "b": ""}
    assert benchmarks.own_speech(rows, heard, "ear", "en") == benchmarks.own_speech([], {}, "ear", "en") == []
    (some,) = benchmarks.own_speech([*rows, {**rows[0], "id": "c", "text": "hi"}], {**heard, "c": "hi"}, "ear", "en")
    assert some.figure.value == 1 and some.figure.count == 3  # what was heard in the first is inserted


def test_a_module_of_evaluate_of_ones_own_is_a_scorer(tmp_path, answering):
    (tmp_path / "length").mkdir()
    (tmp_path / "length" / "length.py").write_text(
        '''"""Mean letters."""
import datasets
import evaluate


class Length(evaluate.Metric):
    """Mean letters."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        return {"letters": sum(map(len, predictions)) / len(predictions)}
'''
    )
    args = benchmarks.Arguments(
        data=str(own_data(tmp_path)),
        columns=["audio=file", "text=said"],
        scorer=[str(tmp_path / "length")],
        output_dir=tmp_path / "out",
    )
    assert "| length, text (letters) | 2.00 |" in benchmarks.run(args)


def test_texts_are_asked_aloud_and_folders_are_data_too(tmp_path, answering):
    (tmp_path / "data").mkdir()
    shutil.copy(RECORDINGS[0], tmp_path / "data" / "a.flac")
    (tmp_path / "data" / "metadata.csv").write_text(f"file_name,text\na.flac,{WORDS[0]}\n")
    folder = benchmarks.Arguments(data=str(tmp_path / "data"), output_dir=tmp_path / "folder")
    assert "| word error rate, text | 100.0 % |" in benchmarks.run(folder)
    (tmp_path / "texts.jsonl").write_text('{"text": "hi"}\n{"text": "oh hi"}\n')
    aloud = benchmarks.Arguments(
        data=str(tmp_path / "texts.jsonl"), prompt="tts", scorer=["exact"], output_dir=tmp_path / "aloud"
    )
    assert "| exact answers, text | 50.0 % |" in benchmarks.run(aloud)


def test_a_task_of_texts_is_asked_texts_though_the_data_has_recordings(tmp_path, answering, backend, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy(RECORDINGS[0], tmp_path / "data" / "a.flac")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\na.flac,hi\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "hi"}\n')
    own = {**backend.processor.system_prompts, "shout": {"system_prompt": "Shout.", "needs_text": True}}
    monkeypatch.setattr(backend.processor, "system_prompts", own)
    for data, prompt in (("data", "tts"), ("data", "shout"), ("texts.jsonl", "shout")):
        args = benchmarks.Arguments(data=str(tmp_path / data), prompt=prompt, output_dir=tmp_path / f"{prompt} {data}")
        assert "| word error rate, text | 0.0 % |" in benchmarks.run(args)
    args.prompt = "whisper"
    with pytest.raises(ValueError, match="no task 'whisper'; choose one of .*shout"):
        benchmarks.run(args)
    address = OpenAIBackend("http://127.0.0.1:9/v1", "model")
    assert benchmarks.asks_text_alone(address, "tts") and not benchmarks.asks_text_alone(address, "asr")


def test_error_rates_are_those_of_the_language_and_of_the_name(tmp_path):
    def options(language, *scorers, **more):
        return [dict(use.options) for use in tasks.own_task("asr", scorers, more, language).scorings]

    assert options("en") == [{"normalizer": "english"}] and options("de") == [{"normalizer": "plain"}]
    assert options("zh") == options("zh", "cer") == [{"normalizer": "chinese"}]  # English words whole, as published
    assert options("en", "cer") == [{"normalizer": "english", "unit": "character"}]
    assert options("ja") == [{"normalizer": "plain", "unit": "character"}]
    assert options("auto", "wer", "exact") == [{"normalizer": "chinese"}, {}]
    assert options("fr", "error_rate", normalizer="none") == [{"normalizer": "none"}]

    use = tasks.own_task("asr", ["cer"], {}, "fr").scorings[0]
    scorer, said, heard = load_scorer(use.scorer), ["un café noir", "deux"], ["un cafe noire", "deus"]
    expected = jiwer.cer([text.replace(" ", "") for text in said], [text.replace(" ", "") for text in heard])
    assert scorer.compute(predictions=heard, references=said, **use.options)["error_rate"] == pytest.approx(expected)


def test_each_scorer_gets_the_options_that_it_takes():
    uses = tasks.own_task("asr", ["wer", "qa", "exact"], {"normalizer": "plain", "unit": "character"}, "en").scorings
    assert [dict(use.options) for use in uses] == [
        {"normalizer": "plain", "unit": "character"}, {}, {"normalizer": "plain"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer_options": ["normaliser=plain"]}, r"`--scorer_options` normaliser: the scorers \(wer\) take no such"),
        ({"scorer": ["qa"], "scorer_options": ["unit=word"]}, r"`--scorer_options` unit: the scorers \(accuracy\)"),
        ({"scorer_options": ["normalizer=chinse"]}, "`--scorer_options` of wer: `normalizer` is 'chinse'; use one of"),
        ({"scorer": ["repeat_score"], "scorer_options": ["highest_rate=high"]}, "`--scorer_options` of repeat_score:"),
        ({"scorer": ["were"]}, "There is no scorer 'were'"),
        ({"recogniser": ["wisper:base"]}, "`--recogniser` wisper:base: there is no kind 'wisper'"),
        ({"recogniser": ["basis"]}, "`--recogniser` basis: there is neither a folder basis nor such a model"),
        ({"recogniser": ["pocketsphinx:none.txt"]}, "`--recogniser` pocketsphinx:none.txt: there is no file none.txt"),
        ({"generation": ["audio_blok_size=8"]}, "`generation`: .*audio_blok_size"),
    ],
)
def test_what_scores_listens_and_generates_is_refused_before_the_first_answer(
    options, message, tmp_path, model_folder, monkeypatch
):
    monkeypatch.setattr(TttBackend, "answer", lambda *_: pytest.fail("an answer was asked for"))
    columns = {"data": str(own_data(tmp_path)), "columns": ["audio=file", "text=said"]}
    args = benchmarks.Arguments(model=str(model_folder), output_dir=tmp_path / "out", **columns, **options)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        benchmarks.run(args)
    assert not (tmp_path / "out").exists()


def test_rows_without_a_reference_are_named_and_in_no_figure(tmp_path, answering):
    texts = ["hi", None, "", *["hi"] * (len(RECORDINGS) - 1)]
    audio = [*RECORDINGS[:1], *RECORDINGS[:2], *RECORDINGS[1:]]
    data = tmp_path / "rows.jsonl"
    lines = [
        {"audio": str(path), "text": text, "id": f"r{i}"}
        for i, (path, text) in enumerate(zip(audio, texts, strict=True))
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = benchmarks.Arguments(data=str(data), output_dir=tmp_path / "out", scorer=["wer", "qa"])
    text = benchmarks.run(args)
    figures = {key: m.figure for (_, key), m in Report.read(tmp_path / "out").figures.items()}
    assert figures["text/accuracy"].count == len(RECORDINGS) and figures["text/accuracy"].value == 1
    # That nothing is said is a reference of an error rate: "hi" is an insertion there.
    assert figures["text/wer"].count == len(RECORDINGS) + 1 and figures["text/wer"].value == 1 / len(RECORDINGS)
    assert "2 rows have no reference and no part in figures of scorers; the first: r1" in text

    data.write_text("".join(json.dumps({**line, "text": None}) + "\n" for line in lines))
    with pytest.raises(ValueError, match="no row has a reference to be scored by .*--columns text=COLUMN"):
        read_samples(tasks.own_task("asr", [], {}, "en"), str(data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": ["aishell1"], "scorer_options": ["unit=word"]}, "`--scorer_options` goes with data of your own"),
        ({"task": ["aishell1"], "language": "zh"}, "`--language` goes with data of your own"),
        ({"data": "x", "voice": "alloy"}, "`--voice` is asked of an `--address`"),
        ({"data": "x", "judge": "http://x"}, "`--judge` goes with a `--task` whose answers are judged: alpaca_eval"),
        ({"task": ["aishell1"], "judge": "http://x"}, "`--judge` goes with a `--task`"),
        ({}, "`--task`, `--data`"),
        ({"task": ["aishell3"]}, "aishell3: there is no such task; use aishell1"),
        ({"task": ["aishell1", "aishell2"], "data": "x"}, "one `--task`"),
        (
            {"task": ["aishell1", "aishell2", "macs"]},
            "`--task` aishell2, macs: their data is not on the Hub .*`--data`",
        ),
        ({"task": ["aishell1"], "scorer": ["wer"]}, "`--scorer` goes with data of your own"),
        ({"data": "x", "limit": 0}, "--limit"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.Arguments(**options)


def test_all_tasks_are_those_that_have_a_source_and_the_others_are_named(monkeypatch, answering, capsys):
    measured = []
    monkeypatch.setattr(benchmarks, "measure_task", lambda args, task, backend: measured.append(task))
    monkeypatch.setattr(benchmarks, "write_report", lambda *_: "")
    benchmarks.run(benchmarks.Arguments(task=["all"]))
    assert len(measured) == 8 and all(task.source for task in measured)
    assert "Not measured: aishell2, clotho, macs, uro_basic, uro_pro; " in capsys.readouterr().err
    benchmarks.run(benchmarks.Arguments(task=["aishell1"]))
    assert not capsys.readouterr().err


def test_data_that_does_not_fit_is_refused_by_name(tmp_path):
    data = str(own_data(tmp_path))
    own = tasks.own_task("asr", [], {}, "en")
    with pytest.raises(ValueError, match="no such field"):
        read_samples(own, data, {"sound": "file"})
    with pytest.raises(ValueError, match="text=words: .* no such column; it has file, said"):
        read_samples(own, data, {"text": "words"})
    with pytest.raises(ValueError, match="has no column `text` of right answers; it has file, said. Name it"):
        read_samples(own, data, {"audio": "file"})
    with pytest.raises(ValueError, match="row 000000 has no audio"):
        read_samples(own, data, {"text": "said"})
    with pytest.raises(ValueError, match="--data"):
        read_samples(TASKS["aishell2"])
    with pytest.raises(ValueError, match="SET/test.jsonl"):
        read_samples(TASKS["uro_basic"], data)
    (tmp_path / "lost.jsonl").write_text('{"audio": "lost.wav", "text": "a"}\n')
    with pytest.raises(FileNotFoundError, match="lost.wav"):
        read_samples(own, str(tmp_path / "lost.jsonl"))


def test_recordings_that_are_missing_or_broken_are_named_and_the_others_measured(tmp_path, answering):
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    good = [{"audio": str(path), "text": "hi", "id": path.stem[:6]} for path in RECORDINGS]
    bad = [{"audio": name, "text": "hi", "id": name} for name in ("lost.wav", "broken.wav")]
    bad.append({"audio": None, "text": "hi", "id": "none"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*bad, *good]))
    args = benchmarks.Arguments(data=str(data), output_dir=tmp_path / "out", scorer=["exact"])
    text = benchmarks.run(args)
    figures = {key: m.figure for (_, key), m in Report.read(tmp_path / "out").figures.items()}
    assert figures["text/exact"].value == 1 and figures["text/exact"].count == len(RECORDINGS)  # what was asked alone
    assert f"3 of {3 + len(RECORDINGS)} rows have no recording that can be read" in text
    for said in ("lost.wav is neither in", "broken.wav' cannot be read as audio", "none: its row names no recording"):
        assert said in text
    shutil.copy(RECORDINGS[0], tmp_path / "lost.wav")
    assert "2 of" in benchmarks.run(args) and "lost.wav is neither" not in (tmp_path / "out" / "report.md").read_text()

    data.write_text("".join(json.dumps(row) + "\n" for row in bad[1:]))
    with pytest.raises(ValueError, match="no recording of own data can be read; the first: .*broken.wav"):
        benchmarks.run(args)
    data.write_text("".join(json.dumps({**row, "audio": "gone.wav"}) + "\n" for row in bad))
    with pytest.raises(FileNotFoundError, match=r"no row has its recording \(3 rows\); the first: gone.wav"):
        benchmarks.run(args)


def test_parts_of_recordings_are_asked_not_the_whole_of_them(tmp_path):
    wave, rate = soundfile.read(RECORDINGS[0], dtype="float32")
    soundfile.write(tmp_path / "long.wav", np.concatenate([wave, -wave]), rate)
    lines = [
        {"audio_filepath": "long.wav", "offset": len(wave) / rate, "duration": len(wave) / rate, "text": "second"},
        {"audio_filepath": "long.wav", "duration": 2 * len(wave) / rate, "text": "all of it"},
        {"audio_filepath": "lost.wav", "offset": 1.0, "duration": 1.0, "text": "nothing"},
    ]
    data = tmp_path / "manifest.json"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    second, whole, lost = read_samples(tasks.own_task("asr", [], {}, "en"), str(data))
    assert np.allclose(second.turns[0].audio["array"] / 32767, -wave, atol=1e-4)
    assert second.turns[0].audio["sampling_rate"] == rate
    assert whole.turns[0].audio == str(tmp_path / "long.wav") and "lost.wav" in lost.problem

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(RECORDINGS[0], "a.flac")
        (tmp_path / "a.txt").write_text("first")
        tar.add(tmp_path / "a.txt", "a.txt")
    folder = tmp_path / "kaldi"
    folder.mkdir()
    (folder / "wav.scp").write_text(f"u0 {RECORDINGS[0]}\n")
    (folder / "text").write_text("u0 first\nu1 never recorded\n")
    heard, alone = read_samples(tasks.own_task("asr", [], {}, "en"), str(folder))
    assert heard.turns[0].audio == str(RECORDINGS[0]) and not heard.problem
    assert alone.problem == "u1 is in text alone, not in wav.scp or segments"

    (sample,) = read_samples(tasks.own_task("asr", [], {}, "en"), str(tmp_path / "shard.tar"))
    assert sample.turns[0].audio == {"bytes": RECORDINGS[0].read_bytes()} and sample.references == ("first",)


def test_a_benchmark_with_a_recording_lost_is_not_called_by_its_name(tmp_path, answering, monkeypatch):
    table = csv_with_files(tmp_path, {"Questions": WORDS, "answer": WORDS})
    monkeypatch.setitem(TASKS, "llama_questions", replace(TASKS["llama_questions"], rows=len(RECORDINGS)))
    args = benchmarks.Arguments(task=["llama_questions"], data=str(table), output_dir=tmp_path / "out")
    assert "## Llama Questions\n" in benchmarks.run(args)
    (tmp_path / "audios" / RECORDINGS[0].name).unlink()
    assert "(2 of 3 rows): not the benchmark" in benchmarks.run(args)
    of_unknown_size, args = replace(TASKS["llama_questions"], rows=None), benchmarks.Arguments(task=["llama_questions"])
    titles = [benchmarks.describe(of_unknown_size, args, 2, lost)[0] for lost in (False, True)]
    assert titles[0] == "Llama Questions" and "(2 rows): not the benchmark" in titles[1]


@pytest.mark.parametrize(
    ("value", "references"),
    [
        ("Paris", ["Paris"]),
        (["Paris", "paris", None, ""], ["Paris", "paris"]),
        ('["a", "b"]', ["a", "b"]),
        ("['it''s', 'b']", ["its", "b"]),
        ("[not a list", ["[not a list"]),
        ({"value": "Sol", "aliases": ["Sun", "Sol"]}, ["Sol", "Sun"]),
        (1942, ["1942"]),
        (1942.0, ["1942"]),  # as a column of numbers has it, one of which is not there
        ([2.5, 3.0, float("nan")], ["2.5", "3"]),
        (float("nan"), []),
        ({"value": 0, "aliases": ["zero", ""]}, ["0", "zero"]),
        ("", [""]),
        (None, []),
    ],
)
def test_right_answers_are_read_in_every_form_they_have(value, references):
    assert references_of(value) == references


# ------------------------------------------------------------------------------------------------ recognisers


def test_a_recogniser_of_transformers_listens(tmp_path):
    vocabulary = {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", pad_token="<pad>", unk_token="<unk>")
    config = Wav2Vec2Config(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(5, 64), num_feat_extract_layers=2, pad_token_id=0,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    for part in (Wav2Vec2ForCTC(config), tokenizer, Wav2Vec2FeatureExtractor()):
        part.save_pretrained(tmp_path / "asr")
    recogniser = open_listener(f"transformers:{tmp_path / 'asr'}").open()
    texts = recogniser.transcribe([tone(0.3, 8_000), np.zeros(0, np.float32), tone(0.5, 8_000)], 8_000)
    assert len(texts) == 3 and texts[1] == "" and all(set(text) <= set("ab <unk>") for text in texts)


# ------------------------------------------------------------------------------------------------ addresses


@pytest.fixture(scope="module")
def address(model_folder, backend):
    """A real server of the same model."""
    with serve(backend.pipe.model, backend.processor) as running:
        yield f"{running.url}/v1"


def test_a_model_behind_an_address_answers_as_it_does_here(address, backend):
    with soundfile.SoundFile(RECORDINGS[0]) as file:
        assert file.samplerate == 16_000
    samples = [Sample(path.stem, (Turn(str(path)),), ("hi",)) for path in RECORDINGS]
    name = json.loads(openai_backend.urllib.request.urlopen(f"{address}/models").read())["data"][0]["id"]
    here = backend.answer(samples, "spoken_qa")
    for voice in (None, "alloy"):
        there = OpenAIBackend(address, name, voice).answer(samples, "spoken_qa")
        assert [answer.text for answer in there] == [answer.text for answer in here]
        assert all((len(answer.audio) > 1000) == (voice is not None) for answer in there)
        assert all(answer.seconds > 0 for answer in there)


def test_two_turns_are_asked_of_an_address_one_after_the_other(address):
    name = json.loads(openai_backend.urllib.request.urlopen(f"{address}/models").read())["data"][0]["id"]
    (answer,) = OpenAIBackend(address, name).answer([Sample("a", (Turn(text="x"), Turn(text="y")))], "text_chat")
    assert answer.text == "hi" and answer.earlier == ["hi"]


def test_of_samples_that_are_asked_side_by_side_those_that_are_answered_are_not_asked_again(address, tmp_path):
    def answered() -> int:
        metrics = openai_backend.urllib.request.urlopen(address.removesuffix("v1") + "metrics").read().decode()
        asked = 'ttt_http_requests_total{path="/v1/chat/completions",status="200"} '
        return int(float(next((line for line in metrics.splitlines() if line.startswith(asked)), "0").split()[-1]))

    name = json.loads(openai_backend.urllib.request.urlopen(f"{address}/models").read())["data"][0]["id"]
    texts = ["x", "too long " * 1000, "y"]
    samples = [Sample(str(place), (Turn(text=text),), ("hi",)) for place, text in enumerate(texts)]
    before = answered()
    rows = Run(tmp_path, "own", "text_chat", samples, {}).answer(OpenAIBackend(address, name), batch_size=3)
    assert answered() - before == 2
    assert [row["text"] for row in rows] == ["hi", "", "hi"]
    assert "AddressError" in rows[1]["error"] and "send 4096 or fewer" in rows[1]["error"]


def test_a_model_behind_an_address_is_measured_by_the_same_command(address, tmp_path, monkeypatch, capsys):
    name = json.loads(openai_backend.urllib.request.urlopen(f"{address}/models").read())["data"][0]["id"]
    options = [
        "--address",
        address,
        "--model",
        name,
        "--data",
        own_data(tmp_path),
        "--columns",
        "audio=file",
        "text=said",
    ]
    command(monkeypatch, *options, "--output_dir", tmp_path / "out")
    assert f"# Evaluation of {name} at {address}" in capsys.readouterr().out
    assert Report.read(tmp_path / "out").figures["own_data", "text/wer"].figure.count == 3


class Oracle(BaseHTTPRequestHandler):
    """Chat completions that rate everything 7, agree with everything, and are busy at first."""

    requests: list[dict] = []
    busy = 1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Oracle.busy:
            Oracle.busy -= 1
            self.send_response(503)
            self.end_headers()
            return
        if body["model"] == "stranger":
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"no such model")
            return
        Oracle.requests.append({**body, "key": self.headers.get("Authorization")})
        prompt = body["messages"][-1]["content"]
        reply = "Yes." if "yes or no" in prompt else "I would say 4" if "to 5" in prompt else "7"
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(openai_backend, "PAUSE", 0.01)
    Oracle.requests, Oracle.busy = [], 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Oracle)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_open_answers_are_judged_through_an_address_and_the_prompts_are_in_the_report(
    tmp_path, answering, oracle, monkeypatch
):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    data = parquet(tmp_path, {"instruction": ["a?", "b?", "c?"], "output": ["x", "y", "z"]})
    args = benchmarks.Arguments(
        task=["alpaca_eval"], data=str(data), output_dir=tmp_path / "out", judge=oracle, judge_model="judge-1",
        api_key_variable="JUDGE_KEY",
    )  # fmt: skip
    text = benchmarks.run(args)
    assert Report.read(tmp_path / "out").figures["alpaca_eval", "judged"].figure.value == 70
    assert "not judged" not in text and "judged by judge-1" in text and "secret" not in text
    assert "Rate how helpful" in text and "- judge: judge-1 at http" in text
    prompts = [request["messages"][0]["content"] for request in Oracle.requests]
    assert len(prompts) == 3 and {request["key"] for request in Oracle.requests} == {"Bearer secret"}
    assert any("Question: b?" in prompt and "Answer: hi" in prompt and "would be: y" in prompt for prompt in prompts)
    assert benchmarks.run(args) == text and len(Oracle.requests) == 3  # remembered

    data = parquet(tmp_path, {"instruction": ["a?", "b?", "d?"], "output": ["x", "y", "z"]})  # a question mended
    benchmarks.run(args)
    prompts = [request["messages"][0]["content"] for request in Oracle.requests]
    assert len(prompts) == 4 and "Question: d?" in prompts[-1]

    (tmp_path / "lines.txt").write_text("\n".join(WORDS))
    benchmarks.run(
        replace(args, recogniser=[f"pocketsphinx:{tmp_path / 'lines.txt'}"])
    )  # what is heard is judged apart
    judged = [key for _, key in Report.read(tmp_path / "out").figures if key.startswith("judged")]
    assert judged == ["judged", "judged/speech/lines"]


def test_a_benchmark_of_sets_is_scored_set_by_set_and_as_their_mean(tmp_path, answering, oracle):
    data = uro(tmp_path, tasks.BASIC_UNDERSTANDING)
    args = benchmarks.Arguments(task=["uro_basic"], data=str(data), output_dir=tmp_path / "out", judge=oracle)
    benchmarks.run(args)
    figures = {key: measured.figure for (_, key), measured in Report.read(tmp_path / "out").figures.items()}
    values = {key: figure.value for key, figure in figures.items() if "judged/" in key or key.endswith("/repeat")}
    assert values == {
        "text/Repeat/repeat": 100.0, "text/Repeat-zh/repeat": 100.0, "judged/Summary": 80.0, "judged/LCSTS-zh": 80.0,
        "judged/GaokaoEval": 100.0, "judged/HSK5-zh": 100.0,
    }  # fmt: skip
    assert figures["understanding"].value == pytest.approx(560 / 6)


def test_an_address_that_refuses_or_is_not_there_is_named(oracle, monkeypatch):
    Oracle.busy = 0
    with pytest.raises(AddressError, match="404: no such model"):
        openai_backend.chat(oracle, {"model": "stranger", "messages": []})
    with pytest.raises(AddressError, match="http://127.0.0.1:9/v1/chat/completions is not reached"):
        openai_backend.chat("http://127.0.0.1:9/v1", {"messages": []})
    Oracle.busy = 99
    with pytest.raises(AddressError, match="503"):
        openai_backend.chat(oracle, {"model": "x", "messages": [{"content": ""}]})


@pytest.mark.parametrize(
    ("reply", "highest", "rating"),
    [("7", 10, 7.0), ("Rating: 8.5.", 10, 8.5), ("11", 10, None), ("none", 10, None), ("Yes.", 1, 1.0), ("NO", 1, 0.0),
     ("maybe", 1, None), ("known", 1, None)],
)  # fmt: skip
def test_a_reply_is_read_as_a_rating_or_as_none(reply, highest, rating):
    assert Judgement(RATE_PROMPT if highest > 1 else AGREE_PROMPT, highest, "t").read(reply) == rating
