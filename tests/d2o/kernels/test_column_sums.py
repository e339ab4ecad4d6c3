"""The kernel's column sums are those of the whole attention matrix, whatever the shape, the sample and the chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from d2o.attention import AttentionRule, ScoreTarget, prefill_attention
from d2o.kernels.column_sums import LONG, MIDDLE, SHORT, Tiling, add_column_sums
from d2o.kernels.reference import column_sums as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter's dot multiplies bfloat16's bits
SMALL = Tiling(keys=32, queries=32, warps=4, stages=1)
CUTS: list[list[int]] = [[], [64], [37, 130, 131], [192]]
SAMPLES = [
    {"stride": 2, "block": 16},
    {"stride": 3, "block": 64},
    {"stride": 4, "block": 32, "first_query": 77},
    {"first_query": 197},
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 2e-4}


def queries_keys(heads: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Strided views; behind the keys stands NaN."""
    q = torch.randn(tokens, heads, head_dim, device=DEVICE).to(dtype).transpose(0, 1)
    k = torch.full((tokens + 9, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    k[:tokens] = torch.randn(tokens, kv_heads, head_dim, device=DEVICE)
    return q, k.transpose(0, 1)


def blank(heads: int, kv_heads: int, tokens: int, window: int | None = None, **fields: int) -> ScoreTarget:
    observed = None if window is None else torch.zeros(kv_heads, tokens, device=DEVICE)
    start = tokens if window is None else max(0, tokens - window)
    return ScoreTarget(torch.zeros(heads, tokens, device=DEVICE), observed, start, tokens, **fields)


def fill(
    add: Callable[..., None],
    target: ScoreTarget,
    q: Tensor,
    k: Tensor,
    rule: AttentionRule,
    cuts: list[int],
    **more: Tiling,
) -> ScoreTarget:
    """Adds the prompt's chunks between ``cuts``; queries and their logsumexp beyond a chunk are not visible."""
    for low, high in zip([0, *cuts], [*cuts, q.shape[1]], strict=True):
        part = q[:, low:high]
        lse = reference.logsumexp(part, k, low, rule)
        add(part, k, lse, target, start=low, scale=rule.scale, softcap=rule.softcap, window=rule.window, **more)
    return target


def assert_equal(ours: ScoreTarget, theirs: ScoreTarget, tolerance: float) -> None:
    torch.testing.assert_close(ours.received, theirs.received, rtol=tolerance, atol=tolerance)
    if theirs.window is not None:
        torch.testing.assert_close(ours.window, theirs.window, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        (2, 2, 64, torch.float32),
        (3, 1, 96, torch.float32),
        (4, 1, 128, HALF),
        (8, 1, 64, torch.float16),
        (2, 1, 256, HALF),
    ],
)
def test_every_query_counts(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k = queries_keys(heads, kv_heads, 75, head_dim, dtype)
    rule = AttentionRule(head_dim**-0.5)
    ours = fill(add_column_sums, blank(heads, kv_heads, 75, 20), q, k, rule, [], tiling=SMALL)
    theirs = fill(reference.add_column_sums, blank(heads, kv_heads, 75, 20), q, k, rule, [])
    assert_equal(ours, theirs, TOLERANCE[dtype])
    torch.testing.assert_close(ours.received.sum(1), torch.full((heads,), 75.0, device=DEVICE), rtol=1e-3, atol=0)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("fields", SAMPLES)
def test_samples_do_not_depend_on_chunks(cuts: list[int], fields: dict[str, int]) -> None:
    q, k = queries_keys(2, 1, 229, 64, torch.float32)
    rule = AttentionRule(0.2)
    ours = fill(add_column_sums, blank(2, 1, 229, 32, **fields), q, k, rule, cuts, tiling=SMALL)
    theirs = fill(reference.add_column_sums, blank(2, 1, 229, 32, **fields), q, k, rule, [])
    assert_equal(ours, theirs, 1e-5)


@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_the_twin_is_the_tiled_attention_of_the_cpu(tokens: int) -> None:
    q, k = queries_keys(4, 2, tokens, 64, torch.float32)
    for rule in (AttentionRule(0.125), AttentionRule(0.3, window=50), AttentionRule(0.2, softcap=5.0)):
        theirs = fill(reference.add_column_sums, blank(4, 2, tokens, 32, stride=2), q, k, rule, [])
        tiled = blank(4, 2, tokens, 32, stride=2)
        prefill_attention(q, k, k[..., :64], start=0, rule=rule, scores=tiled)
        assert_equal(theirs, tiled, 1e-5)


@pytest.mark.parametrize("window", [None, 1, 40, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_sliding_windows_and_softcaps(window: int | None, softcap: float | None) -> None:
    q, k = queries_keys(2, 2, 150, 64, torch.float32)
    rule = AttentionRule(0.4, window, softcap)
    ours = fill(add_column_sums, blank(2, 2, 150, 16, stride=2, block=32), q, k, rule, [70], tiling=SMALL)
    theirs = fill(reference.add_column_sums, blank(2, 2, 150, 16, stride=2, block=32), q, k, rule, [70])
    assert_equal(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    "tiling",
    [
        replace(SMALL, keys=16, queries=64),
        replace(SMALL, queries=128),
        replace(SMALL, keys=64, queries=16, stages=2),
    ],
)
@pytest.mark.parametrize("stride", [1, 3])
def test_tilings_agree(tiling: Tiling, stride: int) -> None:
    q, k = queries_keys(1, 1, 300, 64, torch.float32)
    rule = AttentionRule(0.125)
    ours = fill(add_column_sums, blank(1, 1, 300, 8, stride=stride, block=32), q, k, rule, [], tiling=tiling)
    theirs = fill(reference.add_column_sums, blank(1, 1, 300, 8, stride=stride, block=32), q, k, rule, [])
    assert_equal(ours, theirs, 1e-5)


@pytest.mark.parametrize("adjacent", [2, 3, 4])
def test_heads_in_any_order(adjacent: int) -> None:
    q, k = queries_keys(4, 2, 75, 64, torch.float32)
    rule = AttentionRule(0.125)
    ours = fill(add_column_sums, blank(4, 2, 75, 8), q, k, rule, [], tiling=replace(SMALL, adjacent=adjacent))
    theirs = fill(reference.add_column_sums, blank(4, 2, 75, 8), q, k, rule, [])
    assert_equal(ours, theirs, 1e-5)


def test_a_chunk_without_a_counting_query_changes_nothing() -> None:
    q, k = queries_keys(2, 1, 128, 64, torch.float32)
    target = blank(2, 1, 128, 8, first_query=100)
    lse = torch.full((2, 64), torch.nan, device=DEVICE)
    add_column_sums(q[:, :64], k, lse, target, start=0, scale=0.125)
    assert not target.received.any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("window", [None, 1000])
def test_real_shapes(head_dim: int, stride: int, window: int | None) -> None:
    q, k = queries_keys(8, 2, 3001, head_dim, torch.bfloat16)
    rule = AttentionRule(head_dim**-0.5, window)
    ours = fill(add_column_sums, blank(8, 2, 3001, 32, stride=stride), q, k, rule, [1000, 2048])
    theirs = fill(reference.add_column_sums, blank(8, 2, 3001, 32, stride=stride), q, k, rule, [])
    assert_equal(ours, theirs, 1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("tiling", [None, LONG, MIDDLE, SHORT, replace(LONG, polynomial=0), replace(LONG, adjacent=1)])
def test_long_prompts(head_dim: int, stride: int, tiling: Tiling | None) -> None:
    q, k = queries_keys(8, 2, 6001, head_dim, torch.bfloat16)
    rule = AttentionRule(head_dim**-0.5)
    fields = {"stride": stride, "first_query": 100}
    more = {} if tiling is None else {"tiling": tiling}
    ours = fill(add_column_sums, blank(8, 2, 6001, 32, **fields), q, k, rule, [1500, 3584], **more)
    theirs = fill(reference.add_column_sums, blank(8, 2, 6001, 32, **fields), q, k, rule, [1500, 3584])
    assert_equal(ours, theirs, 1e-3)
