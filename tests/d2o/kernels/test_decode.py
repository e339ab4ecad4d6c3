"""Decode attention's kernel does what its torch twin does, wherever the pages lie and whatever stale memory holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d2o.kernels.decode import (
    DecodeConfig,
    DecodeGrid,
    DecodePlan,
    DecodeWorkspace,
    decode_attention,
    plan_decode,
)
from d2o.kernels.decode_plan import WORTH_SLOTS
from d2o.kernels.reference import decode as reference
from tests.d2o.kernels.decode_case import DEVICE, Case

gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]


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
    case.check(grid=DecodeGrid.alone(4 + 20), config=DecodeConfig(block=16))
    case.check(grid=DecodeGrid.alone(4 + 1), config=DecodeConfig(block=32, score_slots=64))


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("score_slots", [64, 1024])
def test_however_many_slots_are_scored_at_once_the_scores_are_the_same(score_slots: int, group: int) -> None:
    config = DecodeConfig(block=16, score_slots=score_slots)
    Case(lengths=[[90, 1100, 1, 128, 257]], kv_heads=1, group=group).check(grid=DecodeGrid.alone(5 + 8), config=config)


@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_items_that_share_the_stash_take_turns(chunks: int) -> None:
    # The interpreter runs one program after another: none may wait for a later one, so each sequence has one item.
    grid = DecodeGrid(items=7 + 3, parts=1, chunks=chunks, together=True)
    case = Case(lengths=[[90, 300, 1, 128, 257, 33, 64], [5, 64, 700, 2, 1, 130, 31]], head_dim=96, group=3)
    case.check(0, grid=grid)
    case.check(1, grid=grid, window=100)


def test_tiles_that_the_window_hides_score_nothing_however_small_all_logits_are() -> None:
    case = Case(lengths=[[200]], kv_heads=1, group=1)
    case.q = -40 * case.k_new
    case.check(window=1, config=DecodeConfig(block=32))


@pytest.mark.parametrize(
    "grid", [DecodeGrid.alone(2 + 9), DecodeGrid(items=2 + 9, parts=1, chunks=1, together=True)], ids=["last", "each"]
)
def test_one_workspace_serves_layer_after_layer(grid: DecodeGrid) -> None:
    case = Case(lengths=[[300, 900], [700, 5]])
    plan = plan_decode(case.counts, grid)
    workspace, pool, expected = case.workspace(grid), case.copy(), case.copy()
    rule = case.rule() | {"config": DecodeConfig(block=32)}
    for layer in (0, 1, 0):
        inputs = (case.q, case.k_new, case.v_new)
        out = decode_attention(
            *inputs, pool, case.table, case.rows, case.positions, plan, layer, workspace=workspace, **rule
        )
        tables = (case.table, case.rows, case.positions, case.counts)
        wanted = reference.decode_attention(*inputs, expected, *tables, layer, **case.rule())
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        assert not workspace.arrivals.any()
        assert not workspace.turns.any()
        assert not workspace.turns.any()
    torch.testing.assert_close(pool.score, expected.score, rtol=1e-3, atol=1e-6, equal_nan=True)


def test_a_tile_larger_than_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="block: got 64 slots, allowed are a page's 32"):
        Case(lengths=[[40]]).run(config=DecodeConfig(block=64))


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


def small_workspace(items: int, slots: int) -> DecodeWorkspace:
    return DecodeWorkspace.allocate(
        DecodeGrid.alone(items),
        batch=1,
        heads=8,
        kv_heads=2,
        head_dim=64,
        slots=slots,
        longest=slots,
        device=DEVICE,
    )


def test_a_workspace_that_is_too_small_is_refused() -> None:
    case = Case(lengths=[[40]])
    plan = plan_decode(case.counts, DecodeGrid.alone(4))
    inputs = (case.q, case.k_new, case.v_new, case.pool, case.table, case.rows, case.positions)
    with pytest.raises(ValueError, match="got 4 items, allowed are the workspace's 3"):
        decode_attention(*inputs, plan, 0, workspace=small_workspace(3, 40), **case.rule())
    narrow = replace(small_workspace(4, 40), stash=small_workspace(2, 40).stash)
    with pytest.raises(ValueError, match="got 4 chunks, allowed are the workspace's 2"):
        decode_attention(*inputs, plan, 0, workspace=narrow, **case.rule())
    with pytest.raises(ValueError, match="without room for scores"):
        decode_attention(*inputs, plan, 0, workspace=small_workspace(4, 0), **case.rule())


def test_an_item_larger_than_a_chunk_of_the_stash_writes_nothing_beyond_it() -> None:
    case = Case(lengths=[[WORTH_SLOTS + 500, 200]], kv_heads=2)
    grid = replace(DecodeGrid.alone(6), parts=1)
    plan, room = plan_decode(case.counts, grid), small_workspace(6, 100)
    assert room.stash.shape == (6, 2, WORTH_SLOTS * 4)
    inputs = (case.q, case.k_new, case.v_new, case.copy(), case.table, case.rows, case.positions)
    out = decode_attention(*inputs, plan, 0, workspace=room, **case.rule())
    torch.testing.assert_close(out, case.expect()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=gpu) for d in (torch.bfloat16, torch.float16, torch.float32)])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (96, 8), (128, 4), (256, 1)])
def test_real_lengths_on_the_gpu(dtype: torch.dtype, head_dim: int, group: int) -> None:
    case = Case(lengths=[[9000, 1, 4097, 512, 31]], kv_heads=8, group=group, head_dim=head_dim, dtype=dtype)
    grid = DecodeGrid.of(5, 8, torch.device("cuda"))
    case.check(grid=grid)
    case.check(grid=grid, window=3000, softcap=30.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [[1500 + 37 * n for n in range(160)], [20000, *range(1, 120)], [131072]])
def test_programs_that_wait_for_one_another_all_end(lengths: list[int]) -> None:
    case = Case(lengths=[lengths], kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    grid = DecodeGrid.of(len(lengths), 8, torch.device("cuda"))
    case.check(grid=grid)
    case.check(grid=replace(grid, chunks=grid.parts))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_step_follows_the_lengths_that_its_tensors_hold() -> None:
    layer = 1
    case = Case(lengths=[[300, 40], [900, 2000]], kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    grid = DecodeGrid.of(2, 8, torch.device("cuda"))
    workspace, pool = case.workspace(grid), case.copy()
    plan = DecodePlan.empty(case.counts.clone(), grid)
    inputs = (case.q, case.k_new, case.v_new, pool, case.table, case.rows, case.positions)

    def step() -> Tensor:
        plan_decode(plan.lengths, grid, out=plan)
        return decode_attention(*inputs, plan, layer, workspace=workspace, **case.rule())

    plan.lengths.fill_(1)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in (case.counts, case.counts.flip(0), torch.ones_like(case.counts), case.counts):
        # Fewer slots than were filled: the new token overwrites an old one.
        plan.lengths.copy_(lengths.minimum(case.counts))
        for name in ("k", "v", "score", "position", "bias"):
            getattr(pool, name).copy_(getattr(case.pool, name))
        graph.replay()
        after = case.copy(torch.float32)
        new = (case.q.float(), case.k_new.float(), case.v_new.float())
        tables = (case.table, case.rows, case.positions, plan.lengths)
        expected = reference.decode_attention(*new, after, *tables, layer, **case.rule())
        assert (out.float() - expected).norm() < 1e-2 * expected.norm()
        torch.testing.assert_close(pool.score, after.score, rtol=1e-3, atol=1e-6, equal_nan=True)
        assert not workspace.arrivals.any()
        assert not workspace.turns.any()
