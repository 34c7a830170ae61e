"""The same application under Ray Serve: replicas of it behind one address, on one machine or many. A WebSocket stays
with its replica, and with it its session; answers of chats are kept beside the replicas, so that each finds them by id.

    python -m pipelines.serving.ray_app --replicas 2 --model my-model
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..ttt_serve import api_keys, build_parser, build_service, check_arguments
from ..ttt_talk import UsageError
from .answers import Answer, AnswerStore
from .limits import Limits

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)
HEALTH_SECONDS = 5.0  # between two questions whether a replica is well
UPSCALE_SECONDS = 10.0  # that more is asked than replicas answer before there is another


class SharedAnswerStore(AnswerStore):
    """
    The answers of all replicas, kept by an actor. Where that has died, there are none.

    Args:
        actor: an [`AnswerStore`] as Ray's actor.
        limits ([`Limits`]): those it was made with.
    """

    def __init__(self, actor: Any, limits: Limits):
        super().__init__(limits.answers, limits.answer_seconds)
        self.actor = actor

    async def keep(self, answer: Answer) -> None:
        """Keep an answer."""
        from ray.exceptions import RayError

        try:
            await self.actor.keep.remote(answer)
        except RayError:
            logger.exception("an answer cannot be kept")

    async def find(self, answer_id: str) -> Answer | None:
        """Return an answer, or None if there is none, or none any more."""
        from ray.exceptions import RayError

        try:
            return await self.actor.find.remote(answer_id)
        except RayError:
            logger.exception("an answer cannot be looked for")
            return None


class Replica:
    """
    One engine and the application over it, in a process of its own.

    Args:
        arguments (`argparse.Namespace`): those of `ttt-serve`.
        keys (`Sequence[str]`): that open it.
        answers: the actor that keeps answers of chats.
    """

    def __init__(self, arguments: argparse.Namespace, keys: Sequence[str], answers: Any):
        self.arguments, self.keys = arguments, list(keys)
        self.service = build_service(arguments)
        self.service.answers = SharedAnswerStore(answers, self.service.limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from .app import create_app

        return create_app(self.service, self.keys, self.arguments.allowed_host)

    def check_health(self) -> None:
        """
        Called by Ray Serve, which replaces a replica that is not well.

        Raises:
            RuntimeError: if the engine has died.
        """
        if not self.service.engine.is_running:
            raise RuntimeError("the engine has died")


def build_replica_parser() -> argparse.ArgumentParser:
    """Return the options: those of `ttt-serve`, and how many replicas there are."""
    parser = build_parser()
    parser.prog = "python -m pipelines.serving.ray_app"
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument("--replicas", type=int, default=1, metavar="N", help="at least as many (default: 1)")
    replicas.add_argument("--max_replicas", type=int, metavar="N", help="more of them while requests wait")
    replicas.add_argument("--cpus", type=float, default=1.0, metavar="N", help="cores of each (default: 1)")
    replicas.add_argument("--gpus", type=float, default=0.0, metavar="N", help="GPUs of each (default: 0)")
    replicas.add_argument("--address", help="of a Ray cluster (default: a new one on this machine)")
    return parser


def check(arguments: argparse.Namespace) -> list[str]:
    """
    Check the arguments, and return the keys that open the replicas.

    Raises:
        UsageError: if they make no sense together.
    """
    check_arguments(arguments)
    if arguments.max_replicas is None:
        arguments.max_replicas = arguments.replicas
    if not 1 <= arguments.replicas <= arguments.max_replicas:
        got = f"{arguments.replicas} and {arguments.max_replicas}"
        raise UsageError(f"--replicas must be 1 or more, and --max_replicas no less; got {got}")
    for name in ("cpus", "gpus"):
        if not 0 <= getattr(arguments, name) < math.inf:
            raise UsageError(f"--{name} must be a number of 0 or more, got {getattr(arguments, name):g}")
    return api_keys(arguments)


def build(arguments: argparse.Namespace, keys: Sequence[str]) -> Any:
    """
    Return the application for `ray.serve.run`. Ray is connected by now; answers are kept as long as this process lives.

    Args:
        arguments (`argparse.Namespace`): those of `ttt-serve` and of `main`, checked.
        keys (`Sequence[str]`): that open the replicas.
    """
    import ray
    from ray import serve

    limits = Limits()
    answers = ray.remote(AnswerStore).options(num_cpus=0).remote(limits.answers, limits.answer_seconds)
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if arguments.max_replicas > arguments.replicas:
        # As many requests as are answered together are well served; what waits calls for another replica. Ray counts
        # what is under way, which is the queue too, since it is the replicas that hold it; and every open session.
        scaling = {
            "autoscaling_config": {
                "min_replicas": arguments.replicas,
                "max_replicas": arguments.max_replicas,
                "target_ongoing_requests": arguments.max_rows,
                "upscale_delay_s": UPSCALE_SECONDS,
            }
        }
    deploy = serve.deployment(
        name="ttt",
        # Beyond what a replica takes it answers 429 itself, so that Ray's own queue stays empty.
        max_ongoing_requests=2 * (arguments.max_rows + arguments.max_queue + arguments.max_sessions),
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=max(1.0, arguments.drain_seconds),
        **scaling,
    )
    return deploy(serve.ingress()(Replica)).bind(arguments, keys, answers)


def http_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return where Ray Serve listens, and how, for `ray.serve.start`."""
    options: dict[str, Any] = {"host": arguments.host, "port": arguments.port}
    for name in ("ssl_certfile", "ssl_keyfile"):
        if (path := getattr(arguments, name)) is not None:
            options[name] = str(path.resolve())
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_replica_parser()
    arguments = parser.parse_args(argv)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    try:
        keys = check(arguments)
    except UsageError as error:
        parser.error(str(error))
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=arguments.log_level == "debug")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options=http_options(arguments))
        serve.run(build(arguments, keys), name="ttt", route_prefix="/")
        scheme = "http" if arguments.ssl_certfile is None else "https"
        print(f"ttt-serve: {arguments.replicas} replicas at {scheme}://{arguments.host}:{arguments.port}", flush=True)
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
