"""Paged and tiled attention against a dense one in float64, and the attention that each key received."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2o.attention import AttentionRule, DecodeSegments, ScoreTarget, decode_attention, prefill_attention
from d2o.pages import PagePool

DIM = 8
PLAIN = AttentionRule(DIM**-0.5)
RULES = {
    "plain": PLAIN,
    "scaled": AttentionRule(0.7),
    "window": AttentionRule(DIM**-0.5, window=20),
    "window-1": AttentionRule(DIM**-0.5, window=1),
    "softcap": AttentionRule(0.5, softcap=1.5),
    "both": AttentionRule(0.4, window=33, softcap=3.0),
}


def dense(
    q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, rule: AttentionRule, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [queries, heads, dim] and probabilities [heads, queries, keys] in float64, by the definition.

    ``q`` [heads, queries, dim], ``k``, ``v`` [kv_heads, keys, dim], ``bias`` [kv_heads, keys]; positions by query, key.
    """
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    logits = q.double() @ k.transpose(1, 2) * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    if bias is not None:
        logits = logits + bias.double().repeat_interleave(group, 0)[:, None]
    age = q_at[:, None] - k_at[None]
    hidden = age < 0
    if rule.window is not None:
        hidden = hidden | (age >= rule.window)
    probabilities = logits.masked_fill(hidden, -math.inf).softmax(-1)
    return (probabilities @ v).transpose(0, 1), probabilities


