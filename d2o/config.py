"""What a sequence's KV cache keeps: one frozen, validated value that names every variant of the method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class ConfigError(ValueError):
    """A field of :class:`D2OConfig` is out of bounds; ``field`` names it."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        super().__init__(f"compression.{field}: got {given!r}, allowed is {allowed}")
        self.field = field
        self.given = given
        self.allowed = allowed


class Policy(StrEnum):
    """Whose rule chooses the slots that survive."""

    NONE = "none"
    D2O = "d2o"
    H2O = "h2o"
    STREAMING = "streaming"
    SNAPKV = "snapkv"


class LayerBudgets(StrEnum):
    """How the total budget is divided over layers."""

    UNIFORM = "uniform"
    PAPER = "paper"
    VARIANCE = "variance"
    COVERAGE = "coverage"


class Merge(StrEnum):
    """What becomes of an evicted token that passes the threshold."""

    NONE = "none"
    PAPER = "paper"
    AUTHORS = "authors"
    CONSERVE = "conserve"


class Threshold(StrEnum):
    """How the similarity threshold moves after the first eviction."""

    OFF = "off"
    PAPER = "paper"
    AUTHORS = "authors"


class Scope(StrEnum):
    """Whether a quantity is kept for each KV head or shared by the heads of a layer."""

    HEAD = "head"
    LAYER = "layer"


