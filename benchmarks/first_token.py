"""When do the first token of a prompt and its second come, with the full cache and compressed?

One server; the policies in turn, ``--repeats`` times, each time ``--at-once`` prompts that are submitted together over
gRPC. Writes ``first_token.json``: the seconds of every round, those of its last stream, and their medians.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks import _cli
from benchmarks._prompts import make_prompts
from benchmarks._server import ClosedSet, check_complete, open_client, running_server
from benchmarks._serving import model_flags
from d2o_client import AsyncClient, Compression

_POLICIES = {"none": Compression(policy="none"), "d2o": Compression(policy="d2o", ratio=0.2, min_budget=64)}
_NEW_TOKENS = 4


async def measure(client: AsyncClient, prompts: Sequence[Sequence[int]], compression: Compression) -> tuple[float, ...]:
    """Seconds from submission until all of the prompts have their first token, and until all have their second."""
    replies = await ClosedSet(client, prompts, new_tokens=_NEW_TOKENS, compression=compression).run()
    check_complete(replies, _NEW_TOKENS)
    return tuple(max(reply.times[place] for reply in replies) for place in range(2))


async def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Runs both policies on one server; returns the result as JSON."""
    rounds = 1 + parsed.repeats
    count = parsed.at_once * rounds
    prompts = make_prompts(parsed.model, count=count, tokens=parsed.prompt_tokens, text=parsed.text)
    flags = [*model_flags(parsed), *shlex.split(parsed.server_flags)]
    seconds: dict[str, list[tuple[float, ...]]] = {policy: [] for policy in _POLICIES}
    with running_server(*flags) as target:
        async with open_client(target) as client:
            for turn in range(rounds):
                part = prompts.token_ids[turn * parsed.at_once : (turn + 1) * parsed.at_once]
                for policy, compression in _POLICIES.items():
                    seconds[policy].append(await measure(client, part, compression))
    chosen = ("model", "dtype", "threads", "server_flags", "prompt_tokens", "at_once", "repeats")
    return {
        "settings": {name: getattr(parsed, name) for name in chosen},
        "prompts": {"source": prompts.source, "sha256": prompts.sha256},
        # The first round is a warm-up.
        "policies": [_row(policy, each[1:]) for policy, each in seconds.items()],
    }


def _row(policy: str, rounds: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    first, second = map(list, zip(*rounds, strict=True))
    return {
        "policy": policy,
        "first_seconds": median(first),
        "second_seconds": median(second),
        "rounds_first_seconds": first,
        "rounds_second_seconds": second,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--server-flags", default="", help="more flags of d2o-serve, in one argument")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--at-once", type=int, default=1, help="prompts of a round")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--name", default="first_token", help="of the file that is written")
    parsed = parser.parse_args(arguments)
    result = asyncio.run(run(parsed))
    path = _cli.write_json(parsed.out, parsed.name, result)
    rows = [(row["policy"], row["first_seconds"], row["second_seconds"]) for row in result["policies"]]
    _cli.print_table(("policy", "first token s", "second s"), rows)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
