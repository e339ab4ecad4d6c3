"""The newest decoded queries, whose probabilities the scores have yet to receive.

A softmax's normaliser is known when all slots have been read, and until then no probability is. Instead of keeping
every slot's logit for so long, decode keeps its queries and their normalisers: a later step reads the same keys anyway.
And as reading and writing scores costs more than multiplying by a few queries more, it waits until several have come
together. What is pending is settled before anything looks at the scores or moves a slot (:func:`settle`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from d2o.kernels.paged import PagedTensors, described, whole_rows

LOG2E = tl.constexpr(math.log2(math.e))
# Of the pending queries of all heads of a group at most, and of each head: docs/adr/0020.
_ROWS, _DEPTH = 16, 8
_TILE_BYTES = 1 << 14
PART_SLOTS = 2048
"""Slots of a sequence that one program settles at most: of longer programs the last to begin end late."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Of every (layer, row) of a block table, on the device; decode attention and :func:`settle` change it in place.

    Attributes:
        query: [layers, rows, depth, heads, head_dim], the pool's dtype; the oldest first.
        level: [layers, rows, depth, heads] float32, logsumexp of each one's logits, base 2.
        count: [layers, rows, kv_heads] int32, how many there are.
        rule: [layers, 2] float32, factor and softcap (0: none) of the layer's logits, as kernels take them.
        clock: [1] int32, counts steps.
        arrivals: [layers, rows, kv_heads] int32, parts of a sequence that have been settled; 0 between launches.
    """

    query: Tensor
    level: Tensor
    count: Tensor
    rule: Tensor
    clock: Tensor
    arrivals: Tensor

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Pending:
        depth = depth_of(heads // kv_heads)
        return cls(
            torch.empty(layers, rows, depth, heads, head_dim, dtype=dtype, device=device),
            torch.empty(layers, rows, depth, heads, device=device),
            torch.zeros(layers, rows, kv_heads, dtype=torch.int32, device=device),
            torch.zeros(layers, 2, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(layers, rows, kv_heads, dtype=torch.int32, device=device),
        )

    @property
    def depth(self) -> int:
        """How many queries come together before their probabilities are added."""
        return self.query.shape[2]

    def tick(self) -> None:
        """Begins a step. In every ``depth``-th all rows add what they have: programs that add and others keep each
        other waiting, so they had better do it together.
        """
        self.clock.add_(1)

    def forget(self, row: int) -> None:
        """Has the row begin anew."""
        self.count[:, row] = 0


def depth_of(group: int) -> int:
    """How many queries come together where ``group`` query heads share a KV head."""
    lanes: int = triton.next_power_of_2(group)
    return max(1, min(_DEPTH, _ROWS // lanes))


def settle(
    pool: PagedTensors,
    pending: Pending,
    places: Tensor,
    tables: Tensor,
    used: Tensor,
    *,
    most_used: int,
    part_slots: int = PART_SLOTS,
) -> None:
    """Adds to the scores of (layer, row) pairs what their pending queries give; nothing is pending there afterwards.

    Never waits for the device. Slots must lie as they did when the queries were decoded. Vectors begin at multiples of
    16 bytes, as tensors of their own do: for others the kernel is compiled anew.

    Args:
        pool: the pages; score is written.
        pending: of the rows of the block table.
        places: [pairs] int32, ``layer * rows + row`` of each; unique.
        tables: [pairs, pages] int32, their pages.
        used: [pairs] int32, slots in use.
        most_used: the most of any pair, on the host.
        part_slots: of a sequence that one program works on at most.
    """
    _, rows, depth, heads, head_dim = pending.query.shape
    group, dim_pad = heads // pool.kv_heads, triton.next_power_of_2(head_dim)
    lanes, tile = triton.next_power_of_2(group), _TILE_BYTES // (dim_pad * pool.k.element_size())
    block = max(16, min(pool.page_size, tile))
    tiles = described(pool.k, [block, dim_pad])
    settle_kernel[(pool.kv_heads, places.shape[0], triton.cdiv(most_used, part_slots))](
        *(
            pool.score,
            tiles,
            pool.bias,
            pending.query,
            pending.level,
            pending.count,
            pending.arrivals,
            pending.rule,
        ),
        *(places, tables, used, rows, tables.shape[1]),
        KV_HEADS=pool.kv_heads,
        GROUP=group,
        PAGE=pool.page_size,
        DIM=head_dim,
        DIM_PAD=dim_pad,
        BLOCK=block,
        DESCRIBED=isinstance(tiles, TensorDescriptor),
        LANES=lanes,
        DEPTH=depth,
        LATE_ROWS=max(8, depth * lanes),
        PART=part_slots,
        num_warps=2,
        num_stages=3,
    )


@triton.jit  # type: ignore[untyped-decorator]
def capped(logits: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Softcapped logits, in base 2."""
    return (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / softcap))) * (softcap * LOG2E)


