"""How much attention a slot received: per query, in the observation window, and as a rank (ALGORITHM 1, 3, 4b).

Scores are sums of attention probabilities over queries and over the query heads of a KV head's group. Shapes are
``[rows, kv_heads, slots]``, where a row is one (sequence, layer); per-row vectors are ``[rows]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.config import D2OConfig, Ranking, Scope

_SHARE_SLACK = 1e-6


def share_of(budget: Tensor, share: float) -> Tensor:
    """``share`` of each budget in whole tokens, rounded down; 4/16 of 16 is 4 whatever the share's last digit."""
    return (budget.double() * share + _SHARE_SLACK).long()


def queries_seen(position: Tensor, seen: Tensor) -> Tensor:
    """How many causal queries saw each slot: ``n_j = seen - position_j``, float32, at least 1."""
    return (seen.view(-1, 1, 1) - position).clamp_min(1).float()


def mean_attention(score: Tensor, position: Tensor, seen: Tensor) -> Tensor:
    """The mean attention ``a_j = s_j / n_j`` (ALGORITHM 4b)."""
    return score / queries_seen(position, seen)


def extrapolate(score: Tensor, position: Tensor, seen: Tensor, config: D2OConfig) -> Tensor:
    """Prompt column sums as an estimate over all queries; to be called once, when the prompt is complete.

    Sums over the last W queries (``score_queries = last:W``) are scaled from the ``min(W, n_j)`` queries that were
    counted to the ``n_j`` that saw the slot, so that later sums and means need not know which were sampled. The
    other kinds already are such sums and are returned as they are.
    """
    if config.score_queries.kind != "last":
        return score
    queries = queries_seen(position, seen)
    return score * (queries / queries.clamp_max(config.score_queries.count))


def pooled_window_mean(window: Tensor, position: Tensor, used: Tensor, seen: Tensor, config: D2OConfig) -> Tensor:
    """Mean attention from the observation window, mean-pooled over neighbouring slots (SnapKV, arXiv 2404.14469).

    With ``config.window_ahead`` a slot's pool lies mostly before it: what follows on a token that is looked at now is
    what will be looked at next.

    Args:
        window: attention summed over the last ``config.window_queries`` prompt queries.
        position: logical positions; ascending, so that neighbouring slots are neighbouring tokens.
        used: ``[rows]``; slots at and after it are padding.
        seen: ``[rows]`` tokens of each sequence.

    Returns:
        The pooled mean; a pool at either end averages over the slots that exist. Padding is 0.
    """
    valid = torch.arange(window.shape[-1], device=window.device) < used.view(-1, 1, 1)
    queries = queries_seen(position, seen).clamp_max(config.window_queries)
    mean = torch.where(valid, window / queries, 0.0)
    if config.window_pool == 1:
        return mean
    width = config.window_pool
    ahead = width // 2 if config.window_ahead is None else config.window_ahead
    around = (width - 1 - ahead, ahead)
    total = torch.nn.functional.avg_pool1d(torch.nn.functional.pad(mean, around), width, 1)
    exists = torch.nn.functional.avg_pool1d(torch.nn.functional.pad(valid.to(mean.dtype), around), width, 1)
    return torch.where(valid, total / exists.clamp_min(1e-9), 0.0)


def rank(score: Tensor, position: Tensor, seen: Tensor, pooled: Tensor | None, config: D2OConfig) -> Tensor:
    """What slots are ranked by: the higher, the longer they survive.

    The mean or summed attention, blended by ``config.window_blend`` with ``pooled`` (:func:`pooled_window_mean`)
    where that is given.

    Returns:
        ``[rows, kv_heads, slots]``, or ``[rows, 1, slots]`` (the mean over heads) where heads share one choice.
    """
    blend = 0.0 if pooled is None else config.window_blend
    if config.ranking is Ranking.SUM and not blend:
        by = score
    else:
        by = mean_attention(score, position, seen)
        if pooled is not None and blend:
            by = torch.lerp(by, pooled, blend)
        if config.ranking is Ranking.SUM:
            by = by * queries_seen(position, seen)
    return shared(by, config)


def shared(by: Tensor, config: D2OConfig) -> Tensor:
    """``by`` itself, or its mean over heads ``[rows, 1, slots]`` where the heads of a layer share one choice."""
    return by.mean(1, keepdim=True) if config.heads is Scope.LAYER else by
