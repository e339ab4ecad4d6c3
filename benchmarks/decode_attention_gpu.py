"""How much of the GPU's read bandwidth does paged decode attention reach, with scores and without?

Llama-3.1-8B's attention (32 query heads, 8 KV heads, head 128, bfloat16), pages scattered over the pool. The kernels
are first compared with their torch twin. Times are medians of CUDA graph replays over several layers, so that nothing
is still in the cache; bytes are those that must move: keys, values, with scores the score read and written, with
biases the bias. Writes ``decode_attention_gpu.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks._gpu import RESULTS, Ceilings, GpuFacts, time_graph, write_result
from d2o.kernels.decode import (
    DecodeConfig,
    DecodePlan,
    DecodeWorkspace,
    decode_attention,
    decode_items,
    plan_decode,
)
from d2o.kernels.paged import PagedTensors
from d2o.kernels.reference import decode as reference

_LAYER_BYTES = 2e9


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


SHAPES = (
    Shape("64 x 6592", (6592,) * 64, target=0.92),
    Shape("64 x 6592, page 64", (6592,) * 64, page_size=64),
    Shape("256 x 2048", (2048,) * 256, target=0.90),
    Shape("8 x 32768", (32768,) * 8, target=0.85),
    Shape("32 x 512 and 32 x 32768", (512,) * 32 + (32768,) * 32),
    Shape("512 x 1024", (1024,) * 512),
    Shape("64 x 512", (512,) * 64),
    Shape("1 x 32768", (32768,)),
)
MODES = {
    "plain": {"score": False, "bias": False},
    "scores": {"score": True, "bias": False},
    "scores, biases": {"score": True, "bias": True},
}
SWEEP: tuple[dict[str, Any], ...] = (
    {},
    {"block": 32},
    {"block": 32, "stages": 5},
    {"block": 128},
    {"block": 128, "stages": 2},
    {"stages": 2},
    {"stages": 4},
    {"pin_stash": False},
    {"warps": 2},
    {"warps": 8},
    {"combine_slots": 256},
    {"combine_slots": 1024},
    {"combine_slots": 1024, "combine_warps": 8},
    {"waves": 4},
    {"waves": 6},
    {"waves": 12},
    {"waves": 16},
)


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

    def workspace(self, items: int) -> DecodeWorkspace:
        heads = self.heads
        return DecodeWorkspace.allocate(
            batch=len(self.shape.lengths),
            items=items,
            heads=heads.kv_heads * heads.group,
            kv_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            slots=sum(self.shape.lengths),
            device="cuda",
        )

    def items(self, **waves: int) -> int:
        return decode_items(len(self.shape.lengths), self.heads.kv_heads, GpuFacts.read().processors, **waves)

    def rule(self, **changed: Any) -> dict[str, Any]:
        return {"scale": self.heads.head_dim**-0.5, "window": None, "softcap": None} | changed

    def time(self, mode: dict[str, bool], config: DecodeConfig | None = None, **waves: int) -> float:
        """Milliseconds of one layer's attention."""
        plan = plan_decode(self.lengths, items=self.items(**waves))
        workspace, rule = self.workspace(plan.items), self.rule(**mode)

        def attend(layer: int) -> Tensor:
            return decode_attention(*self.inputs, plan, layer, workspace=workspace, config=config, **rule)

        return time_graph([partial(attend, layer) for layer in range(self.layers)])

    def time_plan(self) -> float:
        """Milliseconds to plan a step of 32 layers."""
        lengths = self.lengths[:1].repeat(32, 1)
        plan = DecodePlan.empty(lengths, self.items())
        return time_graph([lambda: plan_decode(lengths, items=plan.items, out=plan)] * 8)

    def necessary_bytes(self, mode: dict[str, bool]) -> int:
        extra = self.heads.kv_heads * (8 * mode["score"] + 4 * mode["bias"])
        return sum(self.shape.lengths) * (self.heads.slot_bytes + extra)


