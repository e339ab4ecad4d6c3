"""``d2o-serve``: starts the server."""

from __future__ import annotations

import asyncio
import os
import sys

from d2o_server.app import configure_logs, serve
from d2o_server.errors import StartupError, WorkersLost
from d2o_server.rpc.event_loop import EventLoop
from d2o_server.settings import Settings, from_arguments


def main(arguments: list[str] | None = None) -> int:
    """Runs the server; returns the process's exit status."""
    try:
        settings = from_arguments(sys.argv[1:] if arguments is None else arguments, os.environ)
        configure_logs(settings)
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            runner.run(serve(settings, _progress, lambda port: _listening(settings, port)))
    except (StartupError, WorkersLost) as error:
        print(f"d2o-serve: {error}", file=sys.stderr)
        return 1
    return 0


def _progress(text: str) -> None:
    print(f"d2o-serve: {text}", file=sys.stderr, flush=True)


def _listening(settings: Settings, port: int) -> None:
    print(f"d2o-serve: {settings.worker.model} is listening on {settings.listen.host}:{port}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
