"""The custom operator that carries attention over pages through a compiled model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from d2o.attention import AttentionRule


class Attends(Protocol):
    """What the operator asks for attention: :class:`d2o_server.worker.gpu.step.KernelStep`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor: ...


@dataclass(frozen=True)
class OperatorStep:
    """What travels through the model: the same object in every step, so that compiled code need not be made anew."""

    operator: Callable[..., Tensor]

    def attend(
        self,
        layer: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See :class:`d2o_server.worker.hf_attention.AttentionStep`."""
        return self.operator(query, key, value, layer, scale, window, softcap)


class AttentionOperator:
    """A custom operator of torch that attends in whatever step is current.

    The compiler sees its tensors only. That it writes to the pool is not declared: nothing else in the graph reads the
    pool, layers follow one another through the hidden state, and a declared write would make the compiler copy it.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._current: Attends | None = None

        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            layer: Tensor,
            scale: float,
            window: int | None,
            softcap: float | None,
        ) -> Tensor:
            if self._current is None:
                raise ValueError("the attention operator was called outside a step")
            return self._current.attend(int(layer), query[0], key[0], value[0], AttentionRule(scale, window, softcap))

        # Annotations are strings in this module, and the operator's schema is made from real ones.
        attend.__annotations__ = {
            "query": Tensor,
            "key": Tensor,
            "value": Tensor,
            "layer": Tensor,
            "scale": float,
            "window": int | None,
            "softcap": float | None,
            "return": Tensor,
        }
        operator: Any = torch.library.custom_op(f"d2o::attend_{next(self._numbers)}", attend, mutates_args=())
        operator.register_fake(_shape_of_output)
        self.step = OperatorStep(operator)

    @contextmanager
    def running(self, step: Attends) -> Iterator[None]:
        """Makes ``step`` the current one."""
        self._current = step
        try:
            yield
        finally:
            self._current = None


def _shape_of_output(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[2], query.shape[1], query.shape[3])
