"""How many times one GPU's output tokens a second do several give, a worker on each, through one front?

A server with one worker serves every load, then one with ``--workers`` of them serves it with as many times the
requests, on the same machine. All requests of a load are submitted at once. Writes ``data_parallel.json`` anew after
every run. On a CPU, workers share cores, and the ratio says nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import _cli
from benchmarks._serving import Figures, Session, room_for
from benchmarks.throughput import EVERY_CELL, WORKLOADS

CELLS = ("8192+1024:d2o", "512+256:none")
_WARM_UP_EACH = 4

Cell = tuple[str, str]


@dataclass(slots=True)
class Served:
    """What a server with so many workers has given, by load and policy."""

    workers: int
    facts: dict[str, Any] = field(default_factory=dict)
    runs: dict[Cell, Figures] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        runs = [{"workload": name, "policy": policy} | asdict(run) for (name, policy), run in self.runs.items()]
        return {"workers": self.workers} | self.facts | {"runs": runs}


def over_one(servers: Sequence[Served]) -> dict[str, float]:
    """The last server's rate over the first one's, for the cells that both have run."""
    one, several = servers[0].runs, servers[-1].runs
    return {
        ":".join(cell): several[cell].output_tokens_per_second / one[cell].output_tokens_per_second
        for cell in several
        if cell in one
    }


async def run(parsed: argparse.Namespace, cells: Sequence[Cell]) -> tuple[Path, list[Served]]:
    """Runs every cell on one worker and on several; returns the file with the results, and these."""
    servers: list[Served] = []
    for workers in (1, parsed.workers):
        served = Served(workers)
        servers.append(served)
        requests = {name: workers * WORKLOADS[name].scaled(parsed.scale) for name, _ in cells}
        room = room_for(max(requests.values()), max(WORKLOADS[name].prompt_tokens for name, _ in cells))
        async with Session.open(parsed, "--data-parallel", str(workers), *room) as session:
            served.facts = session.facts(scale=parsed.scale)
            for name, policy in cells:
                load = WORKLOADS[name].load(session, policy, requests[name])
                await session.warm_up(load, _WARM_UP_EACH * workers)
                figures = served.runs[name, policy] = await session.measure(load)
                path = _cli.write_json(parsed.out, parsed.name, _report(servers))
                rate = f"{figures.output_tokens_per_second:.0f} output tokens/s, {figures.seconds:.1f} s"
                print(f"{workers} x {name} {policy}: {rate}", file=sys.stderr, flush=True)
    return path, servers


def _report(servers: Sequence[Served]) -> dict[str, Any]:
    ratios = over_one(servers) if len(servers) > 1 else {}
    return {"over_one": ratios, "servers": [served.as_json() for served in servers]}


_HEAD = ("load", "policy", "workers", "requests", "at once", "seconds", "out tok/s", "TTFT p50", "ITL p50", "front")


def _row(workers: int, cell: Cell, figures: Figures) -> tuple[object, ...]:
    return (
        *(*cell, workers, figures.requests, figures.at_once, figures.seconds, figures.output_tokens_per_second),
        *(figures.ttft_seconds["p50"], f"{figures.itl_seconds['p50']:.4f}", figures.front_busy),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.serving_parser(__doc__ or "", "data_parallel")
    parser.add_argument("--workers", type=int, default=2, help="on so many GPUs, beside one; at least 2")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help="workload:policy, in this order")
    parser.add_argument("--scale", type=float, default=1.0, help="of the workloads' numbers of requests")
    options = parser.parse_args(arguments)
    if options.workers < 2:
        parser.error(f"argument --workers: got {options.workers}, must be at least 2")
    cells = _cli.cells(options.cells, EVERY_CELL)
    if _cli.lacks_gpu(options):
        return
    path, servers = asyncio.run(run(options, cells))
    _cli.print_table(_HEAD, [_row(served.workers, *item) for served in servers for item in served.runs.items()])
    print(", ".join(f"{cell} {ratio:.2f} x one" for cell, ratio in over_one(servers).items()))
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
