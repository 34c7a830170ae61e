"""The command `ttt-talk`: asks a TtT model in speech or text, prints what it answers and writes it as speech.

Heavy imports wait until the arguments are read."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import urlparse

if TYPE_CHECKING:
    import numpy as np

    from processing import TttProcessor

    from .pipeline_ttt import TttAudioToAudioPipeline

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "model_cards" / "ttt-tiny"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CONFIG_NAMES = ("config.json", "adapter_config.json")
STANDARD = "-"  # standard input as a question, standard output as an answer
DTYPES = ("float32", "bfloat16", "float16")
# How often an idle thread of PyTorch looks for work before it gives up its core, where OpenMP is GNU's. Its default is
# so high that threads hold each other up as soon as another process wants a core.
SPIN_COUNT = "1000"
SOFTWARE = "ttt-talk"  # written into every answer, so that only answers are overwritten
PLAYERS = (["aplay", "-q"], ["paplay"], ["afplay"], ["ffplay", "-nodisp", "-autoexit", "-loglevel", "quiet"])

EXAMPLES = """\
examples:
  ttt-talk question.wav reply.wav              answer a spoken question
  ttt-talk question.wav                        the same, into question.reply.wav
  ttt-talk --task asr recording.wav            write down what was said, and say it again
  ttt-talk --task tts --text "golden monkey river" a.wav
  ttt-talk --text "what is two plus two"       ask in writing; the speech goes to reply.wav
  ttt-talk --output_dir replies *.wav          many questions
  ttt-talk --json question.wav | jq .text
  arecord -d 3 -f cd | ttt-talk - - | aplay    standard input and output
  ttt-talk --live                              a conversation by microphone and loudspeaker

