"""What admission promises is enough for whatever a request becomes, and is counted to the page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o.config import D2OConfig, LayerBudgets, Policy
from d2o.kernels.pairs import FEW
from d2o.pages import PagePool
from d2o_server.engine.memory import MOST_SLACK, CacheShape, PageLedger, Reservation, reserve
from d2o_server.errors import InvalidRequest
from d2o_server.worker.cache_ops import TorchCacheOps
from d2o_server.worker.caches import CacheManager

NONE = D2OConfig(policy=Policy.NONE)
FULL = CacheShape(windows=(None,) * 4, page_size=16)
HYBRID = CacheShape(windows=(32, None, 32, None, 40), page_size=16)


def test_a_full_cache_reserves_every_token_of_every_layer() -> None:
    reservation = reserve(FULL, NONE, 100, 29)
    assert (reservation.peak, reservation.resident, reservation.pages) == (4 * 7, 4 * 9, 4 * 9)
    assert (reservation.config, reservation.budget) == (NONE, 0)


def test_a_compressed_request_reserves_its_staging_or_its_budget_whichever_is_more() -> None:
    config = D2OConfig(budget_tokens=64)
    long = reserve(FULL, config, 1600, 100)
    assert (long.peak, long.budget) == (4 * 100, 64)
    assert long.pages == long.peak > long.resident
    short = reserve(FULL, config, 40, 1000)
    assert short.pages == short.resident > short.peak
    # Budget and a page of slack, with at most a page lost to rounding in each layer.
    assert 4 * 5 <= short.resident <= 4 * 6


@pytest.mark.parametrize(
    ("page", "slack"),
    [
        (16, {1: 16, 2047: 16, 2048: 32, 3072: 48, 4096: 64, 100_000: 64}),
        (32, {1: 32, 4095: 32, 4096: 64, 100_000: 64}),
        (64, {1: 64, 100_000: 64}),
        (128, {1: 128, 100_000: 128}),
    ],
)
def test_large_budgets_have_more_slack_in_whole_pages(page: int, slack: dict[int, int]) -> None:
    shape = CacheShape(windows=(None,), page_size=page)
    assert {budget: shape.slack(D2OConfig(), budget) for budget in slack} == slack
    assert {shape.slack(D2OConfig(evict_interval=5), budget) for budget in slack} == {5}


def test_no_default_slack_but_a_larger_page_s_is_more_than_decode_s_kernels_evict_at_once() -> None:
    assert MOST_SLACK == FEW


def test_more_generation_costs_a_compressed_request_nothing() -> None:
    config = D2OConfig(budget_tokens=64)
    assert reserve(FULL, config, 400, 100).resident == reserve(FULL, config, 400, 100_000).resident


def test_snapkv_keeps_all_that_it_generates() -> None:
    config = D2OConfig.of(Policy.SNAPKV, budget_tokens=64)
    assert reserve(FULL, config, 400, 160).resident >= 4 * (64 + 160) // 16
    assert reserve(FULL, config, 400, 320).resident > reserve(FULL, config, 400, 160).resident


def test_a_sliding_layer_reserves_its_window_and_a_page() -> None:
    reservation = reserve(HYBRID, NONE, 200, 56)
    assert reservation.resident == 3 + 3 + 4 + 2 * 16
    assert reservation.peak == 5 * 13
    assert reserve(HYBRID, NONE, 10, 5).resident == 5


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.NONE])
@pytest.mark.parametrize(("budget", "enabled"), [(129, True), (130, False), (500, False)])
def test_a_budget_of_all_that_a_request_can_become_switches_compression_off(
    policy: Policy, budget: int, enabled: bool
) -> None:
    config = D2OConfig.of(policy, budget_tokens=budget)
    reservation = reserve(FULL, config, 100, 30)
    assert reservation.config == (config if enabled else config.with_changes(policy=Policy.NONE))
    assert reservation.budget == (budget if enabled else 0)
    if not enabled:
        assert reservation.pages == reserve(FULL, NONE, 100, 30).pages


def test_a_model_whose_layers_all_have_windows_has_nothing_to_compress() -> None:
    shape = CacheShape(windows=(32, 32), page_size=16)
    reservation = reserve(shape, D2OConfig(budget_tokens=64), 400, 100)
    assert (reservation.config.policy, reservation.budget) == (Policy.NONE, 0)
    assert (reservation.peak, reservation.resident) == (2 * 25, 2 * 3)


def test_dense_layers_that_do_not_exist_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"compression.dense_layers: got \(1, 4\), allowed is layers from 0 to 3"):
        reserve(FULL, D2OConfig(budget_tokens=50, dense_layers=(1, 4)), 100, 50)


def test_dense_layers_that_eat_the_others_budget_are_refused_with_the_bound() -> None:
    config = D2OConfig(budget_tokens=50, dense_layers=(0,))
    # One layer of 185 tokens and 3 of at least 5 slots are 200, which is 4 layers of 50.
    assert reserve(FULL, config, 100, 85).budget == 50
    with pytest.raises(InvalidRequest, match="200 slots holds 1 layers of 186 tokens and 5 slots"):
        reserve(FULL, config, 100, 86)


def test_a_dense_layer_with_a_window_costs_the_budget_nothing() -> None:
    assert reserve(HYBRID, D2OConfig(budget_tokens=50, dense_layers=(0, 2, 4)), 1000, 85).budget == 50


@st.composite
def configs(draw: st.DrawFn) -> D2OConfig:
    policy = draw(st.sampled_from(list(Policy)))
    changes: dict[str, Any] = {"evict_interval": draw(st.sampled_from([None, 1, 3, 40]))}
    if draw(st.booleans()):
        changes["budget_tokens"] = draw(st.integers(1, 150))
    else:
        changes |= {"ratio": draw(st.sampled_from([0.05, 0.2, 0.5])), "min_budget": draw(st.integers(0, 60))}
    if policy is Policy.D2O:
        changes["layer_budgets"] = draw(st.sampled_from(list(LayerBudgets)))
        changes["layer_gain"] = draw(st.sampled_from([0.3, 3.0, -5.0]))
        changes["dense_layers"] = draw(st.sampled_from([(), (), (1,)]))
    return D2OConfig.of(policy, **changes)


class Life:
    """A sequence's cache from its first chunk to its last token; no model, random keys and random attention."""

    def __init__(self, shape: CacheShape, config: D2OConfig, prompt: int, new: int, reservation: Reservation) -> None:
        self.reservation, self.prompt, self.new = reservation, prompt, new
        pool = PagePool(
            layers=len(shape.windows),
            kv_heads=2,
            head_dim=2,
            page_size=shape.page_size,
            num_pages=reservation.pages,
            rows=1,
            max_slots=prompt + new + shape.page_size,
            dtype=torch.float32,
        )
        self.caches = CacheManager(TorchCacheOps(pool), shape, query_heads=4)
        self.cache = self.caches.open(reservation, range(prompt), prompt + new)
        self.row = torch.tensor([self.cache.row])
        self.draw = torch.Generator().manual_seed(prompt)

    def append(self, count: int) -> None:
        """Takes slots; the pool has the reserved pages and no more, so it raises where they do not do."""
        pool = self.caches.pool
        slots = self.caches.append(self.row, torch.tensor([count])).flatten()
        for store in (pool.k, pool.v):
            store.view(-1, 2)[slots] = torch.randn(slots.numel(), 2, generator=self.draw)
        pool.score.view(-1)[slots] = torch.rand(slots.numel(), generator=self.draw)

    def read(self, chunk: int) -> int:
        for start in range(0, self.prompt, chunk):
            self.append(min(chunk, self.prompt - start))
            self.caches.evict_due()
        if self.cache.scores is not None:
            received = self.cache.scores.received
            spread = torch.rand(received.shape[0], 1, 1, generator=self.draw) * 5
            received.copy_(torch.rand(received.shape, generator=self.draw) ** spread)
        needed = self.caches.finish_prompt(self.cache)
        return self.reservation.resident if needed < 0 else needed

    def held(self) -> int:
        return self.caches.pool.row_pages(self.cache.row)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    config=configs(),
    windows=st.lists(st.sampled_from([None, None, 10, 40]), min_size=1, max_size=4).map(tuple),
    page=st.sampled_from([1, 8, 16]),
    prompt=st.integers(1, 200),
    new=st.integers(1, 90),
    chunk=st.sampled_from([7, 64, 1000]),
)
def test_no_request_ever_holds_more_than_was_reserved(
    config: D2OConfig, windows: tuple[int | None, ...], page: int, prompt: int, new: int, chunk: int
) -> None:
    shape = CacheShape(windows=windows, page_size=page)
    try:
        reservation = reserve(shape, config, prompt, new)
    except InvalidRequest:
        assert config.dense_layers
        return
    life = Life(shape, config, prompt, new, reservation)
    promise = life.read(chunk)
    assert promise <= reservation.pages
    assert life.held() <= promise
    # The last token is never fed.
    for _ in range(new - 1):
        life.append(1)
        assert life.held() <= promise
        life.caches.evict_due()
        life.caches.pool.check_integrity()
    cache, budget = life.cache, reservation.budget
    if cache.compressed:
        assert sum(cache.budgets) <= shape.full_layers * budget
        slack = shape.slack(reservation.config, reservation.budget) if reservation.config.evicts_in_decode else new
        used = life.caches.pool.used[:, cache.row].tolist()
        full = [layer for layer, window in enumerate(windows) if window is None]
        assert all(used[layer] < cache.budgets[layer] + slack for layer in full)
    life.caches.close(cache)
    assert life.caches.pool.used_pages == 0


def test_a_ledger_adds_up() -> None:
    ledger = PageLedger(10)
    assert ledger.fits(10)
    ledger.take(4)
    assert (ledger.reserved, ledger.unreserved, ledger.fits(6), ledger.fits(7)) == (4, 6, True, False)
    ledger.give_back(3)
    assert (ledger.reserved, ledger.unreserved) == (1, 9)


def test_a_ledger_never_promises_more_than_there_is_nor_takes_back_more_than_it_gave() -> None:
    ledger = PageLedger(10)
    ledger.take(6)
    with pytest.raises(AssertionError, match="5 pages promised with 4 unreserved"):
        ledger.take(5)
    with pytest.raises(AssertionError, match="7 pages given back of 6 reserved"):
        ledger.give_back(7)
    assert ledger.reserved == 6
