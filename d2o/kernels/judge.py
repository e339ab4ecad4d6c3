"""Which evicted tokens are similar enough to be merged, and the threshold that this moves (eq. 10).

Up to ``FEW`` evicted tokens a head, as in decode, one program judges all heads of a pair. More, as of a prompt, are
judged by torch (:mod:`d2o.merging`), the kernel's twin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2o import merging
from d2o.config import D2OConfig, Scope, Threshold
from d2o.kernels.history import History
from d2o.kernels.pairs import FEW, Pairs
from d2o.kernels.select import Selection

_OFF, _PAPER, _AUTHORS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_RULES = {Threshold.OFF: 0, Threshold.PAPER: 1, Threshold.AUTHORS: 2}
_ROUNDING = tl.constexpr(merging.ROUNDING)


def judge(
    pairs: Pairs, selection: Selection, slot: Tensor, similarity: Tensor, history: History, config: D2OConfig
) -> Tensor:
    """Which evicted tokens are merged: bool [pairs, kv_heads, most_evicted], false for padding.

    Moves the pairs' thresholds and counts what is merged and dropped, in ``history``.

    Args:
        pairs: what is evicted from.
        selection: survivors; a head without a fallback merges nothing.
        slot, similarity: from :func:`d2o.kernels.nearest.nearest`.
        history: of all rows; written where the pairs are.
        config: the rule.
    """
    if pairs.most_evicted > FEW:
        return judge_by_torch(pairs, selection, slot, similarity, history, config)
    heads = slot.shape[1]
    passes = torch.empty(slot.shape, dtype=torch.bool, device=slot.device)
    judge_kernel[(pairs.count,)](
        passes.view(torch.uint8),
        similarity,
        selection.fallback,
        history.threshold,
        history.fates,
        pairs.places,
        pairs.used,
        pairs.keep,
        pairs.most_evicted,
        history.fates[0].numel(),
        merging.old_weight(config),
        config.beta,
        HEADS=heads,
        HEADS_PAD=triton.next_power_of_2(heads),
        EVICTED=pairs.lanes,
        RULE=_RULES[config.threshold],
        LAYER=config.threshold_scope is Scope.LAYER,
        num_warps=4,
    )
    return passes


def listed(pairs: Pairs) -> Tensor:
    """Which entries of the lists of evicted slots are real: [pairs, 1, most_evicted]."""
    nth = torch.arange(pairs.most_evicted, device=pairs.used.device)
    return nth < (pairs.used - pairs.keep).view(-1, 1, 1)


def judge_by_torch(
    pairs: Pairs, selection: Selection, slot: Tensor, similarity: Tensor, history: History, config: D2OConfig
) -> Tensor:
    """As :func:`judge`, of any number of evicted tokens."""
    matches = merging.Matches(slot, similarity, listed(pairs) & (selection.fallback >= 0).unsqueeze(-1))
    threshold = merging.moved_threshold(matches, history.thresholds_of(pairs.places), config)
    passes = merging.passing(matches, threshold, config)
    merged = passes.sum(-1).float().mean(-1)
    history.note(pairs.places, threshold, merged, (pairs.used - pairs.keep) - merged)
    return passes


@triton.jit(do_not_specialize=["width", "entries"])  # type: ignore[untyped-decorator]
def judge_kernel(
    passes: tl.tensor,
    similarity: tl.tensor,
    fallback: tl.tensor,
    threshold: tl.tensor,
    fates: tl.tensor,
    places: tl.tensor,
    used: tl.tensor,
    keep: tl.tensor,
    width: tl.tensor,
    entries: tl.tensor,
    old_weight: tl.tensor,
    beta: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    EVICTED: tl.constexpr,
    RULE: tl.constexpr,
    LAYER: tl.constexpr,
) -> None:
    """Program (pair). ``entries``: of ``fates`` for merged, before those for dropped."""
    pair = tl.program_id(0)
    place = tl.load(places + pair).to(tl.int64)
    head, nth = tl.arange(0, HEADS_PAD), tl.arange(0, EVICTED)
    real = head < HEADS
    gone = tl.load(used + pair) - tl.load(keep + pair)
    owner = pair.to(tl.int64) * HEADS + head
    served = tl.load(fallback + owner, mask=real, other=-1) >= 0
    found = served[:, None] & (nth < gone)[None, :]
    cell = owner[:, None] * width + nth[None, :]
    alike = tl.load(similarity + cell, mask=found, other=0.0)
    chosen = found
    if RULE != _OFF:
        spot = threshold + place * HEADS + head
        old = tl.load(spot, mask=real, other=0.0)
        best = tl.max(tl.where(found, alike, float("-inf")), 1)
        if LAYER:
            heads_of = tl.sum(found.to(tl.int32), 0)
            rank_mean = tl.sum(alike, 0) / tl.maximum(heads_of, 1).to(tl.float32)
            count = tl.sum((heads_of > 0).to(tl.int32), 0) + tl.zeros_like(head)
            total = tl.sum(rank_mean, 0) + tl.zeros_like(old)
            best = tl.max(best, 0) + tl.zeros_like(old)
            if RULE == _AUTHORS:
                alike = rank_mean[None, :] + tl.zeros_like(alike)
        else:
            count = tl.sum(found.to(tl.int32), 1)
            total = tl.sum(alike, 1)
        mean = total / tl.maximum(count, 1).to(tl.float32)
        newest = best if RULE == _PAPER else mean
        moved = tl.where(old != old, mean, old_weight * old + beta * newest)
        now = tl.where(count > 0, moved, old)
        tl.store(spot, now, mask=real)
        chosen = found & (alike >= now[:, None] - _ROUNDING)
    tl.store(passes + cell, chosen.to(tl.uint8), mask=real[:, None] & (nth < width)[None, :])
    merged = tl.sum(tl.sum(chosen.to(tl.int32), 1), 0).to(tl.float32) / HEADS
    tl.store(fates + place, tl.load(fates + place) + merged)
    tl.store(fates + entries + place, tl.load(fates + entries + place) + (gone.to(tl.float32) - merged))
