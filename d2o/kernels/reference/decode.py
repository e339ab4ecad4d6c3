"""The torch twins of :mod:`d2o.kernels.decode`: a loop over sequences and heads, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2o.kernels.decode_plan import ROUNDS
from d2o.kernels.paged import PagedTensors


def decode_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    pool: PagedTensors,
    block_table: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    layer: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: bool,
    score: bool,
    reset: bool = True,
) -> Tensor:
    """As :func:`d2o.kernels.decode.decode_attention`; ``lengths`` [layers, batch] stands for the plan."""
    batch, heads, head_dim = q.shape
    group = heads // pool.kv_heads
    out = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=q.device)
    for sequence in range(batch):
        length = int(lengths[layer, sequence])
        slot = torch.arange(length, device=q.device)
        page = block_table[layer, rows[sequence]].long()[slot // pool.page_size]
        inner = slot % pool.page_size
        for head in range(pool.kv_heads):
            place = (page, torch.full_like(page, head), inner)
            newest = (page[-1], head, inner[-1])
            pool.k[newest], pool.v[newest] = (
                k_new[sequence, head].to(pool.k.dtype),
                v_new[sequence, head].to(pool.v.dtype),
            )
            pool.position[newest], pool.bias[newest] = positions[sequence], 0.0
            if reset:
                pool.score[newest] = 0.0
            queries = q[sequence, head * group : (head + 1) * group].float()
            logits = queries @ pool.k[place].float().T * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if bias:
                logits = logits + pool.bias[place]
            if window is not None:
                hidden = pool.position[place] <= positions[sequence] - window
                logits = logits.masked_fill(hidden, -math.inf)
            probabilities = torch.softmax(logits, -1)
            out[sequence, head * group : (head + 1) * group] = probabilities @ pool.v[place].float()
            if score:
                pool.score[place] += probabilities.sum(0)
    return out.to(q.dtype)


def plan_shares(lengths: list[int], target: int, unit: int, worth: int, at_once: int = 0) -> list[int]:
    """Slots of each item but the last, for one layer's sequences: equal parts, none larger than a target's share.

    Unless that is less than ``worth``: then as much, while it leaves one of the target's ``ROUNDS`` rounds. Where the
    last round of ``at_once`` items would be less than 45 % full, the sequences that it begins with are cut finer.
    """

    def whole_units(slots: float) -> int:
        return max(1, math.ceil(slots / unit)) * unit

    slots = sum(lengths)
    limit = whole_units(max(math.ceil(slots / target), min(worth, math.ceil(ROUNDS * slots / target))))
    shares = [whole_units(math.ceil(length / math.ceil(length / limit))) for length in lengths]
    parts = [math.ceil(length / share) * (length > unit) for length, share in zip(lengths, shares, strict=True)]
    full = sum(parts) // at_once * at_once if at_once else 0
    over = sum(parts) - full
    if full and 100 * over < 45 * at_once:
        for sequence in range(len(lengths)):
            if sum(parts[:sequence]) >= full:
                shares[sequence] = min(shares[sequence], whole_units(math.ceil(shares[sequence] * over / at_once)))
    return shares
