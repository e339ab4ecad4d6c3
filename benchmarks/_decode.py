"""Batches for decode attention on a GPU: how long a layer takes, and whether it does what its torch twin does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu import time_graph
from d2o.kernels.decode import (
    DecodeConfig,
    DecodeGrid,
    DecodePlan,
    DecodeWorkspace,
    decode_attention,
    plan_decode,
)
from d2o.kernels.decode_plan import MOST_AT_ONCE, WORTH_SLOTS
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pending import Pending, depth_of, settle
from d2o.kernels.reference import decode as reference

REPLAYS = (
    (20000, 1, 700, 6592, 512, 31, 2048, 128),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (300, 20000, 129, 64, 4096, 1, 9000, 2),
    (19999, 19998, 20000, 17, 20000, 15000, 12345, 20000),
)


@dataclass(frozen=True, slots=True)
class Heads:
    """An attention's shape."""

    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one slot, over all KV heads."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shape:
    """One batch: the slots of each sequence. ``target`` is the share of the read bandwidth to reach with scores."""

    name: str
    lengths: tuple[int, ...]
    page_size: int = 32
    target: float | None = None


class Batch:
    """A pool filled at random, its tables, and one new token a sequence."""

    def __init__(self, shape: Shape, heads: Heads, *, layers: int) -> None:
        self.shape, self.heads, self.layers = shape, heads, layers
        batch, page = len(shape.lengths), shape.page_size
        columns = -(-max(shape.lengths) // page)
        needed = [-(-length // page) for length in shape.lengths]
        pages = layers * sum(needed)
        order = torch.randperm(pages, dtype=torch.int32)
        table, at = torch.zeros(layers, batch, columns, dtype=torch.int32), 0
        for layer in range(layers):
            for row, count in enumerate(needed):
                table[layer, row, :count] = order[at : at + count]
                at += count
        self.table = table.cuda()
        slots = (pages, heads.kv_heads, page)
        k, v = (torch.randn(*slots, heads.head_dim, dtype=heads.dtype, device="cuda") for _ in range(2))
        position = torch.randint(0, max(shape.lengths), slots, dtype=torch.int32, device="cuda")
        score, bias = torch.zeros(slots, device="cuda"), torch.rand(slots, device="cuda")
        self.pool = PagedTensors(k, v, score, position, bias)
        self.rows = torch.arange(batch, dtype=torch.int32, device="cuda")
        self.lengths = torch.tensor([shape.lengths] * layers, dtype=torch.int32, device="cuda")
        self.positions = self.lengths[0].clone()
        hidden = (batch, heads.kv_heads, heads.head_dim)
        self.q = 2 * torch.randn(batch, heads.kv_heads * heads.group, heads.head_dim, device="cuda").to(heads.dtype)
        self.k_new, self.v_new = (torch.randn(hidden, device="cuda").to(heads.dtype) for _ in range(2))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, PagedTensors, Tensor, Tensor, Tensor]:
        return self.q, self.k_new, self.v_new, self.pool, self.table, self.rows, self.positions

    def workspace(self, grid: DecodeGrid | None = None) -> DecodeWorkspace:
        heads = self.heads
        return DecodeWorkspace.allocate(
            grid or self.grid(MOST_AT_ONCE),
            heads=heads.kv_heads * heads.group,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            device="cuda",
        )

    def pending(self) -> Pending:
        heads, (layers, rows, _) = self.heads, self.table.shape
        return Pending.empty(
            layers,
            rows,
            heads=heads.kv_heads * heads.group,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            dtype=heads.dtype,
            device="cuda",
        )

    def settle(self, pending: Pending, layer: int) -> None:
        """Adds what the newest queries of all sequences give to the scores of a layer."""
        places = layer * self.table.shape[1] + self.rows
        most = max(self.shape.lengths)
        settle(self.pool, pending, places, self.table[layer], self.lengths[layer], most_used=most)

    def grid(self, at_once: int = 0) -> DecodeGrid:
        return DecodeGrid.of(len(self.shape.lengths), self.heads.kv_heads, torch.device("cuda"), at_once)

    def rule(self, **changed: Any) -> dict[str, Any]:
        return {"scale": self.heads.head_dim**-0.5, "window": None, "softcap": None} | changed

    def config(self, **changes: Any) -> DecodeConfig:
        return replace(DecodeConfig.choose(self.heads.head_dim, self.heads.dtype, self.shape.page_size), **changes)

    def time(self, mode: dict[str, bool], config: DecodeConfig | None = None, worth: int = WORTH_SLOTS) -> float:
        """Milliseconds of one layer's attention; with scores the mean of as many steps as queries come together."""
        workspace, rule = self.workspace(), self.rule(bias=mode["bias"])
        pending = self.pending() if mode["score"] else None

        def attend(layer: int, plan: DecodePlan) -> Tensor:
            return decode_attention(
                *self.inputs, plan, layer, workspace=workspace, pending=pending, config=config, **rule
            )

        # Once it has run, it is known how many programs run at once.
        attend(0, plan_decode(self.lengths, self.grid()))
        grid = replace(self.grid(workspace.at_once[mode["score"]]), worth=worth)
        plan = plan_decode(self.lengths, grid)
        steps = 1 if pending is None else pending.depth
        if pending is not None:
            # In the middle of service: rows begin and are settled at different times.
            pending.count[:] = torch.arange(len(self.rows), device="cuda")[:, None] % pending.depth

        def step() -> None:
            if pending is not None:
                pending.tick()
            for layer in range(self.layers):
                attend(layer, plan)

        return time_graph([step] * steps) / self.layers

    def time_settle(self) -> float:
        """Milliseconds a layer to settle what is pending in all of them at once, where as much is as can be."""
        pending = self.pending()
        pending.query.normal_()
        pending.level.fill_(10.0)
        pending.rule[:, 0] = self.heads.head_dim**-0.5
        places = torch.arange(self.table.shape[:2].numel(), dtype=torch.int32, device="cuda")
        tables, used = self.table.flatten(0, 1), self.lengths.flatten()

        def run() -> None:
            pending.count.fill_(pending.depth)
            settle(self.pool, pending, places, tables, used, most_used=max(self.shape.lengths))

        return time_graph([run]) / self.layers

    def time_plan(self) -> float:
        """Milliseconds to plan a step of 32 layers."""
        lengths = self.lengths[:1].repeat(32, 1)
        plan = DecodePlan.empty(lengths, self.grid())
        return time_graph([lambda: plan_decode(lengths, plan.grid, out=plan)] * 8)

    def necessary_bytes(self, mode: dict[str, bool]) -> float:
        """Of a step: keys, values, with biases the bias, and of the score that is read and written once in a while."""
        extra = self.heads.kv_heads * (8 / depth_of(self.heads.group) * mode["score"] + 4 * mode["bias"])
        return sum(self.shape.lengths) * (self.heads.slot_bytes + extra)


def check(heads: Heads, page_size: int = 32, changes: dict[str, Any] | None = None, **rule: Any) -> dict[str, float]:
    """Largest differences to the twin in float32 on the same values, on fresh data; raises where they are too large."""
    batch = Batch(Shape("check", (5000, 1, 700, 64, 31), page_size), heads, layers=2)
    rule = batch.rule(bias=True, **rule)
    batch.pool.score.uniform_()
    plan, workspace = plan_decode(batch.lengths, batch.grid()), batch.workspace()
    pending = batch.pending() if rule["window"] is None else None
    for scratch in (workspace.partial, workspace.peak, workspace.total):
        scratch.fill_(float("nan"))
    expected, after = twin(batch, rule | {"score": pending is not None})
    config = batch.config(**(changes or {}))
    out = decode_attention(*batch.inputs, plan, 1, workspace=workspace, pending=pending, config=config, **rule)
    if pending is not None:
        batch.settle(pending, 1)
    return compare(batch, out, expected, after, workspace)


def twin(batch: Batch, rule: dict[str, Any]) -> tuple[Tensor, PagedTensors]:
    """What layer 1 of the batch must give, and its pool afterwards."""
    pool = batch.pool
    copy = PagedTensors(pool.k.float(), pool.v.float(), pool.score.clone(), pool.position.clone(), pool.bias.clone())
    new = (batch.q.float(), batch.k_new.float(), batch.v_new.float(), copy)
    return reference.decode_attention(*new, *batch.inputs[4:], batch.lengths, 1, **rule), copy


def compare(
    batch: Batch, out: Tensor, expected: Tensor, after: PagedTensors, workspace: DecodeWorkspace
) -> dict[str, float]:
    pool, exact = batch.pool, batch.heads.dtype == torch.float32
    torch.testing.assert_close(pool.score, after.score, rtol=1e-3, atol=1e-6)
    for name in ("k", "v", "bias", "position"):
        given, wanted = getattr(pool, name), getattr(after, name)
        torch.testing.assert_close(given.to(wanted.dtype), wanted, rtol=0, atol=0)
    error = float((out.float() - expected).norm() / expected.norm())
    if not error < (1e-5 if exact else 1e-2):
        raise AssertionError(f"{batch.heads}: relative error {error}")
    if int(workspace.arrivals.abs().max()):
        raise AssertionError("counters of arrivals are not 0 again")
    return {"output_relative_norm": error, "score_largest": float((pool.score - after.score).abs().max())}


def check_replays(changes: dict[str, Any], rounds: int = 3) -> dict[str, float]:
    """One captured step, replayed at changing lengths; the worst differences to the twin."""
    longest = max(max(lengths) for lengths in REPLAYS)
    batch = Batch(Shape("replays", (longest,) * len(REPLAYS[0])), Heads(), layers=2)
    rule, grid, pending = batch.rule(bias=True), batch.grid(), batch.pending()
    workspace, plan = batch.workspace(), DecodePlan.empty(batch.lengths, grid)
    config = batch.config(**changes)

    def step() -> Tensor:
        plan_decode(batch.lengths, grid, out=plan)
        return decode_attention(*batch.inputs, plan, 1, workspace=workspace, pending=pending, config=config, **rule)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    worst: dict[str, float] = {}
    for lengths in REPLAYS * rounds:
        batch.lengths.copy_(torch.tensor([lengths] * 2, dtype=torch.int32))
        expected, after = twin(batch, rule | {"score": True})
        out.fill_(float("nan"))
        for row in range(len(lengths)):
            pending.forget(row)
        graph.replay()
        batch.settle(pending, 1)
        found = compare(batch, out, expected, after, workspace)
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
    return worst
