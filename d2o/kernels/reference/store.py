"""What storing and gathering tokens mean, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.kernels.paged import PagedTensors


def store_tokens(
    k: Tensor,
    v: Tensor,
    pool: PagedTensors,
    block_table: Tensor,
    rows: Tensor,
    slots: Tensor,
    positions: Tensor,
    layer: int,
    *,
    clear_tail: bool = True,
) -> None:
    """As :func:`d2o.kernels.store.store_tokens`; synchronises."""
    listed = list(zip(rows.tolist(), slots.tolist(), positions.tolist(), strict=True))
    for token, (row, slot, position) in enumerate(listed):
        if slot < 0:
            continue
        page, offset = int(block_table[layer, row, slot // pool.page_size]), slot % pool.page_size
        pool.k[page, :, offset] = k[:, token]
        pool.v[page, :, offset] = v[:, token]
        pool.position[page, :, offset] = position
        pool.score[page, :, offset] = 0
        pool.bias[page, :, offset] = 0
        follows = token + 1 < len(listed) and listed[token + 1][0] == row and listed[token + 1][1] >= 0
        if clear_tail and not follows:
            for store in (pool.k, pool.v, pool.bias):
                store[page, :, offset + 1 :] = 0


def gather_context(pool: PagedTensors, block_table: Tensor, layer: int, row: int, tokens: int) -> tuple[Tensor, Tensor]:
    """As :func:`d2o.kernels.store.gather_context`."""
    pages = block_table[layer, row, : -(-tokens // pool.page_size)].long()
    k, v = (
        x[pages].permute(1, 0, 2, 3).flatten(1, 2)[:, :tokens] if tokens else x.new_empty(pool.kv_heads, 0, x.shape[-1])
        for x in (pool.k, pool.v)
    )
    return k, v


def empty_pool(
    pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> PagedTensors:
    """A pool in which everything is stale: NaN, and positions that nobody has."""
    shape = (pages, kv_heads, page_size)
    return PagedTensors(
        k=torch.full((*shape, head_dim), torch.nan, dtype=dtype, device=device),
        v=torch.full((*shape, head_dim), torch.nan, dtype=dtype, device=device),
        score=torch.full(shape, torch.nan, device=device),
        position=torch.full(shape, -7, dtype=torch.int32, device=device),
        bias=torch.full(shape, torch.nan, device=device),
    )
