"""From logits to one token per row, exactly and the same in any batch.

Probabilities are fixed-point integers: a token's weight is ``floor(2**40 * exp(logit - best))``, ``best`` being the
row's largest logit. Integer sums do not depend on the order of their terms, so neither the number of rows, the
number of threads nor the path taken can change a result; a token less than ``2**-40`` times as probable as the best
one has weight 0 and is never drawn. Where logits are equal the lower token id ranks first, in every filter.

``shifted`` below is ``(logits - best) / temperature`` in float32, [rows, vocabulary]: at most 0, and 0 somewhere in
each row. The vocabulary is a multiple of ``BLOCK``; :func:`pad_vocabulary` makes it so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
_WEIGHT_OF_BEST = float(2**40)
_NARROW_WIDTHS = (64, 512)
"""How many leading tokens are looked at before the whole row is. A small vocabulary is looked at whole at once."""
_ID_BITS = 32
_DIGIT_BITS = 16
_WEIGHTLESS_DIGIT = 0x4200
"""Leading digit of 32.0's float32 bits: a token 32 below the best has weight 0, since exp(-32) < 2**-40."""


@dataclass(frozen=True, slots=True)
class Filters:
    """One value a row, on the logits' device.

    Attributes:
        top_k: int64; the vocabulary size or more keeps all.
        top_p: float64 in (0, 1]; 1 keeps all.
        lowest: float32; tokens whose shifted logit is lower are removed (log of min_p).
    """

    top_k: Tensor
    top_p: Tensor
    lowest: Tensor

    def select(self, rows: Tensor) -> Filters:
        return Filters(self.top_k[rows], self.top_p[rows], self.lowest[rows])


def pad_vocabulary(logits: Tensor) -> Tensor:
    """Appends logits of -inf up to a multiple of ``BLOCK``; no copy where the vocabulary already is one."""
    missing = -logits.shape[-1] % BLOCK
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits.contiguous()


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token of each row, ties to the lowest id, and its logit: ([rows] int64, [rows]).

    A row that holds NaN gives NaN as its logit.
    """
    blocks = logits.view(len(logits), -1, BLOCK)
    block = blocks.amax(-1).argmax(-1)
    inside = _pick(blocks, block)
    offset = inside.argmax(-1)
    return block * BLOCK + offset, _pick(inside, offset)


def draw(shifted: Tensor, uniforms: Tensor, lowest: Tensor | None) -> Tensor:
    """Draws from whole rows by inverse CDF in order of token ids; [rows] int64.

    Args:
        uniforms: [rows] float64 in [0, 1).
        lowest: as in :class:`Filters`; None where no row of the batch uses it.
    """
    weights = _weights(shifted)
    if lowest is not None:
        weights.masked_fill_(shifted < lowest[:, None], 0)
    return _invert(weights, uniforms)


def draw_filtered(shifted: Tensor, uniforms: Tensor, filters: Filters) -> Tensor:
    """Draws from rows filtered by top_k, then top_p, then min_p, in order of token ids; [rows] int64.

    Most rows keep few tokens, which are found among the leading ones of each block; the rows whose filters reach
    further are searched whole. Both give the same token.
    """
    vocabulary = shifted.shape[-1]
    widths = [width for width in _NARROW_WIDTHS if width * BLOCK < vocabulary] or [vocabulary]
    tokens = torch.empty(len(shifted), dtype=torch.int64, device=shifted.device)
    uncounted = bool((filters.top_k >= vocabulary).any())
    totals = _weights(shifted).sum(-1) if uncounted else torch.zeros_like(tokens)
    pending = torch.arange(len(shifted), device=shifted.device)
    for width in widths:
        drawn, complete = _draw_narrow(
            _rows(shifted, pending), uniforms[pending], filters.select(pending), totals[pending], width
        )
        tokens[pending[complete]] = drawn[complete]
        pending = pending[~complete]
        if not len(pending):
            return tokens
    rest = filters.select(pending)
    by_count, by_mass = bool((rest.top_k < vocabulary).any()), bool((rest.top_p < 1).any())
    tokens[pending] = draw_whole(_rows(shifted, pending), uniforms[pending], rest, by_count=by_count, by_mass=by_mass)
    return tokens


def draw_whole(shifted: Tensor, uniforms: Tensor, filters: Filters, *, by_count: bool, by_mass: bool) -> Tensor:
    """:func:`draw_filtered` by a search of whole rows, which never waits for the device.

    ``by_count`` and ``by_mass`` say whether any row's top_k and top_p remove tokens.
    """
    weights = _weights(shifted)
    bits = _magnitude_bits(shifted)
    if by_count:
        weights.mul_(_smallest_set(bits, torch.ones_like(weights), filters.top_k))
    if by_mass:
        weights.mul_(_smallest_set(bits, weights, _goal(filters.top_p, weights.sum(-1))))
    weights.masked_fill_(shifted < filters.lowest[:, None], 0)
    return _invert(weights, uniforms)


def leading(shifted: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` most probable tokens, best first, ties by id; [rows, count] int64."""
    vocabulary = shifted.shape[-1]
    candidates = torch.arange(vocabulary, device=shifted.device).expand(len(shifted), -1)
    if count * BLOCK < vocabulary:
        # Each block that ranks below `count` others by its best token is led by `count` better tokens.
        best = shifted.view(len(shifted), -1, BLOCK).amax(-1)
        numbers = torch.arange(best.shape[-1], device=shifted.device)
        blocks = _ids(_rank_keys(best, numbers).topk(count, largest=False, sorted=False).values)
        candidates = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=shifted.device)).flatten(1)
        shifted = shifted.gather(-1, candidates)
    return _ids(_rank_keys(shifted, candidates).topk(count, largest=False, sorted=True).values)


