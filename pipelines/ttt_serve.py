"""The command `ttt-serve`: serves a TtT model over OpenAI's protocols, with a page to talk to it.

Heavy imports wait until the arguments are read."""

from __future__ import annotations

import argparse
import asyncio
import copy
import logging
import math
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ttt_talk import DTYPES, UsageError, limit_spinning, load_pipeline, load_processor, locate_model

if TYPE_CHECKING:
    import uvicorn

    from .serving.service import Service

GOODBYE_SECONDS = 3.0  # for clients to be told that their answer is cut off
FLUSH_TICKS = 50  # of 0.1 s, between two looks at connections that are closing
EXAMPLES = """\
examples:
  ttt-serve                                    ttt-tiny at http://127.0.0.1:8000: the page, and all endpoints under /v1
  ttt-serve --model my-model --device cuda --max_rows 32
  ttt-serve --host 0.0.0.0 --api_key_file keys.txt --ssl_certfile cert.pem --ssl_keyfile key.pem

  curl http://127.0.0.1:8000/v1/audio/speech -H 'Content-Type: application/json' \\
    -d '{"model": "ttt-tiny", "input": "seven plus eight is fifteen"}' > answer.wav

Only this machine can reach the server unless --host says otherwise, which takes an API key: one a line in the file of
--api_key_file, or one in the environment variable TTT_SERVE_API_KEY. pipelines/serving/README.md has more.
Exit status: 0 stopped by a signal after what was being answered, 1 something failed, 2 wrong arguments.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="ttt-serve",
        description="Serve a Text-to-Talk model over OpenAI's Realtime and HTTP protocols, with a page to talk to it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    where.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 for any that is free (default: 8000)"
    )
    where.add_argument("--ssl_certfile", type=Path, metavar="FILE", help="certificate, to serve https and wss")
    where.add_argument("--ssl_keyfile", type=Path, metavar="FILE", help="its private key")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", help="folder or Hub name of a model or an adapter (default: the repository's ttt-tiny)"
    )
    model.add_argument("--processor", help="folder or Hub name of the processor, if not the model's")
    model.add_argument("--model_name", metavar="NAME", help="what clients call it (default: the last part of --model)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    model.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32 on cpu, else as saved)")
    model.add_argument("--trust_remote_code", action="store_true", help="let code in the model's folder run")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the model (default: one less than PyTorch chooses, since a core is kept busy by the audio "
        "tokenizer and the callers)",
    )
    load.add_argument("--max_rows", type=int, default=8, metavar="N", help="requests answered together (default: 8)")
    load.add_argument(
        "--max_queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that wait; one more is told to try later (default: 64)",
    )
    load.add_argument(
        "--max_sessions", type=int, default=64, metavar="N", help="Realtime sessions open at once (default: 64)"
    )
    load.add_argument(
        "--max_audio_seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="longest recording or spoken turn (default: 60)",
    )
    load.add_argument(
        "--session_memory",
        type=int,
        default=512,
        metavar="MIB",
        help="for caches that sessions keep between turns (default: 512)",
    )
    load.add_argument(
        "--idle_seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="a silent session is closed after as much (default: 600)",
    )
    load.add_argument(
        "--drain_seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="for answers to end when the server is stopped (default: 20)",
    )
    access = parser.add_argument_group("access")
    access.add_argument("--api_key_file", type=Path, metavar="FILE", help="keys that clients must send, one a line")
    access.add_argument(
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name of this server, as of a proxy on this machine; may be repeated",
    )
    parser.add_argument(
        "--log_level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what is logged (default: info)",
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """
    Check what needs no model.

    Raises:
        UsageError: if arguments do not go together.
    """
    least = {"max_rows": 1, "max_queue": 0, "max_sessions": 1, "session_memory": 0, "drain_seconds": 0, "port": 0}
    if arguments.threads is not None:
        least["threads"] = 1
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise UsageError(f"--{name} must be at least {value}, got {getattr(arguments, name)}")
    for name in ("max_audio_seconds", "idle_seconds"):
        if not getattr(arguments, name) > 0:
            raise UsageError(f"--{name} must be more than 0, got {getattr(arguments, name):g}")
    for name in ("max_audio_seconds", "idle_seconds", "drain_seconds"):
        if not math.isfinite(getattr(arguments, name)):
            raise UsageError(f"--{name} must be a number of seconds, got {getattr(arguments, name):g}")
    if arguments.port > 65535:
        raise UsageError(f"--port must be at most 65535, got {arguments.port}")
    for name in arguments.allowed_host:
        if not name or set(name) & set("/:@ "):
            raise UsageError(f"--allowed_host takes a name alone, without scheme and port, got {name!r}")
    if (arguments.ssl_certfile is None) != (arguments.ssl_keyfile is None):
        raise UsageError("--ssl_certfile and --ssl_keyfile go together")
    for name in ("ssl_certfile", "ssl_keyfile", "api_key_file"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            raise UsageError(f"--{name}: there is no file {path}")


def api_keys(arguments: argparse.Namespace) -> list[str]:
    """
    Return the keys that open the server.

    Raises:
        UsageError: if a key cannot be used, or there is none and others than this machine can reach it.
    """
    from .serving.security import KEY_VARIABLE, is_loopback, read_api_keys

    try:
        keys = read_api_keys(arguments.api_key_file)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not keys and not is_loopback(arguments.host):
        raise UsageError(
            f"--host {arguments.host} lets other machines in, which takes an API key: write one into a file for "
            f"--api_key_file, or into the environment variable {KEY_VARIABLE}. Make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return keys


def listen(host: str, port: int) -> socket.socket:
    """
    Return a socket that is bound, so that a port that is taken is told before a model is loaded.

    Raises:
        OSError: if it cannot be.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port} ({error.strerror}); choose others") from error
    return bound


