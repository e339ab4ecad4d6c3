"""Does a server keep its rate at five times what it can do, and refuse the rest as it should?

Locust measures the peak first: closed loops of several sizes, of which the one with most output tokens/s counts. Then
an open loop sends ``--factor`` times as many requests as were answered there, for ``--seconds``, and that closed loop
runs once more: the peak is the mean of the two, so that drift of the machine cancels. Goodput is the output tokens/s of
streams that came to their end. The script fails where goodput falls below 90 % of the peak, anything but
RESOURCE_EXHAUSTED with a pushback comes, a stream waited longer than ``--max-wait``, or memory grows.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import _cli
from benchmarks._memory import growth, watched_memory
from benchmarks._server import RunningServer, server_process
from tests.load.run import locust

_E2E, _QUEUE, _TTFT = ("E2E", "stream"), ("QUEUE", "stream"), ("TTFT", "stream")
_LEAST_GOODPUT = 0.9
# Until the first streams of a run have ended; of short runs a quarter.
_WARM_SECONDS, _WARM_SHARE = 5, 0.25
# From the deadline of the wait to the refusal, and from admission to the first step, which ends the wait.
_QUEUE_SLACK = 0.5
# Of a front process that holds some 300 MiB, over the whole run.
_FLAT_MEBIBYTES = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What Locust saw of one run; ``refused`` by status, seconds of streams that came to their end.

    ``worker_busy`` is the share of the run in which the worker computed: the rest of it others had the processor, or
    there was nothing to do.
    """

    goodput_tokens_per_second: float
    streams_per_second: float
    completed: int
    failures: int
    refused: dict[str, int]
    ttft_p50_seconds: float
    ttft_p99_seconds: float
    queue_max_seconds: float
    worker_busy: float = 0.0


def read_outcome(folder: Path, seconds: float) -> Outcome:
    """The figures of a run of so many seconds, from Locust's CSVs."""
    with (folder / "load_stats.csv").open() as file:
        stats = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    with (folder / "load_stats_history.csv").open() as file:
        rows = list(csv.DictReader(file))
    began = int(rows[0]["Timestamp"])
    ended = [row for row in rows if (row["Type"], row["Name"]) == _E2E]
    warm = min(_WARM_SECONDS, seconds * _WARM_SHARE)
    window = [row for row in ended if warm <= int(row["Timestamp"]) - began <= seconds]
    if len(window) < 2:
        raise RuntimeError("no stream came to its end while the load ran; Locust says why above")
    first, last = window[0], window[-1]
    elapsed = int(last["Timestamp"]) - int(first["Timestamp"])
    streams = int(last["Total Request Count"]) - int(first["Total Request Count"])
    return Outcome(
        goodput_tokens_per_second=(_tokens(last) - _tokens(first)) / elapsed,
        streams_per_second=streams / elapsed,
        completed=int(stats[_E2E]["Request Count"]),
        failures=sum(int(row["Failure Count"]) for kind, row in stats.items() if kind != ("", "Aggregated")),
        refused={name: int(row["Request Count"]) for (kind, name), row in stats.items() if kind == "REFUSED"},
        ttft_p50_seconds=float(stats[_TTFT]["50%"]) / 1000,
        ttft_p99_seconds=float(stats[_TTFT]["99%"]) / 1000,
        queue_max_seconds=float(stats[_QUEUE]["Max Response Time"]) / 1000,
    )


def _tokens(row: dict[str, str]) -> float:
    return int(row["Total Request Count"]) * float(row["Total Average Content Size"])


def _measure(server: RunningServer, parsed: argparse.Namespace, seconds: int, *flags: str) -> Outcome:
    lengths = ("--prompt-tokens", parsed.prompt_tokens, "--output-tokens", parsed.output_tokens)
    with tempfile.TemporaryDirectory() as folder:
        # The tail needs no wait: what is under way when the time is up is not counted.
        ending = ("--run-time", f"{seconds}s", "--stop-timeout", "0", "--spawn-rate", "100")
        busy = _worker_seconds(server)
        locust(server.target, Path(folder), *lengths, *ending, *flags)
        busy = _worker_seconds(server) - busy
        return replace(read_outcome(Path(folder), seconds), worker_busy=busy / seconds)


def _worker_seconds(server: RunningServer) -> float:
    times = [worker.cpu_times() for worker in server.workers()]
    return sum(time.user + time.system for time in times)


