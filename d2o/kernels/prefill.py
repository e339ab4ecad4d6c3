"""Prefill attention on a GPU, with the logsumexp of every query: cuDNN, torch's flash kernel or plain torch."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from d2o import attention
from d2o.attention import AttentionRule
from d2o.kernels.launch import Launcher, Options, eighths
from d2o.kernels.reference.column_sums import logsumexp
from d2o.kernels.store import gather_context

__all__ = [
    "Backend",
    "choose_backend",
    "gather_context",
    "packed_prefill_attention",
    "prefill_attention",
    "warm_plans",
]

Backend = Literal["cudnn", "flash", "torch"]
_HALF = (torch.bfloat16, torch.float16)
_LONG_CHUNK = 1024
_START_STEP = 1024
_TILE_ELEMENTS = 1 << 26
_MERGED = 16


def choose_backend(dtype: torch.dtype, head_dim: int, rule: AttentionRule, chunk: int, start: int) -> Backend:
    """Which kernel attends: cuDNN where a chunk is long and its attention plain, else flash, else torch.

    Of the chunks that do not begin their prompt, cuDNN gets those that begin at a multiple of their own length: their
    few shapes can be warmed up, and building a plan for any other takes longer than flash loses.
    """
    if dtype not in _HALF or rule.softcap is not None or head_dim % 8 or head_dim > 256:
        return "torch"
    windowed = rule.window is not None and rule.window < start + chunk
    odd = chunk < _LONG_CHUNK or start % chunk != 0
    return "flash" if windowed or odd or head_dim > 128 else "cudnn"


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    rule: AttentionRule,
    return_lse: bool = True,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of one prompt's chunk over everything up to its end.

    Args:
        q: [heads, chunk, head_dim], the queries at positions ``start`` to ``start + chunk``; strided views are fine.
        k, v: [kv_heads, >= start + chunk, head_dim], in order of position; strided views are fine.
        start: position of the first query.
        rule: scale, window and softcap.
        return_lse: whether the second result is wanted.
        backend: instead of :func:`choose_backend`'s choice.

    Returns:
        out [chunk, heads, head_dim] in q's dtype (maybe strided); lse [heads, chunk] float32 (natural), or None.
    """
    end = start + q.shape[1]
    if k.shape[1] > end:
        k, v = k[:, :end], v[:, :end]
    if backend is None:
        backend = choose_backend(q.dtype, q.shape[2], rule, q.shape[1], start) if q.is_cuda else "torch"
    if backend == "torch":
        out = attention.prefill_attention(q, k, v, start=start, rule=rule)
        return out, _tiled_logsumexp(q, k, start, rule) if return_lse else None
    out, lse = _flash(q, k, v, rule) if backend == "flash" else _cudnn(q, k, v, start, rule.scale)
    return out, lse if return_lse else None


def packed_prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    rule: AttentionRule,
) -> tuple[Tensor, Tensor]:
    """Causal attention of many sequences at once by torch's flash kernel; each one's queries are its last tokens.

    Args:
        q: [tokens, heads, head_dim], bfloat16 or float16.
        k, v: [keys, kv_heads, head_dim].
        cu_q, cu_k: [sequences + 1] int32, where each sequence begins in q and in k and v; then their ends.
        max_q, max_k: at least the longest of them.
        rule: scale and window.

    Returns:
        out [tokens, heads, head_dim]; lse [heads, tokens] float32, natural logarithm.

    Raises:
        ValueError: the rule has a softcap, which the flash kernel of torch does not know.
    """
    if rule.softcap is not None:
        raise ValueError(f"softcap: got {rule.softcap}, allowed is None; call prefill_attention for each sequence")
    # At max_q = 1 the kernel would swap groups and queries, and its logsumexp's order with them.
    out, lse = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max(2, max_q), max_k, 0.0, True, False, scale=rule.scale, **_window(rule)
    )[:2]
    return out, lse


def _window(rule: AttentionRule) -> dict[str, int]:
    return {} if rule.window is None else {"window_size_left": rule.window - 1, "window_size_right": 0}