With exactly two files and no --output_dir the second is written; three or more are all questions. An earlier answer is
written over, any other file is not.
Exit status: 0 all answered, 1 something failed, 2 wrong arguments, 130 interrupted.
"""


class UsageError(Exception):
    """Arguments that make no sense together; exit status 2."""


@dataclass
class Job:
    """One question, and where its answer goes: a file, or standard output where there is none."""

    name: str
    audio: str | None
    text: str | None
    output: Path | None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ttt-talk",
        description="Ask a Text-to-Talk model in speech or text: prints its answer and writes it as speech.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="questions (audio files, addresses, - for standard input), then a WAV"
    )
    parser.add_argument("--text", help="a question, a text to read aloud, or an instruction about the audio")
    parser.add_argument(
        "--task",
        help="spoken_chat (default), asr, tts, captioning, spoken_qa, text_chat (default for --text alone), or another "
        "that the processor has",
    )
    parser.add_argument(
        "--model", default=None, help="folder or Hub name of a model or an adapter (default: the repository's ttt-tiny)"
    )
    parser.add_argument("--processor", help="folder or Hub name of the processor, if not the model's")
    parser.add_argument("--output_dir", type=Path, help="write the answers here, under the questions' names")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, else as saved)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as PyTorch chooses)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps per audio block: fewer are faster")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="longest answer, text and codes together")
    parser.add_argument("--seed", type=int, help="of sampled answers, to hear the same one again")
    parser.add_argument("--play", action="store_true", help="play the answers, where a player is installed")
    parser.add_argument("--json", action="store_true", help="print one JSON object per answer")
    parser.add_argument(
        "--live",
        action="store_true",
        help="talk hands free by microphone and loudspeaker, and interrupt by speaking (takes the extra `live`)",
    )
    parser.add_argument("--url", help="with --live: talk to a server, ws://HOST/v1/realtime, and load no model")
    parser.add_argument(
        "--no_interruption",
        action="store_true",
        help="with --live: do not listen while an answer is played, for those without headphones",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, and not where answers are written")
    parser.add_argument("--trust_remote_code", action="store_true", help="let code in the model's folder run")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """
    Check what needs no model.

    Raises:
        UsageError: if arguments do not go together.
    """
    for name, least in (("threads", 1), ("steps", 1), ("max_new_tokens", 1), ("seed", 0)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.live:
        check_live_arguments(arguments)
        return
    for name in ("url", "no_interruption"):
        if getattr(arguments, name):
            raise UsageError(f"--{name} goes with --live")
    if arguments.text is not None and not arguments.text.strip():
        raise UsageError("--text is empty")
    if arguments.text is None and not arguments.files:
        raise UsageError(
            "nothing to answer: pass an audio file, or --text"
            if arguments.task is None
            else f"--task {arguments.task} needs an audio file, or --text"
        )


def check_live_arguments(arguments: argparse.Namespace) -> None:
    """
    Check what goes with --live.

    Raises:
        UsageError: if something does not.
    """
    for name in ("files", "text", "output_dir", "play", "json"):
        if getattr(arguments, name):
            raise UsageError(f"{'files do' if name == 'files' else f'--{name} does'} not go with --live")
    if arguments.url is None:
        return
    if urlparse(arguments.url).scheme not in ("ws", "wss"):
        raise UsageError(f"--url is {arguments.url}; use one like ws://127.0.0.1:8000/v1/realtime")
    for name in ("model", "processor", "device", "dtype", "threads", "trust_remote_code"):
        if getattr(arguments, name):
            raise UsageError(f"--{name} does not go with --url: the server has its own")


def plan_jobs(arguments: argparse.Namespace, takes_text_alone: bool) -> list[Job]:
    """
    Return what to ask and where to write.

    Args:
        arguments (`argparse.Namespace`): the command line.
        takes_text_alone (`bool`): whether the task is asked with a text and no audio, so that no file is a question.

    Raises:
        UsageError: if arguments do not go together.
    """
    files, text, folder = arguments.files, arguments.text, arguments.output_dir
    if takes_text_alone:
        if text is None:
            raise UsageError(f"--task {arguments.task} needs --text")
        if len(files) > 1:
            raise UsageError(f"--text takes one file at most, the WAV to write; got {len(files)}")
        jobs = [Job("text", None, text, _output(files[0] if files else "reply.wav", folder))]
    elif not files:
        raise UsageError(f"--task {arguments.task} needs an audio file")
    elif len(files) == 2 and folder is None:
        jobs = [Job(files[0], files[0], text, _output(files[1], None))]
    else:
        jobs = [Job(name, name, text, _beside(name, folder)) for name in files]
    for job in jobs:
        _check_output(job, jobs, arguments)
    return jobs


def _output(name: str, folder: Path | None) -> Path | None:
    if name == STANDARD:
        return None
    return folder / Path(name).name if folder else Path(name)


def _beside(question: str, folder: Path | None) -> Path:
    """Where the answer to a question goes that names no place: beside it, or under its name into the folder."""
    is_address = _is_address(question)
    stem = Path(urlparse(question).path if is_address else question).stem
    if question == STANDARD or not stem:
        return (folder or Path()) / "reply.wav"
    if folder is not None:
        return folder / f"{stem}.wav"
    return (Path() if is_address else Path(question).parent) / f"{stem}.reply.wav"


def _is_address(name: str) -> bool:
    return "://" in name or name.startswith("data:")


def _check_output(job: Job, jobs: list[Job], arguments: argparse.Namespace) -> None:
    if job.output is None:
        if arguments.json or arguments.play:
            raise UsageError(f"the speech goes to standard output: leave out --{'json' if arguments.json else 'play'}")
        if sys.stdout.isatty():
            raise UsageError("standard output is a terminal, which speaks no WAV: add `> answer.wav` or `| aplay`")
        return
    path = job.output.resolve()
    if job.output.suffix.lower() not in (".wav", ".wave"):
        raise UsageError(f"the answer is written as WAV: give {job.output} a name that ends in .wav")
    for other in jobs:
        if other.audio is not None and Path(other.audio).resolve() == path:
            raise UsageError(f"{job.output} is a question; it would be overwritten")
        if other is not job and other.output is not None and other.output.resolve() == path:
            raise UsageError(f"{other.name} and {job.name} would both be written to {job.output}; rename one")
    folder = next(parent for parent in path.parents if os.path.exists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "may not be written to" if folder.is_dir() else "is no folder"
        raise UsageError(f"{job.output} cannot be written: {folder} {reason}. Name another folder")
    if path.exists() and not _is_answer(path):
        remedies = "Give the answer another name"
        if arguments.files and job.output == Path(arguments.files[-1]):
            asked = "to ask about it, add --task captioning or spoken_qa"
            remedies += f"; {asked if job.audio is None else 'if both files are questions, add --output_dir'}"
        raise UsageError(f"{job.output} exists and is no answer of ttt-talk, so it is not overwritten. {remedies}")


def _is_answer(path: Path) -> bool:
    """Whether ttt-talk wrote this file."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            return file.software.startswith(SOFTWARE)
    except (OSError, RuntimeError):
        return False