def verdicts(result: dict[str, Any], max_wait: float) -> dict[str, bool]:
    """What was to be shown, and whether it was."""
    overload: Outcome = result["overload"]
    return {
        "goodput": result["goodput_over_peak"] >= _LEAST_GOODPUT,
        "refusals": not overload.failures and set(overload.refused) == {"RESOURCE_EXHAUSTED"},
        "queue_time": overload.queue_max_seconds <= max_wait + _QUEUE_SLACK,
        "memory": max(result["memory_growth_mib"].values()) <= _FLAT_MEBIBYTES,
    }


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """The peak, then the overload, on one server."""
    flags = ("--model", parsed.model, "--dtype", parsed.dtype, "--threads", str(parsed.threads), "--device", "cpu")
    bounds = ("--max-sequences", str(parsed.max_sequences), "--max-waiting", str(parsed.max_waiting))
    with server_process(*flags, *bounds, "--max-wait", str(parsed.max_wait), "--no-access-log") as server:
        peaks = {
            users: _measure(server, parsed, parsed.peak_seconds, "--users", str(users)) for users in parsed.peak_users
        }
        users, best = max(peaks.items(), key=lambda item: item[1].goodput_tokens_per_second)
        rate = parsed.factor * best.streams_per_second
        with watched_memory(server.pid) as memory:
            arrivals = ("--mode", "open", "--rate", str(rate), "--arrivals", "poisson")
            busy = server.front_cpu_seconds()
            overload = _measure(server, parsed, parsed.seconds, *arrivals)
            busy = server.front_cpu_seconds() - busy
        again = _measure(server, parsed, parsed.peak_seconds, "--users", str(users))
    peak = (best.goodput_tokens_per_second + again.goodput_tokens_per_second) / 2
    return {
        "peaks": peaks,
        "peak_again": again,
        "peak_tokens_per_second": peak,
        "front_busy": busy / parsed.seconds,
        "arrivals_per_second": rate,
        "overload": overload,
        "goodput_over_peak": overload.goodput_tokens_per_second / peak,
        "memory_growth_mib": {"front": growth(memory.front), "workers": growth(memory.workers)},
        "memory_peak_mib": {"front": max(memory.front), "workers": max(memory.workers)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table; status 1 where the server did not keep what it should."""
    parser = _cli.parser(__doc__ or "")
    parser.set_defaults(dtype="float32", threads=1)
    parser.add_argument("--prompt-tokens", default="16-64", help="as tests/load/locustfile.py takes it")
    parser.add_argument("--output-tokens", default="32-64", help="the same")
    parser.add_argument("--peak-users", type=int, nargs="+", default=[16, 24], help="sizes of the closed loop")
    parser.add_argument("--peak-seconds", type=int, default=60, help="of each")
    parser.add_argument("--factor", type=float, default=5.0, help="arrivals over those that the peak answered")
    parser.add_argument("--seconds", type=int, default=300, help="of overload")
    parser.add_argument("--max-sequences", type=int, default=16, help="of the server")
    parser.add_argument("--max-waiting", type=int, default=32, help="of the server")
    parser.add_argument("--max-wait", type=float, default=30.0, help="of the server")
    parsed = parser.parse_args(arguments)
    result = run(parsed)
    held = verdicts(result, parsed.max_wait)
    left_out = ("out", "text")
    shown = {name: value for name, value in vars(parsed).items() if name not in left_out}
    peaks, overload = result["peaks"], result["overload"]
    written = {
        "settings": shown,
        **result,
        "peaks": {str(users): asdict(outcome) for users, outcome in peaks.items()},
        "peak_again": asdict(result["peak_again"]),
        "overload": asdict(overload),
        "held": held,
    }
    path = _cli.write_json(parsed.out, "overload", written)
    head = (
        "load",
        "goodput tokens/s",
        "streams/s",
        "ended",
        "refused",
        "failed",
        "TTFT p99 s",
        "queue max s",
        "worker busy",
    )
    named = [*((f"{users} users", outcome) for users, outcome in peaks.items()), ("overload", overload)]
    named.append(("peak again", result["peak_again"]))
    _cli.print_table(head, [_row(name, outcome) for name, outcome in named])
    print(f"{result['arrivals_per_second']:.0f} arrivals/s; goodput {result['goodput_over_peak']:.3f} of the peak")
    print(f"memory: peak {result['memory_peak_mib']}, growth {result['memory_growth_mib']} MiB")
    print(f"written: {path.name}; " + ", ".join(f"{name} {'held' if ok else 'FAILED'}" for name, ok in held.items()))
    if not all(held.values()):
        sys.exit(1)


def _row(name: str, outcome: Outcome) -> tuple[object, ...]:
    rates = (outcome.goodput_tokens_per_second, outcome.streams_per_second)
    counts = (outcome.completed, sum(outcome.refused.values()), outcome.failures)
    return (name, *rates, *counts, outcome.ttft_p99_seconds, outcome.queue_max_seconds, outcome.worker_busy)


if __name__ == "__main__":
    main()
