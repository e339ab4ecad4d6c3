"""D2OConfig refuses what makes no sense and names the field; its presets are the published methods."""

from __future__ import annotations

import math
from typing import Any

import pytest

from d2o.config import ConfigError, D2OConfig, LayerBudgets, Merge, Policy, Ranking, Scope, ScoreQueries, Threshold


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 0),
        ("ratio", 1.01),
        ("ratio", math.nan),
        ("ratio", True),
        ("min_budget", -1),
        ("budget_tokens", 0),
        ("sinks", -1),
        ("recent_share", 1.5),
        ("recent_tokens", -1),
        ("recent_tokens", 2.0),
        ("window_pool", 4),
        ("window_pool", 0),
        ("window_ahead", -1),
        ("window_ahead", 99),
        ("window_quota", 0.95),
        ("window_blend", -0.1),
        ("recurrence_share", 1.1),
        ("window_queries", 0),
        ("layer_gain", math.inf),
        ("layer_floor", 2),
        ("dense_layers", (-1,)),
        ("merge_weight", -1),
        ("merge_keys", "true"),
        ("merge_bias", 1),
        ("merge_into_sinks", None),
        ("bias_limit", math.nan),
        ("beta", 1.1),
        ("alpha", -0.1),
        ("evict_interval", 0),
        ("policy", "lru"),
        ("merge", "average"),
        ("threshold", "always"),
        ("heads", "query"),
        ("ranking", "max"),
        ("layer_budgets", "pyramid"),
        ("score_queries", "last:0"),
        ("score_queries", "first:3"),
        ("score_queries", "sample:0"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        D2OConfig(**{"window_pool": 7, "window_ahead": None, field: value})
    assert caught.value.field == field
    assert caught.value.allowed


def test_names_are_accepted_for_enums() -> None:
    config = D2OConfig(policy="h2o", merge="paper", heads="layer", score_queries="stride:4")  # type: ignore[arg-type]
    assert (config.policy, config.merge, config.heads) == (Policy.H2O, Merge.PAPER, Scope.LAYER)
    assert config.score_queries == ScoreQueries(kind="stride", count=4)


@pytest.mark.parametrize("text", ["all", "last:32", "stride:8", "sample:4096"])
def test_score_queries_read_and_print_the_same(text: str) -> None:
    assert str(ScoreQueries.parse(text)) == text


@pytest.mark.parametrize(
    ("queries", "prompt", "stride"),
    [
        ("all", 1 << 20, 1),
        ("last:32", 1 << 20, 1),
        ("stride:8", 5, 8),
        ("sample:4096", 1, 1),
        ("sample:4096", 8191, 1),
        ("sample:4096", 8192, 2),
        ("sample:4096", 32768, 8),
    ],
)
def test_a_sample_leaves_as_many_queries_as_it_says(queries: str, prompt: int, stride: int) -> None:
    assert ScoreQueries.parse(queries).stride(prompt) == stride


def test_only_the_default_samples_and_the_published_policies_sum_over_all_queries() -> None:
    assert str(D2OConfig().score_queries) == "sample:4096"
    published = [D2OConfig.of(policy) for policy in (Policy.H2O, Policy.SNAPKV, Policy.STREAMING)]
    for config in (*published, D2OConfig.paper(), D2OConfig.authors()):
        assert config.score_queries == ScoreQueries()


def test_dense_layers_are_sorted_and_distinct() -> None:
    assert D2OConfig(dense_layers=(5, 0, 5, 1)).dense_layers == (0, 1, 5)


@pytest.mark.parametrize(
    ("config", "prompt", "budget"),
    [
        (D2OConfig(ratio=0.2, min_budget=0), 1001, 201),
        (D2OConfig(ratio=0.2), 1001, 1024),
        (D2OConfig(budget_tokens=300), 9999, 300),
        (D2OConfig(budget_tokens=2, sinks=4), 9999, 5),
        (D2OConfig(ratio=0.2, min_budget=0, sinks=4), 3, 5),
    ],
)
def test_average_budget_is_the_largest_lower_bound(config: D2OConfig, prompt: int, budget: int) -> None:
    assert config.average_budget(prompt) == budget


def test_the_default_is_the_mass_conserving_row_with_a_window_quota() -> None:
    config = D2OConfig()
    assert (config.merge, config.threshold, config.ranking) == (Merge.CONSERVE, Threshold.PAPER, Ranking.MEAN)
    assert (config.layer_budgets, config.layer_gain) == (LayerBudgets.VARIANCE, 0.6)
    assert (config.window_quota, config.recent_share, config.window_queries) == (0.5, 0.3, 32)
    assert (config.window_pool, config.window_ahead, config.recurrence_share) == (16, 3, 0.25)


def test_presets_differ_where_the_publications_do() -> None:
    paper, authors = D2OConfig.paper(), D2OConfig.authors()
    snapkv = D2OConfig.of(Policy.SNAPKV)
    assert (snapkv.window_queries, snapkv.window_pool, snapkv.window_ahead) == (32, 7, None)
    assert (paper.recent_share, authors.recent_share) == (0.25, 0.5)
    assert (paper.threshold_scope, authors.threshold_scope) == (Scope.HEAD, Scope.LAYER)
    assert (paper.beta, authors.beta) == (0.7, 0.5)
    assert D2OConfig.paper(sinks=2).sinks == 2


@pytest.mark.parametrize("policy", list(Policy))
def test_every_policy_has_a_published_form(policy: Policy) -> None:
    config = D2OConfig.of(policy)
    assert config.policy is policy
    assert config.enabled is (policy is not Policy.NONE)
    assert config.evicts_in_decode is (policy in (Policy.D2O, Policy.H2O, Policy.STREAMING))


def test_a_copy_is_validated_again() -> None:
    with pytest.raises(ConfigError, match="ratio"):
        D2OConfig().with_changes(ratio=2)
