"""Attention that also reports how much attention each cached token received. Plain torch, any device.

Both forms compute the softmax in tiles that stay in cache and never hold the attention matrix of a whole prompt; the
sums over queries (ALGORITHM section 1) fall out of the same tiles, so exact scores cost a few per cent.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.pages import PagePool
from d2o.ragged import ragged_indices

_TILE_ELEMENTS = 1 << 22
_SEGMENT_SLOTS = 128


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """What a layer's attention does besides the plain softmax.

    Attributes:
        scale: factor on q.k.
        window: a query sees the ``window`` most recent positions, its own included; None is all.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None is off.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class ScoreTarget:
    """Where prefill adds the attention that keys received.

    Attributes:
        received: [heads, prompt] float32, summed over queries whose block has a weight.
        window: [kv_heads, prompt] float32 or None, summed over queries at or after ``window_start`` and over groups.
        window_start: position of the first query of the observation window.
        stride: every ``stride``-th block of ``block`` queries counts, ``stride`` times; 1 is every query.
        first_query: queries before this position do not count.
        prompt_tokens: length of the whole prompt; its last block of queries always counts.
    """

    received: Tensor
    window: Tensor | None
    window_start: int
    prompt_tokens: int
    stride: int = 1
    first_query: int = 0
    block: int = 64

    def cuts(self, begin: int, end: int) -> list[int]:
        """Positions in (begin, end) at which a tile of queries must end."""
        marks = (self.first_query,) if self.window is None else (self.first_query, self.window_start)
        cuts = {p for p in marks if begin < p < end}
        if self.stride > 1:
            cuts.update(range(begin - begin % self.block + self.block, end, self.block))
        return sorted(cuts)

    def weight(self, query: int) -> float:
        """How often the tile that begins at this query position counts."""
        if query < self.first_query:
            return 0.0
        if self.stride == 1 or (query // self.block) % self.stride == 0:
            return float(self.stride)
        return 1.0 if query // self.block == (self.prompt_tokens - 1) // self.block else 0.0

    def add(self, probabilities: Tensor, query: int, first_key: int) -> None:
        """Adds one tile's probabilities [kv_heads, group, queries, keys]."""
        weight = self.weight(query)
        in_window = self.window is not None and query >= self.window_start
        if not weight and not in_window:
            return
        sums = probabilities.sum(2)
        keys = slice(first_key, first_key + sums.shape[-1])
        if weight:
            self.received[:, keys].add_(sums.flatten(0, 1), alpha=weight)
        if in_window and self.window is not None:
            self.window[:, keys] += sums.sum(1, dtype=torch.float32)


def _tiles(begin: int, end: int, rows: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = sorted({begin, end, *cuts, *range(begin - begin % rows + rows, end, rows)})
    return list(itertools.pairwise(edges))


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, *, start: int, rule: AttentionRule, scores: ScoreTarget | None = None
) -> Tensor:
    """Causal attention of one prompt's chunk over everything up to its end.

    Args:
        q: [heads, chunk, head_dim], the queries at positions ``start`` to ``start + chunk``.
        k, v: [kv_heads, >= start + chunk, head_dim], in order of position.
        start: position of the first query.
        rule: scale, window and softcap.
        scores: where to add the attention that each key received, or None.

    Returns:
        [chunk, heads, head_dim].
    """
    heads, chunk, head_dim = q.shape
    kv_heads = k.shape[0]
    group, end = heads // kv_heads, start + chunk
    rows = max(16, min(128, 1 << max(4, (_TILE_ELEMENTS // (heads * end)).bit_length() - 1)))
    out = q.new_empty(chunk, heads, head_dim)
    queries = (q * rule.scale).view(kv_heads, group, chunk, head_dim)
    for low, high in _tiles(start, end, rows, scores.cuts(start, end) if scores else []):
        first = 0 if rule.window is None else max(0, low - rule.window + 1)
        tile = queries[:, :, low - start : high - start].reshape(kv_heads, -1, head_dim)
        logits = torch.bmm(tile, k[:, first:high].transpose(1, 2))
        logits = logits.view(kv_heads, group, high - low, high - first)
        if rule.softcap is not None:
            logits = torch.tanh(logits / rule.softcap) * rule.softcap
        _mask_tile(logits, low, high, first, rule.window)
        probabilities = torch.softmax(logits, -1)
        if scores is not None:
            scores.add(probabilities, low, first)
        result = torch.bmm(probabilities.view(kv_heads, -1, high - first), v[:, first:high])
        result = result.view(kv_heads, group, high - low, head_dim)
        out[low - start : high - start].view(-1, kv_heads, group, head_dim).copy_(result.permute(2, 0, 1, 3))
    return out


def _mask_tile(logits: Tensor, low: int, high: int, first: int, window: int | None) -> None:
    """Hides the future and what left the window from a tile [..., queries low:high, keys first:high], in place."""
    size = high - low
    causal = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu_(1)
    logits[..., low - first :].masked_fill_(causal, -math.inf)
    if window is not None and high - window > first:
        width = min(high - window - first, high - first)
        age = torch.arange(low, high, device=logits.device)[:, None]
        gone = torch.arange(first, first + width, device=logits.device)[None] <= age - window
        logits[..., :width].masked_fill_(gone, -math.inf)


@dataclass(frozen=True, slots=True)
class DecodeSegments:
    """One decode step's slots cut into segments of equal length, for all layers, in order of layer.

    A segment is ``segment_slots`` slots of one (layer, sequence); the last one of each is padded. Cutting by slot
    index makes a sequence's arithmetic independent of what else is in the batch.

    Attributes:
        rows: [segments, kv_heads, pages] flat page indices; mask: [segments, 1, 1, slots] 0 or -inf;
        sequence: [segments] index into the batch; offsets: layers + 1 boundaries of each layer's segments.
    """

    rows: Tensor
    mask: Tensor
    sequence: Tensor
    offsets: list[int]
    batch: int

    @classmethod
    def plan(cls, pool: PagePool, rows: Tensor, current: Tensor, windows: Tensor | None) -> DecodeSegments:
        """Cuts the slots in use of ``rows`` [batch].

        ``current`` [batch] is the position of each sequence's query; ``windows`` [layers] the sliding window by layer
        (very large where there is none), or None where no layer has one.
        """
        per = max(1, _SEGMENT_SLOTS // pool.page_size)
        used = pool.used[:, rows]
        pages = (used + pool.page_size - 1) // pool.page_size
        count = (pages + per - 1) // per
        flat = count.flatten()
        owner, nth = ragged_indices(flat)
        layer, column = owner // rows.numel(), owner % rows.numel()
        page_index = nth[:, None] * per + torch.arange(per, device=pool.device)
        last = pages[layer, column] - 1
        page = pool.block_table[layer[:, None], rows[column][:, None], torch.minimum(page_index, last[:, None])]
        slot = (page_index[..., None] * pool.page_size + torch.arange(pool.page_size, device=pool.device)).flatten(1)
        hidden = slot >= used[layer, column][:, None]
        if windows is not None:
            age = current[column][:, None] - pool.position[page, 0].flatten(1)
            hidden |= age >= windows[layer][:, None]
        mask = torch.zeros(hidden.shape, device=pool.device).masked_fill_(hidden, -math.inf)
        offsets = [0, *count.sum(1).cumsum(0).tolist()]
        return cls(pool.page_rows(page), mask[:, None, None], column, offsets, rows.numel())


def decode_attention(
    q: Tensor, pool: PagePool, segments: DecodeSegments, layer: int, *, rule: AttentionRule, bias: bool, score: bool
) -> Tensor:
    """Attention of one query a sequence over its layer's slots.

    Args:
        q: [batch, heads, head_dim].
        segments: the step's plan; the query's own key must already be in its slot.
        bias: add the slots' logit biases (ALGORITHM section 4b).
        score: add each slot's probability, summed over the group, to ``pool.score``.

    Returns:
        [batch, heads, head_dim].
    """
    batch, heads, head_dim = q.shape
    kv_heads, group = pool.kv_heads, heads // pool.kv_heads
    part = slice(segments.offsets[layer], segments.offsets[layer + 1])
    rows, sequence = segments.rows[part], segments.sequence[part]
    flat = rows.flatten()
    count = sequence.numel()
    query = (q * rule.scale).view(batch, kv_heads, group, head_dim)[sequence].view(count * kv_heads, group, head_dim)
    k = pool.k.view(-1, pool.page_size * head_dim).index_select(0, flat).view(count * kv_heads, -1, head_dim)
    logits = torch.bmm(query, k.transpose(1, 2)).view(count, kv_heads, group, -1).float()
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    if bias:
        logits += pool.bias.view(-1, pool.page_size).index_select(0, flat).view(count, kv_heads, 1, -1)
    logits += segments.mask[part]
    probabilities = _segment_softmax(logits, sequence, batch)
    if score:
        received = probabilities.sum(2).view(-1, pool.page_size)
        pool.score.view(-1, pool.page_size).index_add_(0, flat, received)
    v = pool.v.view(-1, pool.page_size * head_dim).index_select(0, flat).view(count * kv_heads, -1, head_dim)
    partial = torch.bmm(probabilities.view(count * kv_heads, group, -1).to(q.dtype), v)
    out = torch.zeros(batch, heads * head_dim, dtype=torch.float32, device=q.device)
    out.index_add_(0, sequence, partial.view(count, -1).float())
    return out.view(batch, heads, head_dim).to(q.dtype)


def _segment_softmax(logits: Tensor, sequence: Tensor, batch: int) -> Tensor:
    """Softmax of logits [segments, ...,  slots] over all slots of all segments of the same sequence, in place."""
    top = logits.amax(-1).flatten(1)
    peak = top.new_full((batch, top.shape[1]), -math.inf)
    peak.scatter_reduce_(0, sequence[:, None].expand_as(top), top, "amax")
    logits -= peak[sequence].view(*logits.shape[:-1], 1)
    logits.exp_()
    total = torch.zeros_like(peak).index_add_(0, sequence, logits.sum(-1).flatten(1))
    logits /= total[sequence].view(*logits.shape[:-1], 1)
    return logits
