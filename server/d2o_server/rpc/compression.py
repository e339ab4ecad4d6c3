"""The wire's Compression and the method's D2OConfig, both ways."""

from __future__ import annotations

from typing import Any, TypeVar

from d2o.config import ConfigError, D2OConfig, LayerBudgets, Merge, Policy
from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_server.engine.types import AutoCompression, Compression, MaxLoss, settled
from d2o_server.errors import InvalidRequest
from d2o_server.rpc import bounds

POLICIES: dict[pb.CompressionPolicy, Policy] = {
    pb.COMPRESSION_POLICY_NONE: Policy.NONE,
    pb.COMPRESSION_POLICY_D2O: Policy.D2O,
    pb.COMPRESSION_POLICY_H2O: Policy.H2O,
    pb.COMPRESSION_POLICY_STREAMING: Policy.STREAMING,
    pb.COMPRESSION_POLICY_SNAPKV: Policy.SNAPKV,
}
MERGES: dict[pb.MergeRule, Merge] = {
    pb.MERGE_RULE_NONE: Merge.NONE,
    pb.MERGE_RULE_PAPER: Merge.PAPER,
    pb.MERGE_RULE_AUTHORS: Merge.AUTHORS,
    pb.MERGE_RULE_CONSERVE: Merge.CONSERVE,
}
LAYER_BUDGETS: dict[pb.LayerBudgetRule, LayerBudgets] = {
    pb.LAYER_BUDGET_RULE_UNIFORM: LayerBudgets.UNIFORM,
    pb.LAYER_BUDGET_RULE_PAPER: LayerBudgets.PAPER,
    pb.LAYER_BUDGET_RULE_VARIANCE: LayerBudgets.VARIANCE,
    pb.LAYER_BUDGET_RULE_COVERAGE: LayerBudgets.COVERAGE,
}
MAX_LOSSES: dict[pb.MaxLoss, MaxLoss] = {
    pb.MAX_LOSS_LOW: MaxLoss.LOW,
    pb.MAX_LOSS_MEDIUM: MaxLoss.MEDIUM,
    pb.MAX_LOSS_HIGH: MaxLoss.HIGH,
}
_POLICY_NUMBERS = {policy: number for number, policy in POLICIES.items()}
_MERGE_NUMBERS = {merge: number for number, merge in MERGES.items()}
_LAYER_BUDGET_NUMBERS = {rule: number for number, rule in LAYER_BUDGETS.items()}


K = TypeVar("K", bound=int)
V = TypeVar("V")


def compression_of(message: pb.Compression, default: Compression) -> tuple[Compression, MaxLoss | None]:
    """What the message asks for, and the loss that is to set its ratio.

    Auto compresses as D2O does: the message's changes are to that.

    Raises:
        InvalidRequest: a field is out of bounds, or the fields contradict each other.
    """
    max_loss = _choice("max_loss", message.max_loss, MAX_LOSSES, pb.MaxLoss)
    if max_loss is not None:
        for name in ("ratio", "min_budget", "budget_tokens"):
            if message.HasField(name):
                raise InvalidRequest("compression.max_loss", f"{max_loss} beside {name}", f"one of max_loss and {name}")
    base, auto = settled(default)
    if message.policy == pb.COMPRESSION_POLICY_AUTO or (auto and not message.policy):
        plain = pb.Compression()
        plain.CopyFrom(message)
        plain.policy = pb.COMPRESSION_POLICY_D2O
        return AutoCompression(config_of(plain, base)), max_loss
    return config_of(message, base), max_loss


def config_of(message: pb.Compression, default: D2OConfig) -> D2OConfig:
    """``default``, or the published form of another policy at the default's budget, with the message's changes.

    A ratio or least budget that the message sets replaces an absolute budget of the default's, as does
    ``budget_tokens`` 0, which is also how an absolute budget that is not in force is reported.

    Raises:
        InvalidRequest: a field is out of bounds, or the fields contradict each other.
    """
    policy = _choice("policy", message.policy, POLICIES, pb.CompressionPolicy) or default.policy
    given = {name for name in ("ratio", "recent_share", "window_quota", "min_budget") if message.HasField(name)}
    changes: dict[str, Any] = {name: getattr(message, name) for name in given}
    for name in given - {"min_budget"}:
        changes[name] = bounds.shortest_float32(changes[name])
    if message.HasField("budget_tokens"):
        changes["budget_tokens"] = message.budget_tokens or None
    elif given & {"ratio", "min_budget"}:
        changes["budget_tokens"] = None
    if merge := _choice("merge", message.merge, MERGES, pb.MergeRule):
        changes["merge"] = merge
    if rule := _choice("layer_budgets", message.layer_budgets, LAYER_BUDGETS, pb.LayerBudgetRule):
        changes["layer_budgets"] = rule
    if policy is not default.policy:
        budget = {name: getattr(default, name) for name in ("ratio", "min_budget", "budget_tokens")}
        default = D2OConfig.of(policy, **budget)
    try:
        return default.with_changes(**changes)
    except ConfigError as error:
        raise InvalidRequest(f"compression.{error.field}", error.given, error.allowed) from error


def policy_number(policy: Policy | None) -> pb.CompressionPolicy:
    """``policy`` as the wire has it; None is auto."""
    return pb.COMPRESSION_POLICY_AUTO if policy is None else _POLICY_NUMBERS[policy]


def message_of(compression: Compression) -> pb.Compression:
    """``compression`` with every field of the wire set but ``max_loss``.

    ``budget_tokens`` is 0 where no absolute budget is in force.
    """
    config, auto = settled(compression)
    return pb.Compression(
        policy=policy_number(None if auto else config.policy),
        ratio=config.ratio,
        min_budget=config.min_budget,
        budget_tokens=config.budget_tokens or 0,
        recent_share=config.recent_share,
        window_quota=config.window_quota,
        merge=_MERGE_NUMBERS[config.merge],
        layer_budgets=_LAYER_BUDGET_NUMBERS[config.layer_budgets],
    )


def _choice(name: str, given: K, table: dict[K, V], enum: Any) -> V | None:
    if given == 0:
        return None
    if given not in table:
        allowed = "one of " + ", ".join(enum.keys()[1:])
        raise InvalidRequest(f"compression.{name}", given, allowed)
    return table[given]
