"""Every backend's attention and logsumexp are those of the definition, in one chunk, in many and packed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from d2o.attention import AttentionRule
from d2o.kernels import prefill
from d2o.kernels.prefill import Backend, choose_backend, packed_prefill_attention, plan_sizes, prefill_attention
from d2o.kernels.reference.column_sums import attention_logits, logsumexp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
PLAIN, WINDOWED, CAPPED = AttentionRule(0.1), AttentionRule(0.1, window=100), AttentionRule(0.1, softcap=30.0)


def inputs(heads: int, kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Strided views; keys and values are followed by NaN."""
    q = torch.randn(tokens, heads, head_dim, device=DEVICE).to(dtype)
    k, v = (torch.full((tokens + 50, kv_heads, head_dim), math.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    for x in (k, v):
        x[:tokens] = torch.randn(tokens, kv_heads, head_dim, device=DEVICE)
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def defined(q: Tensor, k: Tensor, v: Tensor, start: int, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    """Attention and logsumexp in float32 from the whole matrix."""
    probabilities = torch.softmax(attention_logits(q, k, start, rule), -1)
    values = v[:, : start + q.shape[1]].float().repeat_interleave(q.shape[0] // v.shape[0], 0)
    return (probabilities @ values).transpose(0, 1), logsumexp(q, k, start, rule)


def assert_defined(
    found: tuple[Tensor, Tensor | None], q: Tensor, k: Tensor, v: Tensor, start: int, rule: AttentionRule
) -> None:
    out, lse = defined(q, k, v, start, rule)
    assert found[1] is not None
    assert found[0].dtype == q.dtype
    tolerance = 1e-5 if q.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0].float(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], lse, rtol=1e-4, atol=1e-3 if q.dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize(
    ("expected", "dtype", "head_dim", "rule", "chunk", "start"),
    [
        ("cudnn", torch.bfloat16, 128, PLAIN, 8192, 0),
        ("cudnn", torch.float16, 64, PLAIN, 1024, 5120),
        ("flash", torch.float16, 64, PLAIN, 1024, 5000),
        ("flash", torch.bfloat16, 128, PLAIN, 1808, 8192),
        ("cudnn", torch.bfloat16, 128, AttentionRule(0.1, window=9000), 8192, 0),
        ("flash", torch.bfloat16, 128, AttentionRule(0.1, window=9000), 8192, 8192),
        ("flash", torch.bfloat16, 128, PLAIN, 1023, 0),
        ("flash", torch.bfloat16, 256, PLAIN, 8192, 0),
        ("torch", torch.bfloat16, 128, CAPPED, 8192, 0),
        ("torch", torch.float32, 128, PLAIN, 8192, 0),
        ("torch", torch.bfloat16, 100, PLAIN, 8192, 0),
        ("torch", torch.bfloat16, 512, PLAIN, 8192, 0),
    ],
)
def test_the_backend_follows_from_the_shape(
    expected: Backend, dtype: torch.dtype, head_dim: int, rule: AttentionRule, chunk: int, start: int
) -> None:
    assert choose_backend(dtype, head_dim, rule, chunk, start) == expected


@pytest.mark.parametrize(("chunk", "start"), [(8192, 0), (8192, 24576), (4096, 4096), (1024, 1024)])
def test_aligned_chunks_are_not_padded(chunk: int, start: int) -> None:
    assert plan_sizes(chunk, start) == (start, chunk)


def test_few_plans_serve_all_lengths() -> None:
    sides = set()
    for chunk, start in itertools.product(range(1024, 8193, 7), (0, 100, 8192)):
        first, side = plan_sizes(chunk, start)
        assert first % 1024 == 0
        assert first <= start < first + 1024
        needed = start + chunk - first
        assert needed <= side < needed * 1.07 + 128
        sides.add(side)
    assert len(sides) <= 60


@pytest.mark.parametrize("rule", [PLAIN, WINDOWED, CAPPED])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 64), (6, 2, 96), (4, 1, 128)])
def test_torch_gives_attention_and_logsumexp(rule: AttentionRule, heads: int, kv_heads: int, head_dim: int) -> None:
    q, k, v = inputs(heads, kv_heads, 130, head_dim, torch.float32)
    for low, high in ((0, 130), (37, 101)):
        part = q[:, low:high]
        found = prefill_attention(part, k, v, start=low, rule=rule, backend="torch")
        assert_defined(found, part, k, v, low, rule)


def test_the_logsumexp_is_optional_and_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(2, 1, 70, 64, torch.float32)
    assert prefill_attention(q, k, v, start=0, rule=PLAIN, return_lse=False, backend="torch")[1] is None
    monkeypatch.setattr(prefill, "_TILE_ELEMENTS", 1)
    assert_defined(prefill_attention(q, k, v, start=0, rule=PLAIN, backend="torch"), q, k, v, 0, PLAIN)


