"""One eviction of a batch of layers: choose survivors, match the evicted, merge or drop them (ALGORITHM 3 to 5).

The same path serves a prompt's compression and the evictions of decode. Everything is a pure function of tensors; the
only loop is over chunks of rows, whose size bounds the memory that is used beside the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from d2o import eviction, merging, scores
from d2o.config import D2OConfig, Merge

# Elements of the keys of one chunk of rows.
_CPU_CHUNK = 1 << 24
_DEVICE_CHUNK = 1 << 29


@dataclass(frozen=True, slots=True)
class Slots:
    """The cache of ``rows`` (sequence, layer) pairs, padded to one width; padding holds garbage.

    Attributes:
        k, v: ``[rows, kv_heads, slots, head_dim]`` in the model's type; keys as cached, after RoPE.
        score: ``[rows, kv_heads, slots]`` float32, attention received so far, summed over queries and the group.
        position: ``[rows, kv_heads, slots]`` int32, the token's logical position.
        bias: ``[rows, kv_heads, slots]`` float32, added to the slot's logit.
        used: ``[rows]`` int64; a slot whose index is at least ``used[row]`` is padding.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    position: Tensor
    bias: Tensor
    used: Tensor

    def rows(self, part: slice) -> Slots:
        """The rows of ``part``, as views."""
        return Slots(*(getattr(self, field.name)[part] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Compressed:
    """What an eviction leaves.

    Attributes:
        slots: the survivors in ascending position in every head, padded to the longest row.
        threshold: ``[rows, kv_heads]`` float32, the moved similarity threshold; NaN before a first eviction.
        merged: ``[rows]`` float32, evicted tokens that were merged by this call, the mean over heads.
        dropped: ``[rows]`` float32, evicted tokens that were dropped by this call, the mean over heads.
    """

    slots: Slots
    threshold: Tensor
    merged: Tensor
    dropped: Tensor


def compress(
    slots: Slots,
    *,
    keep: Tensor,
    seen: Tensor,
    config: D2OConfig,
    threshold: Tensor,
    window: Tensor | None = None,
) -> Compressed:
    """Evicts every row down to its budget.

    Rows whose budget is at least what they use keep every slot as it is, bit for bit; if all do, ``slots`` itself is
    returned. Slots may come in any order.

    Args:
        slots: the caches.
        keep: ``[rows]`` int64, the budget of each row in slots, at least 1.
        seen: ``[rows]`` int64, tokens of each sequence so far.
        config: the method.
        threshold: ``[rows, kv_heads]`` float32, from the previous eviction; NaN where there was none.
        window: ``[rows, kv_heads, slots]`` float32, attention summed over the last ``config.window_queries`` prompt
            queries and the group, not pooled; given when a prompt is compressed. Without it there is no window
            quota and no blend. It may be narrower than ``slots`` by padding.
    """
    evicting = keep < slots.used
    if not bool(evicting.any()):
        none = torch.zeros_like(slots.used, dtype=torch.float32)
        return Compressed(slots, threshold, none, none)
    if window is not None:
        window = torch.nn.functional.pad(window, (0, slots.score.shape[-1] - window.shape[-1]))
    slots, window = _in_position_order(slots, window)
    parts = []
    for part in _chunks(slots.k):
        near = None if window is None else window[part]
        chunk = slots.rows(part)
        choice = eviction.choose(chunk.score, chunk.position, chunk.used, keep[part], seen[part], config, near)
        parts.append(_evict(chunk, choice, seen[part], config, threshold[part]))
    return parts[0] if len(parts) == 1 else _joined(parts)


def _evict(slots: Slots, choice: eviction.Choice, seen: Tensor, config: D2OConfig, threshold: Tensor) -> Compressed:
    """Gathers the survivors of one chunk and merges into them what passes the threshold."""
    left = Slots(
        k=merging.take(slots.k, choice.kept),
        v=merging.take(slots.v, choice.kept),
        score=choice.score.gather(-1, choice.kept),
        position=slots.position.gather(-1, choice.kept),
        bias=slots.bias.gather(-1, choice.kept),
        used=choice.kept_count,
    )
    if config.merge is Merge.NONE or choice.evicted.shape[-1] == 0:
        return Compressed(left, threshold, torch.zeros_like(seen, dtype=torch.float32), choice.evicted_count.float())
    evicted_k = merging.take(slots.k, choice.evicted)
    real = _counted(choice.evicted, choice.evicted_count)[:, :1]
    targets = _counted(choice.kept, choice.kept_count)
    if not config.merge_into_sinks:
        targets = targets & (left.position >= config.sinks)
    matches = merging.match(evicted_k, left.k, real, targets)
    threshold = merging.moved_threshold(matches, threshold, config)
    passes = merging.passing(matches, threshold, config)
    _merge(left, slots, choice, evicted_k, matches, passes, seen, config)
    merged = passes.sum(-1).float().mean(-1)
    return Compressed(left, threshold, merged, choice.evicted_count - merged)


def _merge(
    left: Slots,
    slots: Slots,
    choice: eviction.Choice,
    evicted_k: Tensor,
    matches: merging.Matches,
    passes: Tensor,
    seen: Tensor,
    config: D2OConfig,
) -> None:
    """Writes the merges that pass into ``left``."""
    pairs = merging.pair(matches, passes, choice.kept.shape[-1])
    mass = scores.mean_attention(left.score, left.position, seen).flatten()[pairs.target]
    gone_score = choice.score.gather(-1, choice.evicted)
    gone_mass = scores.mean_attention(gone_score, slots.position.gather(-1, choice.evicted), seen)
    similarity = matches.similarity.flatten()[pairs.source]
    share = merging.weights(pairs, similarity, mass, gone_mass.flatten()[pairs.source], config)
    conserves = config.merge is Merge.CONSERVE
    if not conserves or config.merge_keys:
        _blend_into(left.k, pairs, share, evicted_k.view(-1, evicted_k.shape[-1])[pairs.source])
    _blend_into(left.v, pairs, share, _values(slots.v, choice.evicted, pairs.source))
    if conserves:
        left.score.view(-1).index_add_(0, pairs.target[pairs.group], gone_score.flatten()[pairs.source])
        if config.merge_bias:
            bias = left.bias.view(-1)
            bias[pairs.target] = merging.raised_bias(bias[pairs.target], share, config)


def _blend_into(kept: Tensor, pairs: merging.Pairs, share: merging.Weights, pulled: Tensor) -> None:
    flat = kept.view(-1, kept.shape[-1])
    flat[pairs.target] = merging.blended(pairs, share, flat[pairs.target], pulled)


def _values(v: Tensor, evicted: Tensor, source: Tensor) -> Tensor:
    """The values ``[n, head_dim]`` of the evicted tokens ``source`` only."""
    head = source.div(evicted.shape[-1], rounding_mode="floor")
    return v.reshape(-1, v.shape[-1]).index_select(0, evicted.flatten()[source] + head * v.shape[2])


def _counted(index: Tensor, count: Tensor) -> Tensor:
    """Which entries of a padded index are real, in the shape of ``index``."""
    return (torch.arange(index.shape[-1], device=index.device) < count.view(-1, 1, 1)).expand_as(index)


def _chunks(keys: Tensor) -> Iterator[slice]:
    elements = _CPU_CHUNK if keys.device.type == "cpu" else _DEVICE_CHUNK
    rows = max(1, elements // max(1, keys[0].numel()))
    return (slice(start, start + rows) for start in range(0, keys.shape[0], rows))


def _joined(parts: list[Compressed]) -> Compressed:
    """Chunks of rows as one result; shorter chunks are padded with 0."""
    width = max(part.slots.score.shape[-1] for part in parts)

    def column(each: list[Tensor]) -> Tensor:
        out = each[0].new_zeros(sum(len(rows) for rows in each), each[0].shape[1], width, *each[0].shape[3:])
        at = 0
        for rows in each:
            out[at : at + len(rows), :, : rows.shape[2]] = rows
            at += len(rows)
        return out

    slots = Slots(
        k=column([part.slots.k for part in parts]),
        v=column([part.slots.v for part in parts]),
        score=column([part.slots.score for part in parts]),
        position=column([part.slots.position for part in parts]),
        bias=column([part.slots.bias for part in parts]),
        used=torch.cat([part.slots.used for part in parts]),
    )
    return Compressed(
        slots,
        torch.cat([part.threshold for part in parts]),
        torch.cat([part.merged for part in parts]),
        torch.cat([part.dropped for part in parts]),
    )


def _in_position_order(slots: Slots, window: Tensor | None) -> tuple[Slots, Tensor | None]:
    """The same slots in ascending position, padding last; usually they already are."""
    index = torch.arange(slots.position.shape[-1], device=slots.used.device)
    places = slots.position.masked_fill(index >= slots.used.view(-1, 1, 1), torch.iinfo(torch.int32).max)
    if bool((places.diff(dim=-1) >= 0).all()):
        return slots, window
    order = places.argsort(dim=-1, stable=True)
    ordered = Slots(
        k=merging.take(slots.k, order),
        v=merging.take(slots.v, order),
        score=slots.score.gather(-1, order),
        position=slots.position.gather(-1, order),
        bias=slots.bias.gather(-1, order),
        used=slots.used,
    )
    return ordered, None if window is None else window.gather(-1, order)
