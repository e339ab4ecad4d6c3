"""Decode steps as CUDA graphs, one for each of a few batch sizes; smaller batches are padded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from d2o.kernels.decode import DecodeGrid, DecodePlan, DecodeWorkspace, plan_decode
from d2o.kernels.decode_plan import MOST_AT_ONCE
from d2o_server.worker.gpu.batch_sizes import BatchSize, multiplying_by
from d2o_server.worker.gpu.cache_ops import KernelCacheOps
from d2o_server.worker.gpu.device import upload
from d2o_server.worker.gpu.lent import lent
from d2o_server.worker.gpu.model import Logits, ModelForward
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.step import DecodePart, KernelStep

_WARM_UP_RUNS = 2


class DecodeInputs:
    """What the host says of a decode step, in one buffer of the device: rows, positions and lengths.

    A captured graph reads the same addresses at every replay.
    """

    def __init__(self, layers: int, capacity: int, device: torch.device) -> None:
        self._layers = layers
        self._buffer = torch.zeros((2 + layers) * capacity, dtype=torch.int32, device=device)

    def views(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """rows [batch], positions [batch], lengths [layers, batch]."""
        rows, positions, lengths = self._buffer[: (2 + self._layers) * batch].split(
            [batch, batch, self._layers * batch]
        )
        return rows, positions, lengths.view(self._layers, batch)

    def fill(self, rows: Tensor, positions: Tensor, lengths: Tensor, batch: int, padding_row: int) -> None:
        """Sends a step's numbers, padded to ``batch`` with sequences of one slot in the padding row."""
        packed = torch.empty(2 + self._layers, batch, dtype=torch.int32)
        size = rows.numel()
        packed[0, :size], packed[0, size:] = rows, padding_row
        packed[1, :size], packed[1, size:] = positions, 0
        packed[2:, :size], packed[2:, size:] = lengths, 1
        self._buffer[: packed.numel()].copy_(upload(packed.view(-1), self._buffer.device), non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: Logits


class DecodeGraphs:
    """Runs decode steps, replaying a graph where one was captured.

    ``last_token`` [rows] int64 on the device has every row's newest token, which a step reads there: it can be launched
    before the host knows what was sampled. ``most`` is the largest batch, padding included.
    """

    def __init__(
        self,
        forward: ModelForward,
        operator: AttentionOperator,
        ops: KernelCacheOps,
        workspace: DecodeWorkspace,
        last_token: Tensor,
        most: int,
    ) -> None:
        self._forward, self._operator, self._ops = forward, operator, ops
        self._workspace, self._last_token = workspace, last_token
        self._most, self._inputs = most, DecodeInputs(ops.pool.layers, most, ops.pool.device)
        self._sizes: list[int] = []
        self._captured: dict[tuple[int, bool], _Captured] = {}

    def rehearse(self) -> None:
        """Runs the step of the largest batch as it is captured."""
        self._fill_with_padding(self._most)
        self._run(self._most, scored=True)

    def capture(self, sizes: list[BatchSize], progress: Callable[[str], None]) -> Any:
        """Captures graphs for these batch sizes, with and without scores; the memory of the largest serves all.

        Their logits, too, stand where the others' steps work: they hold until the next replay of any graph.
        Returns the memory, for others to be captured in.
        """
        pool = None
        for size in sorted(sizes, key=lambda size: size.rows, reverse=True):
            progress(f"capturing decode steps of {size.rows} sequences")
            for scored in (True, False):
                with multiplying_by(size.library):
                    captured = self._capture(size.rows, scored, pool)
                pool = captured.graph.pool()
                self._captured[size.rows, scored] = captured
        self._sizes = sorted(size.rows for size in sizes)
        return pool

    def _capture(self, size: int, scored: bool, pool: Any) -> _Captured:
        self._fill_with_padding(size)
        for _ in range(_WARM_UP_RUNS):
            self._run(size, scored)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = self._run(size, scored)
        return _Captured(graph, replace(result, logits=lent(result.logits)))

    def _fill_with_padding(self, size: int) -> None:
        nobody = torch.empty(0, dtype=torch.int32)
        lengths = torch.empty(self._ops.pool.layers, 0, dtype=torch.int32)
        self._inputs.fill(nobody, nobody, lengths, size, self._ops.padding_row)

    def run(self, rows: Tensor, positions: Tensor, lengths: Tensor, *, scored: bool) -> Logits | None:
        """One decode step for ``rows`` [batch], or None where no captured graph is large enough.

        Args:
            rows, positions: [batch] on the host.
            lengths: [layers, batch] on the host, the new token's slot included.
            scored: whether any sequence has biases or goes on adding to scores.
        """
        batch = rows.numel()
        place = bisect_left(self._sizes, batch)
        if place == len(self._sizes):
            return None
        size = self._sizes[place]
        self._inputs.fill(rows, positions, lengths, size, self._ops.padding_row)
        captured = self._captured[size, scored]
        captured.graph.replay()
        return captured.result.first(batch)

    def _run(self, size: int, scored: bool) -> Logits:
        """What is captured: everything from the newest tokens to what the next ones are chosen from."""
        rows, positions, lengths = self._inputs.views(size)
        pool, at_once = self._ops.pool, self._workspace.at_once.get(scored, 0)
        grid = DecodeGrid.of(size, pool.kv_heads, pool.device, at_once)
        plan = plan_decode(lengths, grid, out=DecodePlan.empty(lengths, grid))
        pending = self._ops.pending if scored else None
        if pending is not None:
            pending.tick()
        part = DecodePart(rows, positions, plan, self._workspace, pending, set())
        step = KernelStep(self._ops.paged, self._ops.table, part, None)
        keep = torch.arange(size, device=rows.device)
        with self._operator.running(step):
            ids = self._last_token[rows.long()]
            return self._forward(ids[None], positions.long()[None], keep, self._operator.step)


def workspace_for(ops: KernelCacheOps, query_heads: int, most: int) -> DecodeWorkspace:
    """Scratch for batches of up to ``most`` sequences."""
    pool = ops.pool
    grid = DecodeGrid.of(most, pool.kv_heads, pool.device, MOST_AT_ONCE)
    return DecodeWorkspace.allocate(
        grid, heads=query_heads, kv_heads=pool.kv_heads, head_dim=pool.head_dim, device=pool.device
    )
