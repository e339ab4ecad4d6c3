"""What becomes of evicted tokens: matched to their nearest survivor, then merged into it or dropped (ALGORITHM 4, 4b).

Everything that is summed is summed in float32 and rounded once. ``kept`` indices below count survivors, not slots of
the cache before eviction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.config import D2OConfig, Merge, Scope, Threshold

ROUNDING = 1e-6
"""Equal similarities that differ by rounding only must not fall on both sides of their own mean."""

_SMALLEST_NORM = 1e-12
_LANES = 32
# Elements of keys and of similarities that are worked on at once; on a CPU they should stay in its cache.
_CPU_TILE = (1 << 19, 1 << 21)
_DEVICE_TILE = (1 << 27, 1 << 27)
_SMALLEST_MASS = 1e-12


@dataclass(frozen=True, slots=True)
class Matches:
    """The nearest survivor of every evicted token.

    Attributes:
        nearest: ``[rows, kv_heads, evicted]`` int64, an index among the survivors.
        similarity: ``[rows, kv_heads, evicted]`` float32 cosine.
        found: ``[rows, kv_heads, evicted]`` bool; false for padding and where no survivor may be merged into.
    """

    nearest: Tensor
    similarity: Tensor
    found: Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """Evicted tokens that are merged, flattened: ``n`` pairs with ``m <= n`` distinct survivors.

    Attributes:
        source: ``[n]`` index into the flattened ``[rows, kv_heads, evicted]``.
        target: ``[m]`` index into the flattened ``[rows, kv_heads, kept]``, ascending.
        group: ``[n]`` which of the ``m`` survivors a pair belongs to.
    """

    source: Tensor
    target: Tensor
    group: Tensor

    def total(self, values: Tensor) -> Tensor:
        """Sums ``[n, ...]`` over the pairs of each survivor: ``[m, ...]``."""
        zeros = torch.zeros(self.target.shape[0], *values.shape[1:], dtype=values.dtype, device=values.device)
        return zeros.index_add_(0, self.group, values)


def match(evicted: Tensor, kept: Tensor, real: Tensor, targets: Tensor) -> Matches:
    """The survivor with the highest cosine to each evicted key (eq. 8 and 9).

    Args:
        evicted: ``[rows, kv_heads, evicted, head_dim]`` keys as cached.
        kept: ``[rows, kv_heads, kept, head_dim]`` keys as cached.
        real: ``[rows, 1 or kv_heads, evicted]`` bool, false for padding.
        targets: ``[rows, kv_heads, kept]`` bool, survivors that may be merged into.

    The search runs in the keys' type; below float32 the cosine of the pair that it finds is then taken in float32.
    """
    first = _leading_gap(targets)
    allowed = targets[:, :, first:].flatten(0, 1).unsqueeze(1)
    forbidden = None if bool(allowed.all()) else ~allowed
    wanted, pool = _unit(evicted).flatten(0, 1), kept[:, :, first:].flatten(0, 1)
    nearest = torch.empty(wanted.shape[:2], dtype=torch.int64, device=evicted.device)
    similarity = torch.empty(wanted.shape[:2], device=evicted.device)
    heads_at_once, tokens_at_once = _tile(wanted, pool)
    lanes = -(-pool.shape[1] // _LANES) * _LANES
    scratch = torch.full((heads_at_once, tokens_at_once, lanes), -torch.inf, device=pool.device)
    for heads in _steps(wanted.shape[0], heads_at_once):
        barred = None if forbidden is None else forbidden[heads]
        units = _unit(pool[heads]).transpose(1, 2)
        for part in _steps(wanted.shape[1], tokens_at_once):
            similarity[heads, part], nearest[heads, part] = _nearest(wanted[heads, part], units, barred, scratch)
    nearest = nearest.view(evicted.shape[:3]) + first
    if evicted.dtype is torch.float32:
        similarity = similarity.view_as(nearest)
    else:
        similarity = _cosine(evicted, take(kept, nearest))
    found = real & targets.any(-1, keepdim=True)
    return Matches(nearest, similarity, found.expand_as(similarity))


def take(slots: Tensor, index: Tensor) -> Tensor:
    """``slots[row, head, index[row, head, i]]``: ``[rows, heads, n, dim]`` from ``[rows, heads, slots, dim]``."""
    rows, heads, width, dim = slots.shape
    base = torch.arange(rows * heads, device=index.device).view(rows, heads, 1) * width
    return slots.reshape(-1, dim).index_select(0, (index + base).flatten()).view(rows, heads, -1, dim)


def moved_threshold(matches: Matches, threshold: Tensor, config: D2OConfig) -> Tensor:
    """The similarity that this eviction must reach, ``[rows, kv_heads]`` (eq. 10).

    The first eviction's is its mean similarity; later ``beta * max + (1 - beta) * old`` (authors' code: ``alpha * old +
    beta * mean``). Heads with nothing to match keep theirs; with ``threshold = off`` all do.
    """
    if config.threshold is Threshold.OFF or matches.similarity.shape[-1] == 0:
        return threshold
    layer = config.threshold_scope is Scope.LAYER
    ranked, counted = _rank_means(matches, layer)
    mean = (ranked * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    newest = mean
    if config.threshold is Threshold.PAPER:
        newest = matches.similarity.masked_fill(~matches.found, -torch.inf).amax(-1)
        newest = newest.amax(1, keepdim=True) if layer else newest
    moved = torch.where(threshold.isnan(), mean, old_weight(config) * threshold + config.beta * newest)
    return torch.where(counted.any(-1), moved, threshold)


def old_weight(config: D2OConfig) -> float:
    """What is left of the old threshold in the moved one."""
    return 1 - config.beta if config.alpha is None else config.alpha


def passing(matches: Matches, threshold: Tensor, config: D2OConfig) -> Tensor:
    """Which evicted tokens are merged, ``[rows, kv_heads, evicted]`` bool; the others are dropped.

    With the authors' threshold one a layer, the n-th evicted tokens of all heads pass or fail together, by their mean.
    """
    if config.threshold is Threshold.OFF:
        return matches.found
    similarity = matches.similarity
    if config.threshold is Threshold.AUTHORS and config.threshold_scope is Scope.LAYER:
        similarity, _ = _rank_means(matches, layer=True)
    return matches.found & (similarity >= threshold.unsqueeze(-1) - ROUNDING)


def pair(matches: Matches, passes: Tensor, kept: int) -> Pairs:
    """The merges that ``passes`` allows, among ``kept`` survivors a head."""
    source = passes.flatten().nonzero().squeeze(-1)
    target = matches.nearest.flatten()[source] + source.div(passes.shape[-1], rounding_mode="floor") * kept
    distinct, group = torch.unique(target, return_inverse=True)
    return Pairs(source, distinct, group)


@dataclass(frozen=True, slots=True)
class Weights:
    """How much of a merged slot each part makes up: the survivor ``own [m]``, the evicted ``pulled [n]``, float32."""

    own: Tensor
    pulled: Tensor


def weights(pairs: Pairs, similarity: Tensor, own_mass: Tensor, pulled_mass: Tensor, config: D2OConfig) -> Weights:
    """The weights of ``config.merge``.

    ``paper``: eq. 11 and 12. ``authors``: the mean of the survivor and cosine times the evicted. ``conserve``: the
    attention that each received.

    Args:
        pairs: who merges into whom.
        similarity: ``[n]`` float32.
        own_mass: ``[m]`` float32, the survivors' mean attention.
        pulled_mass: ``[n]`` float32, the evicted tokens' mean attention.
        config: the rule.
    """
    if config.merge is Merge.PAPER:
        pulled = similarity.exp()
        own = torch.full_like(own_mass, config.merge_weight)
        whole = own + pairs.total(pulled)
    elif config.merge is Merge.AUTHORS:
        pulled = similarity
        own = torch.ones_like(own_mass)
        whole = own + pairs.total(torch.ones_like(pulled))
    else:
        pulled = pulled_mass
        own = own_mass.clamp_min(_SMALLEST_MASS)
        whole = own + pairs.total(pulled)
    return Weights(own / whole, pulled / whole[pairs.group])


def blended(pairs: Pairs, share: Weights, own: Tensor, pulled: Tensor) -> Tensor:
    """Merged vectors ``[m, head_dim]`` in the type of ``own [m, head_dim]``; ``pulled [n, head_dim]``."""
    total = pairs.total(pulled.float() * share.pulled.unsqueeze(-1))
    return total.add_(own.float() * share.own.unsqueeze(-1)).to(own.dtype)


def raised_bias(bias: Tensor, share: Weights, config: D2OConfig) -> Tensor:
    """The survivors' new logit bias ``[m]``: ``b + log(whole mass / own mass)``, clamped (ALGORITHM 4b)."""
    return (bias - share.own.log()).clamp(0, config.bias_limit)


