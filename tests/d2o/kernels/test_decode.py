"""Decode attention's kernels do what their torch twin does, wherever the pages lie and whatever stale memory holds."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from d2o.kernels.decode import (
    DecodeConfig,
    DecodePlan,
    DecodeWorkspace,
    decode_attention,
    decode_items,
    plan_decode,
)
from d2o.kernels.decode_plan import SHARE_SLOTS
from d2o.kernels.paged import PagedTensors
from d2o.kernels.reference import decode as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compiles for compute capability 9.0, which needs no device: the interpreter accepts what the compiler refuses.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from d2o.kernels.decode_kernels import attend_kernel, combine_kernel

MODEL = dict.fromkeys("q k_new v_new k v out".split(), "*bf16")
REAL = dict.fromkeys("score bias partial peak total stash_peak".split(), "*fp32")
WHOLE = dict.fromkeys("position positions table rows lengths share first base owner".split(), "*i32")
TYPES = MODEL | REAL | WHOLE | {"stash": "*fp16", "scale": "fp32", "softcap": "fp32"}
SHAPE = {"KV_HEADS": 8, "GROUP": 3, "PAGE": 32, "DIM": 96, "BLOCK": 64, "SCORE": True}
RULE = {"WINDOW": True, "SOFTCAP": True, "BIAS": True, "RESET": True}
ATTEND = SHAPE | RULE | {"DIM_PAD": 128, "ROWS": 16, "STORE_POLICY": "evict_last"}
COMBINE = SHAPE | {"ROWS": 4, "TILES": 8, "WIDTH": 32, "SPLITS": 16, "LOAD_POLICY": "evict_first"}
for kernel, constants in ((attend_kernel, ATTEND), (combine_kernel, COMBINE)):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, values, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    assert made.metadata.shared < 113 * 1024, "two programs no longer fit a processor"
"""
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]


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

    def workspace(self, items: int) -> DecodeWorkspace:
        made = DecodeWorkspace.allocate(
            batch=len(self.lengths[0]),
            items=items,
            heads=self.kv_heads * self.group,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            slots=max(sum(each) for each in self.lengths),
            device=DEVICE,
        )
        for scratch in (made.partial, made.peak, made.total, made.stash, made.stash_peak):
            scratch.fill_(math.nan)
        return made

    def rule(self, **changed: Any) -> dict[str, Any]:
        plain = {"window": None, "softcap": None, "bias": True, "score": True}
        return {"scale": self.head_dim**-0.5} | plain | changed

    def run(
        self, layer: int = 0, *, items: int | None = None, config: DecodeConfig | None = None, **rule: Any
    ) -> tuple[Tensor, PagedTensors]:
        pool = self.copy()
        plan = plan_decode(self.counts, items=items or len(self.lengths[0]) + 4)
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
            workspace=self.workspace(plan.items),
            config=config,
            **self.rule(**rule),
        )
        return out, pool

    def expect(self, layer: int = 0, **rule: Any) -> tuple[Tensor, PagedTensors]:
        """The twin, in float32 on the same values."""
        pool = self.copy(torch.float32)
        new = (self.q.float(), self.k_new.float(), self.v_new.float())
        tables = (self.table, self.rows, self.positions, self.counts)
        return reference.decode_attention(*new, pool, *tables, layer, **self.rule(**rule)), pool

    def check(self, layer: int = 0, **changed: Any) -> None:
        launch = {name: changed.pop(name) for name in ("items", "config") if name in changed}
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


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_it_does_what_the_twin_does(head_dim: int, group: int) -> None:
    Case(lengths=[[1, 150, 33]], kv_heads=1 if group == 8 else 2, group=group, head_dim=head_dim).check()


def test_half_precision_stays_near_the_float32_twin() -> None:
    # Float16 only: the interpreter multiplies bfloat16 by its bits. On the GPU all types are checked below.
    Case(lengths=[[200, 64]], head_dim=128, dtype=torch.float16).check()


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_page_size_is_free(page_size: int) -> None:
    Case(lengths=[[130, page_size, page_size + 1]], page_size=page_size).check()


@pytest.mark.parametrize(
    "rule",
    [
        {"window": 120},
        {"window": 1},
        {"softcap": 3.0},
        {"bias": False},
        {"score": False},
        {"window": 60, "softcap": 5.0, "bias": False},
    ],
)
def test_windows_softcaps_biases_and_scores(rule: dict[str, Any]) -> None:
    Case(lengths=[[150, 300]]).check(**rule)


def test_every_layer_uses_its_own_table_and_lengths() -> None:
    case = Case(lengths=[[40, 90], [140, 7], [1, 129]])
    for layer in range(3):
        case.check(layer)


def test_a_long_sequence_beside_short_ones_is_split_over_many_items() -> None:
    case = Case(lengths=[[5, 1500, 128, 1]], kv_heads=1, group=2)
    case.check(items=4 + 20, config=DecodeConfig(block=64))
    case.check(items=4 + 1, config=DecodeConfig(block=128))


