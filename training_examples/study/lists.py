"""Which held-out lists of ttt_tiny/build_speech.py the study measures on. How they are read is in samples.py."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SPLITS = ["evaluation", "development"]


@dataclass(frozen=True)
class HeldOutList:
    """
    One list.

    Args:
        task (`str`): what the model is asked for.
        spoken (`bool`): whether its answers are listened to.
        splits (`tuple` of `str`): where there is one.
    """

    task: str
    spoken: bool = False
    splits: tuple[str, ...] = tuple(SPLITS)


LISTS = {
    "spoken_qa_seen": HeldOutList("spoken_qa", spoken=True),
    "spoken_qa_unheard": HeldOutList("spoken_qa", splits=("evaluation",)),
    "asr_seen": HeldOutList("asr"),
    "tts": HeldOutList("tts", spoken=True),
}


def list_path(folder: Path, split: str, name: str) -> Path:
    """Return where a list of a split is."""
    return folder / f"{name if split == 'evaluation' else f'{split}_{name}'}.jsonl"


def choose_lists(folder: Path, split: str, wanted: Sequence[str] = ()) -> list[str]:
    """
    Return the lists to measure on: those that are wanted, or all that the split has.

    Raises:
        ValueError: If a list is unknown.
        FileNotFoundError: If one is not there; the message says how to do without it.
    """
    if unknown := sorted(set(wanted) - set(LISTS)):
        raise ValueError(f"`--lists` {unknown}: there are {list(LISTS)}")
    names = list(wanted) or [name for name, kind in LISTS.items() if split in kind.splits]
    missing = [name for name in names if not list_path(folder, split, name).exists()]
    if missing:
        there = " ".join(name for name in names if name not in missing)
        remedy = f"`--lists {there}` does without" if there else "and no other list of this split is there"
        raise FileNotFoundError(
            f"{list_path(folder, split, missing[0])} is missing: `--data_dir` must hold the lists of "
            f"ttt_tiny/build_speech.py; {remedy}."
        )
    return names


def read_lines(folder: Path, split: str, name: str, limit: int) -> list[str]:
    """Return the first lines of a list."""
    return list_path(folder, split, name).read_text(encoding="utf-8").splitlines()[:limit]


def hash_lists(folder: Path, split: str, names: Sequence[str], limit: int) -> dict[str, str]:
    """Return a short hash of the rows that are used of each list: runs can be compared where it is the same."""
    digests = {}
    for name in names:
        text = "\n".join(read_lines(folder, split, name, limit))
        digests[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return digests
