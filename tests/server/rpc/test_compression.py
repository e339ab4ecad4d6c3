"""Which compression a request gets: the server's default, changed or exchanged for another policy's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o.config import D2OConfig, LayerBudgets, Merge, Policy
from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_server.engine.types import AutoCompression, MaxLoss
from d2o_server.errors import InvalidRequest
from d2o_server.rpc import convert
from d2o_server.rpc.compression import (
    LAYER_BUDGETS,
    MAX_LOSSES,
    MERGES,
    POLICIES,
    compression_of,
    config_of,
    message_of,
)
from tests.server.rpc.scripted_engine import MODEL

DEFAULT = D2OConfig(ratio=0.3, min_budget=512, merge=Merge.PAPER, sinks=8)


@pytest.mark.parametrize(
    ("table", "wire", "ours"),
    [
        (POLICIES, pb.CompressionPolicy, Policy),
        (MERGES, pb.MergeRule, Merge),
        (LAYER_BUDGETS, pb.LayerBudgetRule, LayerBudgets),
        (MAX_LOSSES, pb.MaxLoss, MaxLoss),
    ],
)
def test_every_choice_of_the_wire_is_one_of_the_methods(table: dict[int, object], wire: Any, ours: Any) -> None:
    # Auto is no rule of the method's, but a choice between two.
    assert set(table) == set(wire.values()) - {0} - ({pb.COMPRESSION_POLICY_AUTO} if table is POLICIES else set())
    assert set(table.values()) == set(ours)
    assert all(wire.Name(number).endswith(f"_{choice.name}") for number, choice in table.items())  # type: ignore[attr-defined]


def test_a_request_without_compression_leaves_the_choice_to_the_engine() -> None:
    request = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"))
    assert convert.generation_request(request, MODEL).compression is None


@pytest.mark.parametrize("policy", [pb.COMPRESSION_POLICY_UNSPECIFIED, pb.COMPRESSION_POLICY_D2O])
def test_the_servers_policy_keeps_all_of_the_servers_default(policy: pb.CompressionPolicy) -> None:
    assert config_of(pb.Compression(policy=policy), DEFAULT) == DEFAULT
    changed = config_of(pb.Compression(policy=policy, ratio=0.1), DEFAULT)
    assert changed == DEFAULT.with_changes(ratio=0.1)


@pytest.mark.parametrize("number", [number for number in POLICIES if number != pb.COMPRESSION_POLICY_D2O])
def test_another_policy_is_its_published_form_at_the_servers_budget(number: pb.CompressionPolicy) -> None:
    expected = D2OConfig.of(POLICIES[number], ratio=0.3, min_budget=512)
    assert config_of(pb.Compression(policy=number), DEFAULT) == expected


def test_the_requests_fields_override_the_policys() -> None:
    message = pb.Compression(
        policy=pb.COMPRESSION_POLICY_H2O,
        min_budget=64,
        recent_share=0.25,
        window_quota=0.125,
        merge=pb.MERGE_RULE_CONSERVE,
        layer_budgets=pb.LAYER_BUDGET_RULE_PAPER,
    )
    assert config_of(message, DEFAULT) == D2OConfig.of(
        Policy.H2O,
        ratio=0.3,
        min_budget=64,
        recent_share=0.25,
        window_quota=0.125,
        merge=Merge.CONSERVE,
        layer_budgets=LayerBudgets.PAPER,
    )


@pytest.mark.parametrize("message", [pb.Compression(ratio=0.5), pb.Compression(budget_tokens=0)])
def test_a_share_of_the_prompt_replaces_an_absolute_default(message: pb.Compression) -> None:
    absolute = DEFAULT.with_changes(budget_tokens=2048)
    assert config_of(pb.Compression(), absolute).budget_tokens == 2048
    assert config_of(message, absolute).budget_tokens is None


def test_a_ratio_means_the_decimal_that_was_written() -> None:
    config = config_of(pb.Compression(ratio=0.4, min_budget=0), DEFAULT)
    assert config.average_budget(1000) == 400


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Compression(ratio=1.5), "compression.ratio: got 1.5, allowed is a number in (0, 1]"),
        (pb.Compression(ratio=0), "compression.ratio: got 0.0, allowed is a number in (0, 1]"),
        (pb.Compression(ratio=float("nan")), "compression.ratio: got nan, allowed is a number in (0, 1]"),
        (pb.Compression(recent_share=float("inf")), "compression.recent_share: got inf, allowed is a number in [0, 1]"),
        (
            pb.Compression(window_quota=0.75, recent_share=0.5),
            "compression.window_quota: got 0.75, allowed is at most 1 - recent_share = 0.5",
        ),
        (
            pb.Compression(policy=99),  # type: ignore[arg-type]
            "compression.policy: got 99, allowed is one of " + ", ".join(pb.CompressionPolicy.keys()[1:]),
        ),
        (
            pb.Compression(layer_budgets=7),  # type: ignore[arg-type]
            "compression.layer_budgets: got 7, allowed is one of " + ", ".join(pb.LayerBudgetRule.keys()[1:]),
        ),
    ],
)
def test_a_field_out_of_bounds_is_refused(message: pb.Compression, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        config_of(message, DEFAULT)
    assert str(refused.value) == text


def test_an_unknown_merge_rule_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^compression\.merge: got 9, allowed is one of MERGE_RULE_NONE, "):
        config_of(pb.Compression(merge=9), DEFAULT)  # type: ignore[arg-type]


AUTO = pb.COMPRESSION_POLICY_AUTO


def test_auto_compresses_as_d2o_does_at_the_servers_budget() -> None:
    assert compression_of(pb.Compression(policy=AUTO), DEFAULT) == (AutoCompression(DEFAULT), None)
    snapkv = D2OConfig.of(Policy.SNAPKV, ratio=0.3, min_budget=512)
    assert compression_of(pb.Compression(policy=AUTO, ratio=0.1), snapkv) == (
        AutoCompression(D2OConfig(ratio=0.1, min_budget=512)),
        None,
    )


def test_a_server_in_auto_stays_so_until_a_policy_is_named() -> None:
    default = AutoCompression(DEFAULT)
    changed = AutoCompression(DEFAULT.with_changes(ratio=0.1))
    assert compression_of(pb.Compression(ratio=0.1), default) == (changed, None)
    assert compression_of(pb.Compression(policy=pb.COMPRESSION_POLICY_D2O), default) == (DEFAULT, None)
    assert message_of(default).policy == AUTO
    assert compression_of(message_of(default), default) == (default, None)


@pytest.mark.parametrize("policy", [0, AUTO, pb.COMPRESSION_POLICY_D2O])
def test_a_loss_stands_beside_a_policy(policy: pb.CompressionPolicy) -> None:
    assert compression_of(pb.Compression(policy=policy, max_loss=pb.MAX_LOSS_LOW), DEFAULT)[1] is MaxLoss.LOW


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (
            pb.Compression(max_loss=9),  # type: ignore[arg-type]
            "compression.max_loss: got 9, allowed is one of MAX_LOSS_LOW, MAX_LOSS_MEDIUM, MAX_LOSS_HIGH",
        ),
        (
            pb.Compression(max_loss=pb.MAX_LOSS_HIGH, budget_tokens=64),
            "compression.max_loss: got high beside budget_tokens, allowed is one of max_loss and budget_tokens",
        ),
    ],
)
def test_a_loss_that_means_nothing_is_refused(message: pb.Compression, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compression_of(message, DEFAULT)
    assert str(refused.value) == text


shares = st.integers(0, 50).map(lambda hundredths: hundredths / 100)


@given(
    policy=st.sampled_from(Policy),
    ratio=st.integers(1, 1000).map(lambda thousandths: thousandths / 1000),
    min_budget=st.integers(0, 2**32 - 1),
    budget_tokens=st.none() | st.integers(1, 2**32 - 1),
    recent_share=shares,
    window_quota=shares,
    merge=st.sampled_from(Merge),
    layer_budgets=st.sampled_from(LayerBudgets),
)
def test_a_reported_compression_asked_for_again_is_the_same(**changes: Any) -> None:
    config = D2OConfig.of(changes.pop("policy"), **changes)
    message = message_of(config)
    assert len(message.ListFields()) == 8
    assert config_of(message, DEFAULT if config.policy is not DEFAULT.policy else D2OConfig()) == config