@pytest.mark.parametrize(("tokens", "head_dim"), [(33, 64), (5, 96)])
def test_parts_merge_by_their_logsumexp(tokens: int, head_dim: int) -> None:
    q, k, v = inputs(3, 3, 2 * tokens, head_dim, torch.float32)
    q = q[:, tokens:]
    own = defined(q, k[:, tokens:], v[:, tokens:], 0, PLAIN)
    past = torch.einsum("hqd,hkd->hqk", q, k[:, :tokens]) * PLAIN.scale
    past_out = torch.softmax(past, -1) @ v[:, :tokens]
    out, lse = own[0].transpose(0, 1), own[1]
    prefill._merge(out, lse, past_out, torch.logsumexp(past, -1))
    assert_defined((out.transpose(0, 1), lse), q, k, v, tokens, PLAIN)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "chunk", "most", "starts"),
    [
        (torch.bfloat16, 128, 1024, 3500, [0, 1024, 2048, 0]),
        (torch.bfloat16, 128, 4096, 4000, []),
        (torch.bfloat16, 128, 8192, 20000, [0, 8192, 0]),
        (torch.float32, 128, 1024, 3500, []),
        (torch.bfloat16, 256, 1024, 3500, []),
    ],
)
def test_plans_are_warmed_up_for_every_whole_chunk(
    dtype: torch.dtype, head_dim: int, chunk: int, most: int, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, padded = [], set()

    def attend(q: Tensor, k: Tensor, v: Tensor, *, start: int, rule: AttentionRule) -> None:
        tokens, end = q.shape[1], start + q.shape[1]
        assert choose_backend(dtype, head_dim, rule, tokens, start) == "cudnn"
        assert q.shape == (4, tokens, head_dim)
        assert k.shape[1] >= end
        if tokens == chunk:
            whole.append(start)
        else:
            assert not start
            padded.add(plan_sizes(tokens, 0))

    monkeypatch.setattr(prefill, "prefill_attention", attend)
    prefill.warm_plans(torch.device("cpu"), dtype, 4, 2, head_dim, chunk, most)
    assert whole == starts
    prompts = range(1, min(chunk, most)) if dtype == torch.bfloat16 else ()
    by_cudnn = (each for each in prompts if choose_backend(dtype, head_dim, PLAIN, each, 0) == "cudnn")
    # A prompt of just so many tokens is not padded, and may have its plan built.
    assert padded == {plan_sizes(each, 0) for each in by_cudnn} - {(0, 1024)}


def test_a_softcap_is_not_packed() -> None:
    q, k, v = (x.transpose(0, 1) for x in inputs(2, 1, 8, 64, torch.float32))
    cu = torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="softcap: got 30"):
        packed_prefill_attention(q, k, v, cu, cu, 8, 8, CAPPED)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 128), (4, 4, 64), (6, 2, 96), (8, 1, 128)])
@pytest.mark.parametrize(("low", "high"), [(0, 2048), (0, 1500), (1024, 2600), (700, 2048), (2047, 2048)])
def test_gpu_kernels_agree(backend: Backend, heads: int, kv_heads: int, head_dim: int, low: int, high: int) -> None:
    q, k, v = inputs(heads, kv_heads, high, head_dim, torch.bfloat16)
    part = q[:, low:high]
    assert_defined(prefill_attention(part, k, v, start=low, rule=PLAIN, backend=backend), part, k, v, low, PLAIN)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("rule", [PLAIN, WINDOWED])
def test_many_sequences_at_once(head_dim: int, rule: AttentionRule) -> None:
    queries, contexts = [1, 300, 77, 512], [1, 300, 700, 600]
    made = [inputs(8, 2, context, head_dim, torch.bfloat16) for context in contexts]
    parts = [q[:, -count:] for (q, _, _), count in zip(made, queries, strict=True)]
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=DEVICE) for x in (queries, contexts)
    )
    q = torch.cat(parts, 1).transpose(0, 1)
    k, v = (torch.cat([x[i][:, :n] for x, n in zip(made, contexts, strict=True)], 1).transpose(0, 1) for i in (1, 2))
    out, lse = packed_prefill_attention(q, k, v, cu_q, cu_k, max(queries), max(contexts), rule)
    for i, (low, high) in enumerate(itertools.pairwise(cu_q.tolist())):
        found = (out[low:high], lse[:, low:high])
        assert_defined(found, parts[i], made[i][1], made[i][2], contexts[i] - queries[i], rule)
