"""What goes into a request: prompts, options, compression, and the checks of their types."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypedDict, TypeVar

from d2o_client._errors import invalid

EnumT = TypeVar("EnumT", bound=StrEnum)


class Policy(StrEnum):
    """Whose rule chooses the cache slots that survive."""

    NONE = "none"
    D2O = "d2o"
    H2O = "h2o"
    STREAMING = "streaming"
    SNAPKV = "snapkv"
    AUTO = "auto"


class MaxLoss(StrEnum):
    """How much quality a request may lose to compression: the server has a ratio for each, by its measurements."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class Merge(StrEnum):
    """How evicted tokens are folded into survivors."""

    NONE = "none"
    PAPER = "paper"
    AUTHORS = "authors"
    CONSERVE = "conserve"


class LayerBudgets(StrEnum):
    """How a request's total budget is divided over layers."""

    UNIFORM = "uniform"
    PAPER = "paper"
    VARIANCE = "variance"
    COVERAGE = "coverage"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation. ``role`` is "system", "user", "assistant" or what the chat template knows."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage | Mapping[str, str] | tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Compression:
    """How a request's cache is compressed; what is None takes the server's default for the policy.

    Enumerated fields also take their names as strings. Bounds belong to the server; here only types are checked.

    Attributes:
        policy: the rule that chooses survivors; ``none`` is the full cache, ``auto`` that or ``d2o`` as room allows.
        ratio: a layer's average budget as a share of the prompt, in (0, 1].
        min_budget: lower bound of that average budget, in slots.
        budget_tokens: an absolute average budget in slots; replaces ``ratio`` and ``min_budget``.
        recent_share: share of the budget that goes to the most recent tokens, in [0, 1].
        window_quota: share of the budget that goes to the best tokens by the last window of queries, in [0, 1].
        merge: how evicted tokens are folded into survivors.
        layer_budgets: how the total budget is divided over layers.
        max_loss: how much quality may be lost, instead of ``ratio``, ``min_budget`` and ``budget_tokens``.

    Raises:
        InvalidArgumentError: a field has the wrong type or an unknown name.
    """

    policy: Policy | str | None = None
    ratio: float | None = None
    min_budget: int | None = None
    budget_tokens: int | None = None
    recent_share: float | None = None
    window_quota: float | None = None
    merge: Merge | str | None = None
    layer_budgets: LayerBudgets | str | None = None
    max_loss: MaxLoss | str | None = None

    def __post_init__(self) -> None:
        kinds: tuple[tuple[str, type[StrEnum]], ...] = (
            ("policy", Policy),
            ("merge", Merge),
            ("layer_budgets", LayerBudgets),
            ("max_loss", MaxLoss),
        )
        for name, kind in kinds:
            object.__setattr__(self, name, enum_member(f"compression.{name}", getattr(self, name), kind))
        for name in ("ratio", "recent_share", "window_quota"):
            check_number(f"compression.{name}", getattr(self, name))
        for name in ("min_budget", "budget_tokens"):
            check_whole(f"compression.{name}", getattr(self, name), bits=32)


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of ``generate`` and ``stream``; what is left out takes the server's default.

    ``temperature`` 0 is greedy; ``top_k`` 0 keeps all; ``stop`` is one string or several, which end the text
    before they appear; ``logprobs`` is how many of the most probable tokens are reported beside the sampled one
    (0 reports the sampled one alone); ``compression`` is a policy's name or a :class:`Compression`. ``priority``, from
    0 to 9, orders requests that wait for cache pages, the higher first.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_end_of_text: bool | None
    logprobs: int | None
    compression: Compression | Policy | str | None
    priority: int | None


def enum_member(field: str, given: str | None, kind: type[EnumT]) -> EnumT | None:
    """The member of ``kind`` that ``given`` is or names; None stays None."""
    if given is None:
        return None
    try:
        return kind(given)
    except ValueError:
        raise invalid(field, given, "one of " + ", ".join(kind)) from None


def check_number(field: str, given: object) -> None:
    """Refuses what is neither None nor a finite number."""
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, numbers.Real) or not math.isfinite(given):
        raise invalid(field, given, "a finite number")


def check_whole(field: str, given: object, *, bits: int) -> None:
    """Refuses what is neither None nor a whole number that ``bits`` bits hold."""
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, numbers.Integral) or not 0 <= int(given) < 2**bits:
        raise invalid(field, given, f"a whole number in [0, {2**bits - 1}]")