def locate_model(name: str | None) -> str:
    """
    Return folder or Hub name of a model or an adapter.

    Raises:
        FileNotFoundError: if there is no such folder, no model in it, or no default model.
    """
    if name is None:
        if not (DEFAULT_MODEL / "config.json").exists():
            raise FileNotFoundError(
                f"the default model is not at {DEFAULT_MODEL}. Install the repository with `pip install -e .` so that "
                "its model_cards folder is found, or pass --model"
            )
        return str(DEFAULT_MODEL)
    if not Path(name).exists() and not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"there is no folder {name}, and the Hub has no such names")
    if Path(name).exists() and not any((Path(name) / config).exists() for config in CONFIG_NAMES):
        raise FileNotFoundError(
            f"{name} holds no {' or '.join(CONFIG_NAMES)}; pass a folder with either, or a name on the Hub"
        )
    return name


def load_processor(arguments: argparse.Namespace) -> TttProcessor:
    """
    Load the processor of --processor, or else the model's; an adapter's model is the one it was trained on.

    Raises:
        FileNotFoundError: as `locate_model`, or if there is no model where an adapter expects it.
        OSError: if the processor cannot be loaded.
        RuntimeError: if PEFT is needed for an adapter and is not installed.
        UsageError: if --max_new_tokens is more than the model has positions.
        ValueError: if the folder holds a model of another architecture.
    """
    model_path = locate_model(arguments.model)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from modeling_ttt import TttConfig
    from processing import TttProcessor

    base_path = base_model(model_path)
    try:
        config = TttConfig.get_config_dict(base_path)[0]
    except OSError as error:
        raise OSError(f"the model {base_path} cannot be loaded: {error}") from error
    model_type = config.get("model_type")
    if model_type != TttConfig.model_type:
        raise ValueError(
            f"{base_path} holds a model of type {model_type!r}, not {TttConfig.model_type!r}. init_from_llm.py makes a "
            "TtT model of a language model, `python -m pipelines.convert_ttt_to_hf` of a published checkpoint"
        )
    most = (config.get("text_config") or {}).get("max_position_embeddings")
    longest = getattr(arguments, "max_new_tokens", None)  # ttt-serve has no such option
    if most is not None and longest is not None and longest >= most:
        raise UsageError(f"--max_new_tokens is {longest}, but the model has {most} positions for question and answer")
    path = arguments.processor or base_path
    try:
        return TttProcessor.from_pretrained(path, trust_remote_code=arguments.trust_remote_code or None)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} has no processor that can be loaded; name one with --processor ({reason})") from error


