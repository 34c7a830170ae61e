"""The tables of ttt-tiny's card, made of the sections that task_set.py measures. The plot is in task_plot.py."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training_examples.evaluation.figures import Figure, markdown_table
from training_examples.evaluation.measuring import Measured
from training_examples.evaluation.reports import Section, settings_list, verdict

TIMES = 4.0  # so many forwards of the twin for one of the model's are asked for
KINDS = "spoken_qa_seen"  # whose figures are shown by kind of question
TWIN = "against the twin: "  # how the rows begin that compare the model with it


@dataclass(frozen=True)
class Asked:
    """
    A row of what the model was asked to reach.

    Args:
        key (`str`): of its figure, in which "{}" stands for the first recogniser.
        title (`str`): what it is called.
        least, aim (`float`): what it should reach at least, and better.
        over (`str`, *optional*): the section whose figure of the same key these are to be added to.
        of (`str`, *optional*, defaults to `"model"`): the section it is measured in.
        unit (`str`, *optional*, defaults to `"%"`): of figure and bounds.
    """

    key: str
    title: str
    least: float
    aim: float
    over: str = ""
    of: str = "model"
    unit: str = "%"

    def bounds(self, base: float | None) -> list[str]:
        """Return the bounds as they are printed, given what they are added to, where that is known."""
        texts = []
        for bound in (self.least, self.aim):
            number = bound + (base or 0.0)
            text = f"{round(100 * number, 1):g} %" if self.unit == "%" else f"{number:g} {self.unit}".strip()
            added = f"{self.over} + {100 * bound:g}"
            texts.append(text if not self.over else added if base is None else f"{text} ({added})")
        return texts


ASKED = (
    Asked("spoken_qa_seen/codes_per_step", "codes a forward of speech, default setting (QA answers)", 4, 8, unit=""),
    Asked("spoken_qa_seen/speech/{}", "reply speech (QA) against its own text: {} WER", 0.03, 0.01, "codec"),
    Asked("tts/speech/{}", "random sequences read aloud: {} WER", 0.06, 0.02, "codec"),
    Asked("codec_answers/speech/{}", "codec, answers encoded and decoded: {} WER", 0.04, 0.01, "original", "codec"),
    Asked("spoken_qa_seen/exact", "spoken QA exact, trained voices", 0.92, 0.96),
    Asked("spoken_qa_unheard/exact", "spoken QA exact, five Kokoro voices never heard", 0.85, 0.93),
    Asked("spoken_qa_unheard_natural/exact", "spoken QA exact, flite rms, never heard", 0.75, 0.88),
    Asked("asr_seen/dictation/wer", "dictation of random words, trained voices: WER", 0.15, 0.08),
    Asked("asr_unheard/dictation/wer", "dictation of random words, voices never heard: WER", 0.20, 0.12),
    Asked("human_digits/wer", "digits of two people, single and spliced: WER", 0.40, 0.15),
    Asked("not_heard/exact", "“i did not hear you” on silence, noise and music", 0.95, 0.99),
    Asked("other_seen/exact", "“i do not know that” on other sentences, trained voices", 0.90, 0.97),
    Asked("other_unheard/exact", "“i do not know that”, other patterns and voices never heard", 0.90, 0.97),
    Asked("false_alarms", "either of them, wrongly, on questions of the domain", 0.02, 0.01),
    Asked("two_turns/after_spoken/exact", "second turn right, spoken or typed after spoken", 0.85, 0.95),
    Asked("speed/time_by_duration", "whole answer, time / duration, one at a time", 0.08, 0.04, unit=""),
    Asked("speed/first_sound", "first sound after the question's end, streaming", 0.4, 0.15, unit="s"),
)
# What else is measured: key, title.
FURTHER = (
    ("spoken_qa_seen/codes_per_forward", "codes a forward, forwards of prompt and text counted too (QA answers)"),
    ("tts/codes_per_step", "codes a forward of speech, random sequences"),
    ("text_qa/exact", "QA in text: exact text answers"),
    ("asr_seen/wer", "all of recognition, trained voices: WER"),
    ("asr_unheard/wer", "the same, voices never heard"),
    ("asr_unheard_natural/wer", "the same, flite rms"),
    ("control_digits/wer", "digits of a trained voice, treated as those of people: WER"),
    ("human_words/wer", "names of animals, connected digits, by people: WER"),
    ("human_other/exact", "“i do not know that” on sentences of people"),
    ("two_turns/exact", "second turn right, all conversations"),
    ("two_turns/spoken then typed/exact", "of these, typed after spoken"),
    ("two_turns/first/exact", "first turn of the same conversations"),
    ("tts/exact", "TTS: exact text"),
    ("end_of_audio", "end of audio found"),
    ("speed/seconds", "whole answer, median"),
    ("speed/cold_command", "ttt-talk, cold, from its start to the reply, median"),
)
SPEECH = {
    "spoken_qa_seen": "answers",
    "tts": "random sequences read aloud",
    "codec_answers": "answers never heard by the codec",
}


def figures_by_key(sections: Sequence[Section], *names: str) -> dict[str, Measured]:
    """Return the figures of the sections of these names."""
    return {m.key: m for section in sections if section.name in names for m in section.figures}


def with_interval(measured: Measured | None) -> str:
    """Return a figure with its interval, empty for none."""
    if measured is None:
        return ""
    interval = measured.figure.interval
    return f"{measured.figure} ({interval})" if interval else str(measured.figure)


def is_reached(value: float, bound: float, lower_is_better: bool) -> bool:
    """Return whether a figure is as good as a bound, or better."""
    return value <= bound if lower_is_better else value >= bound


def asked_row(asked: Asked, sections: Sequence[Section], recogniser: str) -> list[str]:
    """Return title, bounds, figure, rows and whether it was met of a row of what was asked."""
    key, title = asked.key.format(recogniser), asked.title.format(recogniser)
    found = figures_by_key(sections, asked.of, f"{asked.of}_speed").get(key)
    base = figures_by_key(sections, asked.over).get(key) if asked.over else None
    start = base.figure.value if base else None
    row = [title, *asked.bounds(start)]
    if found is None or (asked.over and start is None):
        return [*row, "not measured", "", ""]
    least, aim = (
        is_reached(found.figure.value, bound + (start or 0.0), found.lower_is_better)
        for bound in (asked.least, asked.aim)
    )
    return [*row, with_interval(found), str(found.figure.count), "aim" if aim else "yes" if least else "no"]


def twin_rows(model: Mapping[str, Measured], twin: Mapping[str, Measured], recogniser: str) -> list[list[str]]:
    """Return the rows that ask the model to be no worse than its twin, at fewer forwards."""
    rows = []
    for name, title in (("spoken_qa_seen", "reply speech (QA)"), ("tts", "random sequences")):
        key = f"{name}/speech/{recogniser}"
        row = [f"{TWIN}{title}, {recogniser} WER", "no worse beyond the interval", "better"]
        if key in model and key in twin:
            difference, meaning = verdict(twin[key], model[key])
            met = {"better": "aim", "worse": "no"}.get(meaning, "yes")
            rows.append([*row, f"{difference} points", str(model[key].figure.count), met])
        else:
            rows.append([*row, "not measured", "", ""])
    for key, title, least in (
        ("spoken_qa_seen/codes_per_step", "its forwards of speech for one of the model's", TIMES),
        ("spoken_qa_seen/codes_per_forward", "its forwards of prompt, text and speech for one of the model's", None),
    ):
        row = [f"{TWIN}{title} (QA answers)", f"{least:g}" if least else "", ""]
        if key in model and key in twin:
            times = times_of(model[key], twin[key])
            met = "" if least is None else "yes" if times.value >= least else "no"
            text = f"{times} ({times.interval})" if times.interval else str(times)
            rows.append([*row, text, str(times.count), met])
        else:
            rows.append([*row, "not measured", "", ""])
    return rows


def times_of(model: Measured, twin: Measured) -> Figure:
    """Return by how much a ratio of the model's is that of the twin, with its interval."""
    low, high = math.nan, math.nan
    if model.counts is not None and twin.counts is not None:
        low, high = np.nanquantile(model.draws() / twin.draws(), (0.025, 0.975))  # the same rows of both, where paired
    value = model.figure.value / twin.figure.value if twin.figure.value else math.nan
    return Figure(value, min(model.figure.count, twin.figure.count), "", float(low), float(high))


