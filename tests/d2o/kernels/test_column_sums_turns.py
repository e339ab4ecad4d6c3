"""The kernel whose groups take turns computes the column sums that its twin does, and is used where it can be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from d2o.attention import AttentionRule
from d2o.kernels import column_sums, column_sums_turns
from d2o.kernels.column_sums import LONG, MIDDLE, SHORT, TURNS, Tiling, add_column_sums
from d2o.kernels.launch import multiplies_by_warp_groups
from d2o.kernels.reference import column_sums as reference
from tests.d2o.kernels import gluon_on_cpu
from tests.d2o.kernels.test_column_sums import (
    CUTS,
    DEVICE,
    SAMPLES,
    assert_equal,
    blank,
    fill,
    needs_gpu,
    queries_keys,
)

SMALL = replace(TURNS, keys=96, queries=16)
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the GPU has its own compiler")
needs_hopper = pytest.mark.skipif(not multiplies_by_warp_groups(torch.device(DEVICE)), reason="needs a Hopper GPU")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Its kernel runs here, as Python; the grids of its launches."""
    grids: list[tuple[int, int, int]] = []

    def launch(grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...], _: object) -> None:
        grids.append(grid)
        q, described, *others = arguments
        gluon_on_cpu.run(
            column_sums_turns, "turns_kernel", grid,
            q, gluon_on_cpu.Described(q, described.block_shape), *others, *constants,
            sampled_before=column_sums._sampled, GROUPS=3, WARPS=4,
        )  # fmt: skip

    monkeypatch.setattr(column_sums_turns, "launch", launch)
    monkeypatch.setattr(column_sums._Chunk, "_takes_turns", lambda self, heads, stride, block: heads == 1)
    return grids


