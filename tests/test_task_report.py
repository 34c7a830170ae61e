"""What ttt-tiny's report says at a glance: the table of what was asked, and the plot of the sweep."""

import re

import matplotlib.pyplot as plt
import pytest

from training_examples.evaluation.measuring import of_median, of_ratio, share_of
from training_examples.evaluation.reports import Section
from training_examples.ttt_tiny.task_plot import plot_sweep, points_of
from training_examples.ttt_tiny.task_report import ASKED, FURTHER, asked_table, body, times_of

ROWS = 100


def wer(key, wrong):
    """A word error rate of so many in 100 rows of one word."""
    rows = [(f"r{row}", float(row < wrong), 1.0) for row in range(ROWS)]
    return of_ratio(key, key, rows, "%", lower_is_better=True)


def codes(key, per_forward):
    return of_ratio(key, key, [(f"r{row}", per_forward, 1.0) for row in range(ROWS)])


def share(key, right, lower_is_better=False):
    return share_of(key, key, [(f"r{row}", row < right) for row in range(ROWS)], lower_is_better)


def speech(*wrong):
    keys = ("spoken_qa_seen/speech/ear", "tts/speech/ear", "codec_answers/speech/ear")
    return [wer(key, count) for key, count in zip(keys, wrong, strict=False)]


@pytest.fixture
def sections():
    model = [codes("spoken_qa_seen/codes_per_step", 4.2), *speech(7, 20), share("spoken_qa_seen/exact", 97)]
    model += [codes("spoken_qa_seen/codes_per_forward", 2.0), share("false_alarms", 3, True), share("tts/exact", 99)]
    twin = [codes("spoken_qa_seen/codes_per_step", 0.5), *speech(20, 5), share("tts/exact", 90)]
    twin += [codes("spoken_qa_seen/codes_per_forward", 0.8)]
    return [
        Section("original", "", speech(2, 4, 2)),
        Section("codec", "", speech(5, 9, 4)),
        Section("model", "", model),
        Section("twin", "", twin),
        Section("model_speed", "", [of_median("speed/first_sound", "", [0.2, 0.2, 0.2])]),
    ]


