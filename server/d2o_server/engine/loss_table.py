"""What a request's ``max_loss`` stands for, from the cost of ratios (docs/quality.md, "What it costs")."""

from __future__ import annotations

from d2o.config import D2OConfig, Policy
from d2o_server.engine.types import MaxLoss
from d2o_server.errors import InvalidRequest

RATIOS: dict[MaxLoss, float] = {MaxLoss.LOW: 0.5, MaxLoss.MEDIUM: 0.4, MaxLoss.HIGH: 0.2}
"""The ratio of D2O at its default configuration; ``min_budget`` stays the server's."""


def with_max_loss(config: D2OConfig, max_loss: MaxLoss) -> D2OConfig:
    """``config`` at the ratio that loses no more.

    Raises:
        InvalidRequest: it is of another policy than D2O, for which nothing was measured.
    """
    if config.policy is not Policy.D2O:
        allowed = "max_loss with the policies d2o and auto, whose loss was measured"
        raise InvalidRequest("compression.max_loss", f"{max_loss} with policy {config.policy}", allowed)
    return config.with_changes(ratio=RATIOS[max_loss], budget_tokens=None)