def dense_prompt(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    at = torch.arange(q.shape[1])
    return dense(q, k, v, at, at, rule)


def random_prompt(kv_heads: int, group: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(kv_heads * group, tokens, DIM, generator=draw) * 2
    k, v = torch.randn(2, kv_heads, tokens, DIM, generator=draw)
    return q, k, v


def read_prompt(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, chunks: list[int], scores: ScoreTarget | None = None
) -> Tensor:
    """A prompt read in chunks of these sizes, the last of which takes the rest."""
    parts, start, tokens = [], 0, q.shape[1]
    for size in [*chunks, tokens]:
        end = min(tokens, start + size)
        if end > start:
            parts.append(prefill_attention(q[:, start:end], k, v, start=start, rule=rule, scores=scores))
        start = end
    return torch.cat(parts)


def target(heads: int, kv_heads: int, tokens: int, window: int = 0, **which: int) -> ScoreTarget:
    windowed = torch.zeros(kv_heads, tokens) if window else None
    return ScoreTarget(torch.zeros(heads, tokens), windowed, max(0, tokens - window), tokens, **which)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("chunks", [[], [1, 1, 40], [64, 64, 64], [150]])
def test_prefill_is_dense_attention(group: int, rule: AttentionRule, chunks: list[int]) -> None:
    q, k, v = random_prompt(2, group, 210)
    expected, probabilities = dense_prompt(q, k, v, rule)
    scores = target(2 * group, 2, 210, window=32)
    out = read_prompt(q, k, v, rule, chunks, scores)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.received.double(), probabilities.sum(1), rtol=1e-5, atol=1e-5)
    last = probabilities[:, -32:].sum(1).view(2, group, -1).sum(1)
    assert scores.window is not None
    torch.testing.assert_close(scores.window.double(), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.received.sum(-1), torch.full((2 * group,), 210.0), rtol=1e-5, atol=0)


def test_asking_for_scores_does_not_change_the_result() -> None:
    q, k, v = random_prompt(2, 2, 300)
    assert torch.equal(
        read_prompt(q, k, v, PLAIN, [100], target(4, 2, 300)),
        read_prompt(q, k, v, PLAIN, [100]),
    )


@pytest.mark.parametrize("chunks", [[], [64], [50, 3, 100]])
@pytest.mark.parametrize("last", [1, 50, 64, 200, 1000])
def test_scores_of_the_last_queries_leave_the_others_out(last: int, chunks: list[int]) -> None:
    q, k, v = random_prompt(1, 2, 200)
    _, probabilities = dense_prompt(q, k, v, PLAIN)
    scores = target(2, 1, 200, window=32, first_query=max(0, 200 - last))
    read_prompt(q, k, v, PLAIN, chunks, scores)
    expected = probabilities[:, -last:].sum(1)
    torch.testing.assert_close(scores.received.double(), expected, rtol=1e-5, atol=1e-6)
    assert scores.window is not None
    torch.testing.assert_close(scores.window[0].double(), probabilities[:, -32:].sum((0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [[], [64], [50, 3, 100]])
@pytest.mark.parametrize(("tokens", "stride"), [(210, 2), (210, 3), (256, 2), (257, 4), (30, 5)])
def test_a_stride_counts_every_nth_block_n_times_and_the_last_always(
    tokens: int, stride: int, chunks: list[int]
) -> None:
    q, k, v = random_prompt(1, 2, tokens)
    _, probabilities = dense_prompt(q, k, v, PLAIN)
    blocks = range(-(-tokens // 64))
    weights = torch.tensor([float(stride) if b % stride == 0 else float(b == blocks[-1]) for b in blocks])
    scores = target(2, 1, tokens, stride=stride)
    read_prompt(q, k, v, PLAIN, chunks, scores)
    expected = (probabilities * weights.repeat_interleave(64)[:tokens, None].double()).sum(1)
    torch.testing.assert_close(scores.received.double(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_prefill_is_close_and_its_scores_still_add_up() -> None:
    q, k, v = (x.bfloat16() for x in random_prompt(2, 3, 300))
    expected, probabilities = dense_prompt(q, k, v, PLAIN)
    scores = target(6, 2, 300, window=32)
    out = read_prompt(q, k, v, PLAIN, [128], scores)
    assert out.dtype is torch.bfloat16
    # Logits of up to 20 in bfloat16 are off by up to 0.06, and so is the probability that a key gets.
    torch.testing.assert_close(out.double(), expected, rtol=0.1, atol=0.1)
    assert (out - expected).abs().mean() < 0.003
    torch.testing.assert_close(scores.received.double(), probabilities.sum(1), rtol=0.05, atol=0.05)
    torch.testing.assert_close(scores.received.sum(-1), torch.full((6,), 300.0), rtol=0.01, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 280),
    cuts=st.lists(st.integers(1, 120), max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 300)),
)
def test_any_chunking_of_any_prompt_is_dense_attention(
    tokens: int, cuts: list[int], kv_heads: int, group: int, window: int | None
) -> None:
    q, k, v = random_prompt(kv_heads, group, tokens, seed=tokens)
    rule = replace(PLAIN, window=window)
    scores = target(kv_heads * group, kv_heads, tokens, window=7)
    out = read_prompt(q, k, v, rule, cuts, scores)
    expected, probabilities = dense_prompt(q, k, v, rule)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.received.double(), probabilities.sum(1), rtol=1e-4, atol=1e-5)


@dataclass
class Decoding:
    """A pool of one layer after another in which each sequence holds random slots, in random order of position."""

    pool: PagePool
    rows: Tensor
    current: Tensor
    q: Tensor


def random_caches(
    lengths: list[list[int]], *, kv_heads: int = 2, group: int = 2, page: int = 16, dtype: torch.dtype = torch.float32
) -> Decoding:
    """``lengths`` has the slots in use by layer and sequence."""
    draw = torch.Generator().manual_seed(len(lengths[0]))
    layers, batch = len(lengths), len(lengths[0])
    longest = max(max(each) for each in lengths)
    pages = layers * sum(-(-max(each) // page) for each in zip(*lengths, strict=True)) + 5
    pool = PagePool(
        layers=layers, kv_heads=kv_heads, head_dim=DIM, page_size=page, num_pages=pages, rows=batch + 2,
        max_slots=longest + page, dtype=dtype,
    )  # fmt: skip
    for store in (pool.k, pool.v, pool.bias, pool.score):
        store.fill_(100.0)
    rows = torch.tensor([pool.open_row() for _ in range(batch)]).flip(0)
    pool.grow(rows, torch.tensor(lengths).amax(0))
    for layer, each in enumerate(lengths):
        for row, length in zip(rows.tolist(), each, strict=True):
            pool.used[layer, row] = length
            where = pool.slot_rows(torch.tensor(layer), torch.tensor(row), torch.arange(length)).flatten()
            for store, scale in ((pool.k, 1.0), (pool.v, 1.0)):
                new = torch.randn(where.numel(), DIM, generator=draw) * scale
                store.view(-1, DIM)[where] = new.to(dtype)
            pool.bias.view(-1)[where] = torch.rand(where.numel(), generator=draw)
            pool.score.view(-1)[where] = 0.0
            positions = torch.stack([torch.randperm(longest, generator=draw)[:length]] * kv_heads, -1).int()
            pool.position.view(-1)[where] = positions.flatten()
    q = torch.randn(batch, kv_heads * group, DIM, generator=draw) * 2
    return Decoding(pool, rows, torch.full((batch,), longest - 1), q.to(dtype))


def held(pool: PagePool, store: Tensor, layer: int, row: int) -> Tensor:
    """What a (layer, row) holds, [kv_heads, slots, ...]."""
    slots = torch.arange(int(pool.used[layer, row]))
    flat = pool.slot_rows(torch.tensor(layer), torch.tensor(row), slots)
    return store.reshape(-1, *store.shape[3:])[flat].transpose(0, 1)


LENGTHS = [[1, 16, 300, 17, 128, 129], [40, 3, 5, 290, 1, 64]]


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("rule", [rule for name, rule in RULES.items() if name != "window-1"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("page", [4, 16, 256])
def test_decode_is_dense_attention_over_each_sequences_slots(
    group: int, rule: AttentionRule, bias: bool, page: int
) -> None:
    caches = random_caches(LENGTHS, group=group, page=page)
    pool = caches.pool
    windows = None
    if rule.window is not None:
        rule = replace(rule, window=290)
        windows = torch.tensor([290, 1 << 40])
        for layer, row in ((0, 0), (1, 4)):
            # A lone slot is the query's own.
            slots = pool.slot_rows(torch.tensor(layer), caches.rows[row], torch.tensor([0]))
            pool.position.view(-1)[slots] = int(caches.current[row])
    segments = DecodeSegments.plan(pool, caches.rows, caches.current, windows)
    for layer in range(2):
        out = decode_attention(caches.q, pool, segments, layer, rule=rule, bias=bias, score=True)
        layer_rule = rule if layer == 0 else replace(rule, window=None)
        for index, row in enumerate(caches.rows.tolist()):
            k, v, b = (held(pool, store, layer, row) for store in (pool.k, pool.v, pool.bias))
            at = held(pool, pool.position, layer, row)[0]
            expected, probabilities = dense(
                caches.q[index][:, None], k, v, caches.current[index : index + 1], at, layer_rule, b if bias else None
            )
            torch.testing.assert_close(out[index].double(), expected[0], rtol=1e-5, atol=1e-5)
            received = probabilities[:, 0].view(pool.kv_heads, group, -1).sum(1)
            scored = held(pool, pool.score, layer, row).double()
            torch.testing.assert_close(scored, received, rtol=1e-5, atol=1e-6)


def test_decode_scores_add_up_over_steps_and_only_where_asked() -> None:
    caches = random_caches(LENGTHS)
    pool = caches.pool
    segments = DecodeSegments.plan(pool, caches.rows, caches.current, None)
    before = pool.score.clone()
    decode_attention(caches.q, pool, segments, 0, rule=PLAIN, bias=True, score=False)
    assert torch.equal(pool.score, before)
    for _ in range(3):
        decode_attention(caches.q, pool, segments, 0, rule=PLAIN, bias=True, score=True)
    for row in caches.rows.tolist():
        total = held(pool, pool.score, 0, row).sum(-1)
        torch.testing.assert_close(total, torch.full((2,), 3.0 * 2), rtol=1e-5, atol=0)
        assert torch.equal(held(pool, pool.score, 1, row), torch.zeros_like(held(pool, pool.score, 1, row)))


def test_a_sequence_decodes_to_the_same_in_any_batch() -> None:
    caches = random_caches(LENGTHS, group=3)
    pool = caches.pool
    together = DecodeSegments.plan(pool, caches.rows, caches.current, None)
    crowd = decode_attention(caches.q, pool, together, 0, rule=PLAIN, bias=True, score=False)
    for index in range(len(caches.rows)):
        part = slice(index, index + 1)
        alone = DecodeSegments.plan(pool, caches.rows[part], caches.current[part], None)
        lonely = decode_attention(caches.q[part], pool, alone, 0, rule=PLAIN, bias=True, score=False)
        torch.testing.assert_close(lonely, crowd[part], rtol=1e-6, atol=1e-6)


def test_bfloat16_decode_is_close_and_its_scores_still_add_up() -> None:
    caches = random_caches(LENGTHS, group=3, dtype=torch.bfloat16)
    pool = caches.pool
    segments = DecodeSegments.plan(pool, caches.rows, caches.current, None)
    out = decode_attention(caches.q, pool, segments, 0, rule=PLAIN, bias=True, score=True)
    assert out.dtype is torch.bfloat16
    for index, row in enumerate(caches.rows.tolist()):
        k, v, b = (held(pool, store, 0, row) for store in (pool.k, pool.v, pool.bias))
        at = torch.zeros(k.shape[1], dtype=torch.int64)
        expected, _ = dense(caches.q[index][:, None], k, v, torch.ones(1), at, PLAIN, b)
        torch.testing.assert_close(out[index].double(), expected[0], rtol=0.05, atol=0.03)
        torch.testing.assert_close(held(pool, pool.score, 0, row).sum(-1), torch.full((2,), 3.0), rtol=0.02, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.integers(1, 5).flatmap(
        lambda batch: st.lists(st.lists(st.integers(1, 700), min_size=batch, max_size=batch), min_size=1, max_size=3)
    ),
    page=st.sampled_from([1, 8, 32]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
)
def test_any_mix_of_lengths_decodes_to_dense_attention(
    lengths: list[list[int]], page: int, kv_heads: int, group: int
) -> None:
    caches = random_caches(lengths, kv_heads=kv_heads, group=group, page=page)
    pool = caches.pool
    segments = DecodeSegments.plan(pool, caches.rows, caches.current, None)
    for layer in range(len(lengths)):
        out = decode_attention(caches.q, pool, segments, layer, rule=PLAIN, bias=True, score=True)
        for index, row in enumerate(caches.rows.tolist()):
            k, v, b = (held(pool, store, layer, row) for store in (pool.k, pool.v, pool.bias))
            at = torch.zeros(k.shape[1], dtype=torch.int64)
            expected, _ = dense(caches.q[index][:, None], k, v, torch.ones(1), at, PLAIN, b)
            torch.testing.assert_close(out[index].double(), expected[0], rtol=1e-4, atol=1e-5)
