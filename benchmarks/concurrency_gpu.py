"""Output tokens a second, time to the first token and between tokens, by how many streams run at once, over gRPC.

One server serves every number of streams in turn, with the full cache and with D2O at ratio 0.2. The requests of a
cell are all submitted at once, as many as its streams. Rates are given twice: over the whole run, prompts included, and
while every request decoded and no prompt was read. Writes ``concurrency_gpu.json`` anew after every run, and
``concurrency_gpu.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import _cli
from benchmarks._serving import FULL_CACHE, Figures, Session, room_for
from benchmarks.plot import plot_streams

_STREAMS = (1, 8, 32, 64, 128, 256, 512)
_POLICIES: dict[str, dict[str, Any]] = {
    "none": FULL_CACHE,
    # With a bound so low that the ratio is what counts: 205 of 1,024 slots.
    "d2o": {"policy": "d2o", "ratio": 0.2, "min_budget": 64},
}
_WARM_UP = 8


async def run(parsed: argparse.Namespace) -> tuple[Path, dict[str, list[Figures]]]:
    """Runs every number of streams under every policy; returns the file with the results, and these."""
    runs: dict[str, list[Figures]] = {policy: [] for policy in parsed.policies}
    async with Session.open(parsed, *room_for(max(parsed.streams), parsed.prompt_tokens)) as session:
        for policy in parsed.policies:
            for index, streams in enumerate(parsed.streams):
                load = session.load(
                    requests=streams,
                    prompt_tokens=parsed.prompt_tokens,
                    new_tokens=parsed.new_tokens,
                    compression=_POLICIES[policy],
                )
                if not index:
                    await session.warm_up(load, _WARM_UP)
                figures = await session.measure(load)
                runs[policy].append(figures)
                path = _cli.write_json(parsed.out, parsed.name, _report(parsed, session, runs))
                rate = f"{figures.output_tokens_per_second:.0f} output tokens/s, {figures.seconds:.1f} s"
                print(f"{policy}, {streams} streams: {rate}", file=sys.stderr, flush=True)
    return path, runs


def _report(parsed: argparse.Namespace, session: Session, runs: dict[str, list[Figures]]) -> dict[str, Any]:
    return session.facts(prompt_tokens=parsed.prompt_tokens, new_tokens=parsed.new_tokens) | {
        "policies": [
            {"policy": policy, "runs": [asdict(figures) for figures in measured]} for policy, measured in runs.items()
        ],
    }


_HEAD = ("policy", "streams", "at once", "out tok/s", "prompts in", "TTFT p50", "ITL p50", "p95", "front")


def _row(policy: str, figures: Figures) -> tuple[object, ...]:
    window = figures.prompts_in
    return (
        *(policy, figures.requests, figures.at_once, figures.output_tokens_per_second),
        *(window and window.output_tokens_per_second, figures.ttft_seconds["p50"]),
        *(f"{figures.itl_seconds[share]:.4f}" for share in ("p50", "p95")),
        figures.front_busy,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and plot and prints a table."""
    parser = _cli.serving_parser(__doc__ or "", "concurrency_gpu")
    parser.add_argument("--streams", type=int, nargs="+", default=list(_STREAMS), help="requests at once")
    parser.add_argument("--policies", nargs="+", default=list(_POLICIES), choices=list(_POLICIES))
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=256)
    options = parser.parse_args(arguments)
    if _cli.lacks_gpu(options):
        return
    path, runs = asyncio.run(run(options))
    _cli.print_table(_HEAD, [_row(policy, figures) for policy, measured in runs.items() for figures in measured])
    print(f"written: {path.name}, {plot_streams(options.out, options.name).name}")


if __name__ == "__main__":
    main()
