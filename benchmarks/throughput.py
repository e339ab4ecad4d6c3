"""How many tokens a second does the server give on five loads, with and without D2O, beside what vLLM gave?

One server serves every load in turn. The requests of a load, random tokens that run past the end of text, are all
submitted at once over gRPC from client processes and read to their end, while the server's load is sampled. Writes
``throughput.json`` anew after every run, so that a run that is cut keeps what it measured.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import _cli
from benchmarks._floor import Floor, Work, floor_of
from benchmarks._load import Load
from benchmarks._serving import BY_RATIO, BY_TOKENS, FULL_CACHE, Figures, Session, room_for

_POLICIES = ("none", "d2o")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``requests`` prompts of ``prompt_tokens``, each answered with ``new_tokens``; ``d2o`` is its compression.

    ``vllm``: output tokens a second of vLLM 0.25.1 on one H200 with Llama-3.1-8B's shape in bfloat16.
    """

    prompt_tokens: int
    new_tokens: int
    requests: int
    d2o: dict[str, Any]
    vllm: float

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}+{self.new_tokens}"

    def scaled(self, scale: float) -> int:
        """The number of requests at this scale."""
        return max(1, math.ceil(self.requests * scale))

    def load(self, session: Session, policy: str, requests: int) -> Load:
        """So many of its requests to the session's server, under ``none`` or ``d2o``."""
        return session.load(
            requests=requests,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            compression=self.d2o if policy == "d2o" else FULL_CACHE,
        )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(prompt_tokens=512, new_tokens=256, requests=512, d2o=BY_RATIO, vllm=10_069),
        Workload(prompt_tokens=8192, new_tokens=1024, requests=96, d2o=BY_RATIO, vllm=1_872),
        Workload(prompt_tokens=32768, new_tokens=256, requests=32, d2o=BY_RATIO, vllm=165),
        Workload(prompt_tokens=1024, new_tokens=3072, requests=200, d2o=BY_TOKENS, vllm=7_779),
        Workload(prompt_tokens=1024, new_tokens=4096, requests=400, d2o=BY_TOKENS, vllm=6_616),
    )
}
EVERY_CELL = [(name, policy) for name in WORKLOADS for policy in _POLICIES]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One workload under one policy. ``over_vllm`` compares output rates, and says something at scale 1 only.

    ``floor``: the least that it can take on this GPU if all of its requests decode together; None without a GPU.
    """

    policy: str
    over_vllm: float
    floor: Floor | None
    figures: Figures

    @property
    def of_floor(self) -> float | None:
        """The share of the run's time that the floor is."""
        return self.floor.total / self.figures.seconds if self.floor else None

    def as_json(self) -> dict[str, Any]:
        floor = {"floor_seconds": self.floor and self.floor.as_json(), "of_floor": self.of_floor}
        return {"policy": self.policy, "over_vllm": self.over_vllm} | floor | asdict(self.figures)


class Benchmark:
    """The chosen workloads and policies on one server, and what they have given so far."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self._parsed = parsed
        self._cells = _cells(parsed)
        self.runs: dict[str, list[Run]] = {name: [] for name, _ in self._cells}

    async def run(self) -> Path:
        """Runs everything; returns the file with the results."""
        async with Session.open(self._parsed, *self._flags()) as session:
            for name, policy in self._cells:
                run = await self._cell(session, WORKLOADS[name], policy)
                self.runs[name].append(run)
                path = _cli.write_json(self._parsed.out, self._parsed.name, self._report(session))
                _say(name, run)
        return path

    def _flags(self) -> list[str]:
        """All requests may wait, and as many run as the largest workload has."""
        chosen = [WORKLOADS[name] for name in self.runs]
        most = max(workload.scaled(self._parsed.scale) for workload in chosen)
        return room_for(most, max(workload.prompt_tokens for workload in chosen))

    async def _cell(self, session: Session, workload: Workload, policy: str) -> Run:
        load = workload.load(session, policy, workload.scaled(self._parsed.scale))
        if self._parsed.warm_up:
            await session.warm_up(load, self._parsed.warm_up)
        figures = await session.measure(load)
        over_vllm = figures.output_tokens_per_second / workload.vllm
        return Run(policy=policy, over_vllm=over_vllm, floor=self._floor(session, load), figures=figures)

    def _floor(self, session: Session, load: Load) -> Floor | None:
        if session.rates is None:
            return None
        return floor_of(
            Work.of(self._parsed.model, getattr(torch, session.info.dtype)),
            session.rates,
            requests=load.requests,
            prompt_tokens=load.prompt_tokens,
            new_tokens=load.new_tokens,
            compression=load.compression,
        )

    def _report(self, session: Session) -> dict[str, Any]:
        return session.facts(warm_up=self._parsed.warm_up, scale=self._parsed.scale) | {
            "workloads": [
                {"name": name} | asdict(WORKLOADS[name]) | {"runs": [run.as_json() for run in runs]}
                for name, runs in self.runs.items()
            ],
        }


def _say(name: str, run: Run) -> None:
    figures = run.figures
    rate = f"{figures.output_tokens_per_second:.0f} output tokens/s, {run.over_vllm:.2f} x vLLM"
    at_once = f"{figures.seconds:.1f} s, {figures.at_once} at once"
    print(f"{name} {run.policy}: {rate}, {at_once}", file=sys.stderr, flush=True)


_HEAD = (
    *("load", "policy", "requests", "seconds", "out tok/s", "vLLM", "ratio", "of floor", "req/s", "all tok/s"),
    *("TTFT p50", "p95", "p99", "ITL p50", "p95", "p99", "at once", "pages", "front"),
)


def _row(name: str, run: Run) -> tuple[object, ...]:
    figures = run.figures
    return (
        *(name, run.policy, figures.requests, figures.seconds, figures.output_tokens_per_second),
        *(WORKLOADS[name].vllm, run.over_vllm, run.of_floor),
        *(figures.requests_per_second, figures.total_tokens_per_second),
        *figures.ttft_seconds.values(),
        *(f"{gap:.4f}" for gap in figures.itl_seconds.values()),
        *(figures.at_once, figures.peak_pages_in_use, figures.front_busy),
    )


def _cells(parsed: argparse.Namespace) -> list[tuple[str, str]]:
    """Workloads and policies in the order in which they run."""
    if parsed.cells is None:
        return [(name, policy) for name in parsed.workloads for policy in parsed.policies]
    return _cli.cells(parsed.cells, EVERY_CELL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.serving_parser(__doc__ or "", "throughput")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--policies", nargs="+", default=list(_POLICIES), choices=_POLICIES)
    parser.add_argument("--cells", nargs="+", help="instead of both: workload:policy, in this order")
    parser.add_argument("--scale", type=float, default=1.0, help="of the workloads' numbers of requests")
    parser.add_argument("--warm-up", type=int, default=4, help="short requests before each run; 0 for none")
    options = parser.parse_args(arguments)
    if _cli.lacks_gpu(options):
        return
    benchmark = Benchmark(options)
    path = asyncio.run(benchmark.run())
    _cli.print_table(_HEAD, [_row(name, run) for name, runs in benchmark.runs.items() for run in runs])
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
