"""What does prefill attention cost on a GPU, and what do exact or sampled attention scores add to it?

One layer of Llama-3.1-8B's shape, bfloat16. First checks every kernel against its definition, then times whole and
chunked 32k prompts, the column sums in several tilings, and many short prompts at once. Writes
``prefill_attention_gpu.json``; times are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import RESULTS, Ceilings, time_gpu, write_result
from d2o.attention import AttentionRule, ScoreTarget
from d2o.kernels.column_sums import Tiling, add_column_sums
from d2o.kernels.prefill import Backend, cudnn_takes_groups, packed_prefill_attention, prefill_attention
from d2o.kernels.reference import column_sums as reference
from d2o.kernels.reference.store import empty_pool
from d2o.kernels.store import gather_context, store_tokens

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RULE = AttentionRule(HEAD_DIM**-0.5)
BACKENDS: tuple[Backend, ...] = ("cudnn", "flash")
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(tokens: int) -> Inputs:
    """q [heads, tokens, head_dim] and k, v [kv_heads, ...], views of memory by token as the model makes them."""
    q, k, v = (
        torch.randn(tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def target(tokens: int, *, observed: int | None = None, stride: int = 1, first_query: int = 0) -> ScoreTarget:
    """Zeros to add to; ``observed``: queries of the window."""
    window = None if observed is None else torch.zeros(KV_HEADS, tokens, device="cuda")
    received = torch.zeros(HEADS, tokens, device="cuda")
    return ScoreTarget(received, window, tokens - (observed or 0), tokens, stride=stride, first_query=first_query)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def chunked(q: Tensor, k: Tensor, v: Tensor, scores: ScoreTarget | None, cuts: Sequence[int]) -> Tensor:
    """Attention, and the column sums where ``scores`` wants them, of a prompt in chunks that end at ``cuts``."""

    outs = []
    for low, high in itertools.pairwise((0, *cuts)):
        part = q[:, low:high]
        out, lse = prefill_attention(part, k, v, start=low, rule=RULE)
        outs.append(out)
        if scores is not None and lse is not None:
            add_column_sums(part, k, lse, scores, start=low, scale=RULE.scale)
    return torch.cat(outs)


def tilings() -> dict[str, Tiling]:
    """What the sweep tries."""

    return {
        "default": Tiling(),
        "256x64 8 warps, poly 2": Tiling(poly=2),
        "256x64 8 warps, poly 4": Tiling(poly=4),
        "256x64 8 warps, 2 stages": Tiling(stages=2),
        "256x128 8 warps": Tiling(queries=128, registers=None),
        "128x64 4 warps, 2 stages": Tiling(keys=128, warps=4, stages=2, registers=None),
        "128x64 4 warps, 2 stages, poly 2": Tiling(keys=128, warps=4, stages=2, registers=None, poly=2),
        "128x128 4 warps, 2 stages": Tiling(keys=128, queries=128, warps=4, stages=2, registers=None),
        "128x128 8 warps, 2 stages": Tiling(keys=128, queries=128, stages=2),
        "128x64 4 warps, sums after the loop": Tiling(keys=128, warps=4, fold=False, registers=None),
    }


def check_attention(tokens: int) -> dict[str, float]:
    """Relative errors of outputs and logsumexps against the definition in float32."""

    q, k, v = inputs(tokens)
    logits = reference.attention_logits(q, k, 0, RULE)
    lse = torch.logsumexp(logits, -1)
    out = torch.softmax(logits, -1) @ v.float().repeat_interleave(HEADS // KV_HEADS, 0)
    del logits
    out, errors = out.transpose(0, 1), {}
    for backend in BACKENDS:
        for low, high in ((0, tokens), (1024, tokens), (1500, tokens)):
            found, found_lse = prefill_attention(q[:, low:high], k, v, start=low, rule=RULE, backend=backend)
            assert found_lse is not None
            errors[f"{backend} from {low}"] = error(found, out[low:high])
            errors[f"{backend} from {low}, logsumexp"] = error(found_lse, lse[:, low:high])
    errors["chunked"] = error(chunked(q, k, v, None, [1024, 1600, tokens]), out)
    return errors | check_sums(q, k, lse) | check_packed(q, k, v)


def check_sums(q: Tensor, k: Tensor, lse: Tensor) -> dict[str, float]:
    """Every tiling's column sums, whole and in chunks, against the definition."""

    tokens, errors = q.shape[1], {}
    for stride in (1, 4):
        expected = target(tokens, stride=stride, observed=32)
        reference.add_column_sums(q, k, lse, expected, start=0, scale=RULE.scale)
        found = target(tokens, stride=stride, observed=32)
        for low, high in itertools.pairwise((0, 1000, 2048, tokens)):
            add_column_sums(q[:, low:high], k, lse[:, low:high], found, start=low, scale=RULE.scale)
        errors[f"sums, stride {stride}, chunked"] = error(found.received, expected.received)
        assert found.window is not None
        assert expected.window is not None
        errors[f"window sums, stride {stride}, chunked"] = error(found.window, expected.window)
    full = target(tokens)
    reference.add_column_sums(q, k, lse, full, start=0, scale=RULE.scale)
    for name, tiling in tilings().items():
        found = target(tokens)
        add_column_sums(q, k, lse, found, start=0, scale=RULE.scale, tiling=tiling)
        errors[f"sums, {name}"] = error(found.received, full.received)
    return errors


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Two sequences packed against each one alone."""

    cut, tokens = 700, q.shape[1]
    cu = torch.tensor([0, cut, tokens], dtype=torch.int32, device="cuda")
    packed = [x.transpose(0, 1) for x in (q, k, v)]
    out, lse = packed_prefill_attention(packed[0], packed[1], packed[2], cu, cu, tokens, tokens, RULE)
    errors = {}
    for low, high in ((0, cut), (cut, tokens)):
        alone = prefill_attention(q[:, low:high], k[:, low:], v[:, low:], start=0, rule=RULE, backend="flash")
        assert alone[1] is not None
        errors[f"packed from {low}"] = error(out[low:high], alone[0])
        errors[f"packed from {low}, logsumexp"] = error(lse[:, low:high], alone[1])
    return errors


def check_store() -> dict[str, bool]:
    """Tokens come back from scattered pages as they were."""

    _, k, v = inputs(1000)
    pool = empty_pool(64, KV_HEADS, 32, HEAD_DIM, torch.bfloat16, "cuda")
    table = torch.randperm(64, device="cuda").int().view(1, 2, 32)
    slots = torch.arange(1000, device="cuda", dtype=torch.int32)
    store_tokens(k, v, pool, table, torch.ones_like(slots), slots, slots, 0)
    found = gather_context(pool, table, 0, 1, 1000)
    tail = pool.k[int(table[0, 1, 31]), :, 1000 % 32 :]
    return {"stored": all(map(torch.equal, found, (k, v))), "tail cleared": not bool(tail.any())}


def first_call(run: Callable[[], object]) -> float:
    """Milliseconds of one call on the host's clock."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def time_prompt(tokens: int, matrix: float, deadline: float) -> dict[str, Any]:
    """One whole prompt: forwards, column sums, chunks and the sweep of tilings until ``deadline``."""

    q, k, v = inputs(tokens)
    takes_groups = cudnn_takes_groups(0, q.dtype, HEAD_DIM, HEADS // KV_HEADS)
    forward = {name: partial(prefill_attention, q, k, v, start=0, rule=RULE, backend=name) for name in BACKENDS}
    new_shape = first_call(forward["cudnn"])
    forward_ms = {name: time_gpu(run, repeats=9, warmup=2) for name, run in forward.items()}
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
    scores = {name: time_gpu(partial(sums, scores), repeats=9, warmup=2) for name, scores in targets.items()}
    cuts = range(tokens // 4, tokens + 1, tokens // 4)
    chunks = {
        name: time_gpu(partial(chunked, q, k, v, scores, cuts), repeats=5, warmup=2)
        for name, scores in (("attention", None), ("with all", everything), ("with stride:4", sampled))
    }
    sweep: dict[str, float] = {}
    for (name, tiling), case in itertools.product(tilings().items(), ("all", "stride:4")):
        if time.perf_counter() < deadline:
            run = partial(sums, targets[case], tiling=tiling)
            sweep[f"{case}, {name}"] = time_gpu(run, repeats=5, warmup=2)
    rate = tera / 2 / scores["all"] * 1e3
    return {
        "tokens": tokens,
        "cudnn_takes_groups": takes_groups,
        "cudnn_new_shape_ms": new_shape,
        "forward_ms": forward_ms,
        "forward_tflop_s": {name: tera / ms * 1e3 for name, ms in forward_ms.items()},
        "column_sums_ms": scores,
        "column_sums_of_cudnn_forward": {name: ms / forward_ms["cudnn"] for name, ms in scores.items()},
        "column_sums_all_tflop_s": rate,
        "column_sums_all_of_matrix_rate": rate / matrix,
        "four_chunks_ms": chunks,
        "sweep_ms": sweep,
    }


def time_new_shapes() -> dict[str, float]:
    """Host milliseconds of the first and the second call at lengths that cuDNN has not seen."""

    times = {}
    for tokens in (1100, 2900, 5300):
        q, k, v = inputs(tokens)
        for name in ("first", "second"):
            times[f"{tokens}, {name}"] = first_call(partial(prefill_attention, q, k, v, start=0, rule=RULE))
    return times


def time_short(sequences: int, tokens: int) -> dict[str, float]:
    """Many prompts packed, and their column sums one prompt at a time."""

    q, k, v = inputs(sequences * tokens)
    packed = [x.transpose(0, 1) for x in (q, k, v)]
    cu = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32, device="cuda")

    def forward() -> tuple[Tensor, Tensor]:
        return packed_prefill_attention(packed[0], packed[1], packed[2], cu, cu, tokens, tokens, RULE)

    lse = forward()[1]
    targets = [target(tokens, observed=32) for _ in range(sequences)]

    def sums() -> None:
        for i, scores in enumerate(targets):
            part = slice(i * tokens, (i + 1) * tokens)
            add_column_sums(q[:, part], k[:, part], lse[:, part], scores, start=0, scale=RULE.scale)

    return {"packed_ms": time_gpu(forward), "column_sums_one_by_one_ms": time_gpu(sums)}


def time_pages(tokens: int, context: int) -> dict[str, float]:
    """Storing a chunk and gathering a prompt, with the bytes that must move."""

    _, k, v = inputs(tokens)
    pages = context // 32
    pool = empty_pool(pages, KV_HEADS, 32, HEAD_DIM, torch.bfloat16, "cuda")
    table = torch.randperm(pages, device="cuda").int().view(1, 1, pages)
    slots = torch.arange(tokens, device="cuda", dtype=torch.int32)
    row = torch.zeros_like(slots)
    store = time_gpu(lambda: store_tokens(k, v, pool, table, row, slots, slots, 0))
    gather = time_gpu(lambda: gather_context(pool, table, 0, 0, context))
    slot = 8 * KV_HEADS * HEAD_DIM
    return {
        "store_ms": store,
        "store_tb_s": tokens * (slot + 12 * KV_HEADS) / store / 1e9,
        "gather_ms": gather,
        "gather_tb_s": context * slot / gather / 1e9,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks, measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="of the long prompt")
    parser.add_argument("--seconds", type=float, default=85, help="after which the sweep of tilings stops")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results' folder")
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("prefill_attention_gpu: no CUDA device, nothing measured")
        return

    deadline = time.perf_counter() + parsed.seconds
    torch.manual_seed(0)
    result: dict[str, Any] = {"checks": check_store()}
    print(result["checks"], flush=True)
    result["relative_errors"] = check_attention(3000)
    print(*result["relative_errors"].items(), sep="\n", flush=True)
    ceilings = Ceilings.measure()
    result["ceilings"] = {"copy_tb_s": ceilings.copy_tb_s, "matrix_bf16_tflop_s": ceilings.matrix_bf16_tflop_s}
    result["pages"] = time_pages(8192, 32768)
    result["packed_16_x_512"] = time_short(16, 512)
    result["cudnn_new_lengths_ms"] = time_new_shapes()
    for name in ("ceilings", "pages", "packed_16_x_512", "cudnn_new_lengths_ms"):
        print(name, result[name], flush=True)
    result["prompt"] = time_prompt(parsed.tokens, ceilings.matrix_bf16_tflop_s, deadline)
    print(*result["prompt"].items(), sep="\n", flush=True)
    bad = [name for name, value in result["relative_errors"].items() if not value < 1e-2]
    print("wrong:" if bad else "all checks passed", *bad)
    print(f"written: {write_result(parsed.out, 'prefill_attention_gpu', result).name}")


if __name__ == "__main__":
    main()
