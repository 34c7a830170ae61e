"""The tables and the plot of ttt-tiny's card, made of the sections that task_set.py measures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from training_examples.evaluation.figures import markdown_table
from training_examples.evaluation.measuring import Measured
from training_examples.evaluation.reports import Section, settings_list, verdict

# Rows of the main table: key, title, at least, aim.
GOALS: list[tuple[str, str, str, str]] = [
    ("spoken_qa_seen/codes_per_step", "codes a forward of speech at the default setting (QA answers)", "4", "8"),
    ("spoken_qa_seen/codes_per_forward", "the same, forwards of prompt and text counted too", "", ""),
    ("spoken_qa_seen/exact", "spoken QA, trained voices: exact text answers", "92 %", "96 %"),
    ("spoken_qa_unheard/exact", "the same, five Kokoro voices never heard", "85 %", "93 %"),
    ("spoken_qa_unheard_natural/exact", "the same, flite rms, never heard", "75 %", "88 %"),
    ("text_qa/exact", "QA in text: exact text answers", "", ""),
    ("asr_seen/dictation/wer", "dictation of random words, trained voices: WER", "15 %", "8 %"),
    ("asr_unheard/dictation/wer", "the same, voices never heard", "20 %", "12 %"),
    ("asr_seen/wer", "all of recognition, trained voices: WER", "", ""),
    ("asr_unheard/wer", "the same, voices never heard", "", ""),
    ("asr_unheard_natural/wer", "the same, flite rms", "", ""),
    ("human_digits/wer", "digits of two people, alone and spliced: WER", "40 %", "15 %"),
    ("control_digits/wer", "the same of a trained voice, treated alike", "", ""),
    ("human_words/wer", "names of animals, connected digits, by people: WER", "", ""),
    ("not_heard/exact", '"i did not hear you" on silence, noise and music', "95 %", "99 %"),
    ("other_seen/exact", '"i do not know that" on other sentences, trained voices', "90 %", "97 %"),
    ("other_unheard/exact", "the same, other patterns, voices never heard", "90 %", "97 %"),
    ("human_other/exact", "the same, by people", "", ""),
    ("false_alarms", "either of them, wrongly, on domain questions", "2 %", "1 %"),
    ("two_turns/exact", "second turn right", "85 %", "95 %"),
    ("two_turns/spoken then typed/exact", "of these, typed after spoken", "", ""),
    ("two_turns/first/exact", "first turn of the same conversations", "", ""),
    ("tts/exact", "TTS: exact text", "", ""),
    ("end_of_audio", "end of audio found", "", "all"),
    ("speed/time_by_duration", "whole answer, time / duration, one at a time", "0.08", "0.04"),
    ("speed/seconds", "whole answer, median", "", ""),
    ("speed/first_sound", "first sound after the question's end, streaming, median", "0.4 s", "0.15 s"),
    ("speed/cold_command", "ttt-talk, cold, from its start to the reply, median", "", ""),
]
SPEECH = {
    "spoken_qa_seen": ("answers", "codec + 3 points", "codec + 1 point"),
    "tts": ("random sequences read aloud", "codec + 6 points", "codec + 2 points"),
    "codec_answers": ("answers never heard by the codec", "original + 4 points", "original + 1 point"),
}
KINDS = "spoken_qa_seen"  # whose figures are shown by kind of question


def figures_by_key(sections: Sequence[Section], *names: str) -> dict[str, Measured]:
    """Return the figures of the sections of these names."""
    return {m.key: m for section in sections if section.name in names for m in section.figures}


def with_interval(measured: Measured | None) -> str:
    """Return a figure with its interval, empty for none."""
    if measured is None:
        return ""
    interval = measured.figure.interval
    return f"{measured.figure} ({interval})" if interval else str(measured.figure)


def main_table(model: Mapping[str, Measured], twin: Mapping[str, Measured]) -> str:
    """Return the table of goals and figures, the twin's beside, with what the difference to it means."""
    header = ["", "at least", "aim", "measured (95 %)", "rows"]
    header += ["autoregressive twin (95 %)", "rows", "model against twin"] if twin else []
    rows: list[list[object]] = []
    for key, title, least, aim in GOALS:
        if key not in model:
            continue
        row: list[object] = [title, least, aim, with_interval(model[key]), model[key].figure.count]
        if twin:
            other = twin.get(key)
            row += [with_interval(other), other.figure.count if other else ""]
            row.append(verdict(other, model[key])[1] if other and other.counts is not None else "")
        rows.append(row)
    return markdown_table(header, rows)


