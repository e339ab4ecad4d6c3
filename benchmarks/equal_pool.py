"""How many output tokens a second come out of one pool of pages, with D2O and with the full cache, over gRPC?

One server with a pool of ``--pool-tokens`` tokens of full cache, by default near a quarter of what an H200 affords
beside the model. For every workload and policy as many requests as decode together from that pool, all submitted at
once. What is counted differs by workload, and each run has both figures:

- ``prompts in`` (32768 + 512): output tokens and time from the moment at which the last request gave its first token
  to the moment at which the first request gave its last: every request decodes in it, and no prompt is read.
- ``whole run`` (1024 + 8192, 8192 + 2048, 512 + 256): all output tokens over the time from the submission of all
  requests to the last token, so that prompts, growing caches and the ragged end are in it.

512 + 256 has few short requests, and the pool binds none of them: policies alternate there and turn around, so that
drift cancels; ``d2o`` switches itself off, since its budget of at least 1,024 slots covers the request, and ``tight``
compresses. Ratios are of medians. Writes ``equal_pool.json`` anew after every run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import _cli
from benchmarks._pool import cache_shape, most_at_once, pool_pages
from benchmarks._serving import BY_RATIO, BY_TOKENS, FULL_CACHE, Figures, Session, room_for

# Near a quarter of the full-cache tokens that the server gives its pool beside this model at its default share.
_POOL_TOKENS = 215_552
_PREFILL_TOKENS = 8192
_PROMPTS_IN, _WHOLE_RUN = "prompts in", "whole run"
_TIGHT = {"policy": "d2o", "ratio": 0.2, "min_budget": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of ``prompt_tokens`` and ``new_tokens`` under each policy; ``requests`` None: as many as the pool holds.

    ``targets`` has what a policy's rate must be over that of the full cache.
    """

    prompt_tokens: int
    new_tokens: int
    counted: str
    targets: dict[str, float]
    policies: dict[str, dict[str, Any]]
    requests: int | None = None

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}+{self.new_tokens}"

    def shrunk(self, by: int) -> Workload:
        """The same with every number of tokens divided."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens // by,
            new_tokens=self.new_tokens // by,
            policies={name: _shrunk(config, by) for name, config in self.policies.items()},
        )

    def rate(self, figures: Figures) -> float | None:
        """Output tokens a second as this workload counts them; None where that window is empty."""
        if self.counted == _WHOLE_RUN:
            return figures.output_tokens_per_second
        return figures.prompts_in.output_tokens_per_second if figures.prompts_in else None


def _shrunk(compression: dict[str, Any], by: int) -> dict[str, Any]:
    return {name: value // by if isinstance(value, int) else value for name, value in compression.items()}


_NONE_OR_RATIO = {"none": FULL_CACHE, "d2o": BY_RATIO}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            prompt_tokens=32768, new_tokens=512, counted=_PROMPTS_IN, targets={"d2o": 4.5}, policies=_NONE_OR_RATIO
        ),
        Workload(
            prompt_tokens=8192, new_tokens=2048, counted=_WHOLE_RUN, targets={"d2o": 2.0}, policies=_NONE_OR_RATIO
        ),
        Workload(
            prompt_tokens=512,
            new_tokens=256,
            counted=_WHOLE_RUN,
            targets={"d2o": 0.97},
            policies=_NONE_OR_RATIO | {"tight": _TIGHT},
            requests=64,
        ),
        Workload(
            prompt_tokens=1024,
            new_tokens=8192,
            counted=_WHOLE_RUN,
            targets={"d2o": 3.0},
            policies={"none": FULL_CACHE, "d2o": BY_TOKENS},
        ),
    )
}
_AMPLE = ("none", "d2o", "tight", "tight", "d2o", "none")
CELLS = (
    *(("32768+512", policy) for policy in ("none", "d2o")),
    *(("8192+2048", policy) for policy in ("none", "d2o")),
    *(("512+256", policy) for policy in _AMPLE),
    *(("1024+8192", policy) for policy in ("none", "d2o")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run; ``counted_tokens_per_second`` is the rate that its workload counts."""

    policy: str
    counted_tokens_per_second: float | None
    figures: Figures

    def as_json(self) -> dict[str, Any]:
        own = {"policy": self.policy, "counted_tokens_per_second": self.counted_tokens_per_second}
        return own | asdict(self.figures)


