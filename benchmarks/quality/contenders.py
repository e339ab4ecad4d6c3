"""The cache policies that are compared, at one total of slots each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    "d2o-no-window": lambda **budget: D2OConfig(window_quota=0.0, recent_share=0.25, **budget),
    "d2o-no-bias": lambda **budget: D2OConfig(merge_bias=False, **budget),
}
SCRAMBLED = "d2o-random"
NAMES = (*_FORMS, SCRAMBLED)
DEFAULT = ("streaming", "h2o", "snapkv", "paper", "d2o", "d2o-drop", SCRAMBLED)


def named(names: Sequence[str], ratios: Sequence[float]) -> list[Contender]:
    """The contenders of these names at each ratio of the prompt, called ``name@ratio``, after the full cache.

    Raises:
        ValueError: a name that there is not.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"contenders: got {name!r}, allowed are {', '.join(NAMES)}")
    made = [Contender(name="full", config=FULL)]
    for ratio in ratios:
        for name in names:
            form = _FORMS["d2o" if name == SCRAMBLED else name]
            config = form(ratio=ratio, min_budget=1)
            made.append(Contender(name=f"{name}@{ratio:g}", config=config, scrambled=name == SCRAMBLED))
    return made
