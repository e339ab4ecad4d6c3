"""Densities, and budgets that keep their promise: never more than layers x average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2o import budget
from d2o.config import ConfigError, D2OConfig, LayerBudgets

RULES = list(LayerBudgets)
densities = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def rule(name: LayerBudgets, **changes: object) -> D2OConfig:
    return D2OConfig().with_changes(layer_budgets=name, **changes)


def allocate(
    values: list[float], config: D2OConfig, *, average: int, floor: int = 1, cap: int, multiple: int = 1
) -> list[int]:
    return budget.allocate(
        torch.tensor(values), average=average, floor=floor, cap=cap, config=config, multiple=multiple
    )


def test_density_of_the_paper_is_the_normalised_variance() -> None:
    colsums = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])
    # Variances 0, 1 and 4, over their range.
    torch.testing.assert_close(budget.density(colsums, rule(LayerBudgets.PAPER)), torch.tensor(5 / 12))


def test_density_of_the_variance_rule_is_the_log_of_the_mean_variance() -> None:
    colsums = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])
    torch.testing.assert_close(budget.density(colsums, rule(LayerBudgets.VARIANCE)), torch.tensor(2.5).log())


def test_density_of_the_coverage_rule_is_the_log_of_the_tokens_that_hold_nine_tenths() -> None:
    colsums = torch.tensor([[0.0, 9.5, 0.5, 0.0], [4.0, 2.0, 3.0, 1.0]])
    # One token holds 0.95 of the first head's attention; of the second head's, three hold exactly 0.9.
    both = torch.stack([colsums, torch.ones(2, 4)])
    torch.testing.assert_close(budget.density(both, rule(LayerBudgets.COVERAGE)), torch.tensor([2.0, 4.0]).log())


def test_the_coverage_rule_gives_layers_slots_in_proportion_to_what_covers_them() -> None:
    wide_and_narrow = [math.log(300.0), math.log(100.0)]
    assert allocate(wide_and_narrow, rule(LayerBudgets.COVERAGE), average=80, cap=1000) == [120, 40]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (1, 1)])
def test_densities_are_finite_where_there_is_little_to_measure(name: LayerBudgets, shape: tuple[int, int]) -> None:
    assert budget.density(torch.ones(shape), rule(name)).isfinite()


def test_the_paper_gives_even_layers_more_and_the_variance_rule_spiky_ones() -> None:
    even_then_spiky = [0.1, 0.9]
    paper = allocate(even_then_spiky, rule(LayerBudgets.PAPER), average=100, cap=1000)
    variance = allocate(even_then_spiky, rule(LayerBudgets.VARIANCE), average=100, cap=1000)
    assert paper[0] > 100 > paper[1]
    assert variance[0] < 100 < variance[1]
    assert allocate(even_then_spiky, rule(LayerBudgets.UNIFORM), average=100, cap=1000) == [100, 100]


def test_layers_that_are_nearly_alike_get_nearly_alike() -> None:
    """The three full layers of Gemma 3 270M after a text of 3,072 tokens."""
    given_out = allocate([6.18, 6.06, 5.92], rule(LayerBudgets.VARIANCE, layer_gain=0.6), average=600, cap=3072)
    assert given_out[0] > 600 > given_out[2] > 0.9 * 600


@pytest.mark.parametrize("spread", [1.0, 1.83, 5.0])
def test_layers_that_differ_much_are_standardised(spread: float) -> None:
    config = rule(LayerBudgets.VARIANCE, layer_gain=0.6)
    shares = budget.weights([5.0 - spread, 5.0 + spread], config)
    assert shares[1] / shares[0] == pytest.approx(math.exp(2 * 0.6))


@given(
    values=densities,
    name=st.sampled_from(RULES),
    average=st.integers(1, 3000),
    floor=st.integers(0, 3000),
    cap=st.integers(1, 5000),
    multiple=st.sampled_from([1, 1, 16, 32, 64]),
)
def test_the_total_is_a_promise_and_the_bounds_hold(
    values: list[float], name: LayerBudgets, average: int, floor: int, cap: int, multiple: int
) -> None:
    given_out = allocate(values, rule(name), average=average, floor=floor, cap=cap, multiple=multiple)
    assert all(min(floor, average, cap) <= slots <= cap for slots in given_out)
    assert min(given_out) >= 1
    assert sum(given_out) <= len(values) * average
    if multiple == 1 or average >= cap:
        assert sum(given_out) == len(values) * min(average, cap)


@given(
    values=densities,
    name=st.sampled_from(RULES),
    average=st.integers(33, 3000),
    multiple=st.sampled_from([16, 32]),
)
def test_page_multiples_are_whole_pages_that_waste_less_than_one(
    values: list[float], name: LayerBudgets, average: int, multiple: int
) -> None:
    given_out = allocate(values, rule(name), average=average, cap=average * 50, multiple=multiple)
    assert all(slots % multiple == 0 for slots in given_out)
    assert len(values) * average - sum(given_out) < multiple


@given(values=st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True), data=st.data())
def test_permuting_layers_permutes_budgets(values: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(values))))
    for name in RULES[1:]:
        scaled = [value / 25 for value in values]
        straight = allocate(scaled, rule(name), average=100, floor=40, cap=180)
        turned = allocate([scaled[layer] for layer in order], rule(name), average=100, floor=40, cap=180)
        assert turned == [straight[layer] for layer in order]


def test_equal_layers_differ_by_one_slot_at_most_and_the_lower_layer_gets_it() -> None:
    # Three pages for two layers.
    assert allocate([0.5, 0.5], rule(LayerBudgets.PAPER), average=48, cap=1000, multiple=32) == [64, 32]


def test_what_clamping_frees_goes_to_the_other_layers() -> None:
    config = rule(LayerBudgets.PAPER)
    assert allocate([-5.0, 1.0, 1.0], config, average=100, floor=10, cap=150) == [150, 75, 75]
    assert allocate([9.0, 1.0, 1.0], config, average=100, floor=60, cap=900) == [60, 120, 120]


def test_an_average_at_the_cap_gives_every_layer_the_cap() -> None:
    assert allocate([1.0, 2.0], rule(LayerBudgets.PAPER), average=80, floor=900, cap=70, multiple=32) == [70, 70]


def test_one_layer_gets_the_average() -> None:
    for name in RULES:
        assert allocate([0.3], rule(name), average=77, cap=500) == [77]


@pytest.mark.parametrize("name", RULES)
def test_densities_that_are_no_numbers_do_no_harm(name: LayerBudgets) -> None:
    given_out = allocate([math.nan, math.inf, -math.inf, 0.5], rule(name), average=100, cap=300)
    assert sum(given_out) == 400
    assert allocate([math.nan] * 3, rule(name), average=100, cap=300) == [100, 100, 100]


def test_an_extreme_gain_starves_no_layer_below_its_floor() -> None:
    config = rule(LayerBudgets.VARIANCE, layer_gain=100.0)
    assert allocate([0.0, 1.0, 2.0, 9.0], config, average=100, floor=20, cap=340) == [20, 20, 20, 340]


def test_dense_layers_get_the_cap_and_the_others_pay() -> None:
    config = rule(LayerBudgets.UNIFORM, dense_layers=(0, 1, 5))
    assert allocate([0.0] * 6, config, average=300, floor=10, cap=500) == [500, 500, 100, 100, 100, 500]


def test_dense_layers_never_push_the_others_under_their_floor() -> None:
    config = rule(LayerBudgets.UNIFORM, dense_layers=(0, 1))
    assert allocate([0.0] * 4, config, average=200, floor=50, cap=1000) == [350, 350, 50, 50]
    assert allocate([0.0] * 2, config, average=200, floor=50, cap=1000) == [200, 200]


def test_a_dense_layer_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dense_layers.*below 4"):
        allocate([0.0] * 4, rule(LayerBudgets.PAPER, dense_layers=(4,)), average=10, cap=20)


@pytest.mark.parametrize("wrong", [{"average": 0}, {"cap": 0}, {"multiple": 0}])
def test_counts_below_one_are_refused_by_name(wrong: dict[str, int]) -> None:
    counts = {"average": 10, "cap": 20, "multiple": 1} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        allocate([0.0], D2OConfig(), **counts)


def test_ratios_are_clamped_and_may_drift_as_the_authors_do() -> None:
    config = D2OConfig.authors(ratio=0.6)
    assert budget.ratios(torch.tensor([0.0, 3.0]), config) == [1.0, pytest.approx(1.2 / (1 + math.exp(3)))]
    assert min(budget.ratios(torch.tensor([0.0, 30.0]), config)) == 0.01