class Benchmark:
    """The chosen cells on one server, and what they have given so far."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self._parsed = parsed
        self._cells = _cli.cells(parsed.cells, _allowed())
        self._workloads = {name: WORKLOADS[name].shrunk(parsed.shrink) for name, _ in self._cells}
        self._shape = cache_shape(parsed.model, parsed.page_size)
        self._pages = pool_pages(self._shape, parsed.pool_tokens // parsed.shrink)
        self.runs: dict[str, list[Run]] = {name: [] for name in self._workloads}

    async def run(self) -> Path:
        """Runs everything; returns the file with the results."""
        async with Session.open(self._parsed, *self._flags()) as session:
            warm: set[tuple[str, str]] = set()
            for name, policy in self._cells:
                run = await self._cell(session, self._workloads[name], policy, warm_up=(name, policy) not in warm)
                warm.add((name, policy))
                self.runs[name].append(run)
                path = _cli.write_json(self._parsed.out, self._parsed.name, self._report(session))
                _say(name, run)
        return path

    def _flags(self) -> list[str]:
        """The pool, and room for as many sequences as any cell runs at once."""
        chosen = [(self._workloads[name], policy) for name, policy in self._cells]
        most = max(self._requests(workload, policy) for workload, policy in chosen)
        longest = max(workload.prompt_tokens + workload.new_tokens for workload, _ in chosen)
        flags = ["--page-size", str(self._parsed.page_size), "--num-pages", str(self._pages)]
        flags += ["--prefill-tokens", str(_PREFILL_TOKENS), "--max-model-len", str(longest)]
        return flags + room_for(most, max(workload.prompt_tokens for workload, _ in chosen))

    def _requests(self, workload: Workload, policy: str) -> int:
        """How many requests a run has.

        Raises:
            SystemExit: the pool does not hold one.
        """
        fits = most_at_once(
            self._shape,
            self._pages,
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            compression=workload.policies[policy],
        )
        if not fits:
            raise SystemExit(
                f"pool_tokens: got {self._parsed.pool_tokens}, allowed is what holds a request of {workload.name}"
            )
        return workload.requests or fits

    async def _cell(self, session: Session, workload: Workload, policy: str, *, warm_up: bool) -> Run:
        load = session.load(
            requests=self._requests(workload, policy),
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            compression=workload.policies[policy],
        )
        if warm_up:
            await session.warm_up(load, max(1, min(load.requests, _PREFILL_TOKENS // load.prompt_tokens)))
        figures = await session.measure(load)
        return Run(policy=policy, counted_tokens_per_second=workload.rate(figures), figures=figures)

    def _report(self, session: Session) -> dict[str, Any]:
        return session.facts(shrink=self._parsed.shrink, prefill_tokens=_PREFILL_TOKENS) | {
            "workloads": [
                {"name": name}
                | asdict(self._workloads[name])
                | {
                    "full_caches_in_pool": self._pages
                    / pool_pages(self._shape, self._workloads[name].prompt_tokens + self._workloads[name].new_tokens),
                    "over_none": over_none(runs),
                    "runs": [run.as_json() for run in runs],
                }
                for name, runs in self.runs.items()
            ],
        }


def over_none(runs: Sequence[Run]) -> dict[str, float]:
    """Each policy's median rate over that of the full cache, where both have one."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        if run.counted_tokens_per_second is not None:
            rates.setdefault(run.policy, []).append(run.counted_tokens_per_second)
    full = rates.pop("none", None)
    return {policy: median(values) / median(full) for policy, values in rates.items()} if full else {}


def _allowed() -> list[tuple[str, str]]:
    return [(name, policy) for name, workload in WORKLOADS.items() for policy in workload.policies]


def _say(name: str, run: Run) -> None:
    figures = run.figures
    rate = (
        "no rate" if run.counted_tokens_per_second is None else f"{run.counted_tokens_per_second:.0f} output tokens/s"
    )
    at_once = f"{figures.at_once} of {figures.requests} at once, {figures.seconds:.1f} s"
    print(f"{name} {run.policy}: {rate}, {at_once}", file=sys.stderr, flush=True)


_HEAD = (
    "load",
    "policy",
    "requests",
    "at once",
    "seconds",
    "counted tok/s",
    "whole tok/s",
    "TTFT p50",
    "ITL p50",
    "p95",
)


def _row(name: str, run: Run) -> tuple[object, ...]:
    figures = run.figures
    return (
        *(name, run.policy, figures.requests, figures.at_once, figures.seconds),
        *(run.counted_tokens_per_second, figures.output_tokens_per_second, figures.ttft_seconds["p50"]),
        *(f"{figures.itl_seconds[share]:.4f}" for share in ("p50", "p95")),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.serving_parser(__doc__ or "", "equal_pool")
    parser.add_argument("--pool-tokens", type=int, default=_POOL_TOKENS, help="the pool, in tokens of the full cache")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument(
        "--cells", nargs="+", default=[":".join(cell) for cell in CELLS], help="workload:policy, in this order"
    )
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide all numbers of tokens by this, for small machines"
    )
    options = parser.parse_args(arguments)
    if _cli.lacks_gpu(options):
        return
    benchmark = Benchmark(options)
    path = asyncio.run(benchmark.run())
    _cli.print_table(_HEAD, [_row(name, run) for name, runs in benchmark.runs.items() for run in runs])
    for name, runs in benchmark.runs.items():
        print(f"{name}: " + ", ".join(f"{policy} {ratio:.2f} x none" for policy, ratio in over_none(runs).items()))
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
