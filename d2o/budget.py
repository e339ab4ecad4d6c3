"""How many slots each layer may keep: densities, the authors' ratios, and exact budgets (paper eq. 3 to 5).

A density is made of one number a head (:func:`by_head`), so that heads may lie on several devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from d2o.config import ConfigError, D2OConfig, LayerBudgets

_RANGE_SLACK = 1e-6
_SMALLEST = 1e-30
_COVERED = 0.9
# How near a first guess at a level surely comes.
_NEAR = 2.0**-40
_MOST_RATIO = 1.0
_LEAST_POWER = 1e-12
# Log variances of layers that deviate by less than this are not stretched to it (docs/adr/0018).
_LEAST_DEVIATION = 1.0


def density(colsums: Tensor, config: D2OConfig) -> Tensor:
    """How uneven, or how wide, a layer's attention is, from its column sums.

    ``paper``: eq. 3 as the authors' code has it: the variance over tokens of each head, min-max normalised over the
    layer's heads, averaged; in [0, 1]. ``variance``: the logarithm of the heads' mean variance. ``coverage``: the
    logarithm of how many tokens hold nine tenths of what a head's tokens receive, on average over heads.
    ``uniform``: 0.

    Args:
        colsums: ``[..., heads, tokens]`` float32, attention received by each token.
        config: names the rule.

    Returns:
        ``[...]`` float32; a single token has no variance.
    """
    return density_of(by_head(colsums, config), config)


def by_head(colsums: Tensor, config: D2OConfig) -> Tensor:
    """What :func:`density_of` needs of each head: ``[..., heads]`` of column sums ``[..., heads, tokens]``."""
    if config.layer_budgets is LayerBudgets.UNIFORM:
        return colsums.new_zeros(colsums.shape[:-1]).float()
    if config.layer_budgets is LayerBudgets.COVERAGE:
        return _covering(colsums.float())
    return colsums.float().var(-1, correction=min(1, colsums.shape[-1] - 1))


def density_of(values: Tensor, config: D2OConfig) -> Tensor:
    """:func:`density` from :func:`by_head` of all heads of a layer, ``[..., heads]``."""
    if config.layer_budgets is LayerBudgets.UNIFORM:
        return values.new_zeros(values.shape[:-1])
    if config.layer_budgets is LayerBudgets.PAPER:
        low, high = values.aminmax(dim=-1, keepdim=True)
        return ((values - low) / (high - low + _RANGE_SLACK)).mean(-1)
    return values.mean(-1).clamp_min(_SMALLEST).log()


def _covering(colsums: Tensor) -> Tensor:
    """The least number of tokens that hold ``_COVERED`` of each head's sum: ``[..., heads]`` float32, at least 1."""
    if colsums.dim() > 2:
        # A layer at a time: sorting takes three times the memory of what it sorts.
        return torch.stack([_covering(layer) for layer in colsums])
    reached = colsums.sort(-1, descending=True).values.cumsum(-1)
    return 1.0 + (reached < _COVERED * reached[..., -1:]).sum(-1)


def weights(densities: Sequence[float], config: D2OConfig) -> list[float]:
    """Each layer's share of the budget; they sum to 1 and do not depend on the order of layers.

    ``paper``: softmax of minus the density (eq. 4). ``coverage``: softmax of the density, so in proportion to the
    tokens that hold most of a layer's attention. ``variance``: softmax of ``layer_gain`` times the standardised
    density, so that spiky layers get more (ALGORITHM 4b); the standard deviation counts as 1 at least, so that layers
    which are nearly alike get nearly alike. Densities that are no numbers count as the mean of the others, infinite
    ones as the nearest finite one.
    """
    finite = _finite(densities)
    if config.layer_budgets is LayerBudgets.UNIFORM:
        logits = [0.0] * len(finite)
    elif config.layer_budgets is LayerBudgets.PAPER:
        logits = [-value for value in finite]
    elif config.layer_budgets is LayerBudgets.COVERAGE:
        logits = finite
    else:
        mean = math.fsum(finite) / len(finite)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / len(finite))
        logits = [config.layer_gain * (value - mean) / max(deviation, _LEAST_DEVIATION) for value in finite]
    highest = max(logits)
    powers = [max(math.exp(logit - highest), _LEAST_POWER) for logit in logits]
    total = math.fsum(powers)
    return [power / total for power in powers]


def ratios(densities: Tensor, config: D2OConfig) -> list[float]:
    """The authors' ratios of the prompt by layer: ``weight * layers * config.ratio`` clamped to [floor, 1] (eq. 5).

    The clamp lets their total drift; :func:`allocate` does not.
    """
    shares = weights(densities.tolist(), config)
    return [min(max(share * len(shares) * config.ratio, config.layer_floor), _MOST_RATIO) for share in shares]