def check(heads: Heads, **rule: Any) -> dict[str, float]:
    """Largest differences to the twin in float32 on the same values, on fresh data; raises where they are too large."""
    batch = Batch(Shape("check", (5000, 1, 700, 64, 31)), heads, layers=2)
    rule = batch.rule(score=True, bias=True, **rule)
    pool = batch.pool
    pool.score.uniform_()
    copy = PagedTensors(pool.k.float(), pool.v.float(), pool.score.clone(), pool.position.clone(), pool.bias.clone())
    new = (batch.q.float(), batch.k_new.float(), batch.v_new.float(), copy)
    expected = reference.decode_attention(*new, *batch.inputs[4:], batch.lengths, 1, **rule)
    plan = plan_decode(batch.lengths, items=batch.items())
    workspace = batch.workspace(plan.items)
    for scratch in (workspace.partial, workspace.peak, workspace.total, workspace.stash, workspace.stash_peak):
        scratch.fill_(float("nan"))
    out = decode_attention(*batch.inputs, plan, 1, workspace=workspace, **rule)
    exact = heads.dtype == torch.float32
    torch.testing.assert_close(pool.score, copy.score, rtol=1e-3, atol=1e-6)
    for name in ("k", "v", "bias", "position"):
        torch.testing.assert_close(
            getattr(pool, name).to(getattr(copy, name).dtype), getattr(copy, name), rtol=0, atol=0
        )
    error = float((out.float() - expected).norm() / expected.norm())
    if not error < (1e-5 if exact else 1e-2):
        raise AssertionError(f"{heads}: relative error {error}")
    return {"output_relative_norm": error, "score_largest": float((pool.score - copy.score).abs().max())}


CHECKS: tuple[tuple[Heads, dict[str, Any]], ...] = (
    (Heads(), {}),
    (Heads(group=3, head_dim=64, dtype=torch.float16), {"window": 900, "softcap": 20.0}),
    (Heads(group=8, head_dim=96, dtype=torch.float32), {"window": 2000}),
    (Heads(group=1, head_dim=256), {"softcap": 30.0}),
)


def time_shapes(ceilings: Ceilings) -> list[dict[str, Any]]:
    """One row a shape and mode."""
    rows = []
    for shape in SHAPES:
        size = sum(shape.lengths) * Heads().slot_bytes
        batch = Batch(shape, Heads(), layers=min(32, max(2, -int(-_LAYER_BYTES // size))))
        plan_us = 1e3 * batch.time_plan()
        for name, mode in MODES.items():
            milliseconds = batch.time(mode)
            bandwidth = batch.necessary_bytes(mode) / milliseconds / 1e9
            row = {"shape": shape.name, "mode": name, "ms": milliseconds, "tb_s": bandwidth}
            row |= {"share_of_read": bandwidth / ceilings.read_tb_s, "plan_us": plan_us}
            rows.append(row | {"target": shape.target if mode["score"] else None})
            wanted = f"  target {shape.target}" if shape.target and mode["score"] else ""
            print(
                f"{shape.name:26}{name:16}{milliseconds:8.4f} ms{bandwidth:7.3f} TB/s"
                f"{row['share_of_read']:7.1%} of read{wanted}  plan {plan_us:.1f} us",
                flush=True,
            )
        del batch
        torch.cuda.empty_cache()
    return rows


def sweep(ceilings: Ceilings) -> list[dict[str, Any]]:
    """The default configuration and its neighbours, with scores and biases."""
    rows = []
    default = DecodeConfig.choose(Heads().head_dim, Heads().dtype)
    batches = [Batch(shape, Heads(), layers=2) for shape in (SHAPES[0], SHAPES[2], SHAPES[3])]
    mode = MODES["scores, biases"]
    for changes in SWEEP:
        waves = {name: value for name, value in changes.items() if name == "waves"}
        config = replace(default, **{name: value for name, value in changes.items() if name != "waves"})
        row: dict[str, Any] = asdict(config) | waves
        for batch in batches:
            try:
                milliseconds = batch.time(mode, config, **waves)
            except OutOfResources as error:
                row[batch.shape.name] = str(error).partition("\n")[0]
                continue
            row[batch.shape.name] = batch.necessary_bytes(mode) / milliseconds / 1e9 / ceilings.read_tb_s
        rows.append(row)
        shares = (f"{value:.1%}" if isinstance(value, float) else str(value) for value in row.values())
        print("  ".join(shares), changes, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--no-sweep", action="store_true", help="time the default configuration only")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("decode_attention_gpu: no CUDA device, nothing measured")
        return
    checks = []
    for heads, rule in CHECKS:
        facts = {"heads": str(heads), "rule": rule} | check(heads, **rule)
        checks.append(facts)
        print(facts, flush=True)
    ceilings = Ceilings.measure()
    print(ceilings, flush=True)
    result: dict[str, Any] = {"checks": checks, "ceilings": asdict(ceilings), "rows": time_shapes(ceilings)}
    path = write_result(given.out, "decode_attention_gpu", result)
    if not given.no_sweep:
        path = write_result(given.out, "decode_attention_gpu", result | {"sweep": sweep(ceilings)})
    print(path)


if __name__ == "__main__":
    main()
