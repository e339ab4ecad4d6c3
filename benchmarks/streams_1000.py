"""Do a thousand streams at once all end rightly, and do those who read one byte a second slow the others?

First all streams are read by the client as they come: each must bring exactly its tokens, and the front process's peak
memory is what it holds for them. Then, in turn and turned around, ``--slow`` of them are raw connections that read
either all there is or one byte a second, and the figure is the rate of the others while all streams run: from the last
one's first token to the first one's last. The script fails where in any round less than all run at once, a stream ends
wrongly or a page is held afterwards, or where the others are slowed by 5 % or more.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks import _cli
from benchmarks._load import Load, Outcome, run_load, total_tokens
from benchmarks._memory import peak_mebibytes, reset_peak
from benchmarks._server import RunningServer, open_client, server_process
from benchmarks._serving import FULL_CACHE, Window
from benchmarks._slow_socket import SocketStream
from d2o_client import AsyncClient
from d2o_inference.v1 import inference_service_pb2 as pb

_MOST_SLOWED = 0.05
_PROMPT_TOKENS = 16
_CLIENT_PROCESSES = 2
_POLL_SECONDS = 0.25
_PATIENCE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``slow`` is None where all are read by the client; tokens and seconds are those of the streams that it reads.

    ``at_once`` is from the server's load, sampled; ``overlapping`` is how many of the client's streams were under way
    when the last of them had its first message. ``together_seconds`` is how long all were from then on, and
    ``tokens_per_second`` what came in it; both are 0 where one had ended before another began.
    """

    slow: bool | None
    streams: int
    at_once: int
    overlapping: int
    tokens: int
    seconds: float
    together_seconds: float
    tokens_per_second: float
    front_peak_mib: float
    bytes_a_socket: float | None = None


def _load(target: str, parsed: argparse.Namespace, requests: int, vocabulary: int) -> Load:
    return Load(
        target=target,
        requests=requests,
        prompt_tokens=_PROMPT_TOKENS,
        new_tokens=parsed.tokens,
        compression=FULL_CACHE,
        vocabulary_size=vocabulary,
    )


def _overlapping(outcomes: Sequence[Outcome]) -> int:
    last_start = max(outcome.arrivals[0] for outcome in outcomes)
    return sum(outcome.arrivals[-1] > last_start for outcome in outcomes)


async def _most_running(client: AsyncClient) -> int:
    """Samples until it is cancelled; the most requests that ran at once."""
    most = 0
    with suppress(asyncio.CancelledError):
        while True:
            most = max(most, (await client.load()).running)
            await asyncio.sleep(_POLL_SECONDS)
    return most


async def _idle(client: AsyncClient) -> None:
    """Waits until no request holds a page.

    Raises:
        TimeoutError: one still does.
    """
    async with asyncio.timeout(_PATIENCE):
        while (load := await client.load()).running or load.waiting or load.pages_used or load.pages_reserved:
            await asyncio.sleep(_POLL_SECONDS)


async def measure(server: RunningServer, client: AsyncClient, parsed: argparse.Namespace, *, slow: bool | None) -> Run:
    """One round of all streams, and the wait until the server is idle again.

    Raises:
        RuntimeError: a stream did not bring exactly its tokens.
    """
    sockets = 0 if slow is None else parsed.slow
    vocabulary = (await client.model_info()).vocabulary_size
    request = pb.StreamGenerateTextRequest(
        prompt=pb.Prompt(tokens=pb.TokenIds(ids=[7] * _PROMPT_TOKENS)),
        # They run until the others have ended.
        stopping=pb.StoppingParameters(max_new_tokens=2 * parsed.tokens, ignore_end_of_text=True),
        compression=pb.Compression(policy=pb.COMPRESSION_POLICY_NONE),
    )
    reset_peak(server.pid)
    readers = [SocketStream(server.target, request, slow=bool(slow)) for _ in range(sockets)]
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    watch = asyncio.create_task(_most_running(client))
    outcomes = await run_load(_load(server.target, parsed, parsed.streams - sockets, vocabulary), _CLIENT_PROCESSES)
    watch.cancel()
    most = await watch
    for task in tasks:
        task.cancel()
    failures = [error for error in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(error, Exception)]
    if failures:
        raise failures[0]
    await _idle(client)
    together = Window.of(outcomes)
    return Run(
        slow=slow,
        streams=parsed.streams,
        at_once=most,
        overlapping=_overlapping(outcomes),
        tokens=total_tokens(outcomes),
        seconds=max(outcome.arrivals[-1] for outcome in outcomes),
        together_seconds=together.seconds if together else 0.0,
        tokens_per_second=together.output_tokens_per_second if together else 0.0,
        front_peak_mib=peak_mebibytes(server.pid),
        bytes_a_socket=sum(reader.taken for reader in readers) / sockets if sockets else None,
    )


