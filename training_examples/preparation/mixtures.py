"""Prepared examples as one dataset to train on: a weighted mixture of the folders that prepare_dataset.py writes and of
datasets saved to disk, whole or streamed."""

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from training_examples.preparation.shards import FEATURES, ShardFolder

STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")


def load_mixture(
    sources: list[str],
    streaming: bool = False,
    seed: int = 0,
    split: str = "train",
    *,
    stopping_strategy: str = "all_exhausted",
    shuffle_buffer_size: int = 0,
    endless: bool = False,
) -> Dataset | IterableDataset:
    """
    Load prepared examples as one dataset.

    Args:
        sources (`list[str]`): each "PATH" or "PATH:WEIGHT". A path is a folder that prepare_dataset.py wrote, or a
            `DatasetDict` or `Dataset` saved to disk. Without any weight, every example occurs once, source after
            source. With weights (1 where a source has none), each next example is drawn from a source with a
            probability in proportion to its weight.
        streaming (`bool`, *optional*, defaults to `False`): read the files as they are needed, instead of building a
            cache first.
        seed (`int`, *optional*, defaults to 0): of the draws between sources and of the shuffling.
        split (`str`, *optional*, defaults to `"train"`): which split of each source.
        stopping_strategy (`str`, *optional*, defaults to `"all_exhausted"`): of a weighted mixture, as
            `datasets.interleave_datasets` takes it. "all_exhausted" begins small sources again until every example of
            every source has been seen; "first_exhausted" stops at the end of the first source;
            "all_exhausted_without_replacement" goes on without the sources that have ended.
        shuffle_buffer_size (`int`, *optional*, defaults to 0): shuffles a stream: the order of its files, and examples
            in a buffer of so many, one for each source with a weight. The Trainer shuffles datasets that are not
            streamed by itself.
        endless (`bool`, *optional*, defaults to `False`): begin a stream again when it has ended, in a weighted mixture
            every source by itself, and shuffle across its repetitions.

    Returns:
        `Dataset` or `IterableDataset`: rows of `input_ids`, `labels`, `length` and `task`.

    Raises:
        FileNotFoundError: If a path is no folder of examples.
        ValueError: If there are no sources, a split is not there, a weight is not positive, the strategy is unknown, or
            what is not streamed shall be endless, or a folder holds something else than prepared examples.
    """
    if not sources:
        raise ValueError("`sources` is empty; give at least one folder of prepared examples.")
    if stopping_strategy not in STOPPING_STRATEGIES:
        raise ValueError(f"`stopping_strategy` is {stopping_strategy!r}; use one of {', '.join(STOPPING_STRATEGIES)}.")
    if endless and not streaming:
        raise ValueError("`endless` is True, which streams alone can be; set `streaming=True`, too.")
    parsed = [parse_source(source) for source in sources]
    datasets = [_load(path, streaming, split) for path, _ in parsed]

    def as_read(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        if endless:
            dataset = dataset.repeat(None)
        shuffles = streaming and shuffle_buffer_size
        return dataset.shuffle(seed=seed, buffer_size=shuffle_buffer_size) if shuffles else dataset

    if len(datasets) == 1 or all(weight is None for _, weight in parsed):
        return as_read(concatenate_datasets(datasets))
    # Each source by itself, since `datasets` waits for its threads, five seconds, wherever a mixture ends.
    datasets = [as_read(dataset) for dataset in datasets]
    weights = [1.0 if weight is None else weight for _, weight in parsed]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    return interleave_datasets(datasets, probabilities, seed=seed, stopping_strategy=stopping_strategy)


def parse_source(source: str) -> tuple[Path, float | None]:
    """Return "PATH" or "PATH:WEIGHT" as path and weight; a colon that no number follows belongs to the path."""
    path, separator, weight = source.rpartition(":")
    try:
        value = float(weight) if separator else None
    except ValueError:
        value = None
    if value is None:
        return Path(source), None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`sources`: the weight of {source!r} must be a number above 0; leave the source out for 0.")
    return Path(path), value


def _load(path: Path, streaming: bool, split: str) -> Dataset | IterableDataset:
    shards = ShardFolder(path, split).shards()
    if shards:
        _check_columns(path, pq.read_schema(shards[0]).names)
        files = [str(shard) for shard in shards]
        return load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            _check_split(path, split, list(dataset))
            dataset = dataset[split]
        _check_columns(path, dataset.column_names)
        dataset = dataset.select_columns([name for name in FEATURES if name in dataset.column_names])
        if dataset.features != FEATURES:
            dataset = dataset.cast(FEATURES)  # mixtures need columns of the same types
        return dataset.to_iterable_dataset(num_shards=min(128, len(dataset))) if streaming else dataset
    _check_split(path, split, sorted({file.name.split("-")[0] for file in (path / "data").glob("*.parquet")}))
    raise FileNotFoundError(f"{path} is no folder of examples: make one with prepare_dataset.py.")


def _check_columns(path: Path, available: Sequence[str]) -> None:
    if missing := [name for name in FEATURES if name not in available]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}, but {', '.join(available)}: these are no prepared examples; "
            "prepare_dataset.py makes them."
        )


def _check_split(path: Path, split: str, available: Sequence[str]) -> None:
    if available and split not in available:
        raise ValueError(f"`split` is {split!r}, but {path} has {', '.join(available)}.")