def _draw_narrow(
    shifted: Tensor, uniforms: Tensor, filters: Filters, totals: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Draws from the ``width`` leading tokens, and tells the rows whose filters keep no token beyond them."""
    ids = leading(shifted, width)
    values = shifted.gather(-1, ids)
    rank = torch.arange(width, device=shifted.device)
    weights = _weights(values).masked_fill_(rank >= filters.top_k[:, None], 0)
    reached = weights.cumsum(-1)
    by_count = filters.top_k <= width
    goal = _goal(filters.top_p, torch.where(by_count, reached[:, -1], totals))
    complete = by_count | ((filters.top_k >= shifted.shape[-1]) & (reached[:, -1] >= goal))
    removed = (reached - weights >= goal[:, None]) | (values < filters.lowest[:, None])
    ids, order = ids.sort(-1)
    kept = weights.masked_fill_(removed, 0).gather(-1, order)
    return _pick(ids, _invert(kept, uniforms)), complete


def _smallest_set(bits: Tensor, weights: Tensor, goal: Tensor) -> Tensor:
    """Marks the first tokens, best first, whose weights reach ``goal`` (or all that are not weightless).

    Finds the magnitude of the last token that is needed digit by digit from histograms, without sorting the row.
    """
    high = (bits >> _DIGIT_BITS).clamp_(max=_WEIGHTLESS_DIGIT)
    cut_high, before = _cut(high, weights, goal, _WEIGHTLESS_DIGIT + 1)
    tied = high == cut_high[:, None]
    better = high < cut_high[:, None]
    low = bits & (2**_DIGIT_BITS - 1)
    cut_low, before_low = _cut(low, weights * tied, goal - before, 2**_DIGIT_BITS)
    better |= tied & (low < cut_low[:, None])
    tied &= low == cut_low[:, None]
    tied_weights = weights * tied
    missing = goal - before - before_low
    return better | (tied & (tied_weights.cumsum(-1) - tied_weights < missing[:, None]))


def _cut(digits: Tensor, weights: Tensor, goal: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where weights, summed by ascending digit, reach ``goal``, and their sum before that digit: [rows] both."""
    histogram = torch.zeros(len(digits), size, dtype=torch.int64, device=digits.device)
    histogram.scatter_add_(-1, digits.long(), weights)
    reached = histogram.cumsum(-1)
    cut = (reached < goal[:, None]).sum(-1).clamp_(max=size - 1)
    return cut, _pick(reached - histogram, cut)


def _goal(top_p: Tensor, totals: Tensor) -> Tensor:
    return torch.minimum((top_p * totals.double()).ceil_().long().clamp_(min=1), totals)


def _weights(shifted: Tensor) -> Tensor:
    return shifted.exp().mul_(_WEIGHT_OF_BEST).to(torch.int64)


def _magnitude_bits(shifted: Tensor) -> Tensor:
    """int32 that ascends as the (never positive) shifted logit descends; 0.0 and -0.0 are one."""
    return shifted.abs().view(torch.int32)


def _rank_keys(shifted: Tensor, ids: Tensor) -> Tensor:
    """int64 keys, all different in a row, that ascend from the most to the least probable token."""
    return (_magnitude_bits(shifted).long() << _ID_BITS) | ids


def _ids(rank_keys: Tensor) -> Tensor:
    return rank_keys.bitwise_and(2**_ID_BITS - 1)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The place in each row where the running weight first exceeds ``uniform * total``; it has a weight itself."""
    blocks = weights.view(len(weights), -1, BLOCK)
    sums = blocks.sum(-1)
    reached = sums.cumsum(-1)
    target = torch.minimum((uniforms * reached[:, -1].double()).long(), reached[:, -1] - 1)
    block = (reached <= target[:, None]).sum(-1)
    rest = target - _pick(reached - sums, block)
    offset = (_pick(blocks, block).cumsum(-1) <= rest[:, None]).sum(-1)
    return block * BLOCK + offset


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """``table[row, index[row]]`` of each row."""
    picked: Tensor = table[torch.arange(len(index), device=index.device), index]
    return picked


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    return table if len(rows) == len(table) else table[rows]
