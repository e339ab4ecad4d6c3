"""The cache policies that are compared, at one total of slots each."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.quality.probe import FULL, Contender
from d2o.config import D2OConfig, LayerBudgets, Merge, Policy

SCRAMBLED = "d2o-random"
_FLAGS = {"true": True, "false": False}
_BITS = {"8-bit": 8, "d2o-8-bit": 8}
# The default before docs/adr/0012.
_BEFORE: dict[str, Any] = {
    "window_quota": 0.5,
    "recent_share": 0.1,
    "window_pool": 7,
    "window_ahead": None,
    "layer_gain": 0.3,
    "recurrence_share": 0.0,
}
# Each takes what fixes the budget, so that all hold the same number of slots in all.
_FORMS: dict[str, Callable[..., D2OConfig]] = {
    "streaming": lambda **budget: D2OConfig.of("streaming", **budget),
    "h2o": lambda **budget: D2OConfig.of("h2o", **budget),
    "snapkv": lambda **budget: D2OConfig.of("snapkv", **budget),
    "paper": lambda **budget: D2OConfig.paper(evict_interval=None, **budget),
    "authors": lambda **budget: D2OConfig.authors(evict_interval=None, **budget),
    "d2o": D2OConfig,
    "d2o-drop": lambda **budget: D2OConfig(merge=Merge.NONE, **budget),
    "d2o-uniform": lambda **budget: D2OConfig(layer_budgets=LayerBudgets.UNIFORM, **budget),
    "d2o-before": lambda **budget: D2OConfig(**_BEFORE, **budget),
    "d2o-no-recurrence": lambda **budget: D2OConfig(recurrence_share=0.0, **budget),
    "d2o-no-window": lambda **budget: D2OConfig(window_quota=0.0, **budget),
    "d2o-no-bias": lambda **budget: D2OConfig(merge_bias=False, **budget),
    SCRAMBLED: D2OConfig,
    # Half of the bytes by rounding: the full cache, whatever the ratio, and the default.
    "8-bit": lambda **_: FULL,
    "d2o-8-bit": D2OConfig,
}
NAMES = tuple(_FORMS)
DEFAULT = ("streaming", "h2o", "snapkv", "paper", "d2o", "d2o-drop", SCRAMBLED)


Forms = Mapping[str, Callable[..., D2OConfig]]


def forms(names: Sequence[str], more: Sequence[str] = ()) -> Forms:
    """The contenders of these names, and of each ``LABEL:POLICY:FIELD=VALUE,...`` that policy with such fields.

    Raises:
        ValueError: a name that there is not, or what makes no configuration.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"contenders: got {name!r}, allowed are {', '.join(NAMES)}")
    return {name: _FORMS[name] for name in names} | dict(map(_form, more))


def _form(text: str) -> tuple[str, Callable[..., D2OConfig]]:
    label, policy, fields = (*text.split(":", 2), "", "")[:3]
    if not label or "@" in label or policy not in set(Policy):
        raise ValueError(f"set: got {text!r}, allowed is LABEL:POLICY:FIELD=VALUE,... with a policy such as d2o")
    changes = dict(pair.split("=", 1) for pair in fields.split(",") if pair)
    made: Callable[..., D2OConfig] = partial(D2OConfig.of, policy, **{k: _value(v) for k, v in changes.items()})
    made(ratio=0.5)  # what it refuses, it refuses now
    return label, made


def _value(text: str) -> Any:
    try:
        return _FLAGS[text] if text in _FLAGS else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def at_ratios(entered: Forms, ratios: Sequence[float]) -> list[Contender]:
    """Each at each ratio of the prompt, called ``name@ratio``, after the full cache."""
    return _made(entered, {f"{ratio:g}": {"ratio": ratio, "min_budget": 1} for ratio in ratios})


def at_budgets(entered: Forms, budgets: Sequence[int]) -> list[Contender]:
    """The same at absolute budgets in slots, called ``name@slots``."""
    return _made(entered, {str(budget): {"budget_tokens": budget} for budget in budgets})


def _made(entered: Forms, budgets: dict[str, dict[str, Any]]) -> list[Contender]:
    made = [Contender(name="full", config=FULL)]
    for label, budget in budgets.items():
        for name, form in entered.items():
            scrambled, bits = name == SCRAMBLED, _BITS.get(name)
            made.append(Contender(name=f"{name}@{label}", config=form(**budget), scrambled=scrambled, bits=bits))
    return made
