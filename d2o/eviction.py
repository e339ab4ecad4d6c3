"""Which slots survive: sinks, the recent window, a quota by window score, and the rest by rank (ALGORITHM 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o import scores
from d2o.config import D2OConfig, Policy

# A slot's class and rank make one integer that no two slots of a head share, so that a selection never depends on
# how ties are broken: 2 bits of class, 31 of rank (a float's bits order like the float), 30 of slot, older first.
_REST, _QUOTA, _RECENT, _SINK = range(4)
_CLASS_SHIFT = 61
_RANK_SHIFT = 30
_SLOT_MASK = (1 << _RANK_SHIFT) - 1
_PADDING = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """Slots that survive and slots that go, as ascending slot indices padded with 0.

    Attributes:
        kept: ``[rows, kv_heads, max kept]`` int64.
        evicted: ``[rows, kv_heads, max evicted]`` int64.
        kept_count, evicted_count: ``[rows]`` int64, the same for every head of a row.
        score: ``[rows, kv_heads, slots]`` float32, raised for quota tokens to the larger of their two means.
    """

    kept: Tensor
    evicted: Tensor
    kept_count: Tensor
    evicted_count: Tensor
    score: Tensor


def recent_tokens(keep: Tensor, config: D2OConfig) -> Tensor:
    """The recent window of each row in positions, ``[rows]``: what the budget leaves beside the sinks at most."""
    if config.recent_tokens is None:
        recent = scores.share_of(keep, config.recent_share)
    else:
        recent = torch.full_like(keep, config.recent_tokens)
    if config.policy is Policy.STREAMING:
        recent = keep
    elif config.policy is Policy.SNAPKV:
        recent = recent.clamp_min(config.window_queries)
    return torch.minimum(recent, (keep - config.sinks).clamp_min(0))


def choose(
    score: Tensor,
    position: Tensor,
    used: Tensor,
    keep: Tensor,
    seen: Tensor,
    config: D2OConfig,
    window: Tensor | None = None,
) -> Choice:
    """Chooses exactly ``min(keep, used)`` survivors for every head of every row.

    Sinks outlive recent tokens (the newest first), these the quota, and that the rest; within the last two the higher
    rank survives, and of equal ranks the older slot.

    Args:
        score: ``[rows, kv_heads, slots]`` float32, summed attention.
        position: ``[rows, kv_heads, slots]`` int32, ascending in every head.
        used: ``[rows]`` int64, slots in use.
        keep: ``[rows]`` int64, the budget.
        seen: ``[rows]`` int64, tokens of the sequence so far.
        config: what survives.
        window: ``[rows, kv_heads, slots]`` float32, attention from the observation window, or None.
    """
    kept_count = torch.minimum(keep, used)
    evicted_count = used - kept_count
    valid = torch.arange(score.shape[-1], device=score.device) < used.view(-1, 1, 1)
    recent_from = (seen - recent_tokens(keep, config)).view(-1, 1, 1)
    heads = 1 if scores.shared(score[:, :, :1], config).shape[1] == 1 else score.shape[1]
    places = position[:, :heads]
    classes = torch.where(places >= recent_from, _RECENT, _REST).masked_fill(places < config.sinks, _SINK)
    pooled = None
    if window is not None and (config.window_quota or config.window_blend):
        pooled = scores.pooled_window_mean(window, position, used, seen, config)
    ranks = scores.rank(score, position, seen, pooled, config)
    if pooled is not None and config.window_quota:
        quota = _quota(pooled, classes, valid, keep, evicted_count, config)
        classes = classes.masked_fill(quota, _QUOTA)
        score = torch.where(quota, torch.maximum(score, pooled * scores.queries_seen(position, seen)), score)
    survives = _best(_keys(ranks, places, classes), valid, kept_count, evicted_count)
    goes = valid & ~survives
    return Choice(
        kept=_indices(survives, int(kept_count.max())).expand(-1, score.shape[1], -1),
        evicted=_indices(goes, int(evicted_count.max())).expand(-1, score.shape[1], -1),
        kept_count=kept_count,
        evicted_count=evicted_count,
        score=score,
    )


def _quota(
    pooled: Tensor, classes: Tensor, valid: Tensor, keep: Tensor, evicted_count: Tensor, config: D2OConfig
) -> Tensor:
    """The slots beside sinks and recent ones that the window's quota saves; none in rows that evict nothing."""
    free = (keep - config.sinks - recent_tokens(keep, config)).clamp_min(0)
    count = torch.minimum(scores.share_of(keep, config.window_quota), free)
    count = torch.where(evicted_count > 0, count, 0)
    eligible = (classes == _REST) & valid
    ranks = scores.shared(pooled, config)
    keys = torch.where(eligible, _keys(ranks, torch.zeros_like(classes), torch.zeros_like(classes)), -1)
    return _top(keys, count, largest=True) & eligible


def _keys(ranks: Tensor, places: Tensor, classes: Tensor) -> Tensor:
    """One int64 a slot; the higher, the longer it survives, and no two of a head are equal."""
    bits = torch.where(ranks > 0, ranks, 0.0).contiguous().view(torch.int32).long()
    bits = torch.where(classes == _RECENT, places.long(), bits).masked_fill(classes == _SINK, 0)
    slot = _SLOT_MASK - torch.arange(ranks.shape[-1], device=ranks.device)
    return (classes.long() << _CLASS_SHIFT) | (bits << _RANK_SHIFT) | slot


def _best(keys: Tensor, valid: Tensor, kept_count: Tensor, evicted_count: Tensor) -> Tensor:
    """Mask of the ``kept_count`` highest keys of each head; searched from the end with fewer slots."""
    if int(evicted_count.max()) <= int(kept_count.max()):
        return valid & ~_top(torch.where(valid, keys, _PADDING), evicted_count, largest=False)
    return _top(torch.where(valid, keys, -1), kept_count, largest=True)


def _top(keys: Tensor, count: Tensor, *, largest: bool) -> Tensor:
    """Mask of each row's ``count`` largest (or smallest) keys."""
    most = min(int(count.max()), keys.shape[-1])
    found = keys.topk(most, dim=-1, largest=largest, sorted=True).indices
    wanted = (torch.arange(most, device=keys.device) < count.view(-1, 1, 1)).expand_as(found)
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, found, wanted)


def _indices(mask: Tensor, width: int) -> Tensor:
    """The indices of the true entries along the last dimension, ascending, padded with 0 to ``width``."""
    rank = torch.where(mask, mask.cumsum(-1) - 1, width)
    slot = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    out = torch.zeros(*mask.shape[:-1], width + 1, dtype=torch.int64, device=mask.device)
    return out.scatter_(-1, rank, slot)[..., :width]