def allocate(
    densities: Tensor, *, average: int, floor: int, cap: int, config: D2OConfig, multiple: int = 1
) -> list[int]:
    """Integer budgets that never sum to more than ``layers * average``.

    Each layer gets its share, clamped to [floor, cap]; what clamping frees or costs is spread over the other layers
    in proportion, until it fits. Remainders go to the largest fractions, ties to the lower layer. ``dense_layers``
    get ``cap`` and the others pay for it; where that would push the others under their floor, dense layers get only
    what is left. A ``floor`` above ``average`` cannot be kept and becomes ``average``.

    Args:
        densities: ``[layers]`` from :func:`density`.
        average: slots a layer, on average.
        floor: the least a layer gets.
        cap: the most a layer can use: the prompt and what may still be generated.
        config: names the rule and the dense layers.
        multiple: budgets are multiples of this (a page), or ``cap``, where that leaves every layer its floor.

    Raises:
        ConfigError: a dense layer that the model does not have.
        ValueError: a count below 1.
    """
    layers = densities.shape[0]
    for name, given in (("average", average), ("cap", cap), ("multiple", multiple), ("layers", layers)):
        if given < 1:
            raise ValueError(f"{name}: got {given}, allowed is at least 1")
    if config.dense_layers and config.dense_layers[-1] >= layers:
        raise ConfigError("dense_layers", config.dense_layers[-1], f"a layer below {layers}")
    if average >= cap:
        return [cap] * layers
    floor = max(1, min(floor, average))
    if math.ceil(floor / multiple) * layers > average * layers // multiple:
        multiple = 1
    shares = weights(densities.tolist(), config)
    lowest, highest, total = math.ceil(floor / multiple), math.ceil(cap / multiple), average * layers // multiple
    dense = set(config.dense_layers)
    sparse = [layer for layer in range(layers) if layer not in dense]
    for_dense = min(len(dense) * highest, total - len(sparse) * lowest)
    units = dict(zip(sorted(dense), _fill([1.0] * len(dense), for_dense, lowest, highest), strict=True))
    rest = _fill([shares[layer] for layer in sparse], total - for_dense, lowest, highest)
    units |= zip(sparse, rest, strict=True)
    return [min(units[layer] * multiple, cap) for layer in range(layers)]


def _fill(shares: list[float], total: int, lowest: int, highest: int) -> list[int]:
    """Whole numbers in [lowest, highest] in proportion to ``shares`` that sum to ``total``, or to what fits."""
    if not shares:
        return []
    total = min(total, len(shares) * highest)
    level = _water_level(shares, total, lowest, highest)
    exact = [min(max(share * level, lowest), highest) for share in shares]
    filled = [int(value) for value in exact]
    by_fraction = sorted(range(len(shares)), key=lambda layer: (filled[layer] - exact[layer], layer))
    open_layers = [layer for layer in by_fraction if filled[layer] < highest]
    for layer in open_layers[: total - sum(filled)]:
        filled[layer] += 1
    return filled


def _water_level(shares: list[float], total: int, lowest: int, highest: int) -> float:
    """The ``c`` at which ``sum of clamp(share * c, lowest, highest)`` is ``total``, approached from below."""

    def filled(level: float) -> float:
        return math.fsum([min(max(share * level, lowest), highest) for share in shares])

    if filled(0.0) > total:
        return 0.0
    most = highest / min(shares)
    near = _crossing(shares, total, lowest, highest)
    step = near * _NEAR
    low, high = max(0.0, near - step), min(most, near + step)
    while filled(low) > total:
        low, step = max(0.0, low - step), 2 * step
    while high < most and filled(high) <= total:
        high, step = min(most, high + step), 2 * step
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return low
        if filled(middle) <= total:
            low = middle
        else:
            high = middle


def _crossing(shares: list[float], total: int, lowest: int, highest: int) -> float:
    """:func:`_water_level` to a few roundings: a sum of straight lines, each of which bends twice."""
    bends = sorted([(lowest / share, share) for share in shares] + [(highest / share, -share) for share in shares])
    level, sum_there, slope = 0.0, float(len(shares) * lowest), 0.0
    for bend, change in bends:
        if slope > 0 and sum_there + slope * (bend - level) >= total:
            return level + (total - sum_there) / slope
        sum_there += slope * (bend - level)
        level, slope = bend, slope + change
    return level


def _finite(densities: Sequence[float]) -> list[float]:
    finite = [value for value in densities if math.isfinite(value)]
    if not finite:
        return [0.0] * len(densities)
    mean, low, high = math.fsum(finite) / len(finite), min(finite), max(finite)
    return [mean if math.isnan(value) else min(max(value, low), high) for value in densities]
