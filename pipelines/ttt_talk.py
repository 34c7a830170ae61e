"""The command `ttt-talk`: asks a TtT model in speech or text, prints what it answers and writes it as speech.

Heavy imports wait until the arguments are read."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

if TYPE_CHECKING:
    import numpy as np

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "model_cards" / "ttt-tiny"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CONFIG_NAMES = ("config.json", "adapter_config.json")
TASK_NAMES = ("spoken_chat", "asr", "tts", "captioning", "spoken_qa", "text_chat")
TEXT_TASKS = ("tts", "text_chat")
DTYPES = ("float32", "bfloat16", "float16")
SOFTWARE = "ttt-talk"  # written into every answer, so that only answers are overwritten
PLAYERS = (["aplay", "-q"], ["paplay"], ["afplay"], ["ffplay", "-nodisp", "-autoexit", "-loglevel", "quiet"])

EXAMPLES = """\
examples:
  ttt-talk question.wav reply.wav              answer a spoken question
  ttt-talk question.wav                        the same, into question.reply.wav
  ttt-talk --task asr recording.wav            write down what was said, and say it again
  ttt-talk --task tts --text "two and two" a.wav
  ttt-talk --text "what is two plus two"       ask in writing; the speech goes to reply.wav
  ttt-talk --output_dir replies *.wav          many questions
  ttt-talk --json question.wav | jq .text

With exactly two files and no --output_dir the second is written (over an earlier answer only); three or more are all
questions.
Exit status: 0 all answered, 1 something failed, 2 wrong arguments, 130 interrupted.
"""


class UsageError(Exception):
    """Arguments that make no sense together; exit status 2."""


@dataclass
class Job:
    """One question, and where its answer goes."""

    name: str
    audio: str | None
    text: str | None
    output: Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ttt-talk",
        description="Ask a Text-to-Talk model in speech or text: prints its answer and writes it as speech.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="questions (audio files or addresses), then a WAV")
    parser.add_argument("--text", help="a question, a text to read aloud, or an instruction about the audio")
    parser.add_argument("--task", choices=TASK_NAMES, help="default: spoken_chat, or text_chat for --text alone")
    parser.add_argument(
        "--model", default=None, help="folder or Hub name of a model or an adapter (default: the repository's ttt-tiny)"
    )
    parser.add_argument("--output_dir", type=Path, help="write the answers here, under the questions' names")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, else as saved)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps per audio block: fewer are faster")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer, text and codes together")
    parser.add_argument("--seed", type=int, help="of sampled answers, to hear the same one again")
    parser.add_argument("--play", action="store_true", help="play the answers, where a player is installed")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--trust_remote_code", action="store_true", help="let code in the model's folder run")
    return parser


def plan_jobs(arguments: argparse.Namespace) -> list[Job]:
    """What to ask and where to write, from the arguments alone.

    Raises:
        UsageError: arguments that do not go together.
    """
    files, text, task, folder = arguments.files, arguments.text, arguments.task, arguments.output_dir
    for name, least in (("steps", 1), ("max_new_tokens", 1), ("seed", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if task in TEXT_TASKS and text is None:
        raise UsageError(f"--task {task} needs --text")
    if text is not None and not text.strip():
        raise UsageError("--text is empty")
    if text is not None and (task is None or task in TEXT_TASKS):
        if len(files) > 1:
            raise UsageError(f"--text takes one file at most, the WAV to write; got {len(files)}")
        if files and task is None and Path(files[0]).exists():
            raise UsageError(
                f"{files[0]} exists. To ask about it, add --task captioning or spoken_qa; to overwrite it with the "
                "answer to --text, add --task text_chat or tts"
            )
        output = Path(files[0]) if files else Path("reply.wav")
        return _checked([Job("text", None, text, folder / output.name if folder else output)])
    if not files:
        raise UsageError("nothing to answer: pass an audio file, or --text")
    if len(files) == 2 and folder is None:
        if Path(files[1]).exists() and not _is_answer(files[1]):
            raise UsageError(
                f"{files[1]} exists and is no answer of ttt-talk, so it is not overwritten. Give the answer another "
                "name; if both files are questions, add --output_dir"
            )
        return _checked([Job(files[0], files[0], text, Path(files[1]))])
    return _checked([Job(name, name, text, _output_path(name, folder)) for name in files])


def _is_answer(path: str) -> bool:
    """Whether ttt-talk wrote this file."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            return file.software.startswith(SOFTWARE)
    except (OSError, RuntimeError):
        return False


