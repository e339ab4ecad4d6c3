"""How many long prompts run at once from one fixed pool of cache pages, and how fast, with and without D2O?

One server, one pool. For each policy the same requests are all submitted at once over gRPC and read to their end, while
the server's load is sampled. Writes ``concurrency.json`` and ``concurrency.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from benchmarks import _cli
from benchmarks._pool import cache_shape, pool_pages
from benchmarks._prompts import PromptSet, make_prompts
from benchmarks._server import ClosedSet, Reply, check_complete, open_client, running_server
from benchmarks._serving import model_flags, percentiles, settled
from benchmarks.plot import plot_concurrency
from d2o_client import AsyncClient, Compression, Load, ModelInfo

_SAMPLE_SECONDS = 0.05
_SHARES = (50, 95)
_LEAST_SECONDS_FOR_A_RATE = 0.5
_PREEMPTIONS = (
    "none by construction: admission reserves every page that a request can need; checked: every stream brought "
    "exactly its tokens after exactly one `started`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The server's load and the client's count of streams between started and finished, at one moment."""

    load: Load
    streams: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """What one policy reached.

    ``at_once``: most sequences in prefill or decode as the server reports it; ``streams_at_once``: the same as the
    client counted it; ``mean_at_once_while_queued``: the average while requests waited for pages. Rates are output
    tokens a second: over the whole run, until the last request was admitted, and while no prompt was being read
    (None where that was too short). Times are seconds. ``peak_pages``: the most that one sequence held;
    ``peak_pages_in_use``: the most that all of them did.
    """

    label: str
    compression: dict[str, Any]
    budget_per_layer: int
    reserved_pages_per_request: int
    at_once: int
    streams_at_once: int
    mean_at_once_while_queued: float | None
    seconds: float
    output_tokens_per_second: float
    output_tokens_per_second_while_queued: float | None
    decode_only_seconds: float
    decode_only_tokens_per_second: float | None
    ttft_seconds: dict[str, float]
    ttft_from_admission_seconds: dict[str, float]
    itl_seconds: dict[str, float]
    queue_seconds: dict[str, float]
    peak_pages: int
    peak_pages_in_use: int
    mean_ratio_reached: float
    compression_seconds_per_prompt: float
    pages_used_afterwards: int
    pages_reserved_afterwards: int
    preemptions: int = 0


async def measure(
    client: AsyncClient, prompts: Sequence[Sequence[int]], *, label: str, compression: Compression, new_tokens: int
) -> PolicyResult:
    """Runs the closed set under one policy.

    Raises:
        RuntimeError: a stream was cut or started twice, or pages were still held afterwards.
    """
    requests = ClosedSet(client, prompts, new_tokens=new_tokens, compression=compression)
    samples: list[Sample] = []
    sampler = asyncio.create_task(_sample(client, requests, samples))
    try:
        replies = await requests.run()
    finally:
        sampler.cancel()
    check_complete(replies, new_tokens)
    return _result(label, replies, samples, await settled(client))


async def _sample(client: AsyncClient, requests: ClosedSet, samples: list[Sample]) -> None:
    while True:
        samples.append(Sample(load=await client.load(), streams=requests.running))
        await asyncio.sleep(_SAMPLE_SECONDS)


def _result(label: str, replies: Sequence[Reply], samples: Sequence[Sample], after: Load) -> PolicyResult:
    first = replies[0].started
    seconds = max(reply.times[-1] for reply in replies)
    times = sorted(time for reply in replies for time in reply.times)
    last_admission = max(reply.admitted_at for reply in replies)
    queued = [sample.load.running for sample in samples if sample.load.waiting]
    decode_only = decode_only_tokens(replies)
    return PolicyResult(
        label=label,
        compression=asdict(first.compression) if first.budget_per_layer else {"policy": "none"},
        budget_per_layer=first.budget_per_layer,
        reserved_pages_per_request=first.reserved_pages,
        at_once=max(sample.load.running for sample in samples),
        streams_at_once=max(sample.streams for sample in samples),
        mean_at_once_while_queued=mean(queued) if queued else None,
        seconds=seconds,
        output_tokens_per_second=len(times) / seconds,
        output_tokens_per_second_while_queued=_rate(sum(at <= last_admission for at in times), last_admission),
        decode_only_seconds=decode_only[1],
        decode_only_tokens_per_second=_rate(*decode_only),
        ttft_seconds=percentiles([reply.first_token_at for reply in replies], _SHARES),
        ttft_from_admission_seconds=percentiles(
            [reply.first_token_at - reply.admitted_at for reply in replies], _SHARES
        ),
        itl_seconds=percentiles([gap for reply in replies for gap in reply.gaps], _SHARES),
        queue_seconds=percentiles([reply.finished.usage.queue_seconds for reply in replies], _SHARES),
        peak_pages=max(reply.finished.cache.peak_pages for reply in replies),
        peak_pages_in_use=max(sample.load.pages_used for sample in samples),
        mean_ratio_reached=mean(reply.finished.cache.ratio_reached for reply in replies),
        compression_seconds_per_prompt=mean(reply.finished.cache.compression_seconds for reply in replies),
        pages_used_afterwards=after.pages_used,
        pages_reserved_afterwards=after.pages_reserved,
    )