def asked_table(sections: Sequence[Section], recogniser: str) -> str:
    """Return the table of what was asked: bounds, figure, rows and whether it was met, the twin's figure beside."""
    model = figures_by_key(sections, "model", "model_speed")
    twin = figures_by_key(sections, "twin", "twin_speed")
    rows = []
    for asked in ASKED:
        row = asked_row(asked, sections, recogniser)
        rows.append([*row, with_interval(twin.get(asked.key.format(recogniser)) if asked.of == "model" else None)])
        if asked.of == "codec":
            rows += [[*row, ""] for row in twin_rows(model, twin, recogniser)]
    met = [row[5] for row in rows if row[5]]
    count = f"{len(met) - met.count('no')} of the {len(met)} measured rows are met, {met.count('aim')} with the aim."
    header = ["", "at least", "aim", "measured (95 %)", "n", "met", "autoregressive twin (95 %)"]
    return f"{markdown_table(header, rows)}\n\n{count}"


def further_table(model: Mapping[str, Measured], twin: Mapping[str, Measured]) -> str:
    """Return the table of all other figures, the twin's beside, with what the difference to it means."""
    header = ["", "measured (95 %)", "n", *(["autoregressive twin (95 %)", "model against twin"] if twin else [])]
    rows: list[list[object]] = []
    for key, title in FURTHER:
        if key in model:
            row: list[object] = [title, with_interval(model[key]), model[key].figure.count]
            if twin:
                other = twin.get(key)
                row += [with_interval(other)]
                row.append(verdict(other, model[key])[1] if other and other.counts is not None else "")
            rows.append(row)
    return markdown_table(header, rows)


def speech_table(sections: Sequence[Section], recognisers: Sequence[str]) -> str:
    """Return the word errors of speech: the original, through the codec, the model's, the twin's."""
    columns = {name: figures_by_key(sections, name) for name in ("original", "codec", "model", "twin")}
    has_twin = bool(columns["twin"])
    header = ["speech", "recogniser", "original (95 %)", "audio tokenizer", "model", *(["twin"] if has_twin else [])]
    rows = []
    for name, title in SPEECH.items():
        for recogniser in recognisers:
            key = f"{name}/speech/{recogniser}"
            found = [columns[column].get(key) for column in ("original", "codec", "model", "twin")]
            if any(found):
                count = next(m.figure.count for m in found if m)
                cells = [with_interval(m) for m in found[: 4 if has_twin else 3]]
                rows.append([f"{title} (n = {count})", recogniser, *cells])
    return markdown_table(header, rows)


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
        parts += ["## What was asked", asked_table(sections, recognisers[0] if recognisers else "no recogniser")]
        parts += ["## Further figures", further_table(model, twin)]
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