def _output_path(name: str, folder: Path | None) -> Path:
    is_address = "://" in name or name.startswith("data:")
    stem = Path(urlparse(name).path).stem if is_address else Path(name).stem
    stem = stem or "reply"
    if folder is not None:
        return folder / f"{stem}.wav"
    return (Path() if is_address else Path(name).parent) / f"{stem}.reply.wav"


def _checked(jobs: list[Job]) -> list[Job]:
    written: dict[Path, str] = {}
    for job in jobs:
        if job.output.suffix.lower() not in (".wav", ".wave"):
            raise UsageError(f"the answer is written as WAV: give {job.output} a name that ends in .wav")
        path = job.output.resolve()
        if path in written:
            raise UsageError(f"{written[path]} and {job.name} would both be written to {job.output}; rename one")
        if any(other.audio is not None and Path(other.audio).resolve() == path for other in jobs):
            raise UsageError(f"{job.output} is a question; it would be overwritten")
        written[path] = job.name
    return jobs


def load_pipeline(arguments: argparse.Namespace) -> Any:
    """The pipeline for --model, a model or an adapter (LoRA), which brings the model it was trained on.

    Raises:
        FileNotFoundError: there is no such folder, no default model, or no model where an adapter expects it.
        RuntimeError: PEFT is needed for an adapter and is not installed.
        ValueError: PyTorch cannot use --device.
    """
    model_path = arguments.model
    if model_path is None:
        if not (DEFAULT_MODEL / "config.json").exists():
            raise FileNotFoundError(
                f"the default model is not at {DEFAULT_MODEL}. Install the repository with `pip install -e .` so that "
                "its model_cards folder is found, or pass --model"
            )
        model_path = str(DEFAULT_MODEL)
    elif not Path(model_path).exists() and not HUB_NAME.fullmatch(model_path):
        raise FileNotFoundError(f"there is no folder {model_path}, and the Hub has no such names")
    elif Path(model_path).exists() and not any((Path(model_path) / name).exists() for name in CONFIG_NAMES):
        raise FileNotFoundError(
            f"{model_path} holds no {' or '.join(CONFIG_NAMES)}; pass a folder with either, or a name on the Hub"
        )
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from modeling_ttt import TttForConditionalGeneration
    from processing import TttProcessor

    from .pipeline_ttt import TttAudioToAudioPipeline

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"PyTorch cannot use --device {device} here ({reason}); use cpu") from error
    base_path = _base_model(model_path)
    dtype = arguments.dtype or ("float32" if device == "cpu" else "auto")
    try:
        model = TttForConditionalGeneration.from_pretrained(model_path, dtype=dtype).eval()
        processor = TttProcessor.from_pretrained(base_path, trust_remote_code=arguments.trust_remote_code or None)
    except OSError as error:
        raise OSError(f"the model {model_path} cannot be loaded: {error}") from error
    return TttAudioToAudioPipeline(model=model, processor=processor, device=device)


