"""Opens any source as records of plain Python values: Hub names, files, folders, saved datasets, streams and
data_config lists. Layouts of corpora are the business of layouts.py; what a record means lives in records.py."""

import glob
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Audio, ClassLabel, Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from training_examples.preparation.layouts import data_files, find_layout, of_split

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass
class Chunk:
    """Consecutive records of a source: its place in the list of sources, its number in the source, the first record's
    position, and, for a stream, the state that reading goes on from after it."""

    source: int
    number: int
    first_record: int
    records: list[dict[str, Any]]
    state: dict[str, Any] | None = None


@dataclass
class Source:
    """
    One opened source.

    Args:
        name (`str`): how errors call it.
        dataset (`Dataset` or `IterableDataset`): its records.
        root (`Path`): the folder that relative audio paths start from.
        adapt (`Callable`, *optional*): names a record's columns as layouts.py does.
    """

    name: str
    dataset: Dataset | IterableDataset
    root: Path
    adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        for column, feature in (self.dataset.features or {}).items():
            if isinstance(feature, Audio):  # left as bytes or path, for decoding it here would need torchcodec
                self.dataset = self.dataset.cast_column(column, Audio(decode=False))
        features = self.dataset.features or {}
        self._labels = {column: f.int2str for column, f in features.items() if isinstance(f, ClassLabel)}

    @property
    def num_records(self) -> int | None:
        """Number of records; `None` where only reading to the end tells."""
        return None if isinstance(self.dataset, IterableDataset) else len(self.dataset)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns, of the first record where they are not known beforehand."""
        if self.adapt is not None or self.dataset.column_names is None:
            return [name for row in self.dataset.take(1) for name in self._plain(row)]
        return self.dataset.column_names

    def chunks(self, index: int, size: int, finished: Mapping[int, dict[str, Any] | None]) -> Iterator[Chunk]:
        """
        Yield records in chunks of `size`, without those that are `finished` (chunk number to the state after it). A
        stream is read from the state after its first unbroken run of finished chunks.
        """
        if isinstance(self.dataset, IterableDataset):
            yield from self._stream(index, size, finished)
            return
        for number, first in enumerate(range(0, len(self.dataset), size)):
            if number not in finished:
                columns = self.dataset[first : first + size]
                rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                yield Chunk(index, number, first, [self._plain(row) for row in rows])

    def _stream(self, index: int, size: int, finished: Mapping[int, dict[str, Any] | None]) -> Iterator[Chunk]:
        start = next(number for number in itertools.count() if number not in finished)
        if start and (state := finished[start - 1]) is not None:
            self.dataset.load_state_dict(state)
        rows = iter(self.dataset)
        for number in itertools.count(start):
            records = [self._plain(row) for row in itertools.islice(rows, size)]
            if not records:
                return
            if number not in finished:
                yield Chunk(index, number, number * size, records, self.dataset.state_dict())

    def _plain(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a record with the names of its class labels."""
        named = {c: name_of(row[c]) for c, name_of in self._labels.items() if row[c] is not None}
        return self.adapt({**row, **named}) if self.adapt is not None else {**row, **named}


def name_audio(row: dict[str, Any]) -> dict[str, Any]:
    """
    Return a record of files listed as the `audiofolder` builder expects them: `file_name` becomes `audio`,
    `X_file_name` X. (That builder itself needs torchcodec even where audio is only read.)
    """
    suffix = "file_name"
    return {
        (name.removesuffix(suffix).removesuffix("_") or "audio") if name.endswith(suffix) else name: value
        for name, value in row.items()
    }