def build_service(arguments: argparse.Namespace) -> Service:
    """
    Load the model, start its engine, and have both answer once, so that the first caller does not wait for what is
    only done once.

    Raises:
        OSError, RuntimeError, ValueError: as `load_processor` and `load_pipeline` do.
    """
    pipe = load_pipeline(arguments, load_processor(arguments), spare_cores=1)
    from .serving.engine import Engine
    from .serving.limits import Limits
    from .serving.service import Service

    limits = Limits(
        audio_seconds=arguments.max_audio_seconds,
        sessions=arguments.max_sessions,
        idle_seconds=arguments.idle_seconds,
        drain_seconds=arguments.drain_seconds,
    )
    engine = Engine(
        pipe.model,
        pipe.processor,
        max_rows=arguments.max_rows,
        max_queue=arguments.max_queue,
        max_audio_seconds=limits.audio_seconds,
        session_memory=arguments.session_memory * 2**20,
    )
    name = arguments.model_name or Path(locate_model(arguments.model)).name
    engine.start()
    service = Service(engine, pipe.processor, name, limits)
    service.warm_up()
    return service


def log_filter(record: logging.LogRecord) -> bool:
    """
    Take queries out of addresses, since some clients put keys into them, and leave out that a WebSocket which was
    refused was not opened, which uvicorn takes for an error.
    """
    if isinstance(record.args, tuple):
        record.args = tuple(
            value.partition("?")[0] if isinstance(value, str) and value.startswith("/") else value
            for value in record.args
        )
    return record.msg != "ASGI callable returned without completing handshake."


def log_config(level: str) -> dict[str, Any]:
    """
    Return what is logged, for `logging.config.dictConfig`: uvicorn's own form, for this package's messages as well.
    Connections are never told in more detail than "info", since that would be keys and what is said.

    Args:
        level (`str`): "debug", "info", "warning" or "error".
    """
    from uvicorn.config import LOGGING_CONFIG

    config = copy.deepcopy(LOGGING_CONFIG)
    named = level.upper()
    for logger in config["loggers"].values():
        logger["level"] = named
    config["loggers"]["uvicorn.error"]["level"] = "INFO" if level == "debug" else named
    config["filters"] = {"ours": {"()": lambda: log_filter}}
    for name in ("uvicorn.error", "uvicorn.access"):
        config["loggers"][name]["filters"] = ["ours"]
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["pipelines"] = {"handlers": ["default"], "level": named}
    return config


