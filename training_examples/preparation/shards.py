"""A folder of prepared examples: Parquet shards, a report per finished shard, the arguments they were made with, and
the summary. Every file appears whole or not at all, so a run may be killed at any time."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Features, List, Value

from training_examples.files import read_json, whole_file, write_json, write_text
from training_examples.preparation.sources import Chunk

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "task": Value("string"),
    }
)
MARK = "<!-- Examples prepared for TtT. Remove this line to keep the card as you edit it -->"
QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class ShardFolder:
    """The shards of one split in a folder."""

    folder: Path
    split: str

    @property
    def data(self) -> Path:
        """Where the Parquet files are."""
        return self.folder / "data"

    @property
    def reports(self) -> Path:
        """Where each finished shard has its report."""
        return self.folder / f".{self.split}"

    def shards(self) -> list[Path]:
        """Return the Parquet files, in the order of the records."""
        return sorted(self.data.glob(f"{self.split}-*.parquet"))

    def arguments(self) -> dict[str, Any]:
        """Return what the folder was begun with, nothing if it is new."""
        file = self.reports / "arguments.json"
        return read_json(file) if file.exists() else {}

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """
        Keep what the examples depend on beside them.

        Raises:
            ValueError: If the folder was begun with other arguments; the message names them.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        self.reports.mkdir(exist_ok=True)
        now = json.loads(json.dumps(arguments, default=str))
        before = self.arguments() or now
        changes = [
            f"{key} was {before.get(key)} and is {value}" for key, value in now.items() if before.get(key) != value
        ]
        if changes:
            raise ValueError(
                f"`--output_dir` {self.folder} was begun otherwise: {'; '.join(changes)}. Repeat the former arguments "
                "to go on, or choose another folder or `--output_split`."
            )
        write_json(self.reports / "arguments.json", now)

    def write(self, chunk: Chunk, examples: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
        """Write the examples of a chunk and then its report, which marks the chunk as finished."""
        name = f"{chunk.source:04d}-{chunk.number:06d}"
        if examples:
            target = self.data / f"{self.split}-{name}.parquet"
            with whole_file(target) as partial:
                pq.write_table(pa.Table.from_pylist(examples, FEATURES.arrow_schema), partial, compression="zstd")
        write_json(self.reports / f"{name}.json", report)

    def finished(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Return the reports, by source and chunk."""
        names = sorted(self.reports.glob("[0-9]*-[0-9]*.json"))
        return {tuple(map(int, file.stem.split("-"))): read_json(file) for file in names}  # type: ignore[misc]

    def _write_card(self) -> None:
        """Say in a card which files are which split, since `load_dataset` has names of its own for some; a card that is
        somebody's own stays."""
        card = self.folder / "README.md"
        if card.exists() and MARK not in card.read_text(encoding="utf-8"):
            return
        splits = sorted({file.name.split("-")[0] for file in self.data.glob("*.parquet")})
        files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
        settings = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]}, sort_keys=False)
        write_text(card, f"---\n{settings}---\n{MARK}\n" if files else f"{MARK}\n")

    def summarise(self, source_names: Sequence[str]) -> dict[str, Any]:
        """Write `rejected-SPLIT.jsonl` and `summary-SPLIT.json`; return the summary."""
        tasks: dict[str, dict[str, float]] = {}
        faults: set[tuple[int, int, str, str]] = set()  # several tasks may reject a record for the same one
        lines, records, seconds = [], 0, 0.0
        for (source, _), report in self.finished().items():
            records += report["records"]
            seconds += report["audio_seconds"]
            for task, counts in report["tasks"].items():
                total = tasks.setdefault(task, dict.fromkeys(counts, 0))
                for name, amount in counts.items():
                    total[name] += amount
            for row in report["rejected"]:
                faults.add((source, row["record"], row["kind"], row["reason"]))
                lines.append(json.dumps({"source": source_names[source], **row}, ensure_ascii=False) + "\n")
        shards = self.shards()
        lengths = [pq.read_table(shard, columns=["length"])["length"].to_numpy() for shard in shards]
        quantiles = np.percentile(np.concatenate(lengths), QUANTILES) if lengths else []
        for counts in tasks.values():
            counts["audio_hours"] = round(counts.pop("audio_seconds") / 3600, 4)
        totals = ("examples", "rejected", "text_tokens", "audio_tokens", "scored_tokens")
        summary = {
            "records": records,
            **{name: sum(counts[name] for counts in tasks.values()) for name in totals},
            "audio_hours": round(seconds / 3600, 4),  # a recording that serves several tasks counts once here
            "shards": len(shards),
            "length_quantiles": {f"{q}%": int(value) for q, value in zip(QUANTILES, quantiles, strict=False)},
            "rejected_kinds": dict(Counter(kind for _, _, kind, _ in sorted(faults))),
            "tasks": tasks,
        }
        self._write_card()
        write_text(self.folder / f"rejected-{self.split}.jsonl", "".join(lines))
        write_json(self.folder / f"summary-{self.split}.json", summary)
        return summary
