"""What does prefill attention cost on a GPU, and what do exact or sampled attention scores add to it?

One layer of Llama-3.1-8B's shape, bfloat16. First checks every kernel against its definition, then times whole and
chunked 32k prompts, the column sums in several tilings, many short prompts at once, pages, and what calls cost the
host. Writes ``prefill_attention_gpu.json``; times are medians in milliseconds. What column sums take of cuDNN's forward
is taken from rounds in which each has run by itself for a while: both are at the limit of the GPU's power.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import RESULTS, Ceilings, time_gpu, time_graph, time_in_turn, write_result
from benchmarks._prefill_checks import (
    BACKENDS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    RULE,
    TILINGS,
    check_attention,
    check_store,
    check_tiling,
    check_tilings,
    chunked,
    inputs,
    target,
)
from d2o.kernels.column_sums import LONG, add_column_sums
from d2o.kernels.column_sums_packed import add_column_sums_packed, pack_targets
from d2o.kernels.prefill import cudnn_takes_groups, packed_prefill_attention, prefill_attention, warm_plans
from d2o.kernels.reference.store import empty_pool
from d2o.kernels.store import gather_context, store_tokens


def first_call(run: Callable[[], object]) -> float:
    """Milliseconds of one call on the host's clock."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def host_us(run: Callable[[], object], calls: int = 100) -> float:
    """Microseconds that one call takes the host, which does not wait for the device."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1e6 * took / calls


def time_prompt(tokens: int, matrix: float, deadline: float, failed: set[str]) -> dict[str, Any]:
    """One whole prompt: forwards, column sums, chunks and the sweep of tilings until ``deadline``."""
    q, k, v = inputs(tokens)
    takes_groups = cudnn_takes_groups(0, q.dtype, HEAD_DIM, HEADS // KV_HEADS)
    forward = {name: partial(prefill_attention, q, k, v, start=0, rule=RULE, backend=name) for name in BACKENDS}
    forward_ms = {name: time_gpu(run, repeats=5, warmup=2) for name, run in forward.items()}
    tera = 4 * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2 / 1e12
    lse = forward["cudnn"]()[1]
    assert lse is not None
    sums = partial(add_column_sums, q, k, lse, start=0, scale=RULE.scale)
    everything, sampled = target(tokens), target(tokens, stride=4)
    targets = {
        "all": everything,
        "stride:4": sampled,
        "stride:8": target(tokens, stride=8),
        "last:32 and window": target(tokens, observed=32, first_query=tokens - 32),
        "stride:4 and window": target(tokens, observed=32, stride=4),
    }
    timed: dict[str, Callable[[], object]] = {name: partial(sums, scores) for name, scores in targets.items()}
    timed |= {f"{name}, not in turns": partial(sums, targets[name], tiling=LONG) for name in ("all", "stride:4")}
    rounds = time_in_turn({"cudnn": forward["cudnn"], **timed})
    scores = {name: median(times[name] for times in rounds) for name in timed}
    shares = {name: median(times[name] / times["cudnn"] for times in rounds) for name in timed}
    cuts = range(tokens // 4, tokens + 1, tokens // 4)
    chunks = {
        name: time_gpu(partial(chunked, q, k, v, scores, cuts), repeats=5, warmup=2)
        for name, scores in (("attention", None), ("with all", everything), ("with stride:4", sampled))
    }
    sweep: dict[str, float] = {}
    for (name, tiling), case in itertools.product(TILINGS.items(), ("all", "stride:4", "last:32 and window")):
        if time.perf_counter() < deadline and name not in failed:
            run = partial(sums, targets[case], tiling=tiling)
            sweep[f"{case}, {name}"] = time_gpu(run, repeats=5, warmup=2)
    rate = tera / 2 / scores["all"] * 1e3
    return {
        "tokens": tokens,
        "cudnn_takes_groups": takes_groups,
        "forward_ms": forward_ms,
        "forward_tflop_s": {name: tera / ms * 1e3 for name, ms in forward_ms.items()},
        "column_sums_ms": scores,
        "column_sums_of_cudnn_forward": shares,
        "column_sums_rounds_ms": rounds,
        "column_sums_all_tflop_s": rate,
        "column_sums_all_of_matrix_rate": rate / matrix,
        "four_chunks_ms": chunks,
        "sweep_ms": sweep,
    }


def time_plans() -> dict[str, float]:
    """Host milliseconds of first and second calls at new lengths, and of first calls at shapes that were warmed up."""
    times = {}
    for tokens in (1100, 2900):
        q, k, v = inputs(tokens)
        for name in ("first", "second"):
            times[f"{tokens}, {name}"] = first_call(partial(prefill_attention, q, k, v, start=0, rule=RULE))
    device = torch.device("cuda", 0)
    warm = partial(warm_plans, device, torch.bfloat16, HEADS, KV_HEADS, HEAD_DIM, 4096, 16384)
    times["warming up 4 chunks of 4096"] = first_call(warm)
    q, k, v = inputs(16384)
    for start in (0, 8192, 12288):
        part = q[:, start : start + 4096]
        run = partial(prefill_attention, part, k, v, start=start, rule=RULE)
        times[f"4096 from {start}, warm"] = first_call(run)
    return times


def time_short(sequences: int, tokens: int) -> dict[str, float]:
    """Many prompts packed, and their column sums in one launch each or all at once."""
    q, k, v = inputs(sequences * tokens)
    packed = [x.transpose(0, 1) for x in (q, k, v)]
    cu = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32, device="cuda")

    def forward() -> tuple[Tensor, Tensor]:
        return packed_prefill_attention(packed[0], packed[1], packed[2], cu, cu, tokens, tokens, RULE)

    lse = forward()[1]
    targets = [target(tokens, observed=32) for _ in range(sequences)]
    begins = list(range(0, sequences * tokens, tokens))
    plan = pack_targets(targets, begins)
    together = partial(add_column_sums_packed, q, k, lse, plan, layer=0, scale=RULE.scale)

    def one_by_one() -> None:
        for i, scores in enumerate(targets):
            part = slice(i * tokens, (i + 1) * tokens)
            add_column_sums(q[:, part], k[:, part], lse[:, part], scores, start=0, scale=RULE.scale)

    return {
        "attention_ms": time_gpu(forward),
        "column_sums_ms": time_graph([together] * 4),
        "column_sums_one_by_one_ms": time_gpu(one_by_one),
        "column_sums_host_us": host_us(together),
        "pack_targets_host_us": host_us(partial(pack_targets, targets, begins)),
    }


def time_pages(tokens: int, context: int) -> dict[str, float]:
    """Storing a chunk and gathering a prompt, with the bytes that must move."""
    _, k, v = inputs(tokens)
    pages = context // 32
    pool = empty_pool(pages, KV_HEADS, 32, HEAD_DIM, torch.bfloat16, "cuda")
    table = torch.randperm(pages, device="cuda").int().view(1, 1, pages)
    slots = torch.arange(tokens, device="cuda", dtype=torch.int32)
    row = torch.zeros_like(slots)
    stores = {
        clear: time_graph([partial(store_tokens, k, v, pool, table, row, slots, slots, 0, clear_tail=clear)] * 4)
        for clear in (False, True)
    }
    gather = time_graph([partial(gather_context, pool, table, 0, 0, context)] * 4)
    slot = 8 * KV_HEADS * HEAD_DIM
    return {
        "store_ms": stores[False],
        "store_and_clear_ms": stores[True],
        "store_tb_s": tokens * (slot + 12 * KV_HEADS) / stores[False] / 1e9,
        "gather_ms": gather,
        "gather_tb_s": context * slot / gather / 1e9,
    }


def time_host() -> dict[str, float]:
    """Microseconds a call on the host, of shapes that the device finishes sooner."""
    q, k, v = inputs(2048)
    pool = empty_pool(64, KV_HEADS, 32, HEAD_DIM, torch.bfloat16, "cuda")
    table = torch.arange(64, device="cuda", dtype=torch.int32).view(1, 1, 64)
    slots = torch.arange(64, device="cuda", dtype=torch.int32)
    row = torch.zeros_like(slots)
    few_k, few_v = k[:, :64], v[:, :64]
    lse = torch.zeros(HEADS, 256, device="cuda")
    plain, observed = target(256), target(256, observed=32)
    sums = partial(add_column_sums, q[:, :256], k, lse, start=0, scale=RULE.scale)
    attend = partial(prefill_attention, k=k, v=v, rule=RULE)
    return {
        "store_tokens": host_us(partial(store_tokens, few_k, few_v, pool, table, row, slots, slots, 0)),
        "gather_context": host_us(partial(gather_context, pool, table, 0, 0, 64)),
        "attention, flash": host_us(partial(attend, q[:, :256], start=0)),
        "attention, cudnn": host_us(partial(attend, q[:, :1024], start=0), 40),
        "attention, cudnn and merge": host_us(partial(attend, q[:, 1024:], start=1024), 40),
        "add_column_sums": host_us(partial(sums, target=plain)),
        "add_column_sums with window": host_us(partial(sums, target=observed)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="of the long prompt")
    parser.add_argument("--seconds", type=float, default=35, help="after which the sweep of tilings stops")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results' folder")
    parser.add_argument("--check", metavar="TILING", help="only print this tiling's errors as JSON")
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("prefill_attention_gpu: no CUDA device, nothing measured")
        return
    if parsed.check:
        print(json.dumps(check_tiling(parsed.check)))
        return

    began = time.perf_counter()
    deadline = began + parsed.seconds
    torch.manual_seed(0)
    result: dict[str, Any] = {}

    def note(name: str, value: object) -> None:
        result[name] = value
        print(name, *(value.items() if isinstance(value, dict) else [value]), sep="\n  ", flush=True)

    errors, failures = check_tilings("benchmarks.prefill_attention_gpu", 25)
    note("tiling_errors", errors)
    note("tiling_failures", failures)
    note("checks", check_store())
    note("relative_errors", check_attention(3000))
    ceilings = Ceilings.measure()
    note("ceilings", {"copy_tb_s": ceilings.copy_tb_s, "matrix_bf16_tflop_s": ceilings.matrix_bf16_tflop_s})
    note("prompt", time_prompt(parsed.tokens, ceilings.matrix_bf16_tflop_s, deadline, set(failures)))
    note("pages", time_pages(8192, 32768))
    note("packed_16_x_512", time_short(16, 512))
    note("packed_8_x_1024", time_short(8, 1024))
    note("host_us", time_host())
    note("cudnn_plans_ms", time_plans())
    note("seconds", time.perf_counter() - began)
    bad = [name for name, value in result["relative_errors"].items() if not value < 1e-2]
    bad += [name for name, fine in result["checks"].items() if not fine] + list(failures)
    print("wrong:" if bad else "all checks passed", *bad)
    print(f"written: {write_result(parsed.out, 'prefill_attention_gpu', result).name}")


if __name__ == "__main__":
    main()
