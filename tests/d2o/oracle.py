"""A second reading of ALGORITHM.md's equations: one head and one token at a time, slow, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o.config import D2OConfig, Merge, Policy, Ranking, Scope, Threshold


@dataclass
class Token:
    k: Tensor
    v: Tensor
    score: float
    position: int
    bias: float
    window: float = 0.0
    pooled: float = 0.0


@dataclass
class Head:
    """One KV head of one row; ``gone`` are the evicted tokens, in order of position."""

    tokens: list[Token]
    threshold: float
    gone: list[Token] = field(default_factory=list)
    merged: int = 0


def evict(heads: list[Head], keep: int, seen: int, config: D2OConfig, windowed: bool) -> None:
    """Brings the heads of one row down to ``keep`` tokens each."""
    if keep >= len(heads[0].tokens):
        return
    for head in heads:
        head.tokens.sort(key=lambda token: token.position)
        if windowed:
            pool(head, seen, config)
    choices = [
        survivors(heads if config.heads is Scope.LAYER else [head], keep, seen, config, windowed) for head in heads
    ]
    for head, chosen in zip(heads, choices, strict=True):
        head.gone = [token for token in head.tokens if token.position not in chosen]
        head.tokens = [token for token in head.tokens if token.position in chosen]
    if config.merge is not Merge.NONE:
        merge(heads, seen, config)


def pool(head: Head, seen: int, config: D2OConfig) -> None:
    means = [t.window / min(config.window_queries, seen - t.position) for t in head.tokens]
    ahead = config.window_pool // 2 if config.window_ahead is None else config.window_ahead
    for i, token in enumerate(head.tokens):
        near = means[max(0, i + ahead + 1 - config.window_pool) : i + ahead + 1]
        token.pooled = sum(near) / len(near)


def rank(token: Token, seen: int, config: D2OConfig, windowed: bool) -> float:
    queries = seen - token.position
    mean = token.score / queries
    if windowed:
        mean = (1 - config.window_blend) * mean + config.window_blend * token.pooled
    return mean * queries if config.ranking is Ranking.SUM else mean


def survivors(heads: list[Head], keep: int, seen: int, config: D2OConfig, windowed: bool) -> set[int]:
    """Positions that survive in all of ``heads`` (one head, or all that share a choice)."""
    positions = [token.position for token in heads[0].tokens]

    def mean_over_heads(values: list[list[float]]) -> dict[int, float]:
        columns = zip(*values, strict=True)
        return {position: sum(column) / len(column) for position, column in zip(positions, columns, strict=True)}

    ranks = mean_over_heads([[rank(t, seen, config, windowed) for t in head.tokens] for head in heads])
    pooled = mean_over_heads([[t.pooled for t in head.tokens] for head in heads])
    recent = config.recent_tokens if config.recent_tokens is not None else math.floor(config.recent_share * keep + 1e-6)
    if config.policy is Policy.STREAMING:
        recent = keep
    if config.policy is Policy.SNAPKV:
        recent = max(recent, config.window_queries)
    recent = min(recent, max(0, keep - config.sinks))
    quota = math.floor(config.window_quota * keep + 1e-6) if windowed else 0

    chosen = [p for p in positions if p < config.sinks][:keep]
    late = [p for p in reversed(positions) if p >= seen - recent and p not in chosen]
    chosen += late[: keep - len(chosen)]
    free = max(0, keep - config.sinks - recent)
    by_window = sorted((p for p in positions if p not in chosen), key=lambda p: -pooled[p])
    picked = by_window[: min(quota, free)]
    for head in heads:
        for token in head.tokens:
            if token.position in picked:
                token.score = max(token.score, token.pooled * (seen - token.position))
    chosen += picked
    by_rank = sorted((p for p in positions if p not in chosen), key=lambda p: -ranks[p])
    return {*chosen, *by_rank[: keep - len(chosen)]}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def merge(heads: list[Head], seen: int, config: D2OConfig) -> None:
    nearest: list[list[tuple[float, int]]] = []
    for head in heads:
        targets = [j for j, t in enumerate(head.tokens) if config.merge_into_sinks or t.position >= config.sinks]
        if not targets:
            return
        nearest.append([max((cosine(g.k, head.tokens[j].k), j) for j in targets) for g in head.gone])
    move_thresholds(heads, nearest, config)
    shared = config.threshold is Threshold.AUTHORS and config.threshold_scope is Scope.LAYER
    for head, best in zip(heads, nearest, strict=True):
        sets: dict[int, list[tuple[float, Token]]] = {}
        for i, (similarity, j) in enumerate(best):
            signal = sum(other[i][0] for other in nearest) / len(nearest) if shared else similarity
            if config.threshold is Threshold.OFF or signal >= head.threshold - 1e-6:
                sets.setdefault(j, []).append((similarity, head.gone[i]))
                head.merged += 1
        for j, members in sets.items():
            fold(head.tokens[j], members, seen, config)


def move_thresholds(heads: list[Head], nearest: list[list[tuple[float, int]]], config: D2OConfig) -> None:
    if config.threshold is Threshold.OFF:
        return
    for head, best in zip(heads, nearest, strict=True):
        pools = nearest if config.threshold_scope is Scope.LAYER else [best]
        values = [similarity for matched in pools for similarity, _ in matched]
        mean = sum(values) / len(values)
        newest = max(values) if config.threshold is Threshold.PAPER else mean
        old = 1 - config.beta if config.alpha is None else config.alpha
        head.threshold = mean if math.isnan(head.threshold) else old * head.threshold + config.beta * newest


def fold(survivor: Token, members: list[tuple[float, Token]], seen: int, config: D2OConfig) -> None:
    if config.merge is Merge.PAPER:
        whole = sum(math.exp(u) for u, _ in members) + config.merge_weight
        parts = [(math.exp(u) / whole, token) for u, token in members]
        own = config.merge_weight / whole
    elif config.merge is Merge.AUTHORS:
        parts = [(u / (1 + len(members)), token) for u, token in members]
        own = 1 / (1 + len(members))
    else:
        masses = [token.score / (seen - token.position) for _, token in members]
        mass = survivor.score / (seen - survivor.position)
        whole = mass + sum(masses)
        parts = [(a / whole, token) for a, (_, token) in zip(masses, members, strict=True)]
        own = mass / whole
        survivor.score += sum(token.score for _, token in members)
        if config.merge_bias:
            survivor.bias = min(max(survivor.bias + math.log(whole / mass), 0.0), config.bias_limit)
    if config.merge is not Merge.CONSERVE or config.merge_keys:
        survivor.k = own * survivor.k + torch.stack([w * token.k for w, token in parts]).sum(0)
    survivor.v = own * survivor.v + torch.stack([w * token.v for w, token in parts]).sum(0)


def expected_slots(tokens: list[int], most: int) -> list[int]:
    """Slots that followed on an earlier occurrence of the end: 8 tokens of it, or 4 where two went on alike for 32."""
    places = []
    for place in range(len(tokens) - 1):
        length = 0
        while length < min(64, place + 1) and tokens[place - length] == tokens[-1 - length]:
            length += 1
        if length >= 4:
            places.append((length, place, tokens[place + 1 : place + 33]))
    places = sorted(places, reverse=True)[:64]
    expected: list[int] = []
    for length, place, follows in places:
        twice = len(follows) == 32 and sum(other == follows for _, _, other in places) > 1
        if length >= 8 or twice:
            expected += [slot for slot in range(place + 1, len(tokens)) if slot not in expected]
            expected = expected[:most]
    return sorted(expected)
