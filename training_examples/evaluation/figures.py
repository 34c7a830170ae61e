"""Measured figures: with their counts, remembered across a kill, and as tables."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training_examples.files import read_json, write_json

# What of a folder decides what a model answers, or what it is asked: by suffix, or by name.
HASHED = frozenset({".safetensors", ".json", ".jsonl", ".bin", ".jinja", ".model", "vocab.txt", "merges.txt"})


@dataclass(frozen=True)
class Figure:
    """One measured number: its value, how many samples it rests on, what it counts in, and its 95 % interval."""

    value: float
    count: int
    unit: str = "%"
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "none"
        if self.unit == "%":
            return f"{100 * self.value:.1f} %"
        return f"{self.value:.2f} {self.unit}".strip()

    @property
    def interval(self) -> str:
        """The interval as it is printed, empty where there is none."""
        if self.low is None or self.high is None or math.isnan(self.low) or math.isnan(self.high):
            return ""
        scale, digits = (100, 1) if self.unit == "%" else (1, 2)
        return f"{scale * self.low:.{digits}f} to {scale * self.high:.{digits}f}"


def normalized(text: str) -> str:
    """Return a text in lower case with single blanks, the form in which texts are compared."""
    return " ".join(text.lower().split())


def fingerprint(*paths: str | Path) -> str:
    """
    Return a short hash of folders' weights, settings, chat templates, vocabularies and lists, or of files, so that no
    result is taken for another's.
    """
    digest = hashlib.sha256()
    for root in map(Path, paths):
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and (path == root or HASHED & {path.suffix, path.name}):
                digest.update(path.relative_to(root if root.is_dir() else root.parent).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def remember(path: Path, settings: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """Return the result of `compute`, from `path` if it was computed there before with the same settings."""
    settings = json.loads(json.dumps(settings))
    if path.exists():
        stored = read_json(path)
        if stored["settings"] == settings:
            return stored["result"]
    result = compute()
    write_figures(path, {"settings": settings, "result": result})
    return result


def write_figures(path: Path, content: Any) -> None:
    """Write JSON in which figures may stand, whole or not at all."""
    write_json(path, content, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is text, the others are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
