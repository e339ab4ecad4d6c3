"""Steps that read short prompts: all of the model but attention and the last projection in CUDA graphs.

Launched one by one, the kernels of such a step take the host longer than the GPU. Attention depends on the step's
prompts and stays outside: a graph ends where it begins, and the next begins where it ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2o.attention import AttentionRule
from d2o_server.worker.gpu.batch_sizes import BatchSize, multiplying_by
from d2o_server.worker.gpu.lent import lent
from d2o_server.worker.gpu.model import Logits, ModelForward
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.step import KernelStep

_WARM_UP_RUNS = 2
# Larger steps keep an H200 busy for longer than the host takes to launch them.
_SIZES = (128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)


def body_sizes(most: int) -> list[int]:
    """Numbers of tokens to capture, ascending, where a step has at most ``most``."""
    return [size for size in _SIZES if size < most] + [most] * (most <= _SIZES[-1])


@dataclass(frozen=True, slots=True)
class _Attention:
    """What happens between two graphs: q, k and v [heads, size, head_dim] become out [size, heads, head_dim]."""

    layer: int
    rule: AttentionRule
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    def run(self, step: KernelStep, tokens: int) -> None:
        """Attends for the first ``tokens``; those behind are padding, whose results are anything."""
        step.attend(
            self.layer, self.q[:, :tokens], self.k[:, :tokens], self.v[:, :tokens], self.rule, out=self.out[:tokens]
        )


@dataclass(slots=True)
class _Captured:
    """The body for one number of tokens: a graph, an attention, and so on to the last graph.

    As the operator's current step while it is captured it attends to nothing.
    """

    pool: Any
    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    attentions: list[_Attention] = field(default_factory=list)
    output: Any = None

    def begin(self) -> None:
        """Begins the next graph."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool)
        self.graphs.append(graph)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """Notes where the operands stand and where the result is expected."""
        out = _empty_output(q)
        self.graphs[-1].capture_end()
        self.attentions.append(_Attention(layer, rule, lent(q), lent(k), lent(v), lent(out)))
        self.begin()
        return out

    def replay(self, step: KernelStep, tokens: int) -> Any:
        """What the body returns for a step's tokens."""
        for graph, attention in zip(self.graphs, self.attentions, strict=False):
            graph.replay()
            attention.run(step, tokens)
        self.graphs[-1].replay()
        return type(self.output)(last_hidden_state=self.output.last_hidden_state[:, :tokens])


class _Absent:
    """A step whose attention leaves its result as it finds it."""

    def attend(self, _layer: int, q: Tensor, _k: Tensor, _v: Tensor, _rule: AttentionRule) -> Tensor:
        return _empty_output(q)


def _empty_output(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], q.shape[2])


class BodyGraphs:
    """Runs a step's tokens through the model, replaying graphs where some were captured for as many or a few more."""

    def __init__(self, forward: ModelForward, operator: AttentionOperator, device: torch.device) -> None:
        self._forward, self._operator = forward, operator
        self._ids, self._positions = (torch.zeros(1, _SIZES[-1], dtype=torch.int64, device=device) for _ in range(2))
        self._sizes: list[int] = []
        self._captured: dict[int, _Captured] = {}

    def rehearse(self, tokens: int) -> None:
        """Runs the body for so many tokens as it is captured."""
        with self._operator.running(_Absent()):
            self._run(tokens)

    def capture(self, sizes: list[BatchSize], pool: Any, progress: Callable[[str], None]) -> None:
        """Captures the body for these numbers of tokens; ``pool`` is the memory that other graphs work in.

        What a replay returns holds until the next replay of any graph in it.
        """
        if self._forward.body is None:
            return
        # One for all: a stream keeps what it has been given for its warm-ups, and workspaces to multiply in.
        stream = torch.cuda.Stream(self._ids.device)
        for size in reversed(sizes):
            progress(f"capturing steps of {size.rows} tokens that read prompts")
            with multiplying_by(size.library):
                self._captured[size.rows] = self._capture(size.rows, pool, stream)
        self._sizes = sorted(self._captured)

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        captured = _Captured(pool)

        def record(body: Callable[[], Any]) -> Any:
            captured.begin()
            output = body()
            captured.graphs[-1].capture_end()
            captured.output = type(output)(last_hidden_state=lent(output.last_hidden_state))
            return output

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self.rehearse(size)
            torch.cuda.synchronize()
            with self._operator.running(captured), self._instead(record):
                self._run(size)
        torch.cuda.current_stream().wait_stream(stream)
        return captured

    def run(self, ids: Tensor, positions: Tensor, keep: Tensor, step: KernelStep) -> Logits | None:
        """One step, or None where none was captured for so many tokens.

        Args:
            ids, positions: [tokens] int64 on the device.
            keep: [n] int64 on the device, the tokens whose logits are asked for.
            step: what attends.
        """
        tokens = ids.numel()
        place = bisect_left(self._sizes, tokens)
        if place == len(self._sizes):
            return None
        captured = self._captured[self._sizes[place]]
        self._ids[0, :tokens], self._positions[0, :tokens] = ids, positions
        with self._instead(lambda _: captured.replay(step, tokens)):
            return self._forward(ids[None], positions[None], keep, self._operator.step)

    def _run(self, tokens: int) -> Logits:
        keep = torch.zeros(2, dtype=torch.int64, device=self._ids.device)
        return self._forward(self._ids[:, :tokens], self._positions[:, :tokens], keep, self._operator.step)

    @contextmanager
    def _instead(self, run: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
        """Has ``run`` return what the body would; it is given the body."""
        body = self._forward.body
        if body is None:
            raise ValueError("a model without a body of its own")
        body.around = run
        try:
            yield
        finally:
            body.around = None