def _tile(wanted: Tensor, pool: Tensor) -> tuple[int, int]:
    """How many heads, and of them evicted tokens, are matched at once, so that keys and similarities stay in bounds."""
    keys, similarities = _CPU_TILE if pool.device.type == "cpu" else _DEVICE_TILE
    heads = max(1, min(wanted.shape[0], keys // max(1, pool[0].numel())))
    return heads, max(1, min(wanted.shape[1], similarities // (heads * max(1, pool.shape[1]))))


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))


def _leading_gap(targets: Tensor) -> int:
    """How many survivors at the start (the sinks) no head may merge into."""
    anyone = targets.any(0).any(0)
    return int((anyone.cumsum(0) == 0).sum()) % max(1, targets.shape[-1])


def _unit(keys: Tensor) -> Tensor:
    """Keys of length 1, in the type in which they are multiplied: CPUs are slow in float16."""
    wide = keys.float()
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    unit = wide / norm.clamp_min(_SMALLEST_NORM)
    return unit if keys.dtype is torch.float16 and keys.device.type == "cpu" else unit.to(keys.dtype)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    wide_a, wide_b = a.float(), b.float()
    norms: Tensor = torch.linalg.vector_norm(wide_a, dim=-1) * torch.linalg.vector_norm(wide_b, dim=-1)
    return (wide_a * wide_b).sum(-1) / norms.clamp_min(_SMALLEST_NORM)


def _nearest(wanted: Tensor, pool: Tensor, forbidden: Tensor | None, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Value and index of the largest similarity along the last dimension of ``wanted @ pool``.

    Maxima over lanes ``j % 32`` first, then over one lane: several times faster than a maximum with indices.
    ``scratch [>= heads, >= evicted, whole lanes]`` is float32 and -inf beyond the width of ``pool``.
    """
    width = pool.shape[-1]
    similarity = scratch[: wanted.shape[0], : wanted.shape[1]]
    similarity[..., :width] = wanted @ pool
    if forbidden is not None:
        similarity[..., :width].masked_fill_(forbidden, -torch.inf)
    lanes = similarity.unflatten(-1, (-1, _LANES))
    lane = lanes.amax(2).argmax(-1, keepdim=True)
    value, place = lanes.gather(3, lane.unsqueeze(2).expand(-1, -1, lanes.shape[2], -1)).squeeze(3).max(-1)
    return value, place * _LANES + lane.squeeze(-1)


def _rank_means(matches: Matches, layer: bool) -> tuple[Tensor, Tensor]:
    """Similarities and which of them count, ``[rows, heads, evicted]``; over a layer, means over its heads."""
    similarity = matches.similarity.masked_fill(~matches.found, 0.0)
    if not layer:
        return similarity, matches.found
    count = matches.found.sum(1, keepdim=True)
    return similarity.sum(1, keepdim=True) / count.clamp_min(1), count > 0