def limit_spinning() -> None:
    """
    Have PyTorch's threads give up their cores soon when they wait for each other, unless the environment says how they
    wait: otherwise an answer takes twice as long and more while another process keeps one of two cores busy
    (tests/benchmarks/bench_threads.py). It has an effect only before PyTorch is loaded.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def set_threads(threads: int | None, spare: int = 0) -> None:
    """
    Set the CPU threads of PyTorch.

    Args:
        threads (`int`, *optional*): how many; by default what `OMP_NUM_THREADS` says, or else PyTorch's own choice less
            `spare`, and one at least.
        spare (`int`, *optional*, defaults to 0): cores that other threads of this process keep busy.
    """
    import torch

    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() - spare)
    if threads is not None:
        if threads > (os.cpu_count() or threads):
            _note(f"{threads} threads share {os.cpu_count()} cores and will wait for each other")
        torch.set_num_threads(threads)


def load_pipeline(
    arguments: argparse.Namespace, processor: TttProcessor, spare_cores: int = 0
) -> TttAudioToAudioPipeline:
    """
    Load the model, with its adapter where --model is one, and put the pipeline together.

    Args:
        arguments (`argparse.Namespace`): the command line.
        processor (`TttProcessor`): what `load_processor` returned.
        spare_cores (`int`, *optional*, defaults to 0): see `set_threads`.

    Raises:
        OSError: if the model cannot be loaded.
        ValueError: if PyTorch cannot use --device.
    """
    import torch
    from safetensors import SafetensorError

    from modeling_ttt import TttForConditionalGeneration

    from .pipeline_ttt import TttAudioToAudioPipeline

    set_threads(arguments.threads, spare_cores)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        reason = str(error).splitlines()[0]
        raise ValueError(f"PyTorch cannot use --device {device} here ({reason}); use cpu") from error
    path, dtype = locate_model(arguments.model), arguments.dtype or ("float32" if device == "cpu" else "auto")
    try:
        model = TttForConditionalGeneration.from_pretrained(path, dtype=dtype).eval()
    except (OSError, SafetensorError) as error:
        raise OSError(f"the model {path} cannot be loaded: {error}") from error
    return TttAudioToAudioPipeline(model=model, processor=processor, device=device)


def base_model(model_path: str) -> str:
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


def answer(pipe: Any, job: Job, arguments: argparse.Namespace, show: TextIO | None) -> tuple[str, np.ndarray, int]:
    """Return text, waveform and its rate, with the text shown and the speech counted as they come."""
    import numpy as np
    from tqdm import tqdm

    options = {"audio_steps_per_block": arguments.steps, "seed": arguments.seed}
    options |= {"max_new_tokens": arguments.max_new_tokens}
    generate_kwargs = {name: value for name, value in options.items() if value is not None}

    def ask(audio: Any, text: str | None, task: str | None, show: TextIO | None) -> tuple[str, list[np.ndarray]]:
        pieces: list[str] = []
        chunks: list[np.ndarray] = []
        hidden = arguments.quiet or not sys.stderr.isatty()
        with tqdm(desc="speech", unit="s", unit_scale=True, leave=False, disable=hidden, delay=1.0) as bar:
            for piece in pipe(audio, text=text, task=task, generate_kwargs=generate_kwargs, stream=True):
                if "text" in piece:
                    pieces.append(piece["text"])
                    print(piece["text"], end="", flush=True, file=show or io.StringIO())
                else:
                    chunks.append(piece["audio"])
                    bar.update(len(piece["audio"]) / piece["sampling_rate"])
        return "".join(pieces), chunks

    question: Any = sys.stdin.buffer.read() if job.audio == STANDARD else job.audio
    text, chunks = ask(question, job.text, arguments.task, show)
    if show is not None:
        print(flush=True, file=show)
    if not chunks and text.strip():
        _note("the answer came without speech; reading it aloud")
        _, chunks = ask(None, text, "tts", None)
    if not chunks:
        raise RuntimeError("the model gave no speech. Try a larger --max_new_tokens, more --steps or another --seed")
    return text, np.concatenate(chunks), pipe.processor.sampling_rate


def write_speech(output: Path | None, waveform: np.ndarray, rate: int) -> None:
    """
    Write a WAV file, which appears whole, or to standard output.

    Raises:
        OSError: if the file cannot be written.
    """
    import soundfile

    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", rate, channels=1, subtype="PCM_16", format="WAV") as file:
        file.software = SOFTWARE
        file.write(waveform.clip(-1.0, 1.0))
    if output is None:
        sys.stdout.buffer.write(content.getvalue())
        sys.stdout.buffer.flush()
        return
    partial = output.with_name(f"{output.name}.partial")
    try:
        partial.write_bytes(content.getvalue())
        partial.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(f"the speech cannot be written to {output} ({error.strerror})") from error


def run(arguments: argparse.Namespace) -> int:
    """
    Answer every question; a failed one is reported and the others go on.

    Returns:
        `int`: the exit status.

    Raises:
        UsageError: if the arguments make no sense together.
        FileNotFoundError: if the only question is not there.
    """
    check_arguments(arguments)
    if arguments.live:
        from .ttt_live import run_live

        return run_live(arguments)
    takes_text_alone, processor = arguments.text is not None, None
    if arguments.task is not None:
        processor = load_processor(arguments)
        if arguments.task not in processor.tasks:
            raise UsageError(f"--task {arguments.task} is none of the processor's: {', '.join(processor.tasks)}")
        task = processor.get_task(arguments.task)
        takes_text_alone = task.takes_text_alone or not (task.needs_audio or arguments.files)
    jobs = plan_jobs(arguments, takes_text_alone)
    single = len(jobs) == 1
    question = jobs[0].audio
    if single and question not in (None, STANDARD) and not _is_address(question) and not Path(question).exists():
        raise FileNotFoundError(f"there is no file {question}. A typed question goes into --text")
    pipe = load_pipeline(arguments, processor or load_processor(arguments))
    from tqdm import tqdm

    failed = 0
    hidden = single or arguments.quiet or not sys.stderr.isatty()
    for job in tqdm(jobs, desc="answers", unit="answer", disable=hidden):
        try:
            _answer_job(pipe, job, arguments, single)
        except BrokenPipeError:
            raise
        except Exception as error:
            _report(error, arguments, job.name)
            failed += 1
    return 1 if failed else 0


def _answer_job(pipe: TttAudioToAudioPipeline, job: Job, arguments: argparse.Namespace, single: bool) -> None:
    from tqdm import tqdm

    started = time.perf_counter()
    show = None
    if single and not arguments.json:
        show = sys.stderr if job.output is None else sys.stdout
    if job.output is not None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
    text, waveform, rate = answer(pipe, job, arguments, show)
    write_speech(job.output, waveform, rate)
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
    if job.output is None:
        return
    if not (arguments.quiet or arguments.json):
        _note(f"the answer is in {job.output}")
    if arguments.play:
        play(job.output)


def play(path: Path) -> None:
    """Play a file with the first player installed; say so where there is none."""
    command = next((command for command in PLAYERS if shutil.which(command[0])), None)
    if command is None:
        _note(f"no player found ({', '.join(command[0] for command in PLAYERS)}); the answer is in {path}")
    elif subprocess.run([*command, str(path)], check=False).returncode != 0:
        _note(f"{command[0]} could not play {path}")


def _note(message: str) -> None:
    print(f"ttt-talk: {message}", file=sys.stderr, flush=True)


def _report(error: Exception, arguments: argparse.Namespace, name: str) -> None:
    """Say in one line what went wrong; where in the code, on request."""
    if arguments.traceback:
        traceback.print_exception(error)
    kind = "" if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}: "
    _note(f"{name}: {kind}{error}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    limit_spinning()
    try:
        return run(arguments)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        _note("interrupted")
        return 130
    except BrokenPipeError:  # who read standard output has left; Python would complain once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _report(error, arguments, "error")
        return 1


if __name__ == "__main__":
    sys.exit(main())