def test_a_repeated_step_keeps_the_new_slots_score() -> None:
    case = Case(lengths=[[50, 33]])
    newest = [case.table[0, row, (n - 1) // 32].long() for row, n in zip(case.rows, case.lengths[0], strict=True)]
    for page, length in zip(newest, case.lengths[0], strict=True):
        case.pool.score[page, :, (length - 1) % 32] = 5.0
    case.check(reset=False)
    _, pool = case.run(reset=False)
    assert bool((pool.score[newest[0], :, 49 % 32] > 5).all())


def test_the_scores_that_a_step_adds_are_one_a_query_head() -> None:
    case = Case(lengths=[[170, 35]], dtype=torch.float16)
    case.pool.score.zero_()
    _, pool = case.run()
    torch.testing.assert_close(pool.score.sum(), torch.tensor(2.0 * 2 * 4, device=DEVICE), rtol=1e-3, atol=0)


def test_small_probabilities_beside_a_dominant_one_are_scored_to_a_thousandth() -> None:
    case = Case(lengths=[[128]], kv_heads=1, group=1)
    case.pool.bias[:] = case.pool.bias.nan_to_num().clamp(-1, 1) - 12.0
    case.check()


def test_strided_views_of_projections_are_taken_as_they_are() -> None:
    case = Case(lengths=[[40, 70]])
    case.q, case.k_new, case.v_new = (
        t.transpose(0, 1).contiguous().transpose(0, 1) for t in (case.q, case.k_new, case.v_new)
    )
    assert not case.q.is_contiguous()
    case.check()


def test_padding_entries_may_share_a_row() -> None:
    case = Case(lengths=[[70, 1, 1]])
    case.rows[2] = case.rows[1]
    out, _ = case.run()
    expected, _ = case.expect()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_workspace_that_is_too_small_is_refused() -> None:
    case = Case(lengths=[[40]])
    plan = plan_decode(case.counts, items=4)
    inputs = (case.q, case.k_new, case.v_new, case.pool, case.table, case.rows, case.positions)
    with pytest.raises(ValueError, match="got 4 items, allowed are the workspace's 3"):
        decode_attention(*inputs, plan, 0, workspace=case.workspace(3), **case.rule())
    silent = DecodeWorkspace.allocate(batch=1, items=4, heads=8, kv_heads=2, head_dim=64, slots=0, device=DEVICE)
    with pytest.raises(ValueError, match="without room for scores"):
        decode_attention(*inputs, plan, 0, workspace=silent, **case.rule())


def test_a_layer_larger_than_the_stash_writes_nothing_beyond_it() -> None:
    case = Case(lengths=[[300, 200]])
    plan = plan_decode(case.counts, items=6)
    room = DecodeWorkspace.allocate(batch=1, items=6, heads=8, kv_heads=2, head_dim=64, slots=128, device=DEVICE)
    inputs = (case.q, case.k_new, case.v_new, case.copy(), case.table, case.rows, case.positions)
    out = decode_attention(*inputs, plan, 0, workspace=room, **case.rule())
    torch.testing.assert_close(out, case.expect()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "target"),
    [([1], 1), ([6592] * 64, 264), ([512, 32768] * 20, 33), ([1, 2, 3], 50), ([129, 128, 127, 100000], 7)],
)
def test_the_plan_covers_every_slot_once_in_equal_shares(lengths: list[int], target: int) -> None:
    layers = [lengths, lengths[::-1]]
    counts = torch.tensor(layers, dtype=torch.int32, device=DEVICE)
    items = target + len(lengths)
    plan = plan_decode(counts, items=items, out=DecodePlan.empty(counts, items))
    for layer, each in enumerate(layers):
        share = reference.plan_shares(each, target, SHARE_SLOTS)
        assert plan.share[layer].tolist() == share
        parts = [-(-length // size) for length, size in zip(each, share, strict=True)]
        owners = [sequence for sequence, count in enumerate(parts) for _ in range(count)]
        assert len(owners) <= items
        assert plan.owner[layer].tolist() == owners + [-1] * (items - len(owners))
        assert plan.first[layer].tolist() == [sum(parts[:n]) for n in range(len(parts) + 1)]
        padded = [-(-length // SHARE_SLOTS) * SHARE_SLOTS for length in each]
        assert plan.base[layer].tolist() == [sum(padded[:n]) for n in range(len(padded))]


def test_the_plan_needs_more_items_than_sequences() -> None:
    with pytest.raises(ValueError, match="items: got 2, allowed is more than the batch of 2"):
        plan_decode(torch.ones(1, 2, dtype=torch.int32, device=DEVICE), items=2)


def test_items_depend_on_the_batch_size_only() -> None:
    assert decode_items(64, 8, 132) == 264 + 64
    assert decode_items(1, 8, 132, waves=4) == 132 + 1


def test_the_kernels_compile_for_a_hopper_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=gpu) for d in (torch.bfloat16, torch.float16, torch.float32)])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (96, 8), (128, 4), (256, 1)])
def test_real_lengths_on_the_gpu(dtype: torch.dtype, head_dim: int, group: int) -> None:
    case = Case(lengths=[[9000, 1, 4097, 512, 31]], kv_heads=8, group=group, head_dim=head_dim, dtype=dtype)
    case.check(items=decode_items(5, 8, 132))
    case.check(items=decode_items(5, 8, 132), window=3000, softcap=30.0)


@pytest.mark.parametrize("layer", [pytest.param(1, marks=gpu)])
def test_a_captured_step_follows_the_lengths_that_its_tensors_hold(layer: int) -> None:
    case = Case(lengths=[[300, 40], [900, 2000]], kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    items = decode_items(2, 8, 132)
    workspace, pool = case.workspace(items), case.copy()
    plan = DecodePlan.empty(case.counts.clone(), items)
    inputs = (case.q, case.k_new, case.v_new, pool, case.table, case.rows, case.positions)

    def step() -> Tensor:
        plan_decode(plan.lengths, items=items, out=plan)
        return decode_attention(*inputs, plan, layer, workspace=workspace, **case.rule())

    plan.lengths.fill_(1)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    plan.lengths.copy_(case.counts)
    for name in ("k", "v", "score", "position", "bias"):
        getattr(pool, name).copy_(getattr(case.pool, name))
    graph.replay()
    expected, after = case.expect(layer)
    assert (out.float() - expected).norm() < 1e-2 * expected.norm()
    torch.testing.assert_close(pool.score, after.score, rtol=1e-3, atol=1e-6, equal_nan=True)
