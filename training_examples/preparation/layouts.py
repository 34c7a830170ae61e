"""Layouts in which corpora are published (LJSpeech, Common Voice, Kaldi, NeMo, webdataset, Lhotse): how each is known,
and how its records become columns `audio` and `text`. `datasets` reads whatever it can. Other sources are the business
of sources.py."""

import csv
import glob
import gzip
import json
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset

JSON_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
AUDIO_FILES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".webm", ".mp4")
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # key and field, parted at the first dot of the name
# What names of files say about splits, where they say something.
SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "dev": ("dev", "valid", "validation", "val"),
    "test": ("test", "eval"),
    "eval": ("eval", "test"),
}
# Columns of layouts that are read here: a part of a recording, or why there is none.
PART = {"path": Value("string"), "offset": Value("float64"), "duration": Value("float64"), "channel": Value("int32")}
UTTERANCE = Features(
    {"id": Value("string"), "audio": {**PART, "problem": Value("string")}, "text": Value("string")}
    | {"speaker": Value("string"), "language": Value("string")}
)


class Layout(ABC):
    """One layout: `needs` says what a folder or file of it has."""

    name: str
    needs: str

    @abstractmethod
    def files(self, path: Path, split: str) -> list[Path]:
        """Return the files of a split that list its records; none where `path` has another layout."""

    @abstractmethod
    def open(self, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
        """Return the records that the files list."""

    def adapt(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a record with the columns `audio` and `text`."""
        return row


class LJSpeech(Layout):
    name = "ljspeech"
    needs = "metadata.csv with lines `id|text` or `id|text|normalised text`, without a header, beside wavs/"

    def files(self, path: Path, split: str) -> list[Path]:
        file = _base(path, split) / "metadata.csv" if path.is_dir() else path
        if file.suffix not in (".csv", ".txt") or not (file.parent / "wavs").is_dir():
            return []
        return [file] if _first_line(file).count("|") in (1, 2) else []

    def open(self, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
        names = ["id", "text", "normalized_text"][: _first_line(files[0]).count("|") + 1]
        return _read_table(files[0], "|", names, streaming, names=names)

    def adapt(self, row: dict[str, Any]) -> dict[str, Any]:
        name = str(row["id"])
        return {**row, "audio": f"wavs/{name if name.lower().endswith(AUDIO_FILES) else f'{name}.wav'}"}


class CommonVoice(Layout):
    name = "common_voice"
    needs = "SPLIT.tsv (or validated.tsv) with the columns `path` and `sentence`, beside clips/"

    def files(self, path: Path, split: str) -> list[Path]:
        if not path.is_dir():
            return [path] if path.suffix == ".tsv" and self._is_list(path) else []
        if not (path / "clips").is_dir():
            return []
        lists = {file.stem: file for file in sorted(path.glob("*.tsv")) if self._is_list(file)}
        names = [split, "validated"] if split == "train" else [split, *SPLIT_WORDS.get(split, ())]
        found = next((lists[name] for name in names if name in lists), None)
        if lists and found is None:
            raise ValueError(f"`--split` {split}: {path} has {', '.join(lists)}.")
        return [found] if found else []

    def _is_list(self, file: Path) -> bool:
        return {"path", "sentence"} <= set(_first_line(file).split("\t"))

    def open(self, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
        return _read_table(files[0], "\t", _first_line(files[0]).split("\t"), streaming)

    def adapt(self, row: dict[str, Any]) -> dict[str, Any]:
        path = Path(row["path"] or "")
        clip = None if not path.name else f"clips/{path.name}" if path.suffix else f"clips/{path.name}.mp3"
        return {**row, "audio": clip, "text": row["sentence"]}


class Kaldi(Layout):
    name = "kaldi"
    needs = "wav.scp that names files, and text (segments, utt2spk if there)"

    def files(self, path: Path, split: str) -> list[Path]:
        file = _base(path, split) / "wav.scp" if path.is_dir() else path
        return [file] if file.name == "wav.scp" and file.is_file() else []

    def open(self, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
        folder = files[0].parent
        recordings = {key: self._file(files[0], key, entry) for key, entry in _kaldi_table(files[0]).items()}
        audio: dict[str, dict[str, Any]] = {key: {"path": path} for key, path in recordings.items()}
        if (folder / "segments").is_file():
            audio = dict(self._segments(folder / "segments", recordings))
        texts, speakers = _kaldi_table(folder / "text"), _kaldi_table(folder / "utt2spk")
        alone = {key: {"problem": f"{key} is in text alone, not in wav.scp or segments"} for key in texts}
        rows = [
            {"id": key, "audio": part, "text": texts.get(key), "speaker": speakers.get(key)}
            for key, part in {**audio, **{key: part for key, part in alone.items() if key not in audio}}.items()
        ]
        return _as_dataset(rows, streaming)

    def _file(self, source: Path, key: str, entry: str) -> str:
        """Return the file that an entry of wav.scp names, or refuse what is none: a command is never run."""
        if entry.endswith("|") or entry.startswith("|") or entry == "-":
            raise ValueError(
                f"`--source` {source}: the recording {key} is a shell command ({entry!r}), and commands are not run "
                "here. Write the recordings to files first and name those in wav.scp."
            )
        if re.search(r"\.ark:\d+$", entry):
            raise ValueError(
                f"`--source` {source}: the recording {key} lies in an archive ({entry!r}). Write the recordings to "
                "files first (wav-copy does) and name those in wav.scp."
            )
        return entry

    def _segments(self, file: Path, recordings: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, entry in _kaldi_table(file).items():
            try:
                recording, start, end = entry.split()[:3]
                offset, duration = float(start), float(end) - float(start)
            except ValueError as error:
                raise ValueError(
                    f"`--source` {file}: {key} needs a recording, its start and its end, not {entry!r}."
                ) from error
            if recording not in recordings:
                yield key, {"problem": f"the recording {recording} is not in wav.scp"}
            else:  # an end of -1 is that of the recording
                length = {"duration": duration} if float(end) >= 0 else {}
                yield key, {"path": recordings[recording], "offset": offset, **length}


class Nemo(Layout):
    name = "nemo"
    needs = "a JSON-lines manifest with `audio_filepath` (and `offset`, `duration`, `text`)"

    def files(self, path: Path, split: str) -> list[Path]:
        return _json_files(path, split, lambda first: "audio_filepath" in first)

    def open(self, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
        return load_dataset("json", data_files=[data_files(file) for file in files], split="train", streaming=streaming)

    def adapt(self, row: dict[str, Any]) -> dict[str, Any]:
        part = {"path": row["audio_filepath"], "offset": row.get("offset"), "duration": row.get("duration")}
        return {**row, "audio": None if row["audio_filepath"] is None else part}


class Tars(Layout):
    """The `webdataset` builder of `datasets` needs torchcodec even where audio is only read, so tars are read here."""

    name = "webdataset"
    needs = "tar files whose members KEY.EXTENSION are audio, .txt and .json, those of a record beside each other"

    def files(self, path: Path, split: str) -> list[Path]:
        if path.is_dir():
            return of_split(sorted(_base(path, split).glob("*.tar")), split, path)
        found = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(str(path)))]
        return found if path.suffix == ".tar" else []

    def open(self, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
        rows = [self._record(key, fields) for file in files for key, fields in self._groups(file)]
        names = dict.fromkeys(name for row in rows for name in row)
        dataset = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
        return dataset.to_iterable_dataset() if streaming else dataset

    def _groups(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield key and fields of the records of a tar: what audio is where, and the content of everything else."""
        key = ""
        fields: dict[str, Any] = {}
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                found = MEMBER.fullmatch(member.name)
                if not member.isfile() or not found:
                    continue
                if found[1] != key:
                    if fields:
                        yield key, fields
                    key, fields = found[1], {}
                if found[2] in fields:
                    raise ValueError(
                        f"`--source` {file}: {member.name} is in it twice; give each record a key of its own."
                    )
                extension = "." + found[2].rpartition(".")[2].lower()
                if extension in AUDIO_FILES:
                    fields[found[2]] = {"path": file.name, "start": member.offset_data, "size": member.size}
                elif extension in (".txt", ".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    fields[found[2]] = content.read().decode()
        if fields:
            yield key, fields

    def _record(self, key: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Name `NAME.wav` and `NAME.txt` NAME, `wav` audio and `txt` text; lay the keys of `json` open."""
        record: dict[str, Any] = {}
        for field, value in fields.items():
            stem, _, extension = field.rpartition(".")
            if extension.lower() != "json":
                record.setdefault(stem or ("text" if extension.lower() == "txt" else "audio"), value)
        for field, value in fields.items():
            if field.lower().endswith("json"):
                inner = json.loads(value)
                for name, item in inner.items() if isinstance(inner, dict) else ():
                    plain = item is None or isinstance(item, (str, int, float, bool))
                    record.setdefault(name, item if plain else json.dumps(item, ensure_ascii=False))
        return {"__key__": key, **record}


class Lhotse(Layout):
    name = "lhotse"
    needs = "cuts.jsonl or cuts.jsonl.gz, whose cuts name recordings in files"

    def files(self, path: Path, split: str) -> list[Path]:
        return _json_files(path, split, self._is_cut)

    def _is_cut(self, first: Mapping[str, Any]) -> bool:
        return str(first.get("type", "")).endswith("Cut") or {"supervisions", "start", "duration"} <= set(first)

    def open(self, files: list[Path], streaming: bool) -> Dataset | IterableDataset:
        return _as_dataset([self._utterance(cut) for file in files for cut in _json_lines(file)], streaming)

    def _utterance(self, cut: Mapping[str, Any]) -> dict[str, Any]:
        supervisions = cut.get("supervisions") or []
        said = [part["text"] for part in supervisions if part.get("text")]
        first = supervisions[0] if supervisions else {}
        whose = {"speaker": first.get("speaker"), "language": first.get("language")}
        return {"id": cut.get("id"), "audio": self._audio(cut), "text": " ".join(said) or None, **whose}

    def _audio(self, cut: Mapping[str, Any]) -> dict[str, Any]:
        recording, channel = cut.get("recording"), cut.get("channel", 0)
        if recording is None:
            kind = cut.get("type", "cut")
            return {"problem": f"the {kind} {cut.get('id')} has no recording of its own; `save_audios` writes one"}
        name = recording.get("id")
        changes = [change.get("name") for change in recording.get("transforms") or [] if isinstance(change, dict)]
        if any(change != "Resample" for change in changes):
            said = ", ".join(map(str, changes))
            return {"problem": f"the recording {name} is yet to be changed by {said}; `save_audios` does it"}
        one = isinstance(channel, int)  # several are averaged
        for source in recording.get("sources") or []:
            channels = source.get("channels") or [0]
            if one and channel not in channels:
                continue
            if source.get("type") not in ("file", "url"):
                return {"problem": f"the recording {name} is a {source.get('type')}, not a file"}
            part = {"path": source["source"], "offset": cut.get("start", 0.0), "duration": cut.get("duration")}
            return part | ({"channel": channels.index(channel)} if one and len(channels) > 1 else {})
        return {"problem": f"the recording {name} has no channel {channel}"}


LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (LJSpeech(), CommonVoice(), Kaldi(), Nemo(), Tars(), Lhotse())
}


def find_layout(path: Path, split: str, name: str | None = None) -> tuple[Layout, list[Path]] | None:
    """
    Return the layout of a folder or file with the files of its split, or `None` where it has none of `LAYOUTS`.

    Args:
        path (`Path`): folder or file; tar files may have wildcards.
        split (`str`): which split, of a folder that has several.
        name (`str`, *optional*): the layout, if it shall not be found by looking.

    Raises:
        ValueError: If it is not of the layout that `name` says, has several layouts, or lacks the split.
    """
    if name is not None:
        if name not in LAYOUTS:
            raise ValueError(f"`--layout` is {name!r}; choose from {', '.join(LAYOUTS)}.")
        if files := LAYOUTS[name].files(path, split):
            return LAYOUTS[name], files
        raise ValueError(f"`--layout` {name}: {path} is not one; it needs {LAYOUTS[name].needs}.")
    found = [(layout, files) for layout in LAYOUTS.values() if (files := layout.files(path, split))]
    if len(found) > 1:
        names = ", ".join(layout.name for layout, _ in found)
        raise ValueError(f"`--source` {path} may be read as {names}; say which with `--layout`.")
    return found[0] if found else None


def data_files(path: Path) -> str:
    """Return a path as `datasets` takes it, which reads patterns: a bracket in a name is no pattern."""
    return glob.escape(str(path))


def _base(path: Path, split: str) -> Path:
    return path / split if (path / split).is_dir() else path


def _open_text(file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _first_line(file: Path) -> str:
    """Return the first line of a text file that holds anything, empty where there is none or it is no text."""
    try:
        with _open_text(file) as lines:
            return next((line.rstrip("\r\n") for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError):
        return ""


def _json_lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"`--source` {file}, line {number}: {error}.") from error


def _json_files(path: Path, split: str, is_wanted: Any) -> list[Path]:
    """Return the JSON-lines files whose first object is a wanted one: `path` itself, or those of a split in it."""

    def fits(file: Path) -> bool:
        try:
            first = json.loads(_first_line(file))
        except ValueError:
            return False
        return isinstance(first, dict) and bool(is_wanted(first))

    if path.is_dir():
        files = [file for file in sorted(_base(path, split).iterdir()) if file.name.endswith(JSON_FILES) and fits(file)]
        return of_split(files, split, path)
    return [path] if path.name.endswith(JSON_FILES) and path.is_file() and fits(path) else []


def of_split(files: list[Path], split: str, path: Path, names: Mapping[Path, str] | None = None) -> list[Path]:
    """Return the files whose `names` (default: their own) say the split, or all where none says any."""
    names = names or {file: file.name for file in files}
    words = {word for known in SPLIT_WORDS.values() for word in known}
    parts = {file: set(re.split(r"[^a-z]+", names[file].lower())) for file in files}
    if not any(words & parts[file] for file in files):
        return files
    wanted = {split.lower(), *SPLIT_WORDS.get(split, ())}
    found = [file for file in files if wanted & parts[file]]
    if not found:
        raise ValueError(f"`--split` {split}: {path} has {', '.join(dict.fromkeys(names[file] for file in files))}.")
    return found


def _read_table(file: Path, separator: str, columns: list[str], streaming: bool, **options: Any) -> Any:
    """Read a table of texts: nothing in it is a quote, a number or missing."""
    return load_dataset(
        "csv",
        data_files=data_files(file),
        split="train",
        streaming=streaming,
        delimiter=separator,
        quoting=csv.QUOTE_NONE,
        keep_default_na=False,
        encoding="utf-8-sig",
        features=Features({name: Value("string") for name in columns}),
        **options,
    )


def _kaldi_table(file: Path) -> dict[str, str]:
    """
    Return the rest of every line of a Kaldi file by its key, nothing where there is no file.

    Raises:
        ValueError: If two lines say different things of one key: a recording would be given the text of another.
    """
    table: dict[str, str] = {}
    if file.is_file():
        with _open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    key, *rest = line.strip().split(maxsplit=1)
                    entry = rest[0] if rest else ""
                    if table.setdefault(key, entry) != entry:
                        raise ValueError(
                            f"`--source` {file}, line {number}: {key} is {entry!r} here and {table[key]!r} before. "
                            "Keep one of them, or give each its own key."
                        )
    return table


def _as_dataset(rows: list[dict[str, Any]], streaming: bool) -> Dataset | IterableDataset:
    audio = dict.fromkeys(UTTERANCE["audio"])
    whole = [{**dict.fromkeys(UTTERANCE), **row, "audio": {**audio, **row["audio"]}} for row in rows]
    dataset = Dataset.from_list(whole, features=UTTERANCE)
    return dataset.to_iterable_dataset() if streaming else dataset
