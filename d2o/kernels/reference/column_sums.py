"""Column sums from the whole attention matrix, written as ALGORITHM section 1 defines them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2o.attention import AttentionRule, ScoreTarget


def attention_logits(q: Tensor, k: Tensor, start: int, rule: AttentionRule) -> Tensor:
    """Masked logits [heads, chunk, start + chunk] in float32 of queries [heads, chunk, head_dim] at ``start``."""
    heads, chunk, _ = q.shape
    end = start + chunk
    keys = k[:, :end].repeat_interleave(heads // k.shape[0], 0)
    logits = q.float() @ keys.float().transpose(1, 2) * rule.scale
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    query = torch.arange(start, end, device=q.device)[:, None]
    key = torch.arange(end, device=q.device)
    hidden = key > query
    if rule.window is not None:
        hidden |= key <= query - rule.window
    return logits.masked_fill_(hidden, -math.inf)


def logsumexp(q: Tensor, k: Tensor, start: int, rule: AttentionRule) -> Tensor:
    """[heads, chunk] float32: logarithm of the sum of exponentials of each query's logits."""
    return torch.logsumexp(attention_logits(q, k, start, rule), -1)


def add_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    target: ScoreTarget,
    *,
    start: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> None:
    """As :func:`d2o.kernels.column_sums.add_column_sums`."""
    end = start + q.shape[1]
    logits = attention_logits(q, k, start, AttentionRule(scale, window, softcap))
    probabilities = torch.exp(logits - lse[..., None])
    weights = torch.tensor([target.weight(i) for i in range(start, end)], device=q.device)
    target.received[:, :end] += torch.einsum("hqk,q->hk", probabilities, weights)
    if target.window is not None:
        observed = torch.arange(start, end, device=q.device) >= target.window_start
        sums = probabilities[:, observed].sum(1)
        target.window[:, :end] += sums.view(k.shape[0], -1, end).sum(1)
