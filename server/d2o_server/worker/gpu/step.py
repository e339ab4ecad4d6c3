"""Attention of one step by kernels, and the custom operator that carries it through a compiled model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2o.attention import AttentionRule, ScoreTarget
from d2o.kernels.column_sums import add_column_sums
from d2o.kernels.decode import DecodePlan, DecodeWorkspace, decode_attention
from d2o.kernels.paged import PagedTensors
from d2o.kernels.prefill import (
    choose_backend,
    gather_context,
    packed_prefill_attention,
    prefill_attention,
)
from d2o.kernels.store import store_tokens


@dataclass(frozen=True, slots=True)
class DecodePart:
    """The step's decoding sequences; tensors of the device.

    Attributes:
        rows, positions: [batch] int32, each one's row of the pool and its new token's position.
        plan: how their slots are shared out.
        workspace: the kernels' scratch.
        bias, score: whether any of them has slot biases or goes on adding to scores.
        scored: layers that have added this step's scores: a step that runs again must not add them twice.
    """

    rows: Tensor
    positions: Tensor
    plan: DecodePlan
    workspace: DecodeWorkspace
    bias: bool
    score: bool
    scored: set[int]

    @property
    def batch(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prompt's next tokens at ``begin`` to ``end`` of the step's; the first of them stands at position ``start``."""

    begin: int
    end: int
    start: int
    row: int
    scores: tuple[ScoreTarget | None, ...]

    @property
    def count(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """The step's prompts. ``rows``, ``slots``, ``positions``: [prompt tokens] int32, on the device."""

    rows: Tensor
    slots: Tensor
    positions: Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class KernelStep:
    """One step over pages: decoding tokens first, then the prompts' chunks."""

    paged: PagedTensors
    table: Tensor
    decode: DecodePart | None
    prefill: PrefillPart | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """Attention of [heads, tokens, head_dim]; [tokens, heads, head_dim]."""
        if self.prefill is None:
            return self._decode(layer, q, k, v, rule)
        out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
        first = 0
        if self.decode is not None:
            first = self.decode.batch
            out[:first] = self._decode(layer, q[:, :first], k[:, :first], v[:, :first], rule)
        part = self.prefill
        store_tokens(
            k[:, first:], v[:, first:], self.paged, self.table, part.rows, part.slots, part.positions, layer,
            clear_tail=False,
        )  # fmt: skip
        for chunks in _batches(part.chunks, q.dtype, q.shape[-1], rule):
            tokens = slice(chunks[0].begin, chunks[-1].end)
            if len(chunks) > 1:
                out[tokens], lse = self._packed(chunks, q[:, tokens], k[:, tokens], v[:, tokens], rule)
            else:
                out[tokens], lse = self._single(layer, chunks[0], q[:, tokens], k[:, tokens], v[:, tokens], rule)
            for chunk in chunks:
                self._add_scores(
                    layer, chunk, q, k, lse[:, chunk.begin - tokens.start : chunk.end - tokens.start], rule
                )
        return out

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        part = self.decode
        if part is None:
            raise ValueError("a step without prompts and without decoding sequences")
        fresh = layer not in part.scored
        part.scored.add(layer)
        return decode_attention(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            self.paged,
            self.table,
            part.rows,
            part.positions,
            part.plan,
            layer,
            workspace=part.workspace,
            scale=rule.scale,
            window=rule.window,
            softcap=rule.softcap,
            bias=part.bias,
            score=part.score and fresh,
            reset=fresh,
        )

    def _packed(
        self, chunks: list[Chunk], q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]:
        """Whole short prompts side by side in one launch."""
        borders = [chunks[0].begin, *(chunk.end for chunk in chunks)]
        ends = torch.tensor(borders, dtype=torch.int32).sub_(borders[0]).to(q.device, non_blocking=True)
        longest = max(chunk.count for chunk in chunks)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return packed_prefill_attention(q, k, v, ends, ends, longest, longest, rule)

    def _single(
        self, layer: int, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule
    ) -> tuple[Tensor, Tensor]:
        if chunk.start:
            k, v = self._context(layer, chunk)
        out, lse = prefill_attention(q, k, v, start=chunk.start, rule=rule, return_lse=True)
        if lse is None:
            raise ValueError("prefill attention gave no logsumexp")
        return out, lse

    def _context(self, layer: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        return gather_context(self.paged, self.table, layer, chunk.row, chunk.start + chunk.count)

    def _add_scores(self, layer: int, chunk: Chunk, q: Tensor, k: Tensor, lse: Tensor, rule: AttentionRule) -> None:
        target = chunk.scores[layer]
        if target is None:
            return
        tokens = slice(chunk.begin, chunk.end)
        keys = self._context(layer, chunk)[0] if chunk.start else k[:, tokens]
        add_column_sums(
            q[:, tokens],
            keys,
            lse,
            target,
            start=chunk.start,
            scale=rule.scale,
            softcap=rule.softcap,
            window=rule.window,
        )


def _batches(
    chunks: tuple[Chunk, ...], dtype: torch.dtype, head_dim: int, rule: AttentionRule
) -> Iterator[list[Chunk]]:
    """Neighbouring whole prompts that one packed launch serves together; every other chunk alone."""
    held: list[Chunk] = []
    for chunk in chunks:
        packs = not chunk.start and choose_backend(dtype, head_dim, rule, chunk.count, 0) == "flash"
        if held and not packs:
            yield held
            held = []
        if packs:
            held.append(chunk)
        else:
            yield [chunk]
    if held:
        yield held


@dataclass(frozen=True)
class OperatorStep:
    """What travels through the model: the same object in every step, so that compiled code need not be made anew."""

    operator: Callable[..., Tensor]

    def attend(
        self,
        layer: int,
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
        self._current: KernelStep | None = None

        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            layer: int,
            scale: float,
            window: int | None,
            softcap: float | None,
        ) -> Tensor:
            if self._current is None:
                raise ValueError("the attention operator was called outside a step")
            return self._current.attend(layer, query[0], key[0], value[0], AttentionRule(scale, window, softcap))

        # Annotations are strings in this module, and the operator's schema is made from real ones.
        attend.__annotations__ = {
            "query": Tensor,
            "key": Tensor,
            "value": Tensor,
            "layer": int,
            "scale": float,
            "window": int | None,
            "softcap": float | None,
            "return": Tensor,
        }
        operator: Any = torch.library.custom_op(f"d2o::attend_{next(self._numbers)}", attend, mutates_args=())
        operator.register_fake(_shape_of_output)
        self.step = OperatorStep(operator)

    @contextmanager
    def running(self, step: KernelStep) -> Iterator[None]:
        """Makes ``step`` the current one."""
        self._current = step
        try:
            yield
        finally:
            self._current = None


def _shape_of_output(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[2], query.shape[1], query.shape[3])