def cells(table):
    """The rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def test_every_row_that_was_asked_is_in_one_table_with_its_bounds_and_whether_it_is_met(sections):
    table = asked_table(sections, "ear")
    rows = cells(table)
    assert len(rows) == len(ASKED) + 4
    forwards = rows["codes a forward of speech, default setting (QA answers)"]
    assert forwards == ["4", "8", "4.20 (4.20 to 4.20)", "100", "yes", "0.50 (0.50 to 0.50)"]
    qa = rows["reply speech (QA) against its own text: ear WER"]  # 7 % where the codec alone has 5 %
    assert qa[:2] == ["8 % (codec + 3)", "6 % (codec + 1)"] and qa[2].startswith("7.0 % (") and qa[4] == "yes"
    assert rows["random sequences read aloud: ear WER"][4] == "no"  # 20 % where 9 + 6 are asked
    codec = rows["codec, answers encoded and decoded: ear WER"]
    assert codec[:2] == ["6 % (original + 4)", "3 % (original + 1)"] and codec[4:] == ["yes", ""]
    assert rows["spoken QA exact, trained voices"][4] == "aim"
    assert rows["either of them, wrongly, on questions of the domain"][4] == "no"  # 3 % where at most 2 are asked
    assert rows["first sound after the question's end, streaming"][:5] == [
        "0.4 s", "0.15 s", "0.20 s (0.20 to 0.20)", "3", "yes"
    ]  # fmt: skip
    assert rows["digits of two people, single and spliced: WER"] == ["40 %", "15 %", "not measured", "", "", ""]
    assert "7 of the 10 measured rows are met, 2 with the aim." in table


def test_the_model_is_compared_with_its_twin_row_by_row_and_in_forwards(sections):
    rows = cells(asked_table(sections, "ear"))
    better = rows["against the twin: reply speech (QA), ear WER"]
    assert better[2].startswith("-13.0 (") and better[4] == "aim"
    assert rows["against the twin: random sequences, ear WER"][4] == "no"
    speech_forwards = rows["against the twin: its forwards of speech for one of the model's (QA answers)"]
    assert speech_forwards[0] == "4" and speech_forwards[2:5] == ["8.40 (8.40 to 8.40)", "100", "yes"]
    all_forwards = rows["against the twin: its forwards of prompt, text and speech for one of the model's (QA answers)"]
    assert all_forwards[2:5] == ["2.50 (2.50 to 2.50)", "100", ""]
    without = cells(asked_table([section for section in sections if section.name != "twin"], "ear"))
    assert without["against the twin: random sequences, ear WER"][2] == "not measured"


def test_a_ratio_of_ratios_has_the_interval_of_the_same_rows_of_both():
    rows = [(f"r{row}", 4.0 + row, 1.0) for row in range(20)]
    halves = [(name, top / 2, bottom) for name, top, bottom in rows]
    times = times_of(of_ratio("k", "", rows), of_ratio("k", "", halves))
    assert times.value == pytest.approx(2) and (times.low, times.high) == (pytest.approx(2), pytest.approx(2))


def test_the_report_has_what_was_asked_first_and_everything_else_after_it(sections):
    text = body(sections, ["ear"])
    titles = re.findall(r"^## (.*)", text, re.M)
    assert titles[:3] == ["What was asked", "Further figures", "Speech against its own text, word error rate"]
    assert "TTS: exact text | 99.0 % (" in text and text.count("\n| TTS: exact text") == 1
    assert not {asked.key for asked in ASKED} & {key for key, _ in FURTHER}


def swept(size, steps, per_step, wrong, bias=0.0, threshold=None, prefix=None):
    options = {"audio_block_size": size, "audio_steps_per_block": steps, "audio_order_bias": bias}
    options |= {"audio_confidence_threshold": threshold, "audio_prefix_probability": prefix}
    figures = [codes("spoken_qa_seen/codes_per_step", per_step), *speech(wrong)]
    return Section(f"sweep/{len(options)} {size} {steps} {bias} {threshold} {prefix}", "", figures, settings=options)


def test_the_plot_has_a_line_a_block_size_the_twin_the_default_and_the_recordings(sections, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    plot_sweep(sections, "ear", tmp_path / "none.png")
    assert not drawn  # nothing was swept
    sweep = [swept(4, 1, 4.0, 30), swept(4, 4, 1.0, 12), swept(26, 2, 13.0, 50), swept(4, 1, 4.0, 20, 0.05)]
    sweep += [swept(4, 4, 1.0, 10, 0.05), swept(26, 2, 12.0, 40, 0.05), swept(26, 8, 6.0, 25, 0.05, 0.9)]
    sweep += [swept(26, None, 5.0, 15, 0.05, None, 0.4)]
    twin = Section("sweep_twin", "twin", [codes("spoken_qa_seen/codes_per_step", 1.0), *speech(8)])
    plot_sweep([*sections, *sweep, twin], "ear", tmp_path / "sweep.png")
    (figure,) = drawn
    left, _ = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.get_lines() if line.get_label()[0] != "_"}
    assert lines["blocks of 4"] == [[1.0, 10.0], [4.0, 20.0]] and lines["blocks of 26"] == [[12.0, 40.0]]
    assert lines["the recordings through the codec"][0][1] == 5 and lines["the recordings"][0][1] == 2
    shaded = left.collections[-1].get_paths()[0].get_extents()
    assert shaded.x0 == 4 and (shaded.y0, shaded.y1) == (0, pytest.approx(8))  # the codec's 5 % and 3 points
    entries = {text.get_text() for text in figure.legends[0].get_texts()}
    assert entries >= {"autoregressive twin", "the default (95 %)", "confidence thresholds", "asked at least"}
    assert "faint: without order bias" in entries and "prefix probabilities" in entries
    assert [[5.0, 15.0]] in [line.get_xydata().tolist() for line in left.get_lines() if line.get_marker() == "^"]
    assert points_of(sweep[:2], "spoken_qa_seen/speech/ear", "spoken_qa_seen/codes_per_step") == [(1, 12), (4, 30)]
    plt.close(figure)