def speech_table(sections: Sequence[Section], recognisers: Sequence[str]) -> str:
    """Return the word errors of speech: the original, through the codec, the model's, the twin's."""
    columns = {name: figures_by_key(sections, name) for name in ("original", "codec", "model", "twin")}
    has_twin = bool(columns["twin"])
    header = ["speech", "recogniser", "original (95 %)", "audio tokenizer", "model", *(["twin"] if has_twin else [])]
    rows = []
    for name, (title, *_) in SPEECH.items():
        for recogniser in recognisers:
            key = f"{name}/speech/{recogniser}"
            found = [columns[column].get(key) for column in ("original", "codec", "model", "twin")]
            if any(found):
                count = next(m.figure.count for m in found if m)
                cells = [with_interval(m) for m in found[: 4 if has_twin else 3]]
                rows.append([f"{title} (n = {count})", recogniser, *cells])
    goals = "; ".join(f"{title}: at least {least}, aim {aim}" for title, least, aim in SPEECH.values())
    return markdown_table(header, rows) + f"\n\nAsked for: {goals}."


def sweep_rows(sections: Sequence[Section]) -> list[tuple[str, dict[str, Measured]]]:
    """Return title and figures of each setting of the sweep, the twin's last."""
    found = [(s.title, figures_by_key([s], s.name)) for s in sections if s.name.startswith("sweep/")]
    return found + [(s.title, figures_by_key([s], s.name)) for s in sections if s.name == "sweep_twin"]


def sweep_table(sections: Sequence[Section], recogniser: str) -> str:
    """Return quality against codes a forward, setting by setting."""
    columns = {
        "spoken_qa_seen/codes_per_step": "codes a forward of speech, QA",
        f"spoken_qa_seen/speech/{recogniser}": f"QA speech, {recogniser} WER (95 %)",
        "tts/codes_per_step": "codes a forward of speech, TTS",
        f"tts/speech/{recogniser}": f"TTS speech, {recogniser} WER (95 %)",
        "spoken_qa_seen/exact": "QA exact",
        "end_of_audio": "end found",
    }
    rows = [
        [title, *(with_interval(m.get(key)) if "WER" in name else m[key].figure if key in m else ""
                  for key, name in columns.items())]
        for title, m in sweep_rows(sections)
    ]  # fmt: skip
    return markdown_table(["decoding", *columns.values()], rows)


def body(sections: Sequence[Section], recognisers: Sequence[str]) -> str:
    """Return the report in Markdown, without its title."""
    model = figures_by_key(sections, "model", "model_speed")
    twin = figures_by_key(sections, "twin", "twin_speed")
    parts = []
    if model:
        parts += ["## Figures", main_table(model, twin)]
    if recognisers and any(section.name == "original" for section in sections):
        parts += ["## Speech against its own text, word error rate", speech_table(sections, recognisers)]
    if any(section.name.startswith("sweep") for section in sections):
        parts += ["## Quality against codes a forward", sweep_table(sections, recognisers[0])]
        parts.append("![Word error rate of the speech against codes a forward](sweep.png)")
    kinds = [m for m in model.values() if m.key.startswith(f"{KINDS}/") and m.key.count("/") == 2]
    kinds = [m for m in kinds if m.key.endswith("/exact")]
    if kinds:
        rows = [[m.key.split("/")[1], with_interval(m), m.figure.count] for m in kinds]
        parts += ["## Exact spoken answers by kind of question", markdown_table(["kind", "exact (95 %)", "rows"], rows)]
    settings = next((section.settings for section in sections if section.name == "model"), None)
    if settings:
        parts += ["## Settings", settings_list(settings)]
    return "\n\n".join(parts)


def plot_sweep(sections: Sequence[Section], recogniser: str, path: Path) -> None:
    """Draw the word errors of the speech by codes a forward, with the twin's point and the original's line."""
    points = sweep_rows(sections)
    if not points:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    original = figures_by_key(sections, "original")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharex=True)
    for axis, (name, title) in zip(axes, (("spoken_qa_seen", "answers"), ("tts", "random sequences")), strict=True):
        wer, codes = f"{name}/speech/{recogniser}", f"{name}/codes_per_step"
        groups: dict[str, list[tuple[float, float]]] = {}
        for label, found in points:
            if wer not in found or codes not in found:
                continue
            point = (found[codes].figure.value, 100 * found[wer].figure.value)
            bias = label.partition(", order ")[2]
            block = label.split(",")[0] + (", thresholds" if "threshold" in label else "")
            group = label if "twin" in label else block + (f", order {bias}" if bias else "")
            groups.setdefault(group, []).append(point)
        for index, (label, values) in enumerate(groups.items()):
            values.sort()
            style = {"marker": "*", "markersize": 14, "linestyle": "none", "color": "black"}
            style = style if "twin" in label else {"marker": "o", "markersize": 3, "color": f"C{index % 10}"}
            if ", order" in label:
                style["linestyle"] = "--"
            axis.plot(*zip(*values, strict=True), label=label, **style)
        if (own := original.get(wer)) is not None:
            axis.axhline(100 * own.figure.value, color="grey", ls=":", lw=1.2, label="the original voice")
        axis.set(title=title, xlabel="codes a forward of speech", ylabel=f"{recogniser} WER, %", ylim=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=7, ncols=4, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)
