"""A pool at random for decode attention, and how its kernel is compared with its twin."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2o.kernels.decode import DecodeConfig, DecodeGrid, DecodeWorkspace, decode_attention, plan_decode
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pending import PART_SLOTS, Pending, settle
from d2o.kernels.reference import decode as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class Case:
    """A pool whose unused memory is NaN, lengths by [layer][sequence], and one new token a sequence."""

    lengths: list[list[int]]
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 32
    dtype: torch.dtype = torch.float32
    rows: Tensor = field(init=False)
    table: Tensor = field(init=False)
    pool: PagedTensors = field(init=False)

    def __post_init__(self) -> None:
        layers, batch = len(self.lengths), len(self.lengths[0])
        longest = max(max(each) for each in self.lengths)
        columns = -(-longest // self.page_size) + 1
        self.rows = torch.randperm(batch + 2)[:batch].to(DEVICE, torch.int32)
        pages = layers * (batch + 2) * columns
        table = torch.randperm(pages).view(layers, batch + 2, columns)
        self.table = table.to(DEVICE, torch.int32)
        self.pool = self._fill(pages)
        hidden = (batch, self.kv_heads, self.head_dim)
        self.q = 2 * torch.randn(batch, self.kv_heads * self.group, self.head_dim, device=DEVICE).to(self.dtype)
        self.k_new, self.v_new = (torch.randn(hidden, device=DEVICE).to(self.dtype) for _ in range(2))
        self.counts = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        self.positions = self.counts[0] + 100

    def _fill(self, pages: int) -> PagedTensors:
        slots = (pages, self.kv_heads, self.page_size)
        filled = torch.zeros(slots, dtype=torch.bool, device=DEVICE)
        for layer, each in enumerate(self.lengths):
            for row, length in zip(self.rows, each, strict=True):
                slot = torch.arange(length - 1, device=DEVICE)
                filled[self.table[layer, row][slot // self.page_size].long(), :, slot % self.page_size] = True

        def stale(values: Tensor) -> Tensor:
            return values.masked_fill(~filled.view(*slots, *[1] * (values.dim() - 3)), math.nan)

        k, v = (torch.randn(*slots, self.head_dim, device=DEVICE).to(self.dtype) for _ in range(2))
        score, bias = torch.rand(slots, device=DEVICE), torch.randn(slots, device=DEVICE)
        position = torch.randint(0, 200, slots, dtype=torch.int32, device=DEVICE).masked_fill(~filled, 1 << 30)
        return PagedTensors(stale(k), stale(v), stale(score), position, stale(bias))

    def copy(self, dtype: torch.dtype | None = None) -> PagedTensors:
        pool, kept = self.pool, dtype or self.dtype
        return PagedTensors(
            pool.k.to(kept, copy=True),
            pool.v.to(kept, copy=True),
            pool.score.clone(),
            pool.position.clone(),
            pool.bias.clone(),
        )

    def workspace(self, grid: DecodeGrid) -> DecodeWorkspace:
        heads = self.kv_heads * self.group
        made = DecodeWorkspace.allocate(
            grid, heads=heads, kv_heads=self.kv_heads, head_dim=self.head_dim, device=DEVICE
        )
        for scratch in (made.partial, made.peak, made.total):
            scratch.fill_(math.nan)
        return made

    def pending(self) -> Pending:
        """Nothing is pending; what its memory holds is no number."""
        layers, rows, _ = self.table.shape
        made = Pending.empty(
            layers,
            rows,
            heads=self.kv_heads * self.group,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=DEVICE,
        )
        made.query.fill_(math.nan)
        made.level.fill_(math.nan)
        return made

    def settle(
        self, pool: PagedTensors, pending: Pending, layer: int, used: Tensor | None = None, part: int = PART_SLOTS
    ) -> None:
        """Adds what is pending of all sequences in a layer."""
        places, used = layer * self.table.shape[1] + self.rows, self.counts[layer] if used is None else used
        tables = self.table[layer, self.rows.long()]
        settle(pool, pending, places, tables, used, most_used=int(used.max()), part_slots=part)

    def rule(self, **changed: Any) -> dict[str, Any]:
        plain = {"window": None, "softcap": None, "bias": True, "score": True}
        return {"scale": self.head_dim**-0.5} | plain | changed

    def launch_rule(self, **changed: Any) -> dict[str, Any]:
        """What the kernel is told of it: whether it scores is said by what is pending."""
        return {name: value for name, value in self.rule(**changed).items() if name != "score"}

    def run(
        self,
        layer: int = 0,
        *,
        grid: DecodeGrid | None = None,
        config: DecodeConfig | None = None,
        score: bool = True,
        **rule: Any,
    ) -> tuple[Tensor, PagedTensors]:
        """One step, and what it leaves pending settled."""
        pool, pending = self.copy(), self.pending() if score else None
        plan = plan_decode(self.counts, grid or DecodeGrid(len(self.lengths[0]) + 4))
        rule = self.launch_rule(**rule)
        out = decode_attention(
            self.q,
            self.k_new,
            self.v_new,
            pool,
            self.table,
            self.rows,
            self.positions,
            plan,
            layer,
            workspace=self.workspace(plan.grid),
            pending=pending,
            config=config,
            **rule,
        )
        if pending is not None:
            self.settle(pool, pending, layer)
        return out, pool

    def expect(self, layer: int = 0, **rule: Any) -> tuple[Tensor, PagedTensors]:
        """The twin, in float32 on the same values."""
        pool = self.copy(torch.float32)
        new = (self.q.float(), self.k_new.float(), self.v_new.float())
        tables = (self.table, self.rows, self.positions, self.counts)
        return reference.decode_attention(*new, pool, *tables, layer, **self.rule(**rule)), pool

    def check(self, layer: int = 0, **changed: Any) -> None:
        launch = {name: changed.pop(name) for name in ("grid", "config") if name in changed}
        if not changed.get("bias", True):
            self.pool.bias.zero_()
        out, pool = self.run(layer, **launch, **changed)
        expected, after = self.expect(layer, **changed)
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        if self.dtype == torch.float32:
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        else:
            assert (out.float() - expected).norm() < 1e-2 * expected.norm()
        torch.testing.assert_close(pool.score, after.score, rtol=1e-3, atol=1e-6, equal_nan=True)
        for name in ("k", "v", "bias", "position"):
            given, wanted = getattr(pool, name), getattr(after, name)
            torch.testing.assert_close(given.to(wanted.dtype), wanted, rtol=0, atol=0, equal_nan=True)