async def run(server: RunningServer, parsed: argparse.Namespace) -> list[Run]:
    """A small round that warms up, all streams by the client, then the pairs."""
    order = [slow for turn in range(parsed.repeats) for slow in ((True, False) if turn % 2 else (False, True))]
    async with open_client(server.target) as client:
        vocabulary = (await client.model_info()).vocabulary_size
        await run_load(_load(server.target, parsed, min(16, parsed.streams), vocabulary), 1)
        return [await measure(server, client, parsed, slow=slow) for slow in (None, *order)]


def slowed(runs: Sequence[Run]) -> float | None:
    """By what share slow sockets lengthen the others' time for a token, by medians; None where not all ran together."""
    slow, fast = (median(one.tokens_per_second for one in runs if one.slow is kind) for kind in (True, False))
    return fast / slow - 1 if slow and fast else None


def _all_at_once(run: Run, sockets: int) -> bool:
    """Whether all streams ran together: the client's by what it saw, the sockets' by the server's load."""
    own = run.streams if run.slow is None else run.streams - sockets
    return run.at_once == run.streams and run.overlapping == own


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table; status 1 where the server did not keep what it should."""
    parser = _cli.parser(__doc__ or "")
    parser.set_defaults(model="random:tiny-llama", dtype="float32", threads=1)
    parser.add_argument("--streams", type=int, default=1000, help="at once")
    parser.add_argument("--slow", type=int, default=200, help="of them read one byte a second")
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs with and without slow readers")
    parsed = parser.parse_args(arguments)
    if not 0 < parsed.slow < parsed.streams:
        parser.error(f"--slow: got {parsed.slow}, allowed is [1, {parsed.streams - 1}], less than --streams")
    flags = ("--model", parsed.model, "--dtype", parsed.dtype, "--threads", str(parsed.threads), "--device", "cpu")
    bounds = ("--max-sequences", str(parsed.streams), "--max-waiting", str(parsed.streams))
    # Room for the pollers beside a connection of each stream.
    connections = ("--max-connections", str(parsed.streams + 100), "--no-access-log")
    with server_process(*flags, *bounds, *connections) as server:
        idle = peak_mebibytes(server.pid)
        runs = asyncio.run(run(server, parsed))
    share = slowed(runs)
    held = {
        "all_at_once": all(_all_at_once(one, parsed.slow) for one in runs),
        "slow_readers": share is not None and share < _MOST_SLOWED,
    }
    chosen = ("model", "dtype", "threads", "streams", "slow", "tokens", "repeats")
    result: dict[str, Any] = {
        "settings": {name: getattr(parsed, name) for name in chosen},
        "front_idle_mib": idle,
        "front_peak_mib": runs[0].front_peak_mib,
        "slowed_by": share,
        "held": held,
        "runs": [asdict(one) for one in runs],
    }
    path = _cli.write_json(parsed.out, "streams_1000", result)
    names = {None: "all by the client", False: f"{parsed.slow} sockets", True: f"{parsed.slow} at 1 byte/s"}
    head = (
        "read",
        "streams",
        "at once",
        "overlapping",
        "tokens",
        "seconds",
        "all together s",
        "tokens/s then",
        "front peak MiB",
        "bytes a socket",
    )
    _cli.print_table(head, [(names[one.slow], *list(asdict(one).values())[1:]) for one in runs])
    slower = "unknown: raise --tokens" if share is None else f"{share:.1%}"
    print(f"front: {idle:.0f} MiB idle, {runs[0].front_peak_mib:.0f} MiB at most; the others slowed by {slower}")
    print(f"written: {path.name}; " + ", ".join(f"{name} {'held' if ok else 'FAILED'}" for name, ok in held.items()))
    if not all(held.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