@triton.jit  # type: ignore[untyped-decorator]
def recall(
    late_query: tl.tensor,
    late_level: tl.tensor,
    spot: tl.tensor,
    count: tl.tensor,
    head: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    LATE_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A row's first ``count`` pending queries [DIM_PAD, LATE_ROWS] and their normalisers; infinite where none is."""
    row, dim = tl.arange(0, LATE_ROWS), tl.arange(0, DIM_PAD)
    nth, member = row // LANES, row % LANES
    there = (nth < count) & (member < GROUP)
    cells = ((spot.to(tl.int64) * DEPTH + nth) * KV_HEADS + head) * GROUP + member
    level = tl.load(late_level + cells, mask=there, other=float("inf"))
    wanted = there[None, :] & (dim < DIM)[:, None]
    return tl.load(late_query + cells[None, :] * DIM + dim[:, None], mask=wanted, other=0.0), level


@triton.jit  # type: ignore[untyped-decorator]
def leave(
    late_query: tl.tensor,
    late_level: tl.tensor,
    counter: tl.tensor,
    late_rule: tl.tensor,
    query: tl.tensor,
    level: tl.tensor,
    spot: tl.tensor,
    nth: tl.tensor,
    head: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Leaves a group's queries [DIM_PAD, ROWS] and their normalisers [LANES] as the ``nth`` and newest of their row."""
    cells = ((spot * DEPTH + nth) * KV_HEADS + head) * GROUP
    row, lane, dim = tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, DIM_PAD)
    wanted = (row < GROUP)[None, :] & (dim < DIM)[:, None]
    tl.store(late_query + (cells + row)[None, :] * DIM + dim[:, None], query, mask=wanted)
    tl.store(late_level + cells + lane, level, mask=lane < GROUP)
    tl.store(counter, nth + 1)
    # All rows of a layer have the same; whoever comes last leaves it.
    tl.store(late_rule + 2 * layer, scale)
    tl.store(late_rule + 2 * layer + 1, softcap)


@triton.jit  # type: ignore[untyped-decorator]
def given(
    key: tl.tensor,
    query: tl.tensor,
    level: tl.tensor,
    end: tl.tensor,
    lift: tl.tensor,
    slot: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """What pending queries [DIM, ROWS] give, each to the slots before its ``end`` [ROWS]: sums over them, one a slot.

    ``key`` [SLOTS, DIM] and ``lift`` [SLOTS], biases in base 2, are those of the slots ``slot`` [SLOTS].
    """
    logits = tl.dot(key, query, input_precision="ieee") * scale
    if SOFTCAP:
        logits = capped(logits, softcap)
    weight = tl.exp2(logits + lift[:, None] - level[None, :])
    return tl.sum(tl.where(slot[:, None] < end[None, :], weight, 0.0), 1)


@triton.jit(do_not_specialize=["table_rows", "columns"])  # type: ignore[untyped-decorator]
def settle_kernel(
    score: tl.tensor,
    described_k: tl.tensor,
    bias: tl.tensor,
    late_query: tl.tensor,
    late_level: tl.tensor,
    late_count: tl.tensor,
    arrivals: tl.tensor,
    late_rule: tl.tensor,
    places: tl.tensor,
    tables: tl.tensor,
    used: tl.tensor,
    table_rows: tl.tensor,
    columns: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    LATE_ROWS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """Program (KV head, pair, part): its part of the slots, of as many parts as give each PART slots at most."""
    head, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    spot, length = tl.load(places + pair), tl.load(used + pair)
    parts = tl.cdiv(length, PART)
    counter = late_count + spot * KV_HEADS + head
    count = tl.load(counter)
    if (count > 0) & (part < parts):
        query, level = recall(
            late_query, late_level, spot, count, head, KV_HEADS, GROUP, DIM, DIM_PAD, LANES, DEPTH, LATE_ROWS
        )
        rule = late_rule + 2 * (spot // table_rows)
        pages = tables + pair.to(tl.int64) * columns
        size = tl.cdiv(tl.cdiv(length, parts), BLOCK) * BLOCK
        first, last = part * size, tl.minimum(part * size + size, length)
        end = length - count + 1 + tl.arange(0, LATE_ROWS) // LANES
        scale, softcap = tl.load(rule), tl.load(rule + 1)
        if softcap > 0:
            _add(
                score, described_k, bias, query, level, end, pages, head, first, last, scale, softcap,
                KV_HEADS, PAGE, DIM, DIM_PAD, BLOCK, DESCRIBED, True,
            )  # fmt: skip
        else:
            _add(
                score, described_k, bias, query, level, end, pages, head, first, last, scale, softcap,
                KV_HEADS, PAGE, DIM, DIM_PAD, BLOCK, DESCRIBED, False,
            )  # fmt: skip
        if tl.atomic_add(arrivals + spot * KV_HEADS + head, 1) == parts - 1:
            tl.store(counter, 0)
            tl.store(arrivals + spot * KV_HEADS + head, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _add(
    score: tl.tensor,
    described_k: tl.tensor,
    bias: tl.tensor,
    query: tl.tensor,
    level: tl.tensor,
    end: tl.tensor,
    pages: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    """Adds what the queries give to the scores of a sequence's slots [first, last); ``first`` begins a tile."""
    column, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    page = tl.load(pages + tl.minimum(first, last - 1) // PAGE)
    for start in range(first, last, BLOCK):
        slot = start + column
        live = slot < last
        first_row = (page * KV_HEADS + head) * PAGE + start % PAGE
        place = first_row.to(tl.int64) + column
        # A slot that is not live gives nothing to another's score: its key is whatever lies there.
        if DESCRIBED:
            key = described_k.load([first_row, 0])
        else:
            key = whole_rows(described_k + place[:, None] * DIM + dim[None, :], DIM, DIM_PAD)
        lift = tl.load(bias + place, mask=live, other=0.0) * LOG2E
        before = tl.load(score + place, mask=live, other=0.0)
        page = tl.load(pages + tl.minimum(start + BLOCK, last - 1) // PAGE)
        gained = given(key, query, level, end, lift, slot, scale, softcap, SOFTCAP)
        tl.store(score + place, before + gained, mask=live)
