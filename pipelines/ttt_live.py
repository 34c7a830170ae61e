"""`ttt-talk --live`: a spoken conversation by the microphone and the loudspeaker of this machine. The conversation
itself is serving/live.py's.

Heavy imports wait until the arguments are read."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .serving.live import LiveConversation
    from .serving.service import Service

REMEDY = 'pip install -c constraints.txt -e ".[live]"'
FRAMES_A_SECOND = 50  # the microphone is read, and the loudspeaker fed, as often


@dataclass(frozen=True)
class Device:
    """A microphone or a loudspeaker, and the rate (Hz) at which it runs."""

    name: str
    rate: int


def find_device(sounddevice: Any, kind: str) -> Device:
    """
    Return the default device of this machine.

    Args:
        sounddevice: the package.
        kind (`str`): "input" or "output".

    Raises:
        OSError: if there is none.
    """
    try:
        found = sounddevice.query_devices(kind=kind)
    except (sounddevice.PortAudioError, ValueError) as error:
        what = "microphone" if kind == "input" else "loudspeaker"
        raise OSError(
            f"there is no {what} here ({error}). `python -m sounddevice` lists what there is; without a sound card, "
            "record a question elsewhere and pass the file"
        ) from error
    return Device(found["name"], int(found["default_samplerate"]))


def load_sounddevice() -> Any:
    """
    Import sounddevice.

    Raises:
        RuntimeError: if it, or PortAudio, is missing.
    """
    try:
        import sounddevice
    except ModuleNotFoundError as error:
        raise RuntimeError(f"--live takes the package sounddevice: {REMEDY}") from error
    except OSError as error:
        raise RuntimeError(
            f"--live takes PortAudio, which is missing ({error}): `apt install libportaudio2` on Debian and Ubuntu, "
            "`dnf install portaudio` on Fedora"
        ) from error
    return sounddevice


def make_service(arguments: argparse.Namespace) -> Service:
    """
    Load the model, as `ttt-serve` does.

    Raises:
        RuntimeError: if a package is missing.
    """
    from . import ttt_serve

    served = ttt_serve.build_parser().parse_args([])
    for name in ("model", "processor", "device", "dtype", "threads", "trust_remote_code", "max_new_tokens"):
        setattr(served, name, getattr(arguments, name))
    try:
        return ttt_serve.build_service(served)
    except ModuleNotFoundError as error:
        raise RuntimeError(f"--live takes the package {error.name}: {REMEDY}") from error


def run_live(arguments: argparse.Namespace) -> int:
    """
    Talk until Ctrl-C, or until the session ends.

    Returns:
        `int`: the exit status.

    Raises:
        OSError: if there is no microphone, no loudspeaker or no server, or one of them fails.
        RuntimeError: if a package is missing.
    """
    sounddevice = load_sounddevice()
    microphone, loudspeaker = find_device(sounddevice, "input"), find_device(sounddevice, "output")
    try:
        from .serving.live import LiveConversation, talk_here, talk_to
    except ModuleNotFoundError as error:
        raise RuntimeError(f"--live takes the package {error.name}: {REMEDY}") from error
    names = {"task": "task", "seed": "seed", "steps": "audio_steps_per_block", "max_new_tokens": "max_new_tokens"}
    values = {wire: getattr(arguments, name) for name, wire in names.items()}
    conversation = LiveConversation(
        lambda text: print(text, end="", flush=True),
        note,
        input_rate=microphone.rate,
        output_rate=loudspeaker.rate,
        can_interrupt=not arguments.no_interruption,
        session={"ttt": {name: value for name, value in values.items() if value is not None}},
    )
    service = None if arguments.url else make_service(arguments)
    if service is None:
        key = os.environ.get("TTT_SERVE_API_KEY") or None
        session = lambda: asyncio.run(talk_to(conversation, arguments.url, key))  # noqa: E731
    else:
        session = lambda: asyncio.run(talk_here(conversation, service))  # noqa: E731
    if not arguments.quiet:
        ears = "the answers are not interrupted" if arguments.no_interruption else "wear headphones"
        note(f"speak into {microphone.name}; {ears}; Ctrl-C ends")
    try:
        talk(conversation, session, recorder(sounddevice, microphone), player(sounddevice, loudspeaker))
    except KeyboardInterrupt:
        print(flush=True)
    finally:
        if service is not None:
            service.engine.close(drain=False, timeout=5.0)
    return 0


Loop = Callable[["LiveConversation", threading.Event], None]


def recorder(sounddevice: Any, device: Device) -> Loop:
    """Return what reads the microphone until it is to stop."""

    def record(conversation: LiveConversation, stopped: threading.Event) -> None:
        count = device.rate // FRAMES_A_SECOND
        with sounddevice.InputStream(device.rate, channels=1, dtype="float32") as stream:
            while not stopped.is_set():
                samples, _ = stream.read(count)
                conversation.listen(samples[:, 0])

    return record


def player(sounddevice: Any, device: Device) -> Loop:
    """Return what feeds the loudspeaker until it is to stop."""

    def play(conversation: LiveConversation, stopped: threading.Event) -> None:
        count = device.rate // FRAMES_A_SECOND
        with sounddevice.OutputStream(device.rate, channels=1, dtype="float32") as stream:
            conversation.output_latency = stream.latency
            while not stopped.is_set():
                stream.write(conversation.play(count)[:, None])

    return play


def talk(conversation: LiveConversation, session: Callable[[], None], *devices: Loop) -> None:
    """
    Run the session and the devices, each in a thread, until one of them ends or Ctrl-C is pressed.

    Args:
        conversation (`LiveConversation`): what they share.
        session (`Callable[[], None]`): holds the conversation with a service; it ends when the conversation hangs up.
        devices (`Callable`): loops over frames, which end when the event they are given is set.

    Raises:
        Exception: the first that one of them ended with.
    """
    stopped = threading.Event()
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            stopped.set()

    def loop(device: Loop) -> Callable[[], None]:
        return lambda: device(conversation, stopped)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in (session, *map(loop, devices))]
    for thread in threads:
        thread.start()
    try:
        while not stopped.wait(0.2):  # a wait without end would hold up Ctrl-C on some systems
            pass
    finally:
        stopped.set()
        conversation.hang_up()
        for thread in threads:
            thread.join(5.0)
    if errors:
        raise errors[0]


def note(message: str) -> None:
    print(f"ttt-talk: {message}", file=sys.stderr, flush=True)