def make_server(service: Service, arguments: argparse.Namespace, keys: Sequence[str]) -> uvicorn.Server:
    """Return the server, which drains the service before it stops."""
    import uvicorn

    from .serving.app import create_app

    class Server(uvicorn.Server):
        unsent: dict[Any, tuple[int, float]] = {}  # by closing connection, what it has to send, and since when

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                scheme = "http" if arguments.ssl_certfile is None else "https"
                print(f"ttt-serve: {service.model_name} at {scheme}://{host}:{port}", flush=True)

        async def shutdown(self, sockets: Any = None) -> None:
            for server in self.servers:
                server.close()  # no new connections while the open ones are finished
            service.drain()
            clock, tasks = asyncio.get_running_loop().time, self.server_state.tasks
            ends = clock() + service.limits.drain_seconds
            while (tasks or any(map(self.count_unsent, self.server_state.connections))) and clock() < ends:
                if self.force_exit:  # a second Ctrl-C
                    break
                await asyncio.sleep(0.1)
            # What is not finished ends as cancelled, which its client is told in the form of the protocol.
            closing = asyncio.create_task(asyncio.to_thread(service.engine.close, drain=False, timeout=GOODBYE_SECONDS))
            ends = clock() + GOODBYE_SECONDS
            while (tasks or not closing.done()) and clock() < ends:
                await asyncio.sleep(0.02)
            await super().shutdown(sockets)

        async def on_tick(self, counter: int) -> bool:
            if counter % FLUSH_TICKS == 0:
                self.abort_unflushed()
            return await super().on_tick(counter)

        def abort_unflushed(self) -> None:
            """Free closing connections whose clients have taken nothing for as long as they may."""
            now, unsent = asyncio.get_running_loop().time(), {}
            for connection in [each for each in self.server_state.connections if each.transport.is_closing()]:
                size, since = self.count_unsent(connection), now
                if connection in self.unsent and self.unsent[connection][0] == size:
                    since = self.unsent[connection][1]
                unsent[connection] = size, since
                if now - since >= service.limits.send_seconds:
                    connection.transport.abort()
            self.unsent = unsent

        @staticmethod
        def count_unsent(connection: Any) -> int:
            return connection.transport.get_write_buffer_size()

    limits = service.limits
    config = uvicorn.Config(
        create_app(service, keys, arguments.allowed_host),
        host=arguments.host,
        port=arguments.port,
        loop="asyncio",
        http="h11",
        lifespan="off",  # the application needs none; one that a second Ctrl-C ends would be logged as an error
        ws="websockets-sansio",
        ws_max_size=limits.message_bytes,
        ws_per_message_deflate=False,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0 + 3 * limits.seconds_held_back,  # of a message in hand, the next, and what is on the way
        log_config=log_config(arguments.log_level),
        access_log=arguments.log_level == "debug",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        limit_concurrency=1024,
        ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile,
    )
    return Server(config)


def run(arguments: argparse.Namespace) -> int:
    """
    Serve until a signal comes.

    Returns:
        `int`: the exit status.

    Raises:
        UsageError: if the arguments make no sense together.
    """
    check_arguments(arguments)
    try:
        keys = api_keys(arguments)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f'the package {error.name} is missing: pip install -c constraints.txt -e ".[serve]"'
        ) from error
    bound = listen(arguments.host, arguments.port)
    service = build_service(arguments)
    # uvicorn raises the signals it took once more when it is done; they have had their effect by then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server = make_server(service, arguments, keys)
    try:
        server.run(sockets=[bound])
    finally:
        service.engine.close(drain=False, timeout=5.0)
    return 0 if server.started else 1


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
        return 130
    except Exception as error:
        if arguments.traceback:
            traceback.print_exception(error)
        print(f"ttt-serve: error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
