"""The cache policies that are compared, at one total of slots each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.probe import FULL, Contender
from d2o.config import D2OConfig, LayerBudgets, Merge

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
    "d2o-pool-7": lambda **budget: D2OConfig(window_pool=7, window_ahead=None, **budget),
    "d2o-pool-21": lambda **budget: D2OConfig(window_pool=21, window_ahead=None, **budget),
    "d2o-quota-0.5": lambda **budget: D2OConfig(window_quota=0.5, **budget),
    "d2o-gain-0.6": lambda **budget: D2OConfig(layer_gain=0.6, **budget),
    "d2o-blend": lambda **budget: D2OConfig(window_quota=0.0, window_blend=0.5, **budget),
    "d2o-before": lambda **budget: D2OConfig(window_quota=0.5, window_pool=7, window_ahead=None, **budget),
    "snapkv-pool-21": lambda **budget: D2OConfig.of("snapkv", window_pool=21, **budget),
    "d2o-no-window": lambda **budget: D2OConfig(window_quota=0.0, recent_share=0.25, **budget),
    "d2o-no-bias": lambda **budget: D2OConfig(merge_bias=False, **budget),
}
SCRAMBLED = "d2o-random"
# Half of the bytes by rounding: the full cache, whatever the ratio, and the default.
_ROUNDED = ("8-bit", "d2o-8-bit")
_BITS = 8
NAMES = (*_FORMS, SCRAMBLED, *_ROUNDED)
DEFAULT = ("streaming", "h2o", "snapkv", "paper", "d2o", "d2o-drop", SCRAMBLED)


def named(names: Sequence[str], ratios: Sequence[float]) -> list[Contender]:
    """The contenders of these names at each ratio of the prompt, called ``name@ratio``, after the full cache.

    Raises:
        ValueError: a name that there is not.
    """
    return _made(names, {f"{ratio:g}": {"ratio": ratio, "min_budget": 1} for ratio in ratios})


def absolute(names: Sequence[str], budgets: Sequence[int]) -> list[Contender]:
    """The same at absolute budgets in slots, called ``name@slots``."""
    return _made(names, {str(budget): {"budget_tokens": budget} for budget in budgets})


def _made(names: Sequence[str], budgets: dict[str, dict[str, Any]]) -> list[Contender]:
    for name in names:
        if name not in NAMES:
            raise ValueError(f"contenders: got {name!r}, allowed are {', '.join(NAMES)}")
    made = [Contender(name="full", config=FULL)]
    for label, budget in budgets.items():
        for name in names:
            config = _FORMS.get(name, D2OConfig)(**budget) if name != "8-bit" else FULL
            bits = _BITS if name in _ROUNDED else None
            made.append(Contender(name=f"{name}@{label}", config=config, scrambled=name == SCRAMBLED, bits=bits))
    return made
