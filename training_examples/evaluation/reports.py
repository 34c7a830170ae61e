"""Reports of evaluations: Markdown to read, JSON to compare, and the comparison of several."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from training_examples.evaluation.figures import markdown_table
from training_examples.evaluation.intervals import difference_interval
from training_examples.evaluation.measuring import RATIO, Measured, total_of
from training_examples.files import read_json, write_json, write_text

FORMAT = 1
PACKAGES = ("torch", "transformers", "evaluate", "faster-whisper", "whisper-normalizer")


@dataclass
class Section:
    """What was measured on one list of samples: a heading, figures, remarks, and settings (JSON)."""

    name: str
    title: str
    figures: list[Measured]
    remarks: list[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Return its figures as Markdown."""
        rows = [[m.title, m.figure, m.figure.interval, m.figure.count, m.note] for m in self.figures]
        header = ["", "figure", "95 % interval", "rows", "note"]
        if not any(measured.note for measured in self.figures):
            header, rows = header[:-1], [row[:-1] for row in rows]
        return markdown_table(header, rows)


def environment() -> dict[str, str]:
    """Return the versions that figures may depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return versions


def write_report(
    folder: Path, title: str, sections: Sequence[Section], body: str | None = None, name: str = "report"
) -> str:
    """Write `name`.json and `name`.md into a folder and return the Markdown: `body`, or else a table a section."""
    versions = environment()
    write_json(
        folder / f"{name}.json",
        {
            "format": FORMAT,
            "title": title,
            "environment": versions,
            "sections": [
                {
                    "name": section.name,
                    "title": section.title,
                    "remarks": section.remarks,
                    "settings": dict(section.settings),
                    "figures": [measured.as_json() for measured in section.figures],
                }
                for section in sections
            ],
        },
    )
    parts = [f"# {title}"]
    if body is not None:
        parts.append(body)
    for section in sections if body is None else ():
        parts += [f"## {section.title}", section.table(), *section.remarks]
        if section.settings:
            parts.append(settings_list(section.settings))
    parts.append(
        "Intervals are 95 % bootstrap intervals over rows. "
        + ", ".join(f"{package} {number}" for package, number in versions.items())
        + "."
    )
    text = "\n\n".join(parts) + "\n"
    write_text(folder / f"{name}.md", text)
    return text


def settings_list(settings: Mapping[str, Any]) -> str:
    """Return settings as a Markdown list; mappings in them become lines of their own."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
        text = " ".join(str(value).split())
        lines.append(f"- {name}: {text if len(text) <= 300 else text[:297] + '...'}")
    return "\n".join(lines)


@dataclass
class Report:
    """A report that was written: its name, and its figures by section and key."""

    name: str
    figures: dict[tuple[str, str], Measured]
    section_titles: dict[str, str]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def has_data_of(self, other: "Report", section: str) -> bool:
        """Return whether a section of both rests on the same samples: ids are often no more than numbers of rows. Where
        one of them does not say, they may."""
        ours, theirs = (report.settings.get(section, {}).get("data") for report in (self, other))
        return ours is None or theirs is None or ours == theirs

    @classmethod
    def read(cls, path: Path) -> "Report":
        """
        Read a report.json, or that of a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is no report of this format.
        """
        file = path / "report.json" if path.is_dir() else path
        if not file.exists():
            raise FileNotFoundError(f"`--compare` {path}: there is no report; evaluate_model.py writes report.json")
        content = read_json(file)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"`--compare` {file}: it is no report of evaluate_model.py in format {FORMAT}")
        figures = {
            (section["name"], entry["key"]): Measured.from_json(entry)
            for section in content["sections"]
            for entry in section["figures"]
        }
        name = path.name if path.is_dir() else path.parent.name
        titles = {section["name"]: section["title"] for section in content["sections"]}
        settings = {section["name"]: section.get("settings", {}) for section in content["sections"]}
        return cls(name, figures, titles, settings)


def verdict(first: Measured, second: Measured, same_data: bool = True) -> tuple[str, str]:
    """
    Return the difference of two figures with its 95 % interval, and what it means: "better", "worse", or "within
    chance" where the interval holds 0. Where both have the same rows (`same_data` says that an id names the same sample
    in both), they are compared row by row.
    """
    if first.counts is None or second.counts is None:
        return "", "no intervals"
    if first.scorer != second.scorer or first.figure.unit != second.figure.unit:
        return "", "other scorers"
    paired = same_data and len(first.ids) == len(second.ids) > 0 and set(first.ids) == set(second.ids)
    left, right = first.counts, second.counts
    if paired:
        places = {name: place for place, name in enumerate(second.ids)}
        right = right[[places[name] for name in first.ids]]
    is_share = first.figure.unit == "%"
    low, high = difference_interval(left, right, paired, total_of(first.scorer), is_share)
    if math.isnan(low) or math.isnan(high):
        return "", "no intervals"
    scale, digits = (100, 1) if first.figure.unit == "%" else (1, 2)
    difference = second.figure.value - first.figure.value
    text = f"{scale * difference:+.{digits}f} ({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"
    if low <= 0 <= high:
        return text, "within chance"
    return text, "better" if (difference < 0) == first.lower_is_better else "worse"


def compare(reports: Sequence[Report]) -> str:
    """
    Return a Markdown table of several reports' common figures; each is compared with the first report's.

    Raises:
        ValueError: If there are fewer than two reports, or no figure that the first shares with another.
    """
    if len(reports) < 2:
        raise ValueError("`--compare` takes two reports or more")
    first, others = reports[0], reports[1:]
    names = unique_names([report.name for report in reports])
    keys = [key for key in first.figures if any(key in other.figures for other in others)]
    if not keys:
        raise ValueError(f"`--compare`: {names[0]} has no figure in common with {', '.join(names[1:])}")
    header = ["", names[0]]
    for name in names[1:]:
        header += [name, "difference", ""]
    rows: list[list[object]] = []
    others_data = {
        f"{section} of {name}"
        for section, _ in keys
        for name, other in zip(names[1:], others, strict=True)
        if not other.has_data_of(first, section)
    }
    for key in keys:
        ours = first.figures[key]
        row: list[object] = [f"{key[0]}: {ours.title}", _cell(ours)]
        for other in others:
            theirs = other.figures.get(key)
            row += (
                ["", "", ""]
                if theirs is None
                else [_cell(theirs), *verdict(ours, theirs, other.has_data_of(first, key[0]))]
            )
        rows.append(row)
    return "\n\n".join(
        [
            "# Comparison",
            markdown_table(header, rows),
            f"Differences are to {names[0]}, with their 95 % bootstrap intervals; where both have the same rows, these "
            'are drawn together. "Within chance": the interval holds 0.',
            *([f"Other data than {names[0]}'s: {', '.join(sorted(others_data))}."] if others_data else []),
        ]
    )


def unique_names(names: Iterable[str]) -> list[str]:
    """Return names of which none occurs twice."""
    found: list[str] = []
    for name in names:
        number, unique = 2, name
        while unique in found:
            number, unique = number + 1, f"{name} ({number})"
        found.append(unique)
    return found


def _cell(measured: Measured) -> str:
    interval = measured.figure.interval
    return f"{measured.figure} ({interval}; {measured.figure.count})" if interval else f"{measured.figure}"


__all__ = ["RATIO", "Report", "Section", "compare", "environment", "settings_list", "write_report"]