def _base_model(model_path: str) -> str:
    """The model an adapter was trained on; for a model, itself."""
    from transformers.utils import find_adapter_config_file, is_peft_available

    config_file = None if (Path(model_path) / CONFIG_NAMES[0]).exists() else find_adapter_config_file(model_path)
    if config_file is None:
        return model_path
    if not is_peft_available():
        raise RuntimeError(f"{model_path} is an adapter, which takes the package peft: `pip install peft`")
    base = json.loads(Path(config_file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if Path(base).is_absolute() and not Path(base).exists():
        raise FileNotFoundError(
            f"{model_path} adapts the model in {base}, which is not there. Put it there, or write its place under "
            f"`base_model_name_or_path` into {config_file}"
        )
    return base


def answer(pipe: Any, job: Job, arguments: argparse.Namespace, show_text: bool) -> tuple[str, np.ndarray, int]:
    """Text, waveform and its rate, with the text printed and the speech counted as they come."""
    import numpy as np
    from tqdm import tqdm

    generate_kwargs: dict[str, Any] = {}
    if arguments.steps is not None:
        generate_kwargs["audio_steps_per_block"] = arguments.steps
    if arguments.seed is not None:
        generate_kwargs["seed"] = arguments.seed
    if arguments.max_new_tokens is not None:
        generate_kwargs["max_new_tokens"] = arguments.max_new_tokens

    def ask(audio: str | None, text: str | None, task: str | None, show: bool) -> tuple[str, list[np.ndarray]]:
        pieces: list[str] = []
        chunks: list[np.ndarray] = []
        hidden = arguments.quiet or not sys.stderr.isatty()
        with tqdm(desc="speech", unit="s", unit_scale=True, leave=False, disable=hidden, delay=1.0) as bar:
            for piece in pipe(audio, text=text, task=task, generate_kwargs=generate_kwargs, stream=True):
                if "text" in piece:
                    pieces.append(piece["text"])
                    if show:
                        print(piece["text"], end="", flush=True)
                else:
                    chunks.append(piece["audio"])
                    bar.update(len(piece["audio"]) / piece["sampling_rate"])
        return "".join(pieces), chunks

    text, chunks = ask(job.audio, job.text, arguments.task, show_text)
    if show_text:
        print(flush=True)
    if not chunks and text.strip():
        _note("the answer came without speech; reading it aloud")
        _, chunks = ask(None, text, "tts", False)
    if not chunks:
        raise RuntimeError("the model gave no speech. Try a larger --max_new_tokens, more --steps or another --seed")
    return text, np.concatenate(chunks), pipe.processor.sampling_rate


def run(arguments: argparse.Namespace, jobs: list[Job]) -> int:
    """Answers every job; a failed one is reported and the others go on. Returns the exit status."""
    for job in jobs:
        if job.audio is not None and "://" not in job.audio and not job.audio.startswith("data:"):
            if not Path(job.audio).exists() and len(jobs) == 1:
                raise FileNotFoundError(f"there is no file {job.audio}")
    pipe = load_pipeline(arguments)
    import soundfile
    from tqdm import tqdm

    failed = 0
    single = len(jobs) == 1
    hidden = single or arguments.quiet or not sys.stderr.isatty()
    for job in tqdm(jobs, desc="answers", unit="answer", disable=hidden):
        started = time.perf_counter()
        try:
            text, waveform, rate = answer(pipe, job, arguments, show_text=single and not arguments.json)
            job.output.parent.mkdir(parents=True, exist_ok=True)
            with soundfile.SoundFile(job.output, "w", rate, channels=1, subtype="PCM_16", format="WAV") as file:
                file.software = SOFTWARE
                file.write(waveform.clip(-1.0, 1.0))
        except (OSError, RuntimeError, ValueError) as error:
            _note(f"{job.name}: {error}")
            failed += 1
            continue
        if arguments.json:
            record = {
                "input": job.audio,
                "text": text,
                "output": str(job.output),
                "duration": round(len(waveform) / rate, 3),
                "seconds": round(time.perf_counter() - started, 3),
            }
            tqdm.write(json.dumps(record, ensure_ascii=False), file=sys.stdout)
        elif not single:
            tqdm.write(f"{job.name}: {text}", file=sys.stdout)
        if arguments.play:
            play(job.output)
    return 1 if failed else 0


def play(path: Path) -> None:
    """Plays a file with the first player installed; says so where there is none."""
    command = next((command for command in PLAYERS if shutil.which(command[0])), None)
    if command is None:
        _note(f"no player found ({', '.join(command[0] for command in PLAYERS)}); the answer is in {path}")
    elif subprocess.run([*command, str(path)], check=False).returncode != 0:
        _note(f"{command[0]} could not play {path}")


def _note(message: str) -> None:
    print(f"ttt-talk: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        jobs = plan_jobs(arguments)
    except UsageError as error:
        parser.error(str(error))
    try:
        return run(arguments, jobs)
    except (OSError, RuntimeError, ValueError) as error:
        _note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _note("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