@on_cpu
@pytest.mark.parametrize("tokens", [1, 31, 64, 229])
@pytest.mark.parametrize("adjacent", [1, 4])
def test_every_query_counts(tokens: int, adjacent: int, hopper: list[tuple[int, int, int]]) -> None:
    q, k = queries_keys(4, 2, tokens, 128, torch.float16)
    rule = AttentionRule(128**-0.5)
    tiling = replace(SMALL, adjacent=adjacent)
    ours = fill(add_column_sums, blank(4, 2, tokens), q, k, rule, [], tiling=tiling)
    assert hopper == [(adjacent, -(-tokens // 96), 4 // adjacent)]
    theirs = fill(reference.add_column_sums, blank(4, 2, tokens), q, k, rule, [])
    assert_equal(ours, theirs, 1e-4)


@on_cpu
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("fields", SAMPLES)
@pytest.mark.parametrize("stages", [2, 4])
def test_samples_do_not_depend_on_chunks(
    cuts: list[int], fields: dict[str, int], stages: int, hopper: list[tuple[int, int, int]]
) -> None:
    q, k = queries_keys(2, 1, 229, 128, torch.float16)
    rule = AttentionRule(0.1)
    tiling = replace(SMALL, stages=stages)
    ours = fill(add_column_sums, blank(2, 1, 229, **fields), q, k, rule, cuts, tiling=tiling)
    assert hopper
    theirs = fill(reference.add_column_sums, blank(2, 1, 229, **fields), q, k, rule, [])
    assert_equal(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "softcap", "window", "stride", "block", "can"),
    [
        (1, 128, torch.float16, None, None, 1, 64, True),
        (1, 128, torch.bfloat16, None, None, 4, 64, True),
        (1, 128, torch.bfloat16, None, None, 1, 32, True),
        (1, 128, torch.bfloat16, None, None, 4, 32, False),
        (1, 128, torch.float32, None, None, 1, 64, False),
        (1, 64, torch.float16, None, None, 1, 64, False),
        (2, 128, torch.float16, None, None, 1, 64, False),
        (1, 128, torch.float16, 5.0, None, 1, 64, False),
        (1, 128, torch.float16, None, 9, 1, 64, False),
    ],
)
def test_what_it_cannot_do_the_other_kernel_does(
    heads: int, head_dim: int, dtype: torch.dtype, softcap: float | None, window: int | None, stride: int, block: int,
    can: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(column_sums, "multiplies_by_warp_groups", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(column_sums, "fetches_tiles", lambda device: True)
    q = torch.zeros(4, 8, head_dim, dtype=dtype)
    chunk = column_sums._Chunk(q, q, q[..., 0], 0, 1.0, softcap, window, TURNS)
    assert chunk._takes_turns(heads, stride, block) is can


def test_other_versions_of_triton_use_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_sums, "multiplies_by_warp_groups", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(column_sums, "fetches_tiles", lambda device: True)
    q = torch.zeros(4, 8, 128, dtype=torch.float16)
    chunk = column_sums._Chunk(q, q, q[..., 0], 0, 1.0, None, None, TURNS)
    assert chunk._takes_turns(1, 1, 64)
    monkeypatch.setattr(column_sums, "turns", None)
    assert not chunk._takes_turns(1, 1, 64)


@pytest.mark.parametrize(("version", "taken"), [("3.6.0", True), ("3.7.1", True), ("3.8.0", False), ("4.0.0", False)])
def test_the_kernel_is_not_even_read_by_versions_that_have_not_compiled_it(version: str, taken: bool) -> None:
    code = (
        f"import sys, triton; triton.__version__ = {version!r}\n"
        "from d2o.kernels import column_sums\n"
        "read = 'd2o.kernels.column_sums_turns' in sys.modules\n"
        "assert read == (column_sums.turns is not None), 'read and not kept'\n"
        f"assert read is {taken}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@on_cpu
def test_other_processors_use_the_other_kernel() -> None:
    q, k = queries_keys(2, 1, 75, 128, torch.float16)
    rule = AttentionRule(0.1)
    ours = fill(add_column_sums, blank(2, 1, 75), q, k, rule, [], tiling=TURNS)
    theirs = fill(reference.add_column_sums, blank(2, 1, 75), q, k, rule, [])
    assert_equal(ours, theirs, 2e-4)


def test_long_prompts_of_many_heads_take_turns() -> None:
    def default(tokens: int, rows: int) -> Tiling:
        return Tiling.default(torch.bfloat16, 128, tokens, tokens, rows)

    assert default(32768, 32) is TURNS
    assert default(8193, 32) is TURNS
    assert default(8193, 8) is LONG
    assert default(8192, 32) is MIDDLE
    assert default(1024, 32) is SHORT
    assert Tiling.defaults(torch.bfloat16, 128, 9000) == {SHORT, MIDDLE, LONG, TURNS}
    assert Tiling.defaults(torch.bfloat16, 128, 8192) == {SHORT, MIDDLE}


@pytest.mark.gpu
@needs_gpu
@needs_hopper
@pytest.mark.parametrize(
    ("fields", "tiling"),
    [
        ({}, TURNS),
        ({"first_query": 5000}, TURNS),
        ({"stride": 4}, TURNS),
        ({"stride": 3, "first_query": 777}, replace(TURNS, stages=2)),
        ({"stride": 4, "block": 128}, replace(TURNS, adjacent=1)),
        ({"stride": 3, "block": 192, "first_query": 100}, TURNS),
    ],
)
@pytest.mark.parametrize("cuts", [[], [1500, 3584], [1, 5999]])
def test_long_prompts(fields: dict[str, int], tiling: Tiling, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_sums, "launch", None)
    q, k = queries_keys(8, 2, 6001, 128, torch.bfloat16)
    rule = AttentionRule(128**-0.5)
    ours = fill(add_column_sums, blank(8, 2, 6001, **fields), q, k, rule, cuts, tiling=tiling)
    theirs = fill(reference.add_column_sums, blank(8, 2, 6001, **fields), q, k, rule, cuts)
    assert_equal(ours, theirs, 1e-3)
