"""Which type does this machine's CPU serve a model fastest in? That is what ``--dtype auto`` must choose.

For each type, in turn and turned around, a server of its own reads the same prompts, submitted at once, to the end of
their streams. Writes ``dtype_cpu.json`` with the rates, and with what auto chooses here.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks import _cli
from benchmarks._prompts import PromptSet, make_prompts
from benchmarks._server import ClosedSet, check_complete, open_client, running_server
from d2o_client import Compression, Policy
from d2o_server.worker.dtype import choose_dtype, dtype_name

_DTYPES = ("bfloat16", "float32")


async def _rates(target: str, prompts: PromptSet, new_tokens: int) -> dict[str, float]:
    """Prompt tokens a second until the last first token, and tokens in all a second to the end."""
    async with open_client(target) as client:
        compression = Compression(policy=Policy.NONE)
        replies = await ClosedSet(client, prompts.token_ids, new_tokens=new_tokens, compression=compression).run()
    check_complete(replies, new_tokens)
    read, ended = max(reply.first_token_at for reply in replies), max(reply.times[-1] for reply in replies)
    count = len(replies)
    return {
        "prompt_tokens_per_second": sum(map(len, prompts.token_ids)) / read,
        "output_tokens_per_second": count * new_tokens / ended,
        "seconds": ended,
    }


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the ratio of bfloat16 to float32 of the medians."""
    prompts = make_prompts(parsed.model, count=parsed.requests, tokens=parsed.prompt_tokens, text=parsed.text)
    runs: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in _DTYPES}
    for turn in range(parsed.repeats):
        for dtype in _DTYPES[:: -1 if turn % 2 else 1]:
            flags = ("--model", parsed.model, "--dtype", dtype, "--threads", str(parsed.threads), "--device", "cpu")
            with running_server(*flags) as target:
                runs[dtype].append(asyncio.run(_rates(target, prompts, parsed.new_tokens)))
    names = ("prompt_tokens_per_second", "output_tokens_per_second")
    medians = {dtype: {name: median(one[name] for one in each) for name in names} for dtype, each in runs.items()}
    first, second = _DTYPES
    return {
        "auto": dtype_name(choose_dtype("auto", torch.device("cpu"))),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "medians": medians,
        f"{first}_over_{second}": {name: medians[first][name] / medians[second][name] for name in names},
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--requests", type=int, default=8, help="at once")
    parser.add_argument("--prompt-tokens", type=int, default=400, help="of each")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each")
    parser.add_argument("--repeats", type=int, default=2, help="servers of each type")
    parsed = parser.parse_args(arguments)
    result = run(parsed)
    shown = {name: value for name, value in vars(parsed).items() if name not in ("out", "text", "dtype")}
    path = _cli.write_json(parsed.out, "dtype_cpu", {"settings": shown, **result})
    _cli.print_table(
        ("type", "prompt tokens/s", "output tokens/s"), [(d, *m.values()) for d, m in result["medians"].items()]
    )
    print(f"auto chooses {result['auto']}; written: {path.name}")


if __name__ == "__main__":
    main()
