"""What the evaluation scripts share: held-out lists, results that survive a kill, figures with their counts, tables."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


@dataclass(frozen=True)
class Figure:
    """One measured number: its value, how many samples it rests on, and what it counts in."""

    value: float
    count: int
    unit: str = "%"

    def __str__(self) -> str:
        if self.unit == "%":
            return f"{100 * self.value:.1f} %"
        return f"{self.value:.2f} {self.unit}".strip()


def read_list(folder: str | Path, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of the held-out list `name`.jsonl, the first `limit` of them.

    Raises:
        FileNotFoundError: If there is no such list; the message says which script makes it.
    """
    path = Path(folder, f"{name}.jsonl")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: make the held-out lists with training_examples/ttt_tiny/build_speech.py"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return rows[:limit]


def read_audio(folder: str | Path, path: str, sampling_rate: int = 16_000) -> np.ndarray:
    """A mono waveform `(samples,)`, float32, of the evaluation folder.

    Raises:
        ValueError: If its rate is another one: the lists are made at 16 kHz.
    """
    samples, rate = soundfile.read(Path(folder, path), dtype="float32")
    if rate != sampling_rate or samples.ndim != 1:
        raise ValueError(f"{path} has {rate} Hz and shape {samples.shape}; expected mono at {sampling_rate} Hz")
    return samples


def normalized(text: str) -> str:
    """Lower case, single blanks: the form in which texts are compared."""
    return " ".join(text.lower().split())


def fingerprint(*paths: str | Path) -> str:
    """A short hash of folders' weights, settings and lists, or of files, so that no result is taken for another's."""
    digest = hashlib.sha256()
    for root in map(Path, paths):
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and path.suffix in {".safetensors", ".json", ".jsonl"}:
                digest.update(path.relative_to(root if root.is_dir() else root.parent).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def remember(path: Path, settings: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """The result of `compute`, from `path` if it was computed there before with the same settings."""
    settings = json.loads(json.dumps(settings))
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["settings"] == settings:
            return stored["result"]
    result = compute()
    write_json(path, {"settings": settings, "result": result})
    return result


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    partial.rename(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def share(flags: Iterable[bool]) -> Figure:
    """How many of `flags` are true, with the count; NaN of none."""
    flags = list(flags)
    return Figure(sum(flags) / len(flags) if flags else math.nan, len(flags))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
