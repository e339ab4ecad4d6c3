"""How fast is the server with the full cache, beside transformers' own batching on the same CPU?

Three contenders generate greedily from the same prompts, each in a fresh process, one after the other and in turning
order: transformers' continuous batching (``generate_batch``), one padded ``generate`` over the whole batch, and
``d2o-serve`` end to end over gRPC with compression none. Writes ``baseline_cpu.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks import _cli
from benchmarks._peers import Outcome, Task
from benchmarks._prompts import PromptSet, make_prompts
from benchmarks._server import ClosedSet, check_complete, child_environment, open_client, running_server
from d2o_client import Compression
from d2o_server.engine.worker_process import process_environment

OURS = "d2o-serve"
# What the server gives its workers, large temporaries on the heap and threads that spin briefly: here all have it.
_ENVIRONMENT = process_environment({})
_WARM_UP_TOKENS = 4
_WARM_UP_PROMPTS = 2


@dataclass(slots=True)
class Contender:
    """One way to do the task, and what it took: seconds of every round, and the last round's output."""

    name: str
    task: Task
    seconds: list[float] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return len(self.task.prompts) * self.task.new_tokens / self.median_seconds

    def run(self) -> None:
        outcome = asyncio.run(_serve(self.task)) if self.name == OURS else _peer(self.task)
        wrong = [len(output) for output in outcome.outputs if len(output) != self.task.new_tokens]
        if wrong or len(outcome.outputs) != len(self.task.prompts):
            raise RuntimeError(f"{self.name}: got outputs of {wrong} tokens, expected are {self.task.new_tokens}")
        self.seconds.append(outcome.seconds)
        self.outputs = outcome.outputs
        print(f"{self.name}: {outcome.seconds:.2f} s", file=sys.stderr, flush=True)


def _peer(task: Task) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._peers"],
        input=json.dumps(asdict(task)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=child_environment(_ENVIRONMENT),
    )
    return Outcome(**json.loads(done.stdout))


async def _serve(task: Task) -> Outcome:
    flags = ("--model", task.model, "--device", "cpu", "--dtype", task.dtype, "--threads", str(task.threads))
    with running_server(*flags, environment=_ENVIRONMENT) as target:
        async with open_client(target) as client:
            full = Compression(policy="none")
            await ClosedSet(client, task.warm_up, new_tokens=task.warm_up_tokens, compression=full).run()
            replies = await ClosedSet(client, task.prompts, new_tokens=task.new_tokens, compression=full).run()
    check_complete(replies, task.new_tokens)
    return Outcome(
        seconds=max(reply.times[-1] for reply in replies), outputs=[list(reply.token_ids) for reply in replies]
    )


def compare(task: Task, *, cb_batch_tokens: Sequence[int], repeats: int) -> list[Contender]:
    """Runs every contender ``repeats`` times; of several sizes of generate_batch's steps the fastest goes on.

    Returns:
        generate_batch, generate and ours.
    """
    sizes = [
        Contender(f"generate_batch, {size} tokens a step", replace(task, method="generate_batch", batch_tokens=size))
        for size in cb_batch_tokens
    ]
    for contender in sizes:
        contender.run()
    best = min(sizes, key=lambda contender: contender.median_seconds)
    others = [Contender("generate, one padded batch", replace(task, method="generate")), Contender(OURS, task)]
    for contender in others:
        contender.run()
    contenders = [best, *others]
    for repeat in range(1, repeats):
        for contender in contenders[::-1] if repeat % 2 else contenders:
            contender.run()
    return contenders


def agreement(ours: Contender, other: Contender) -> dict[str, float]:
    """How far outputs agree: in the first token, in tokens of the common prefix, and place by place.

    In bfloat16 near ties fall either way, and after one of them the texts differ.
    """
    pairs = list(zip(ours.outputs, other.outputs, strict=True))
    prefixes = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    places = [a == b for pair in pairs for a, b in zip(*pair, strict=True)]
    return {
        "first_token": statistics.mean(prefix > 0 for prefix in prefixes),
        "common_prefix_tokens": statistics.mean(prefixes),
        "same_tokens": statistics.mean(places),
    }


def report(contenders: Sequence[Contender], prompts: PromptSet, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON.

    Raises:
        RuntimeError: a contender's first tokens are not ours: they do not do the same task.
    """
    *peers, ours = contenders
    rows = {}
    for contender in contenders:
        rows[contender.name] = {
            "seconds": [round(seconds, 3) for seconds in contender.seconds],
            "output_tokens_per_second": contender.tokens_per_second,
        }
    comparison = {}
    for peer in peers:
        same = agreement(ours, peer)
        if same["first_token"] < 0.75:
            raise RuntimeError(f"{peer.name}: only {same['first_token']:.0%} of its first tokens are ours")
        comparison[peer.name] = {"ours_over_it": ours.tokens_per_second / peer.tokens_per_second, "agreement": same}
    task = ours.task
    return {
        "settings": {
            "model": task.model,
            "dtype": task.dtype,
            "threads": task.threads,
            "requests": len(task.prompts),
            "prompt_tokens": len(task.prompts[0]),
            "new_tokens": task.new_tokens,
            "repeats": arguments.repeats,
            "generate_batch_tokens_a_step_tried": arguments.cb_batch_tokens,
            "environment": _ENVIRONMENT,
        },
        "text": {"source": prompts.source, "sha256": prompts.sha256},
        "contenders": rows,
        "comparison": comparison,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes its JSON and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are reported")
    parser.add_argument(
        "--cb-batch-tokens", type=int, nargs="+", default=[256, 1024, 4096], help="generate_batch: the fastest counts"
    )
    parsed = parser.parse_args(arguments)
    count = parsed.requests + _WARM_UP_PROMPTS
    prompts = make_prompts(parsed.model, count=count, tokens=parsed.prompt_tokens, text=parsed.text)
    ids = [list(prompt) for prompt in prompts.token_ids]
    task = Task(
        method=OURS,
        model=parsed.model,
        dtype=parsed.dtype,
        threads=parsed.threads,
        prompts=ids[: parsed.requests],
        warm_up=ids[parsed.requests :],
        new_tokens=parsed.new_tokens,
        warm_up_tokens=_WARM_UP_TOKENS,
    )
    contenders = compare(task, cb_batch_tokens=parsed.cb_batch_tokens, repeats=parsed.repeats)
    result = report(contenders, prompts, parsed)
    path = _cli.write_json(parsed.out, "baseline_cpu", result)
    ratios = [row["ours_over_it"] for row in result["comparison"].values()] + [None]
    rows = [
        (contender.name, contender.tokens_per_second, contender.median_seconds, ratio)
        for contender, ratio in zip(contenders, ratios, strict=True)
    ]
    _cli.print_table(("contender", "output tokens/s", "seconds", "ours over it"), rows)
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
