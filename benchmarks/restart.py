"""How long is a server without a worker that was killed, and what does the template cost that workers are forked from?

One stream runs alone, then again while its worker is killed at its first quarter, and that ``--repeats`` times. Both
waits begin with the kill: until the server's health is SERVING again, and until the stream's next token, for which the
worker has read what was known anew. Beside them stands what a worker had to wait for if it were not forked: a fresh
interpreter that imports the same.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import psutil

from benchmarks import _cli
from benchmarks._memory import MEBIBYTE
from benchmarks._server import RunningServer, open_client, server_process
from d2o_client import AsyncClient, Generation, HealthStatus

_PROMPT = "The house stood at the end of the lane"
_SECONDS_TO_SERVE = 120


def fresh_import_seconds() -> float:
    """Until a fresh interpreter has imported what a worker needs, and ended."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import d2o_server.worker.serving"], check=True)
    return time.monotonic() - began


def memory_mib(server: RunningServer) -> dict[str, float]:
    """What template and worker have for themselves, and what they share; shared libraries count in part."""
    (worker,) = server.workers()
    template, of_worker = psutil.Process(worker.ppid()).memory_full_info(), worker.memory_full_info()
    return {
        "template_own": template.uss / MEBIBYTE,
        "worker_own": of_worker.uss / MEBIBYTE,
        "worker_resident": of_worker.rss / MEBIBYTE,
        "both": (template.pss + of_worker.pss) / MEBIBYTE,
    }


async def _serving_again(client: AsyncClient, since: float) -> float:
    """Seconds until the server serves again, which it ceases to do when its worker is killed."""
    async with asyncio.timeout(_SECONDS_TO_SERVE):
        for wanted in (HealthStatus.NOT_SERVING, HealthStatus.SERVING):
            while await client.health() is not wanted:
                await asyncio.sleep(0.005)
    return time.monotonic() - since


async def _killed_stream(
    server: RunningServer, client: AsyncClient, tokens: int
) -> tuple[Generation, dict[str, float]]:
    """A stream whose worker dies once; the longest pause between its tokens is the one that this makes."""
    arrivals: list[float] = []
    arrived = 0
    serving: asyncio.Task[float] | None = None
    async with client.stream(_PROMPT, max_new_tokens=tokens, ignore_end_of_text=True) as stream:
        async for chunk in stream:
            arrivals.append(time.monotonic())
            arrived += len(chunk.token_ids)
            if serving is None and arrived >= tokens // 4:
                server.workers()[0].kill()
                serving = asyncio.create_task(_serving_again(client, time.monotonic()))
        answer = await stream.result()
    if serving is None or answer.usage.resumed != 1:
        raise RuntimeError(
            f"tokens: got {tokens}, too few for a stream that outlasts its worker's death: it was resumed"
            f" {answer.usage.resumed} times, wanted is once"
        )
    pause = max(later - earlier for earlier, later in pairwise(arrivals))
    return answer, {"serving_seconds": await serving, "next_token_seconds": pause}


async def _kills(server: RunningServer, parsed: argparse.Namespace) -> list[dict[str, float]]:
    async with open_client(server.target) as client:
        alone = await client.generate(_PROMPT, max_new_tokens=parsed.tokens, ignore_end_of_text=True)
        kills = []
        for _ in range(parsed.repeats):
            answer, waits = await _killed_stream(server, client, parsed.tokens)
            same = answer.token_ids == alone.token_ids
            if not (same or parsed.dtype != "float32"):
                raise RuntimeError("other tokens than alone in a stream that was resumed")
            kills.append(waits | {"same_tokens": same})
            # A worker that has served for so long is started again after the shortest pause.
            await asyncio.sleep(parsed.settled)
        return kills


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Starts a server, kills its worker again and again, and times a fresh interpreter as often."""
    began = time.monotonic()
    flags = ("--model", parsed.model, "--dtype", parsed.dtype, "--threads", str(parsed.threads))
    with server_process(*flags, "--device", parsed.device, *shlex.split(parsed.server_flags)) as server:
        first_start = time.monotonic() - began
        memory = memory_mib(server)
        kills = asyncio.run(_kills(server, parsed))
    imports = [fresh_import_seconds() for _ in range(parsed.repeats)]
    return {
        "first_start_seconds": first_start,
        "kills": kills,
        "serving_seconds": median(kill["serving_seconds"] for kill in kills),
        "next_token_seconds": median(kill["next_token_seconds"] for kill in kills),
        "fresh_import_seconds": median(imports),
        "memory_mib": memory,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints what it found."""
    parser = _cli.parser(__doc__ or "")
    # In bfloat16 what is read again may round otherwise than what was read by the token (docs/adr/0010).
    parser.set_defaults(dtype="float32")
    parser.add_argument("--device", default="cpu", help="as d2o-serve takes it")
    parser.add_argument("--server-flags", default="", help="more flags of d2o-serve, in one argument")
    parser.add_argument("--name", default="restart", help="of the file that is written")
    parser.add_argument("--repeats", type=int, default=5, help="kills, and imports by a fresh interpreter")
    parser.add_argument("--tokens", type=int, default=200, help="of the stream")
    parser.add_argument("--settled", type=float, default=11.0, help="seconds of service between kills")
    parsed = parser.parse_args(arguments)
    result = run(parsed)
    shown = {name: value for name, value in vars(parsed).items() if name not in ("out", "text")}
    path = _cli.write_json(parsed.out, parsed.name, {"settings": shown, **result})
    rows = [(name.replace("_", " "), result[name]) for name in result if name.endswith("_seconds")]
    rows += [(f"{name.replace('_', ' ')} MiB", value) for name, value in result["memory_mib"].items()]
    _cli.print_table(("", "median"), rows)
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