def _flash(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    """Queries are the last tokens of the keys: out [chunk, heads, head_dim], lse [heads, chunk]."""
    heads, chunk, _ = q.shape
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = torch.ops.aten._flash_attention_forward(
        queries, keys, values, None, None, chunk, k.shape[1], 0.0, True, False, scale=rule.scale, **_window(rule)
    )[:2]
    return out[0], lse.reshape(heads, chunk)


def plan_sizes(chunk: int, start: int) -> tuple[int, int]:
    """Sizes that cuDNN attends in: (first key of the square on the diagonal, its side).

    cuDNN builds a plan for every new shape, which takes far longer than an attention. So squares begin at multiples
    of 1024 and have one of sixteen sides an octave; a chunk that fits is not padded.
    """
    first = start - start % _START_STEP
    side = start + chunk - first
    unit = max(128, 1 << max(0, (side - 1).bit_length() - 5))
    return first, -(-side // unit) * unit


def _cudnn(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> tuple[Tensor, Tensor]:
    """The square on the diagonal causally, what comes before it whole; both merged by their logsumexp."""
    chunk, end = q.shape[1], k.shape[1]
    first, side = plan_sizes(chunk, start)
    before, after = start - first, first + side - end
    q = _padded(q, before, after)
    if not first:
        out, lse = _cudnn_call(q, _padded(k, 0, after), _padded(v, 0, after), True, scale)
    else:
        out, lse = _cudnn_call(q, _padded(k[:, first:], 0, after), _padded(v[:, first:], 0, after), True, scale)
        _merge(out, lse, *_cudnn_call(q, k[:, :first], v[:, :first], False, scale))
    if before or after:
        out, lse = out[:, before : before + chunk], lse[:, before : before + chunk]
    return out.transpose(0, 1), lse


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """Zeros before and after the tokens of x [heads, tokens, head_dim]."""
    if not before and not after:
        return x
    return functional.pad(x.transpose(0, 1), (0, 0, 0, 0, before, after)).transpose(0, 1)


def _cudnn_call(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[heads, queries, head_dim] and [heads, queries]."""
    group = q.shape[0] // k.shape[0]
    if group > 1 and not cudnn_takes_groups(q.device.index or 0, q.dtype, q.shape[2], group):
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    return _cudnn_forward(q, k, v, causal, scale)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q[None], k[None], v[None], None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out[0], lse.reshape(q.shape[:2]).contiguous()


def warm_plans(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, chunk: int, most: int
) -> None:
    """Has cuDNN build its plans for prompts of up to ``most`` tokens that are read in chunks of ``chunk``.

    Otherwise each is built when it is first met, which takes 50 ms and more: those of chunks that begin at multiples
    of ``chunk``, and of shorter prompts, padded. Nothing waits for the device. Needs room for keys of ``most`` tokens.
    The plans hold for q, k and v as [tokens, heads, head_dim] memory, and at position 0 also for values that are a
    slice of a joined projection of q, k and v.
    """
    rule = AttentionRule(head_dim**-0.5)
    longest = min(chunk, most)
    if choose_backend(dtype, head_dim, rule, longest, 0) != "cudnn":
        return
    q = torch.zeros(longest, heads, head_dim, dtype=dtype, device=device).transpose(0, 1)
    for side in sorted({plan_sizes(each, 0)[1] for each in range(_LONG_CHUNK + 1, longest)}):
        part = slice(0, min(side - 1, longest))
        prefill_attention(q[:, part], q[:kv_heads, part], q[:kv_heads, part], start=0, rule=rule)
    if chunk > most:
        return
    k = torch.zeros(most, kv_heads, head_dim, dtype=dtype, device=device).transpose(0, 1)
    for start in range(0, most - chunk + 1, chunk):
        prefill_attention(q, k, k, start=start, rule=rule)
    joined = torch.zeros(chunk, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device).transpose(0, 1)
    prefill_attention(q, k, joined[-kv_heads:], start=0, rule=rule)


@functools.cache
def cudnn_takes_groups(device: int, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether cuDNN attends right when it is given fewer KV heads than query heads. Tried once; synchronises."""
    q, k, v = (torch.randn(256, 2 * group, head_dim, dtype=dtype, device=f"cuda:{device}") for _ in range(3))
    q, k, v = q.transpose(0, 1), k.transpose(0, 1)[:2], v.transpose(0, 1)[:2]
    wide_k, wide_v = (x.repeat_interleave(group, 0) for x in (k, v))
    expected = _cudnn_forward(q, wide_k, wide_v, True, 0.1)
    try:
        found = _cudnn_forward(q, k, v, True, 0.1)
    except RuntimeError:
        return False
    return all(torch.allclose(x, y, rtol=1e-2, atol=1e-2) for x, y in zip(found, expected, strict=True))


def _tiled_logsumexp(q: Tensor, k: Tensor, start: int, rule: AttentionRule) -> Tensor:
    rows = max(16, _TILE_ELEMENTS // (q.shape[0] * (start + q.shape[1])))
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for low in range(0, q.shape[1], rows):
        lse[:, low : low + rows] = logsumexp(q[:, low : low + rows], k, start + low, rule)
    return lse


def _merge(out: Tensor, lse: Tensor, past_out: Tensor, past_lse: Tensor) -> None:
    """Attention over the union of two sets of keys, into the first's results [heads, queries, head_dim], in place."""
    heads, queries, head_dim = out.shape
    _merge_launch(
        (-(-queries // _MERGED), heads, 1),
        (out, lse, past_out, past_lse, *eighths(out, past_out), queries),
        (head_dim, 1 << (head_dim - 1).bit_length(), _MERGED),
        Options(warps=4),
    )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["out_head8", "out_query8", "past_head8", "past_query8", "queries"],
    do_not_specialize_on_alignment=["lse", "past_lse"],
)
def _merge_kernel(
    out: tl.tensor,
    lse: tl.tensor,
    past_out: tl.tensor,
    past_lse: tl.tensor,
    out_head8: tl.tensor,
    out_query8: tl.tensor,
    past_head8: tl.tensor,
    past_query8: tl.tensor,
    queries: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    query = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.cast(tl.program_id(1), tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = query < queries
    tile = inside[:, None] & (column < D)[None, :]
    row = head * queries + query
    own, past = tl.load(lse + row, mask=inside, other=0.0), tl.load(past_lse + row, mask=inside, other=0.0)
    top = tl.maximum(own, past)
    total = top + tl.log(tl.exp(own - top) + tl.exp(past - top))
    out_at = out + head * out_head8 * 8 + query.to(tl.int64)[:, None] * out_query8 * 8 + column
    past_at = past_out + head * past_head8 * 8 + query.to(tl.int64)[:, None] * past_query8 * 8 + column
    merged = tl.load(out_at, mask=tile, other=0.0).to(tl.float32) * tl.exp(own - total)[:, None]
    merged += tl.load(past_at, mask=tile, other=0.0).to(tl.float32) * tl.exp(past - total)[:, None]
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=tile)
    tl.store(lse + row, total, mask=inside)


_merge_launch = Launcher(_merge_kernel)