class Ranking(StrEnum):
    """Whether slots are ranked by the attention they received per query that saw them, or in sum."""

    MEAN = "mean"
    SUM = "sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreQueries:
    """Which prompt queries the attention scores are summed over (ALGORITHM section 1).

    ``kind`` is ``"all"``, ``"last"`` (the last ``count`` queries), ``"stride"`` (every ``count``-th block of
    queries and always the last block, scaled up to an estimate of all) or ``"sample"`` (the widest stride that
    still leaves ``count`` queries: all of a prompt shorter than twice as many).
    """

    kind: str = "all"
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> ScoreQueries:
        """Reads ``all``, ``last:W``, ``stride:n`` or ``sample:Q``."""
        kind, _, count = text.partition(":")
        if kind == "all" and not count:
            return cls()
        if kind in ("last", "stride", "sample") and count.isdecimal() and int(count) > 0:
            return cls(kind=kind, count=int(count))
        allowed = "'all', 'last:W', 'stride:n' or 'sample:Q' with a positive whole number"
        raise ConfigError("score_queries", text, allowed)

    def stride(self, prompt_tokens: int) -> int:
        """Every how many-th block of such a prompt's queries counts; 1 is all of them."""
        if self.kind == "sample":
            return max(1, prompt_tokens // self.count)
        return self.count if self.kind == "stride" else 1

    def __str__(self) -> str:
        return "all" if self.kind == "all" else f"{self.kind}:{self.count}"


@dataclass(frozen=True, slots=True, kw_only=True)
class D2OConfig:
    """How the KV cache of one sequence is compressed. Counts are tokens (slots) of one layer.

    The defaults are the mass-conserving variant with a window quota; :meth:`paper` and :meth:`authors` give the
    published ones and :meth:`of` the peers (H2O arXiv 2306.14048, StreamingLLM arXiv 2309.17453, SnapKV arXiv
    2404.14469). Source of the method: Wan et al., D2O, arXiv 2406.13035.

    Attributes:
        policy: the rule that chooses survivors; ``none`` is the full cache.
        ratio: a layer's average budget as a share of the prompt, in (0, 1].
        min_budget: lower bound of that average budget, in tokens.
        budget_tokens: an absolute average budget; replaces ``ratio`` and ``min_budget`` where set.
        sinks: the first tokens of a sequence, which always survive.
        recent_share: share of a layer's budget that its most recent tokens take, in [0, 1], rounded down.
        recent_tokens: the same in tokens; replaces ``recent_share`` where set.
        window_queries: prompt queries at its end that make up the observation window; 0 means no window score.
        window_pool: width of the mean pooling over window scores, in slots.
        window_ahead: how many of the pooled slots come after the one that gets the mean, the others before; None is
            half of them, for which the width must be odd.
        window_quota: share of a layer's budget that goes to the best by window score, in [0, 1].
        window_blend: weight of the window score in the ranking of the rest, in [0, 1].
        recurrence_share: share of the average budget that may go to what followed an earlier occurrence of the prompt's
            end (:mod:`d2o.recurrence`), in [0, 1]; part of the window's quota, and without one nothing.
        ranking: rank by mean or by summed attention.
        score_queries: which prompt queries are summed over.
        layer_budgets: the division over layers; ``layer_gain`` is the gain of ``variance``, over layers whose log
            variances deviate by 1 or more; over layers that are more alike it is less.
        layer_floor: lower bound of a layer's budget as a share of the prompt (paper: 0.01).
        dense_layers: layers that stay uncompressed; the others pay for them.
        heads: each KV head chooses its own survivors, or one choice is shared by a layer.
        merge: how evicted tokens are folded into survivors; ``merge_keys`` and ``merge_bias`` refine ``conserve``.
        merge_into_sinks: whether sinks are survivors that evicted tokens may be merged into (the published D2O).
        merge_weight: the survivor's own weight ``e`` in the paper's merge (eq. 11); exp(1) makes it convex.
        bias_limit: upper clamp of a slot's logit bias.
        threshold: how the similarity threshold moves; ``threshold_scope``: one a KV head or one a layer.
        beta: weight of the newest similarity in the moving threshold (paper: 0.7).
        alpha: weight of the old threshold; None is 1 - beta, as in the paper.
        evict_interval: decode tokens between evictions; None is a page's worth, of large budgets up to 64 tokens.
    """

    policy: Policy = Policy.D2O
    ratio: float = 0.4
    min_budget: int = 1024
    budget_tokens: int | None = None
    sinks: int = 4
    recent_share: float = 0.3
    recent_tokens: int | None = None
    window_queries: int = 32
    window_pool: int = 16
    window_ahead: int | None = 3
    window_quota: float = 0.5
    window_blend: float = 0.0
    recurrence_share: float = 0.25
    ranking: Ranking = Ranking.MEAN
    score_queries: ScoreQueries = ScoreQueries(kind="sample", count=4096)
    layer_budgets: LayerBudgets = LayerBudgets.VARIANCE
    layer_gain: float = 0.6
    layer_floor: float = 0.01
    dense_layers: tuple[int, ...] = ()
    heads: Scope = Scope.HEAD
    merge: Merge = Merge.CONSERVE
    merge_keys: bool = False
    merge_bias: bool = True
    merge_into_sinks: bool = False
    merge_weight: float = math.e
    bias_limit: float = 2.0
    threshold: Threshold = Threshold.PAPER
    threshold_scope: Scope = Scope.HEAD
    beta: float = 0.7
    alpha: float | None = None
    evict_interval: int | None = None

    def __post_init__(self) -> None:
        self._coerce_enums()
        self._check_share("ratio", self.ratio, exclusive_zero=True)
        for name in ("recent_share", "window_quota", "window_blend", "recurrence_share", "layer_floor", "beta"):
            self._check_share(name, getattr(self, name))
        if self.alpha is not None:
            self._check_share("alpha", self.alpha)
        self._check_whole("min_budget", self.min_budget, 0)
        for name, low in (("budget_tokens", 1), ("recent_tokens", 0), ("evict_interval", 1)):
            if getattr(self, name) is not None:
                self._check_whole(name, getattr(self, name), low)
        self._check_whole("sinks", self.sinks, 0)
        self._check_whole("window_queries", self.window_queries, 0)
        self._check_whole("window_pool", self.window_pool, 1)
        if self.window_ahead is None and self.window_pool % 2 == 0:
            raise ConfigError("window_pool", self.window_pool, "an odd whole number where window_ahead is None")
        if self.window_ahead is not None:
            self._check_whole("window_ahead", self.window_ahead, 0)
            if self.window_ahead >= self.window_pool:
                raise ConfigError("window_ahead", self.window_ahead, f"less than window_pool = {self.window_pool}")
        if self.window_quota + self.recent_share > 1:
            raise ConfigError("window_quota", self.window_quota, f"at most 1 - recent_share = {1 - self.recent_share}")
        if (self.window_quota or self.window_blend) and not self.window_queries:
            raise ConfigError("window_queries", 0, "at least 1 where window_quota or window_blend is set")
        self._check_number("layer_gain", self.layer_gain, -100, 100)
        self._check_number("merge_weight", self.merge_weight, 0, 1e6)
        self._check_number("bias_limit", self.bias_limit, 0, 100)
        for layer in self.dense_layers:
            self._check_whole("dense_layers", layer, 0)
        self._check_flags("merge_keys", "merge_bias", "merge_into_sinks")

    def _coerce_enums(self) -> None:
        kinds: tuple[tuple[str, type[StrEnum]], ...] = (
            ("policy", Policy),
            ("ranking", Ranking),
            ("layer_budgets", LayerBudgets),
            ("heads", Scope),
            ("merge", Merge),
            ("threshold", Threshold),
            ("threshold_scope", Scope),
        )
        for name, kind in kinds:
            given = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(given))
            except ValueError:
                raise ConfigError(name, given, "one of " + ", ".join(kind)) from None
        if isinstance(self.score_queries, str):
            object.__setattr__(self, "score_queries", ScoreQueries.parse(self.score_queries))
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, getattr(self, name), "true or false")

    @staticmethod
    def _check_number(field: str, given: float, low: float, high: float) -> None:
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not low <= given <= high:
            raise ConfigError(field, given, f"a number in [{low}, {high}]")

    @staticmethod
    def _check_share(field: str, given: float, exclusive_zero: bool = False) -> None:
        bad = isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1
        if bad or (exclusive_zero and given == 0):
            raise ConfigError(field, given, "a number in " + ("(0, 1]" if exclusive_zero else "[0, 1]"))

    @staticmethod
    def _check_whole(field: str, given: int, low: int) -> None:
        if isinstance(given, bool) or not isinstance(given, int) or given < low:
            raise ConfigError(field, given, f"a whole number of at least {low}")

    @property
    def enabled(self) -> bool:
        """Whether anything is ever evicted."""
        return self.policy is not Policy.NONE

    @property
    def evicts_in_decode(self) -> bool:
        """SnapKV compresses the prompt only; every other policy keeps its budget in decode."""
        return self.policy in (Policy.D2O, Policy.H2O, Policy.STREAMING)

    def average_budget(self, prompt_tokens: int) -> int:
        """A layer's average budget B in slots for a prompt of this length."""
        if self.budget_tokens is not None:
            return max(self.budget_tokens, self.sinks + 1)
        return max(self.min_budget, math.ceil(self.ratio * prompt_tokens), self.sinks + 1)

    def with_changes(self, **changes: Any) -> D2OConfig:
        """A copy with some fields replaced, validated again."""
        return replace(self, **changes)

    @classmethod
    def of(cls, policy: Policy | str, **changes: Any) -> D2OConfig:
        """The published form of ``policy`` (``d2o``: this project's default)."""
        base: dict[str, Any] = {"policy": Policy(policy)}
        plain = {
            "merge": Merge.NONE,
            "layer_budgets": LayerBudgets.UNIFORM,
            "window_quota": 0.0,
            "recurrence_share": 0.0,
            "threshold": Threshold.OFF,
            "score_queries": ScoreQueries(),
        }
        match Policy(policy):
            case Policy.H2O:
                base |= plain | {"ranking": Ranking.SUM, "recent_share": 0.5, "sinks": 0}
            case Policy.STREAMING:
                base |= plain | {"recent_share": 1.0}
            case Policy.SNAPKV:
                base |= plain | {
                    "recent_share": 0.0,
                    "window_blend": 1.0,
                    "window_pool": 7,
                    "window_ahead": None,
                    "sinks": 0,
                }
        return cls(**(base | changes))

    @classmethod
    def paper(cls, **changes: Any) -> D2OConfig:
        """D2O to the paper's letter: equations 3 to 12, N : M = 3 : 1, eviction at every step."""
        return cls(**(_PAPER | changes))

    @classmethod
    def authors(cls, **changes: Any) -> D2OConfig:
        """D2O as the authors' code does it: recent half, one threshold a layer by means, scatter-mean merge."""
        return cls(**(_PAPER | _AUTHORS | changes))


_PAPER: dict[str, Any] = {
    "recent_share": 0.25,
    "window_quota": 0.0,
    "recurrence_share": 0.0,
    "ranking": Ranking.SUM,
    "score_queries": ScoreQueries(),
    "layer_budgets": LayerBudgets.PAPER,
    "merge": Merge.PAPER,
    "merge_into_sinks": True,
    "evict_interval": 1,
}
_AUTHORS: dict[str, Any] = {
    "recent_share": 0.5,
    "merge": Merge.AUTHORS,
    "threshold": Threshold.AUTHORS,
    "threshold_scope": Scope.LAYER,
    "beta": 0.5,
}
