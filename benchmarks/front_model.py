"""How much of the engine's rate does gRPC leave, while a real model runs?

Engine and RPC server run in this process over one worker, as in the server's front process. The same streams are read
from the engine in this process (``engine``) and over gRPC in client processes (``grpc``), in turn and turned around, so
that drift cancels. Writes ``front_model.json`` with every run and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from benchmarks import _cli
from benchmarks._floor import Rates
from benchmarks._load import Load
from benchmarks._prompts import special_ids
from benchmarks._serving import FULL_CACHE, model_flags, room_for
from benchmarks.front import PATHS, Pace, measure, print_paces
from d2o_server.app import running_engine
from d2o_server.garbage import calm_garbage_collector
from d2o_server.settings import from_arguments

_WARM_UP_TOKENS = 16


async def run(parsed: argparse.Namespace) -> list[Pace]:
    """Warms both paths up, then runs them in turn on one engine."""
    flags = [*model_flags(parsed), *room_for(parsed.streams, parsed.prompt_tokens), *shlex.split(parsed.server_flags)]
    async with running_engine(from_arguments(flags, {}), _say) as engine:
        calm_garbage_collector()
        load = Load(
            target="",
            requests=parsed.streams,
            prompt_tokens=parsed.prompt_tokens,
            new_tokens=parsed.new_tokens,
            compression=FULL_CACHE,
            vocabulary_size=engine.model_info().vocabulary_size,
            excluded=special_ids(parsed.model),
            seed=parsed.seed,
        )
        short = replace(load, first=load.requests, new_tokens=min(_WARM_UP_TOKENS, load.new_tokens))
        paces = []
        for path in PATHS:
            await measure(path, engine, short, step_seconds=None, processes=parsed.client_processes)
        for turn in range(parsed.repeats):
            for path in sorted(PATHS, reverse=turn % 2 == 1):
                pace = await measure(path, engine, load, step_seconds=None, processes=parsed.client_processes)
                _say(f"{path}: {pace.tokens_per_second:.0f} output tokens/s, {pace.seconds:.1f} s")
                paces.append(pace)
    return paces


def grpc_over_engine(paces: Sequence[Pace]) -> float:
    """The ratio of the paths' median output rates."""
    rates = {path: median(pace.tokens_per_second for pace in paces if pace.path == path) for path in PATHS}
    return rates["grpc"] / rates["engine"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.serving_parser(__doc__ or "", "front_model")
    parser.add_argument("--streams", type=int, default=512, help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each path")
    options = parser.parse_args(arguments)
    if _cli.lacks_gpu(options):
        return
    rates = Rates.measure_apart(options.server_flags)
    paces = asyncio.run(run(options))
    chosen = ("model", "dtype", "threads", "server_flags", "client_processes", "streams", "prompt_tokens", "new_tokens")
    result: dict[str, Any] = {
        "ceilings": rates and asdict(rates),
        "settings": {name: getattr(options, name) for name in chosen},
        "grpc_over_engine": grpc_over_engine(paces),
        "paces": [asdict(pace) for pace in paces],
    }
    path = _cli.write_json(options.out, options.name, result)
    print_paces(paces)
    print(f"gRPC over the engine alone: {result['grpc_over_engine']:.3f}")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
