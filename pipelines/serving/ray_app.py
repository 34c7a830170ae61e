"""The same application under Ray Serve: replicas of it behind one address, on one machine or many. A WebSocket stays
with its replica, and with it its session; an answer of a chat is found by id on the replica that gave it, and any other
says so clearly (404).

    python -m pipelines.serving.ray_app --replicas 2 --model my-model
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..ttt_serve import api_keys, build_parser, build_service, check_arguments
from ..ttt_talk import UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI

HEALTH_SECONDS = 5.0  # between two questions whether a replica is well


class Replica:
    """
    One engine and the application over it, in a process of its own.

    Args:
        arguments (`argparse.Namespace`): those of `ttt-serve`.
        keys (`Sequence[str]`): that open it.
    """

    def __init__(self, arguments: argparse.Namespace, keys: Sequence[str]):
        self.arguments, self.keys = arguments, list(keys)
        self.service = build_service(arguments)

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


def build(arguments: argparse.Namespace) -> Any:
    """
    Return the application for `ray.serve.run`.

    Raises:
        UsageError: if the arguments make no sense together.
    """
    from ray import serve

    check_arguments(arguments)
    if not 1 <= arguments.replicas <= arguments.max_replicas:
        raise UsageError(f"--replicas must be 1 or more, and --max_replicas no less; got {arguments.replicas}")
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if arguments.max_replicas > arguments.replicas:
        # As many requests as are answered together are well served; what waits calls for another replica.
        scaling = {
            "autoscaling_config": {
                "min_replicas": arguments.replicas,
                "max_replicas": arguments.max_replicas,
                "target_ongoing_requests": arguments.max_rows,
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
    return deploy(serve.ingress()(Replica)).bind(arguments, api_keys(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    parser.prog = "python -m pipelines.serving.ray_app"
    replicas = parser.add_argument_group("replicas")
    replicas.add_argument("--replicas", type=int, default=1, metavar="N", help="at least as many (default: 1)")
    replicas.add_argument("--max_replicas", type=int, metavar="N", help="more of them while requests wait")
    replicas.add_argument("--cpus", type=float, default=1.0, metavar="N", help="cores of each (default: 1)")
    replicas.add_argument("--gpus", type=float, default=0.0, metavar="N", help="GPUs of each (default: 0)")
    replicas.add_argument("--address", help="of a Ray cluster (default: a new one on this machine)")
    arguments = parser.parse_args(argv)
    arguments.max_replicas = arguments.max_replicas or arguments.replicas
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    try:
        application = build(arguments)
    except UsageError as error:
        parser.error(str(error))
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=arguments.log_level == "debug")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": arguments.host, "port": arguments.port})
        serve.run(application, name="ttt", route_prefix="/")
        print(f"ttt-serve: {arguments.replicas} replicas at http://{arguments.host}:{arguments.port}", flush=True)
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