def decode_only_tokens(replies: Sequence[Reply]) -> tuple[int, float]:
    """Output tokens that came while no admitted request still waited for its first token, and those seconds."""
    prefills = sorted((reply.admitted_at, reply.first_token_at) for reply in replies)
    free: list[tuple[float, float]] = []
    covered = 0.0
    for begin, end in [*prefills, (max(reply.times[-1] for reply in replies), float("inf"))]:
        if begin > covered:
            free.append((covered, begin))
        covered = max(covered, end)
    tokens = sum(begin < at <= end for reply in replies for at in reply.times for begin, end in free)
    # Before the first admission nothing decodes: that time is the queue's.
    return tokens, sum(end - begin for begin, end in free if begin > 0)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds >= _LEAST_SECONDS_FOR_A_RATE else None


def policies(ratios: Sequence[float], min_budget: int) -> list[tuple[str, Compression]]:
    """The full cache, then D2O at each ratio."""
    d2o = [(f"d2o {ratio:g}", Compression(policy="d2o", ratio=ratio, min_budget=min_budget)) for ratio in ratios]
    return [("none", Compression(policy="none")), *d2o]


async def run(parsed: argparse.Namespace, prompts: PromptSet) -> dict[str, Any]:
    """Runs every policy on one server; returns the result as JSON."""
    count = parsed.requests
    flags = [*model_flags(parsed), "--page-size", str(parsed.page_size), "--prefill-tokens", str(parsed.prefill_tokens)]
    flags += ["--num-pages", str(pool_pages(cache_shape(parsed.model, parsed.page_size), parsed.pool_tokens))]
    flags += ["--max-waiting", str(count), "--max-waiting-tokens", str(count * parsed.prompt_tokens)]
    results = []
    with running_server(*flags) as target:
        async with open_client(target) as client:
            info = await client.model_info()
            chosen = policies(parsed.ratios, parsed.min_budget)
            warm_up = prompts.token_ids[count:]
            await ClosedSet(client, warm_up, new_tokens=4, compression=chosen[-1][1]).run()
            for label, compression in chosen:
                result = await measure(
                    client,
                    prompts.token_ids[:count],
                    label=label,
                    compression=compression,
                    new_tokens=parsed.new_tokens,
                )
                print(f"{label}: {result.at_once} at once, {result.seconds:.1f} s", file=sys.stderr, flush=True)
                results.append(result)
    return _report(parsed, prompts, info, results)


def _report(
    parsed: argparse.Namespace, prompts: PromptSet, info: ModelInfo, results: Sequence[PolicyResult]
) -> dict[str, Any]:
    full = results[0]
    return {
        "settings": {
            "model": parsed.model,
            "dtype": info.dtype,
            "threads": parsed.threads,
            "layers": info.layers,
            "page_size": info.page_size,
            "pool_pages": info.total_pages,
            "pool_full_cache_tokens": info.total_pages // info.layers * info.page_size,
            "pool_bytes": info.total_pages * info.page_bytes,
            "requests": parsed.requests,
            "prompt_tokens": parsed.prompt_tokens,
            "new_tokens": parsed.new_tokens,
            "prefill_tokens_a_step": parsed.prefill_tokens,
        },
        "text": {"source": prompts.source, "sha256": prompts.sha256},
        "preemptions": _PREEMPTIONS,
        "policies": [asdict(result) for result in results],
        "over_none": {
            result.label: {
                "at_once": result.at_once / full.at_once,
                "output_tokens_per_second": result.output_tokens_per_second / full.output_tokens_per_second,
            }
            for result in results[1:]
        },
    }


def _print(results: Sequence[dict[str, Any]]) -> None:
    head = (
        "policy",
        "at once",
        "tok/s",
        "decode-only tok/s",
        "TTFT p50",
        "p95",
        "ITL p50",
        "p95",
        "ratio",
        "pages left",
    )
    rows = [
        (
            result["label"],
            result["at_once"],
            result["output_tokens_per_second"],
            result["decode_only_tokens_per_second"],
            *result["ttft_seconds"].values(),
            *result["itl_seconds"].values(),
            result["mean_ratio_reached"],
            result["pages_used_afterwards"] + result["pages_reserved_afterwards"],
        )
        for result in results
    ]
    _cli.print_table(head, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, writes JSON and plot and prints a table."""
    parser = _cli.parser(__doc__ or "")
    parser.add_argument("--pool-tokens", type=int, default=8192, help="the pool, in tokens of the full cache")
    parser.add_argument("--requests", type=int, default=12, help="requests of each policy, all submitted at once")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.2, 0.1], help="of d2o")
    parser.add_argument("--min-budget", type=int, default=64, help="least slots a layer, of d2o")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=512, help="most prompt tokens in one step of the server")
    parser.add_argument("--name", default="concurrency", help="of the files that are written")
    parsed = parser.parse_args(arguments)
    # One more, which no measured request shares, warms the server up.
    prompts = make_prompts(parsed.model, count=parsed.requests + 1, tokens=parsed.prompt_tokens, text=parsed.text)
    result = asyncio.run(run(parsed, prompts))
    path = _cli.write_json(parsed.out, parsed.name, result)
    _print(result["policies"])
    print(f"written: {path.name}, {plot_concurrency(parsed.out, parsed.name).name}")


if __name__ == "__main__":
    main()
