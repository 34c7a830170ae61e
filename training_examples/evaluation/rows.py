"""Rows of an evaluation on disk: answers as they come, and what was heard in them; both go on where they stopped."""

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import soundfile
from tqdm.auto import tqdm

from processing.audio_input_ttt import load_waveform
from training_examples.evaluation.backends import Answer, Backend, Sample
from training_examples.files import read_json, write_json

MOST_NAMED = 20  # recordings that a report names
TAIL_BYTES = 65_536  # read at a time, in search of the end of the last whole line
MOST_FAILURES = 5  # samples that fail one after the other end a run: the fault is not theirs
Row = dict[str, Any]


class EvaluationError(ValueError):
    """Samples that fail one after the other, or all: whoever answers them cannot, and the message has what it says."""


class Recogniser(Protocol):
    """Whatever reads speech."""

    def transcribe(self, waveforms: Sequence[np.ndarray], sampling_rate: int) -> list[str]:
        """Return one transcript for each mono waveform of shape `(samples,)`."""
        ...


@dataclass(frozen=True)
class Listener:
    """A recogniser with its name in reports. `open` is called when there is something to listen to."""

    name: str
    open: Callable[[], Recogniser]
    settings: Mapping[str, Any]


def hash_of(value: Any, length: int = 16) -> str:
    """Return a short hash of anything that is JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:length]


def audio_bytes(audio: Any) -> bytes:
    """Return the bytes by which audio is told from other audio: those of its file or of its samples."""
    if audio is None:
        return b""
    if isinstance(audio, Mapping):
        return b"".join(audio_bytes(audio[key]) for key in ("bytes", "array", "path") if audio.get(key) is not None)
    if isinstance(audio, bytes):
        return audio
    if isinstance(audio, str | Path):
        return Path(audio).read_bytes() if Path(audio).is_file() else str(audio).encode()
    return np.ascontiguousarray(audio).tobytes()


def sample_hash(sample: Sample) -> str:
    """Return a short hash of all that a sample asks and wants: texts, references and the bytes of its audio."""
    audio = [hashlib.sha256(audio_bytes(turn.audio)).hexdigest() for turn in sample.turns]
    return hash_of([sample.id, sample.kind, list(sample.references), [turn.text for turn in sample.turns], audio])


def recording_problem(sample: Sample) -> str:
    """Return why a sample's audio cannot be read, "" if it can: whose fault it is that nobody answers it."""
    for turn in sample.turns:
        if turn.audio is None or (isinstance(turn.audio, Mapping) and "audio_codes" in turn.audio):
            continue
        try:
            load_waveform(turn.audio, 16_000, name="the recording")
        except (ValueError, OSError) as error:
            return str(error)
    return ""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL file, none if there is no file. A last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a JSONL file; what a kill left of a line is cut off first."""
    with path.open("ab+") as file:
        file.truncate(_end_of_lines(file))
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _end_of_lines(file: BinaryIO) -> int:
    """Return where the last whole line of a file ends, looked for from its end: it may be long."""
    end = file.seek(0, io.SEEK_END)
    while end:
        start = max(0, end - TAIL_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def name_unusable(rows: Sequence[Row], count: int) -> str:
    """Return what a report says of samples that could not be asked, of so many."""
    named = [f"- {row['id']}: {row['unusable']}" for row in rows[:MOST_NAMED]]
    if len(rows) > MOST_NAMED:
        named.append(f"- and {len(rows) - MOST_NAMED} more, in rows.jsonl")
    said = f"{len(rows)} of {count} rows have no recording that can be read. They were not asked, and are in no figure."
    return "\n".join([f"{said} A later run asks them where it is there.", "", *named])


class Run:
    """
    The answers of one backend to one list of samples, in a folder of their own.

    The folder's name ends with a hash of the settings, so that rows of another model, other options or other data are
    never mixed with these, nor overwritten.

    Args:
        folder (`Path`): where runs are kept.
        name (`str`): of this one.
        task (`str`): what the backend is asked for.
        samples (`Sequence` of [`Sample`]): of them all.
        settings (`Mapping`): everything beside the samples that answers depend on, JSON alone.
    """

    def __init__(self, folder: Path, name: str, task: str, samples: Sequence[Sample], settings: Mapping[str, Any]):
        self.task, self.samples = task, list(samples)
        if twice := [name for name, count in Counter(sample.id for sample in samples).items() if count > 1][:3]:
            raise ValueError(f"samples share ids: {twice}; every row needs an id of its own")
        self.hashes = {sample.id: sample_hash(sample) for sample in self.samples}
        self.settings = json.loads(json.dumps({"task": task, **settings}))
        self.folder = folder / f"{name}-{hash_of(self.settings, 8)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():
            write_json(self.folder / "settings.json", self.settings)

    @property
    def rows(self) -> list[Row]:
        """The samples' rows, in their order, as far as they are answered; rows of other content are not theirs."""
        found = {row["id"]: row for row in read_rows(self.folder / "rows.jsonl")}  # a later row replaces an earlier
        # Details are not asked, and so no part of the hash: they are those of now, whatever was written.
        return [
            {**found[sample.id], **sample.details}
            for sample in self.samples
            if found.get(sample.id, {}).get("sample") == self.hashes[sample.id]
        ]

    @property
    def usable(self) -> list[Row]:
        """The rows of samples that could be asked: all but those whose recording is not there or cannot be read."""
        return [row for row in self.rows if "unusable" not in row]

    @property
    def unusable(self) -> list[Row]:
        """The rows of samples that could not be asked, see `name_unusable`."""
        return [row for row in self.rows if "unusable" in row]

    @property
    def data_hash(self) -> str:
        """A short hash of all samples."""
        return hash_of(list(self.hashes.values()))

    def answer(self, backend: Backend, batch_size: int, keep_audio: bool = True) -> list[Row]:
        """
        Answer what is not answered yet, in batches, and return the rows of all samples.

        A batch that fails as a whole is asked one by one; a sample that fails alone becomes a row with `error`, whose
        answer counts as empty, and is asked again by the next run. Where the fault is the recording's, which is not
        there or cannot be read, the row has `unusable`, too, and any number of others go on.

        Raises:
            EvaluationError: If several samples fail one after the other, or all of them.
        """
        known = {row["id"] for row in self.rows if "unusable" in row}
        lost = [self._unusable(s, s.problem) for s in self.samples if s.problem and s.id not in known]
        append_rows(self.folder / "rows.jsonl", lost)
        finished = {row["id"] for row in self.rows if "error" not in row}
        waiting = [sample for sample in self.samples if not sample.problem and sample.id not in finished]
        waiting.sort(key=lambda sample: (len(sample.turns), _size(sample)))
        failures = 0
        with tqdm(total=len(waiting), desc=self.folder.name, disable=not waiting) as bar:
            while waiting:
                turns = len(waiting[0].turns)
                batch = [sample for sample in waiting[:batch_size] if len(sample.turns) == turns]
                waiting = waiting[len(batch) :]
                rows = self._ask(backend, batch, keep_audio)
                append_rows(self.folder / "rows.jsonl", rows)
                for row in rows:
                    if "unusable" in row:
                        continue
                    failures = failures + 1 if "error" in row else 0
                    if failures == MOST_FAILURES:
                        raise EvaluationError(
                            f"{failures} samples failed one after the other, the last: {row['error']}"
                        )
                bar.update(len(batch))
        asked = self.usable
        if asked and all("error" in row for row in asked):  # figures of it would be of nobody's answers
            raise EvaluationError(f"none of {len(asked)} samples was answered, the first: {asked[0]['error']}")
        return self.rows

    def _ask(self, backend: Backend, batch: Sequence[Sample], keep_audio: bool) -> list[Row]:
        try:
            answers = backend.answer(batch, self.task)
        except Exception as error:
            if len(batch) > 1:
                return [row for sample in batch for row in self._ask(backend, [sample], keep_audio)]
            answers = [error]
        return [
            self._failed(sample, answer)
            if isinstance(answer, Exception)
            else self._row(sample) | self._answered(sample, answer, keep_audio)
            for sample, answer in zip(batch, answers, strict=True)
        ]

    def _failed(self, sample: Sample, error: Exception) -> Row:
        if problem := recording_problem(sample):
            return self._unusable(sample, problem)
        return self._row(sample) | {"text": "", "error": f"{type(error).__name__}: {error}"}

    def _unusable(self, sample: Sample, problem: str) -> Row:
        return self._row(sample) | {"text": "", "error": problem, "unusable": problem}

    def _row(self, sample: Sample) -> Row:
        asked = {"question": text} if (text := sample.turns[-1].text) else {}
        row = {"id": sample.id, "kind": sample.kind, "sample": self.hashes[sample.id], **asked, **sample.details}
        return row | {"references": list(sample.references)}

    def _answered(self, sample: Sample, answer: Answer, keep_audio: bool) -> Row:
        path = None
        if keep_audio and len(answer.audio):
            path = f"audio/{hash_of(sample.id)}.flac"
            (self.folder / "audio").mkdir(exist_ok=True)
            soundfile.write(self.folder / path, np.clip(answer.audio, -1.0, 1.0), answer.sampling_rate)
        row: Row = {"text": answer.text, "earlier": answer.earlier, "audio": path, "codes": answer.codes}
        row |= {
            "forwards": answer.forwards,
            "speech_steps": answer.speech_steps,
            "ended": answer.ended,
            "seconds": _finite(answer.seconds),
        }
        return row | {"audio_seconds": len(answer.audio) / answer.sampling_rate}

    def listen(self, listener: Listener, batch_size: int = 16) -> dict[str, str]:
        """
        Return what a recogniser heard in every answer, by id; what it heard before is remembered. Where nothing was
        said, nothing is heard.

        Raises:
            FileNotFoundError: If an answer's recording is gone.
        """
        path = self.folder / f"heard-{listener.name}-{hash_of(listener.settings, 8)}.jsonl"
        keys = {row["id"]: _answer_key(row) for row in self.rows}
        heard = {row["id"]: row["text"] for row in read_rows(path) if row["answer"] == keys.get(row["id"])}
        waiting = [row for row in self.rows if row["id"] not in heard and row.get("audio")]
        if gone := [row for row in waiting if not (self.folder / row["audio"]).is_file()]:
            raise FileNotFoundError(
                f"{listener.name} cannot listen to {len(gone)} of {len(keys)} answers in {self.folder}, whose "
                "recordings were not kept: give another `--output_dir`, or remove rows.jsonl there, to have them "
                "answered anew."
            )
        recogniser = listener.open() if waiting else None
        for start in tqdm(range(0, len(waiting), batch_size), desc=f"{listener.name} listens", disable=not waiting):
            assert recogniser is not None
            rows = waiting[start : start + batch_size]
            waves, rates = zip(
                *(soundfile.read(self.folder / row["audio"], dtype="float32") for row in rows), strict=True
            )
            texts = recogniser.transcribe(waves, rates[0])
            found = {row["id"]: text for row, text in zip(rows, texts, strict=True)}
            append_rows(path, [{"id": name, "answer": keys[name], "text": text} for name, text in found.items()])
            heard |= found
        return {row["id"]: heard.get(row["id"], "") for row in self.rows}

    def remember(
        self,
        name: str,
        settings: Any,
        compute: Callable[[Row], Any],
        kind: str | None = None,
        made_of: Callable[[Row], Any] = lambda row: None,
    ) -> dict[str, Any]:
        """Return what `compute` makes of every row (JSON), or of those of one kind, by id; remembered row by row under
        `name` and settings, as long as the answer and what else the value is `made_of` (JSON) stay. Samples that could
        not be asked have nothing to compute of."""
        path = self.folder / f"{name}-{hash_of(settings, 8)}.jsonl"
        rows = [row for row in self.usable if kind is None or row["kind"] == kind]
        keys = {row["id"]: hash_of([_answer_key(row), made_of(row)]) for row in rows}
        found = {row["id"]: row["value"] for row in read_rows(path) if row["answer"] == keys.get(row["id"])}
        waiting = [row for row in rows if row["id"] not in found]
        for row in tqdm(waiting, desc=name, disable=not waiting):
            found[row["id"]] = compute(row)
            append_rows(path, [{"id": row["id"], "answer": keys[row["id"]], "value": found[row["id"]]}])
        return {row["id"]: found[row["id"]] for row in rows}

    def drop_audio(self) -> None:
        """Remove the answers' recordings."""
        for path in (self.folder / "audio").glob("*.flac"):
            path.unlink()

    def stored_settings(self) -> Any:
        """Return the settings as the folder has them."""
        return read_json(self.folder / "settings.json")


def _answer_key(row: Row) -> str:
    """Return a hash of an answer, so that what was heard in an earlier one is not taken for it."""
    return hash_of([row["sample"], row["text"], row.get("codes"), row.get("audio_seconds")])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _size(sample: Sample) -> int:
    """Return roughly how long an answer is, so that batches are filled with what takes as long."""
    return max(map(len, sample.references), default=0) + sum(len(turn.text or "") for turn in sample.turns)