def open_source(
    location: str,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    layout: str | None = None,
) -> list[Source]:
    """
    Open one source.

    Args:
        location (`str`): a JSON, JSONL, CSV, Parquet or Arrow file (wildcards allowed), a folder saved by
            `save_to_disk`, a folder with `metadata.csv`, `.jsonl` or `.parquet` files whose `file_name` names the
            audio, a folder or file in one of the `LAYOUTS`, any other folder that `load_dataset` reads, or a dataset on
            the Hub.
        split (`str`, *optional*, defaults to `"train"`): of a dataset that has splits; single files have none.
        name, revision (`str`, *optional*): configuration and revision of a dataset on the Hub.
        streaming (`bool`, *optional*, defaults to `False`): read record by record, without building a cache.
        layout (`str`, *optional*): one of `LAYOUTS`, if it shall not be found by looking.

    Returns:
        `list[Source]`: one per file, otherwise one.

    Raises:
        FileNotFoundError: If no file matches.
        ValueError: If a file is of another type, the split is not there, or the layout is another or not clear.
    """
    path = Path(location)
    if layout is not None or not _is_saved(path):
        found = find_layout(path, split, layout)
        if found is not None:
            kind, listed = found
            return [Source(location, kind.open(listed, streaming), listed[0].parent, kind.adapt)]
    if path.is_dir():
        return _open_folder(path, split, streaming)
    if BUILDERS.get(_suffix(path)) is None:
        if path.exists():
            raise ValueError(f"`--source` {location}: cannot read this type of file; use {', '.join(BUILDERS)}.")
        dataset = load_dataset(location, name, split=split, revision=revision, streaming=streaming)
        return [Source(location, dataset, Path())]
    files = [location] if path.is_file() else sorted(glob.glob(location))
    if not files:
        raise FileNotFoundError(f"`--source` {location}: there is no such file.")
    return [_open_file(Path(file), streaming) for file in files]


def open_data_config(file: Path, streaming: bool = False, seed: int = 0) -> list[Source]:
    """
    Open the files of a published data_config: a JSON list of `{"path": ..., "sample_ratio": ...}`, each of which gives
    that share of its records, drawn at random without repetition. Relative paths start at the list's own folder.

    Raises:
        ValueError: If it is no such list, a ratio is outside [0, 1], or a stream has one other than 0 and 1.
    """
    entries = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "path" in entry for entry in entries):
        raise ValueError(f"`--data_config` {file} must hold a JSON list of objects with `path` and `sample_ratio`.")
    sources = []
    for entry in entries:
        ratio = float(entry.get("sample_ratio", 1.0))
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(
                f"`--data_config` {file}: `sample_ratio` of {entry['path']} is {ratio}; give a share from 0 to 1. "
                "To see a source more often, give it a larger weight in training."
            )
        if streaming and ratio not in (0.0, 1.0):
            raise ValueError(
                f"`--data_config` {file}: `sample_ratio` of {entry['path']} is {ratio}, but a stream cannot be "
                "sampled before it is read; leave `--streaming` out."
            )
        if ratio == 0.0:
            continue
        for source in open_source(str(file.parent / entry["path"]), streaming=streaming):
            if ratio < 1.0:
                kept = int(len(source.dataset) * ratio)
                source.dataset = source.dataset.shuffle(seed=seed).select(range(kept))
            sources.append(source)
    return sources


def _open_file(path: Path, streaming: bool, adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Source:
    dataset = load_dataset(BUILDERS[_suffix(path)], data_files=data_files(path), split="train", streaming=streaming)
    return Source(str(path), dataset, path.parent, adapt)


def _is_saved(path: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _open_folder(path: Path, split: str, streaming: bool) -> list[Source]:
    if _is_saved(path):
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"`--split` {split}: {path} has {', '.join(dataset)}.")
            dataset = dataset[split]
        return [Source(str(path), dataset.to_iterable_dataset() if streaming else dataset, path)]
    base = path / split if (path / split).is_dir() else path
    metadata = sorted(file for name in METADATA_FILES for file in base.rglob(name))
    if metadata and base == path and not any(file.parent == path for file in metadata):
        metadata = of_split(metadata, split, path, {file: file.relative_to(path).parts[0] for file in metadata})
    if metadata:
        return [_open_file(file, streaming, name_audio) for file in metadata]
    return [Source(str(path), load_dataset(str(path), split=split, streaming=streaming), path)]


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
