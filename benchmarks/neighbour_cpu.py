"""What does a busy neighbour on one of its cores cost a server on a CPU, by how long its threads spin for one another?

For each setting, in turn and turned around, a server of its own reads the same prompts, submitted at once, to the end
of their streams: on a machine that does nothing else, then beside a process that keeps a core busy. Writes
``neighbour_cpu.json`` with the seconds and, for each setting, how many times as long it takes beside the neighbour.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from benchmarks import _cli
from benchmarks._prompts import PromptSet, make_prompts
from benchmarks._server import ClosedSet, check_complete, open_client, running_server
from d2o_client import Compression, Policy

# As the server starts a worker, without any turns, and as libgomp does where nobody says anything.
SETTINGS: dict[str, dict[str, str]] = {
    "server": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "libgomp": {"GOMP_SPINCOUNT": "300000"},
}


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy each."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


async def _seconds(target: str, prompts: PromptSet, new_tokens: int) -> float:
    async with open_client(target) as client:
        compression = Compression(policy=Policy.NONE)
        replies = await ClosedSet(client, prompts.token_ids, new_tokens=new_tokens, compression=compression).run()
    check_complete(replies, new_tokens)
    return max(reply.times[-1] for reply in replies)


def run(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """A line a setting: all rounds' seconds, and the ratio of their medians."""
    prompts = make_prompts(parsed.model, count=parsed.requests, tokens=parsed.prompt_tokens, text=parsed.text)
    alone: dict[str, list[float]] = {name: [] for name in parsed.settings}
    beside: dict[str, list[float]] = {name: [] for name in parsed.settings}
    flags = ("--model", parsed.model, "--dtype", parsed.dtype, "--threads", str(parsed.threads), "--device", "cpu")
    for turn in range(parsed.repeats):
        for name in parsed.settings[:: -1 if turn % 2 else 1]:
            with running_server(*flags, environment=SETTINGS[name]) as target:
                # The first answer of a server takes what nothing after it takes.
                asyncio.run(_seconds(target, prompts, 2))
                alone[name].append(asyncio.run(_seconds(target, prompts, parsed.new_tokens)))
                with busy_cores(parsed.busy):
                    beside[name].append(asyncio.run(_seconds(target, prompts, parsed.new_tokens)))
    return [
        {
            "setting": name,
            "environment": SETTINGS[name],
            "seconds_alone": alone[name],
            "seconds_beside": beside[name],
            "beside_over_alone": median(beside[name]) / median(alone[name]),
        }
        for name in parsed.settings
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--requests", type=int, default=2, help="at once")
    parser.add_argument("--prompt-tokens", type=int, default=150, help="of each")
    parser.add_argument("--new-tokens", type=int, default=30, help="of each")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="how threads wait")
    parser.add_argument("--busy", type=int, default=1, help="cores that a neighbour keeps busy")
    parser.add_argument("--repeats", type=int, default=2, help="servers of each setting")
    parsed = parser.parse_args(arguments)
    lines = run(parsed)
    shown = {name: value for name, value in vars(parsed).items() if name not in ("out", "text")}
    path = _cli.write_json(parsed.out, "neighbour_cpu", {"settings": shown, "runs": lines})
    rows = [
        (line["setting"], median(line["seconds_alone"]), median(line["seconds_beside"]), line["beside_over_alone"])
        for line in lines
    ]
    _cli.print_table(("threads spin", "alone, s", "beside, s", "times"), rows)
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
