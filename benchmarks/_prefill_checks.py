"""Inputs of the prefill benchmark, the tilings it tries, and checks of every kernel against its definition."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from d2o.attention import AttentionRule, ScoreTarget
from d2o.kernels.column_sums import LONG, MIDDLE, SHORT, TURNS, add_column_sums
from d2o.kernels.column_sums_packed import add_column_sums_packed, pack_targets
from d2o.kernels.prefill import Backend, packed_prefill_attention, prefill_attention
from d2o.kernels.reference import column_sums as reference
from d2o.kernels.reference.store import empty_pool
from d2o.kernels.store import gather_context, store_tokens

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RULE = AttentionRule(HEAD_DIM**-0.5)
BACKENDS: tuple[Backend, ...] = ("cudnn", "flash")
Inputs = tuple[Tensor, Tensor, Tensor]

TILINGS = {
    "in turns": TURNS,
    "in turns, 4 heads adjacent": replace(TURNS, adjacent=4),
    "in turns, 2 tiles held": replace(TURNS, stages=2),
    "256x64 8 warps": LONG,
    "256x64 8 warps, not by the copy engine": replace(LONG, described=False),
    "256x64 8 warps, 2 of 8 by polynomial": replace(LONG, polynomial=2),
    "256x64 8 warps, none by polynomial": replace(LONG, polynomial=0),
    "256x64 8 warps, 32 heads adjacent": replace(LONG, adjacent=32),
    "128x64 4 warps": MIDDLE,
    "128x64 4 warps, not by the copy engine": replace(MIDDLE, described=False),
    "64x64 4 warps": SHORT,
}


def inputs(tokens: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Inputs:
    """q [heads, tokens, head_dim] and k, v [kv_heads, ...], views of memory by token as the model makes them."""
    q, k, v = (
        torch.randn(tokens, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def target(
    tokens: int, *, observed: int | None = None, stride: int = 1, first_query: int = 0, heads: int = HEADS
) -> ScoreTarget:
    """Zeros to add to; ``observed``: queries of the window."""
    window = None if observed is None else torch.zeros(heads // 4, tokens, device="cuda")
    received = torch.zeros(heads, tokens, device="cuda")
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
    return errors | check_packed(q, k, v)


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Two sequences packed against each one alone, and their column sums in the second of two layers."""
    cut, tokens = 700, q.shape[1]
    cu = torch.tensor([0, cut, tokens], dtype=torch.int32, device="cuda")
    packed = [x.transpose(0, 1) for x in (q, k, v)]
    out, lse = packed_prefill_attention(packed[0], packed[1], packed[2], cu, cu, tokens, tokens, RULE)
    errors, parts = {}, ((0, cut), (cut, tokens))
    sums = [torch.zeros(2, HEADS + KV_HEADS, high - low, device="cuda") for low, high in parts]
    firsts = [ScoreTarget(x[0, :HEADS], x[0, HEADS:], x.shape[2] - 32, x.shape[2], stride=4) for x in sums]
    heads = [ScoreTarget(torch.zeros_like(t.received), None, t.window_start, t.prompt_tokens, stride=4) for t in firsts]
    add_column_sums_packed(q, k, lse, pack_targets(heads, [0, cut]), layer=0, scale=RULE.scale)
    for i, (low, high) in enumerate(parts):
        part = slice(low, high)
        alone = prefill_attention(q[:, part], k[:, low:], v[:, low:], start=0, rule=RULE, backend="flash")
        assert alone[1] is not None
        errors[f"packed from {low}"] = error(out[part], alone[0])
        errors[f"packed from {low}, logsumexp"] = error(lse[:, part], alone[1])
        reference.add_column_sums(q[:, part], k[:, part], alone[1], firsts[i], start=0, scale=RULE.scale)
        errors[f"packed from {low}, sums"] = error(heads[i].received, firsts[i].received)
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


def check_tiling(name: str) -> dict[str, float]:
    """One tiling's column sums, of every query and sampled, whole and in chunks, against the definition."""
    torch.manual_seed(0)
    tokens, heads, errors = 6001, 8, {}
    q, k, _ = inputs(tokens, heads, 2)
    lse = reference.logsumexp(q, k, 0, RULE)
    for stride in (1, 4):
        expected = target(tokens, stride=stride, observed=32, heads=heads)
        reference.add_column_sums(q, k, lse, expected, start=0, scale=RULE.scale)
        for cuts in ((0, tokens), (0, 1500, 3584, tokens)):
            found = target(tokens, stride=stride, observed=32, heads=heads)
            for low, high in itertools.pairwise(cuts):
                part = slice(low, high)
                add_column_sums(
                    q[:, part], k, lse[:, part], found, start=low, scale=RULE.scale, tiling=TILINGS[name]
                )  # fmt: skip
            case = f"stride {stride}, {len(cuts) - 1} chunks"
            errors[case] = error(found.received, expected.received)
            assert found.window is not None
            assert expected.window is not None
            errors[f"{case}, window"] = error(found.window, expected.window)
    return errors


def check_tilings(module: str, seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """Every tiling in a process of its own, all at once: a kernel that faults spoils nothing else.

    They also leave the compiled kernels where this process finds them. Returns each one's largest error, and failures.
    """
    command = [sys.executable, "-m", module, "--check"]
    pipe = subprocess.PIPE
    running = {name: subprocess.Popen([*command, name], stdout=pipe, stderr=pipe, text=True) for name in TILINGS}
    errors, failures = {}, {}
    deadline = time.perf_counter() + seconds
    for name, process in running.items():
        try:
            out, trouble = process.communicate(timeout=max(1.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failures[name] = f"took longer than {seconds} s"
            continue
        if process.returncode:
            failures[name] = trouble.strip()[-400:]
            continue
        found = json.loads(out.strip().split("\n")[-1])
        errors[name] = max(found.values())
        if not errors[name] < 1e-3:
            failures[name] = f"wrong: {found}"
    return errors, failures
