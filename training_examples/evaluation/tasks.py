"""What is measured: benchmarks as data (columns), prompt and scorer, and how their rows are read.

No benchmark's data is part of this repository. Names of columns are those of the sources named here; where a source has
several spellings the first that is there is taken.
"""

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

from training_examples.evaluation.backends import Sample, Turn
from training_examples.evaluation.judging import AGREE_PROMPT, RATE_PROMPT, Judgement
from training_examples.evaluation.measuring import scorer_of
from training_examples.evaluation.scoring import SCORERS, RowScorer, takes_option
from training_examples.evaluation.text_forms import is_chinese, is_unspaced, normalizer_of
from training_examples.preparation.recordings import PART_KEYS, load_recording, read_path
from training_examples.preparation.sources import Source, open_source

AUDIO = ("audio", "audio_filename", "source_wav", "file_name", "filename", "path", "wav")
QUESTION = ("question", "Questions", "questions", "instruction", "prompt", "source_text")
ENGLISH, CHINESE = {"normalizer": "english"}, {"normalizer": "chinese"}
CAPTION_PROMPT = "Describe this audio in one sentence."
WHOLE_SECONDS = 0.02  # by which a manifest may round a recording's duration
FIELDS = ("audio", "text", "question", "kind", "id")


@dataclass(frozen=True)
class Scoring:
    """A scorer with its options, and what its figure is called."""

    scorer: str
    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    single_reference: bool = False

    @property
    def needs_reference(self) -> bool:
        """Whether a row without a reference cannot be scored; modules of others may do without."""
        return (SCORERS / self.scorer).is_dir()

    def scores(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has what the scorer needs. Of error rates an empty reference is one: nothing is said."""
        references = row["references"]
        said = bool(references) if self.single_reference else any(text.strip() for text in references)
        return said or not self.needs_reference


WER = Scoring("error_rate", "wer", "word error rate", ENGLISH, True)
CER = Scoring("error_rate", "cer", "character error rate (English words whole)", CHINESE, True)
QA = Scoring("answer_accuracy", "accuracy", "answer found")
CIDER, ROUGE = Scoring("cider_d", "cider_d", "CIDEr-D"), Scoring("rouge_l", "rouge_l", "ROUGE-L")
REPEAT = Scoring("repeat_score", "repeat", "repeated, of 100", ENGLISH, True)
REPEAT_ZH = Scoring("repeat_score", "repeat", "repeated, of 100", CHINESE, True)
SHORT_SCORERS = {
    "wer": WER,
    "cer": Scoring("error_rate", "cer", "character error rate", CHINESE, True),
    "qa": QA,
    "exact": Scoring("exact_answers", "exact", "exact answers"),
    "cider_d": CIDER,
    "rouge_l": ROUGE,
}
RATED_OF_10 = Judgement(RATE_PROMPT, 10, "rating from 1 to 10")
RATED_OF_5 = Judgement(RATE_PROMPT, 5, "rating from 1 to 5")
AGREED = Judgement(AGREE_PROMPT, 1, "agreement")


@dataclass(frozen=True)
class Task:
    """
    One benchmark, or data of the user's own.

    Args:
        name, title (`str`): in files and in reports.
        prompt (`str`): the processor's task.
        scorings (`tuple` of [`Scoring`]): of text and of recognised speech alike.
        source, subset, split (`str`, *optional*): where the data is on the Hub; without a source it needs `--data`.
        columns (`Mapping[str, tuple[str, ...]]`): for every field the spellings of its column.
        layout (`str`): how it is read: "table", "kaldi", "macs" or "uro".
        language (`str`): what is spoken; "auto" where it differs from row to row.
        instruction (`str`, *optional*): text that goes with every recording.
        rows (`int`, *optional*): how many rows the benchmark has, where that is known.
        published (`str`), metric_note (`str`): the paper's figure, and whether ours is the same thing.
        judgement ([`Judgement`], *optional*): what a judge is asked.
        by_kind (`Mapping[str, Scoring | Judgement]`): how the kinds of a benchmark that scores them apart are scored.
        mean_of (`tuple[str, ...]`): the kinds whose mean is the benchmark's figure.
    """

    name: str
    title: str
    prompt: str
    scorings: tuple[Scoring, ...]
    source: str | None = None
    subset: str | None = None
    split: str | None = None
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layout: str = "table"
    language: str = "en"
    instruction: str | None = None
    rows: int | None = None
    published: str = ""
    metric_note: str = ""
    judgement: Judgement | None = None
    by_kind: Mapping[str, "Use"] = field(default_factory=dict)
    mean_of: tuple[str, ...] = ()

    def scorings_of(self, kind: str) -> tuple[Scoring, ...]:
        """Return the scorers of a kind of rows."""
        if not self.by_kind:
            return self.scorings
        use = self.by_kind.get(kind)
        return (use,) if isinstance(use, Scoring) else ()

    def judgement_of(self, kind: str) -> Judgement | None:
        """Return what a judge is asked of a kind of rows."""
        use = self.by_kind.get(kind) if self.by_kind else self.judgement
        return use if isinstance(use, Judgement) else None


Use = Scoring | Judgement  # how a set of rows is scored


def _asr(name: str, title: str, source: str | None, split: str, scoring: Scoring, **more: Any) -> Task:
    columns = {"text": ("text", "sentence", "transcription", "transcript")}
    language = "zh" if scoring is CER else "en"
    return Task(name, title, "asr", (scoring,), source, split=split, columns=columns, language=language, **more)


def _qa(name: str, title: str, source: str, answers: tuple[str, ...], **more: Any) -> Task:
    note = "Ours looks for the right words in a row; how the paper decides that an answer is right is not published."
    columns = {"text": answers}
    return Task(name, title, "spoken_qa", (QA,), source, split="test", columns=columns, metric_note=note, **more)


def _captions(name: str, title: str, published: str, **more: Any) -> Task:
    note = "The paper's captioning score is not defined in what is public; CIDEr-D times 100 may be another thing."
    return Task(
        name,
        title,
        "captioning",
        (CIDER, ROUGE),
        instruction=CAPTION_PROMPT,
        published=published,
        metric_note=note,
        **more,
    )


def _uro(
    name: str, title: str, published: str, sets: Mapping[str, Scoring | Judgement], mean_of: Sequence[str]
) -> Task:
    note = "Its prompts for judges are ours, and which sets test understanding is our reading of the benchmark."
    return Task(
        name,
        title,
        "spoken_qa",
        (),
        columns={"audio": ("source_wav",), "text": ("target_text",), "question": ("source_text",)},
        layout="uro",
        language="auto",
        published=published,
        metric_note=note,
        by_kind=sets,
        mean_of=tuple(mean_of),
    )


# Sets whose figure is one of speaking style, emotion or several rounds are left out: text does not decide them.
URO_BASIC: dict[str, Use] = {
    "Repeat": REPEAT,
    "Repeat-zh": REPEAT_ZH,
    **dict.fromkeys(("Summary", "LCSTS-zh", "StoralEval", "TruthfulEval"), RATED_OF_5),
    **dict.fromkeys(("GaokaoEval", "HSK5-zh", "SQuAD-zh", "OpenbookQA-zh", "Gsm8kEval", "APE-zh"), AGREED),
    **dict.fromkeys(("MLC", "MLC-zh"), AGREED),
    **dict.fromkeys(
        ("AlpacaEval", "AlpacaEval-zh", "CommonEval", "Claude-zh", "WildchatEval", "Wildchat-zh"), RATED_OF_5
    ),
}
URO_PRO: dict[str, Use] = {
    **dict.fromkeys(("CodeSwitching-en", "CodeSwitching-zh", "Safety-en", "Safety-zh"), RATED_OF_5),
    **dict.fromkeys(("UnderEmotion-en", "UnderEmotion-zh", "Multilingual"), RATED_OF_5),
    **dict.fromkeys(("MLCpro-en", "MLCpro-zh", "ClothoEval-en", "MuChoEval-en"), AGREED),
}
BASIC_UNDERSTANDING = ("Repeat", "Repeat-zh", "Summary", "LCSTS-zh", "GaokaoEval", "HSK5-zh")
PRO_UNDERSTANDING = (
    *("CodeSwitching-en", "CodeSwitching-zh", "Safety-en", "Safety-zh", "UnderEmotion-en", "UnderEmotion-zh"),
    *("ClothoEval-en", "MuChoEval-en"),
)

SAME_RATE = "Both are error rates in characters; the paper's way of normalising is not published."
WENET = "TwinkStart/WenetSpeech"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _asr(
            "aishell1", "AISHELL-1, test", "TwinkStart/AISHELL-1", "test", CER, rows=7176, published="5.78",
            metric_note=SAME_RATE,
        ),
        _asr(
            "aishell2", "AISHELL-2, test", None, "test", CER, rows=5000, layout="kaldi", published="6.80",
            metric_note=SAME_RATE,
        ),
        _asr(
            "wenetspeech_meeting", "WenetSpeech, test_meeting", WENET, "test_meeting", CER, rows=8370,
            published="27.59", metric_note=SAME_RATE,
        ),
        _asr(
            "wenetspeech_net", "WenetSpeech, test_net", WENET, "test_net", CER, rows=24774, published="19.85",
            metric_note=SAME_RATE,
        ),
        _asr(
            "librispeech", "LibriSpeech, test-clean", "openslr/librispeech_asr", "test", WER, subset="clean",
            rows=2620,
        ),
        _qa(
            "llama_questions", "Llama Questions", "TwinkStart/llama-questions", ("Answer", "answer"),
            published="40.07",
        ),
        _qa(
            "trivia_qa", "Trivia QA, spoken", "TwinkStart/speech-triavia-qa", ("answer", "answers", "Answer"),
            published="6.53 (without pretraining)",
        ),
        _qa(
            "web_questions", "Web Questions, spoken", "TwinkStart/speech-web-questions",
            ("answers", "answer", "Answer"), published="11.61 (without pretraining)",
        ),
        Task(
            "alpaca_eval", "AlpacaEval, spoken", "spoken_qa", (), "TwinkStart/speech-chatbot-alpaca-eval", split="test",
            columns={"text": ("output", "reference", "answer")}, published="26.73", judgement=RATED_OF_10,
            metric_note="Ours is the mean rating of our judge times 10; the paper's judge is not published.",
        ),
        _captions(
            "clotho", "Clotho, evaluation split", "12.63", rows=1045,
            columns={"text": ("captions", *(f"caption_{number}" for number in range(1, 6)))},
        ),
        _captions("macs", "MACS", "48.87", rows=3930, layout="macs"),
        _uro("uro_basic", "URO-Bench, basic track", "57.63 (understanding)", URO_BASIC, BASIC_UNDERSTANDING),
        _uro("uro_pro", "URO-Bench, pro track", "32.38 (understanding)", URO_PRO, PRO_UNDERSTANDING),
    )
}  # fmt: skip


def own_task(
    prompt: str, scorers: Sequence[str], options: Mapping[str, Any], language: str, split: str | None = None
) -> Task:
    """
    Return the task of data of the user's own.

    Args:
        prompt (`str`): the processor's task.
        scorers (`Sequence[str]`): of `SHORT_SCORERS`, ours by name, or paths of modules of `evaluate`; by default the
            word error rate, or the one in characters where a language is written without blanks.
        options (`Mapping`): of the scorers; each is given those that it takes.
        language (`str`): what is spoken, by which error rates normalise where `options` do not say otherwise.
        split (`str`, *optional*): of the data.

    Raises:
        ValueError: If there is no such scorer, none of them takes an option, or one refuses its value.
    """
    chosen, left = [], dict(options)
    in_characters = is_chinese(language) or is_unspaced(language)
    for name in scorers or (["cer"] if in_characters else ["wer"]):
        single = name in ("error_rate", "repeat_score")
        short = SHORT_SCORERS.get(name) or Scoring(name, Path(name).stem, Path(name).stem, single_reference=single)
        spoken = {}
        if short.scorer in ("error_rate", "repeat_score"):
            spoken["normalizer"] = normalizer_of(language)
        if name == "cer" and not is_chinese(language):  # whose English words stay whole, as is published
            spoken["unit"] = "character"
        scorer = scorer_of(short.scorer)
        given = {option: value for option, value in options.items() if takes_option(scorer, option)}
        left = {option: value for option, value in left.items() if option not in given}
        chosen.append(replace(short, options={**short.options, **spoken, **given}))
        if given and isinstance(scorer, RowScorer):
            try:
                scorer.row_counts(["1"], ["1"], **chosen[-1].options)
            except (TypeError, ValueError) as error:
                raise ValueError(f"`--scorer_options` of {name}: {error}") from error
    if left:
        named = ", ".join(use.name for use in chosen)
        raise ValueError(f"`--scorer_options` {next(iter(left))}: the scorers ({named}) take no such option.")
    return Task("own_data", "own data", prompt, tuple(chosen), split=split, language=language)


def read_samples(
    task: Task,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    text_alone: bool = False,
) -> list[Sample]:
    """
    Return the samples of a task.

    Args:
        task ([`Task`]): what is measured.
        data (`str`, *optional*): where its data lies; its source on the Hub by default.
        columns (`Mapping[str, str]`, *optional*): columns of fields that are called otherwise.
        limit (`int`, *optional*): the first so many.
        text_alone (`bool`, *optional*, defaults to `False`): whether texts are asked, and recordings left aside.

    A row whose recording is not there is a sample with a `problem`.

    Raises:
        FileNotFoundError: If the data is not there, or none of its recordings.
        ValueError: If a column is not there, a row lacks what it needs, or there are no rows.
    """
    if unknown := [name for name in columns or {} if name not in FIELDS]:
        raise ValueError(f"`--columns` {unknown[0]}: there is no such field; use {', '.join(FIELDS)}.")
    location = data or task.source
    if location is None:
        raise ValueError(
            f"{task.title} is not on the Hub in a form that is read here: say with `--data` where it lies."
        )
    layouts = {"kaldi": _read_kaldi, "macs": _read_macs, "uro": _read_uro}
    is_folder = Path(location).is_dir()
    read = layouts.get(task.layout) if is_folder and not columns else None
    if task.layout == "uro" and read is None:
        raise ValueError(f"{task.title} is read from a folder of its sets (SET/test.jsonl), got `--data` {location}.")
    records = read(Path(location), task) if read else _read_table(location, task, columns or {})
    samples = []
    for index, record in enumerate(records):
        if limit is not None and index == limit:
            break
        samples.append(_sample(index, record, task, text_alone))
    if not samples:
        raise ValueError(f"`--data` {location} holds no row of {task.title}.")
    if all(sample.problem for sample in samples):
        raise FileNotFoundError(
            f"`--data` {location}: no row has its recording ({len(samples)} rows); the first: {samples[0].problem}"
        )
    uses = [(use, {"references": sample.references}) for sample in samples for use in task.scorings_of(sample.kind)]
    if uses and not any(use.scores(row) for use, row in uses):
        raise ValueError(
            f"`--data` {location}: no row has a reference to be scored by ({len(samples)} rows); name the column of "
            "right answers with `--columns text=COLUMN`."
        )
    return samples


Record = dict[str, Any]


def _sample(index: int, record: Record, task: Task, text_alone: bool) -> Sample:
    """Return the sample of a record with the fields `audio`, `text`, `question`, `kind` and `id`, each optional; its
    `problem` says why there is no audio."""
    references = tuple(references_of(record.get("text")))
    name = str(record.get("id") if record.get("id") is not None else f"{index:06d}")
    audio, question = record.get("audio"), record.get("question")
    if text_alone:
        text = question or (references[0] if references else None)
        if text is None:
            raise ValueError(f"row {name} has no text to be asked; name its column with `--columns text=COLUMN`")
        return Sample(name, (Turn(text=text),), references, str(record.get("kind") or ""))
    problem = str(record.get("problem") or "")
    if audio is None and not problem:
        raise ValueError(f"row {name} has no audio; name its column with `--columns audio=COLUMN`")
    details = {"asked": str(question)} if question else {}
    turns = (Turn(audio, task.instruction),)
    return Sample(name, turns, references, str(record.get("kind") or ""), details, problem)


def references_of(value: Any) -> list[str]:
    """
    Return the right answers that a column holds: a text, a list, a list written as text (JSON or Python), or a mapping
    with `value` and `aliases` as TriviaQA has them.
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        listed = [value.get("value"), *(value.get("aliases") or []), *(value.get("normalized_aliases") or [])]
        return list(dict.fromkeys(text for item in listed for text in references_of(item) if text.strip()))
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(value)
            except (ValueError, SyntaxError):
                continue
            return references_of(parsed) if isinstance(parsed, list | tuple | Mapping) else [value]
        return [value]
    if isinstance(value, list | tuple):
        texts = (_as_text(item) for item in value if item is not None)
        return list(dict.fromkeys(text for text in texts if text.strip()))
    return [text] if (text := _as_text(value)) or value == "" else []


def _as_text(value: Any) -> str:
    """Return a text or number as it is said. A table makes 12.0 of a 12 where another row of the column is empty, and
    NaN, which is no answer, of that."""
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return str(value)


def _read_table(location: str, task: Task, columns: Mapping[str, str]) -> Iterator[Record]:
    """Yield the records of anything that `open_source` opens."""
    location = single_table(location)
    name = task.subset if location == task.source else None
    for source in open_source(location, task.split or ("test" if location == task.source else "train"), name):
        found = find_columns(names := source.column_names, task, columns, source.name)
        if "text" not in found and any(use.needs_reference for use in task.scorings):
            raise ValueError(
                f"`--data` {source.name} has no column `text` of right answers; it has {', '.join(names)}. Name it "
                "with `--columns text=COLUMN`."
            )
        for chunk in source.chunks(0, 256, {}):
            for record in chunk.records:
                yield {
                    **(_audio_of(record.get(found["audio"][0]), source) if "audio" in found else {}),
                    "text": _text_of(record, found.get("text", [])),
                    **{key: record.get(found[key][0]) for key in ("question", "kind", "id") if key in found},
                }


def single_table(location: str) -> str:
    """Return the one CSV, JSONL or Parquet file of a folder of recordings, as Clotho and OpenAudioBench lay them out;
    any other location as it is."""
    folder = Path(location)
    tables = [path for path in folder.glob("*") if path.suffix in (".csv", ".jsonl", ".parquet")]
    if not folder.is_dir() or len(tables) != 1 or tables[0].stem == "metadata":
        return location
    return str(tables[0])


def find_columns(names: Sequence[str], task: Task, columns: Mapping[str, str], source: str) -> dict[str, list[str]]:
    """
    Return the columns of every field that is there. Only a reference may be spread over several columns.

    Raises:
        ValueError: If a column that was named is not there.
    """
    spellings = {"audio": AUDIO, "question": QUESTION, "text": ("text",), "id": ("id",), "kind": ("kind",)}
    spellings |= task.columns
    found = {}
    for name in FIELDS:
        if name in columns:
            if columns[name] not in names:
                raise ValueError(
                    f"`--columns` {name}={columns[name]}: {source} has no such column; it has {', '.join(names)}."
                )
            found[name] = [columns[name]]
        elif there := [spelling for spelling in spellings[name] if spelling in names]:
            found[name] = there if name == "text" and there[0].startswith("caption_") else there[:1]
    return found


def _text_of(record: Record, columns: Sequence[str]) -> Any:
    return [record[name] for name in columns] if len(columns) > 1 else record[columns[0]] if columns else None


def _audio_of(value: Any, source: Source) -> Record:
    """Return a column's audio as the processor takes it, under `audio`, or under `problem` why there is none; the paths
    of files start at the source's folder."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return {"audio": {"bytes": value["bytes"]}}
        if value.get("problem") is not None:
            return {"problem": value["problem"]}
        if value.get("size") is not None or any(value.get(key) is not None for key in PART_KEYS):
            return _part_of(value, source.root)
        value = value.get("path") if value.get("array") is None else value
    if value is None or value == "":
        return {"problem": "its row names no recording"}
    return _file_of(source.root, value) if isinstance(value, str) else {"audio": value}


def _part_of(value: Mapping[str, Any], root: Path) -> Record:
    """Return the audio of a part of a recording, or of a file in a tar, as recordings.py reads it; of what is all of
    its file, the file. Parts are held in 16 bits, for those of all rows are in memory."""
    try:
        if value.get("size") is not None:
            return {"audio": {"bytes": read_path(value, root)}}
        path = root / value["path"]
        info = soundfile.info(path) if path.is_file() else None
        duration = value.get("duration")
        if info is not None and not value.get("offset") and not value.get("channel") and info.channels == 1:
            if duration is None or duration >= info.duration - WHOLE_SECONDS:
                return {"audio": str(path)}
        rate = info.samplerate if info is not None else 16_000
        waveform = load_recording(value, root, rate)
    except (ValueError, OSError, soundfile.LibsndfileError) as error:
        return {"problem": str(error)}
    return {"audio": {"array": (waveform.clip(-1, 1) * 32767).round().astype(np.int16), "sampling_rate": rate}}


def _file_of(root: Path, name: str) -> Record:
    """
    Return under `audio` the path of a recording: as it stands, in a folder, or in one of the folders below it; if it is
    in none, under `problem` what to do.
    """
    if "://" in name:
        return {"audio": name}
    for path in (root / name, Path(name)):
        if path.is_file():
            return {"audio": str(path)}
    below = sorted(root.rglob(Path(name).name)) if root != Path() else []
    if not below:
        return {"problem": f"{name} is neither in {root} nor below it; put it there, or take its row out."}
    return {"audio": str(below[0])}


def _read_kaldi(folder: Path, task: Task) -> Iterator[Record]:
    """Yield the records of a folder with `wav.scp` and `trans.txt` (or `text`), as AISHELL-2 has it; a folder without
    them is a table."""
    script = next(iter(sorted(folder.rglob("wav.scp"))), None)
    if script is None:
        yield from _read_table(str(folder), task, {})
        return
    files = next((path for name in ("trans.txt", "text") if (path := script.with_name(name)).is_file()), None)
    if files is None:
        raise FileNotFoundError(f"{script.parent} has wav.scp but neither trans.txt nor text")
    texts = dict(_split(line) for line in files.read_text(encoding="utf-8").splitlines() if line.strip())
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.strip():
            name, recording = _split(line)
            yield {"id": name, **_file_of(script.parent, recording), "text": texts.get(name, "")}


def _split(line: str) -> tuple[str, str]:
    name, _, rest = line.strip().replace("\t", " ").partition(" ")
    return name, rest.strip()


def _read_macs(folder: Path, task: Task) -> Iterator[Record]:
    """Yield the records of MACS.yaml: its files with the sentences of all annotators."""
    path = next(iter(sorted(folder.rglob("MACS.yaml"))), None)
    if path is None:
        yield from _read_table(str(folder), task, {})
        return
    for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["files"]:
        captions = [annotation["sentence"] for annotation in entry["annotations"]]
        yield {"id": entry["filename"], **_file_of(path.parent, entry["filename"]), "text": captions}


def _read_uro(folder: Path, task: Task) -> Iterator[Record]:
    """Yield the records of every set of URO-Bench that the task knows and the folder has: SET/test.jsonl."""
    for name in task.by_kind:
        path = next(iter(sorted(folder.rglob(f"{name}/test.jsonl"))), None)
        for index, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path else ()):
            if not line.strip():
                continue
            assert path is not None
            record = json.loads(line)
            target = record.get("target_text") or (record["source_text"] if name.startswith("Repeat") else None)
            yield {
                "id": f"{name}/{record.get('id', index)}",
                "kind": name,
                **_file_of(path.parent, record["source_wav"]),
                "question": record.get("source_text"),
                "text": target,
            }
