"""What rows of the study count, as pairs of a numerator and a denominator; intervals are drawn in report_study.py."""

from collections.abc import Mapping, Sequence

from training_examples.evaluation.figures import normalized
from training_examples.evaluation.rows import Row
from training_examples.evaluation.whisper_judge import count_word_errors

Pairs = list[list[int]]


def count(rows: Sequence[Row], task: str, heard: Mapping[str, Mapping[str, str]]) -> dict[str, Pairs]:
    """
    Return what each row counts: `exact` answers and word errors of the text (`wer`), codes by the forwards that wrote
    speech (`codes_per_step`) and by all forwards, forwards, and what `count_speech` says.

    Args:
        heard (`Mapping`): by judge, what was heard in each row, by id.
    """
    right = [normalized(row["references"][0]) for row in rows]
    said = [normalized(row["text"]) for row in rows]
    counts: dict[str, Pairs] = {
        "codes_per_step": [[row["codes"] or 0, row["speech_steps"] or 0] for row in rows],
        "codes_per_forward": [[row["codes"] or 0, row["forwards"] or 0] for row in rows],
        "forwards": [[row["forwards"] or 0, 1] for row in rows],
    }
    if task != "tts":
        counts["exact"] = [[int(text == reference), 1] for text, reference in zip(said, right, strict=True)]
        counts["wer"] = [list(pair) for pair in count_word_errors(right, said)]
    return counts | count_speech(rows, task, heard)


def count_speech(rows: Sequence[Row], task: str, heard: Mapping[str, Mapping[str, str]]) -> dict[str, Pairs]:
    """
    Return for each judge word errors of the speech (`speech_wer JUDGE`) and answers that are heard as the right one
    (`speech_exact JUDGE`). Word errors are those against the text that was to be said: the list's own where texts are
    read aloud, else what the answer wrote.
    """
    right = [normalized(row["references"][0]) for row in rows]
    said = right if task == "tts" else [normalized(row["text"]) for row in rows]
    counts: dict[str, Pairs] = {}
    for judge, transcripts in heard.items():
        words = [transcripts[row["id"]] for row in rows]
        counts[f"speech_wer {judge}"] = [list(pair) for pair in count_word_errors(said, words)]
        counts[f"speech_exact {judge}"] = [[int(errors == 0), 1] for errors, _ in count_word_errors(right, words)]
    return counts
