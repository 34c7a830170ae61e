"""Files that appear whole or not at all, so that a run may be killed at any time; paths as they are published."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to. It takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def short_name(path: str | Path) -> str:
    """Return a path as what is published may name it: nothing of the machine, at most the last two folders."""
    path = Path(path)
    return str(Path(*path.parts[-2:])) if path.is_absolute() or ".." in path.parts else str(path)


def without_folders(value: Any) -> Any:
    """Return a value, of containers too, whose paths of this machine are named as `short_name` does."""
    if isinstance(value, dict):
        return {name: without_folders(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_folders(item) for item in value)
    is_path = isinstance(value, (str, Path)) and (Path(value).is_absolute() or ".." in Path(value).parts)
    return short_name(value) if is_path else value


def write_json(path: Path, content: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Write JSON, whole or not at all; `default` is that of `json.dumps`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=default) + "\n")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
