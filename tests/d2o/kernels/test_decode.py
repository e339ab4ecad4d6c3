"""Decode attention's kernel does what its torch twin does, wherever the pages lie and whatever stale memory holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from d2o.kernels import decode, paged
from d2o.kernels import pending as pending_kernels
from d2o.kernels.decode import (
    DecodeConfig,
    DecodeGrid,
    DecodePlan,
    decode_attention,
    plan_decode,
)
from d2o.kernels.decode_plan import MOST_AT_ONCE
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
        {"window": 120, "score": False},
        {"window": 1, "score": False},
        {"softcap": 3.0},
        {"bias": False},
        {"score": False},
        {"softcap": 5.0, "bias": False},
        {"window": 60, "softcap": 5.0, "bias": False, "score": False},
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
    case.check(grid=DecodeGrid(4 + 20), config=DecodeConfig(block=16))
    case.check(grid=DecodeGrid(4 + 1), config=DecodeConfig(block=32))


def test_sequences_that_begin_a_last_round_are_split_over_more_items() -> None:
    case = Case(lengths=[[300, 290, 300, 310, 305, 1]], kv_heads=1, group=2)
    grid = DecodeGrid(6 + 6 + 4, at_once=4)
    assert plan_decode(case.counts, grid).first[0].diff().tolist() == [1, 1, 1, 1, 3, 1]
    case.check(grid=grid)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (96, torch.float16)])
def test_without_an_engine_that_copies_tiles_it_gives_the_same(
    head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decode, pending_kernels):
        monkeypatch.setattr(module, "described", lambda values, _: values)
    case = Case(lengths=[[5, 300, 128, 33]], head_dim=head_dim, dtype=dtype)
    case.check(softcap=30.0)
    case.check(bias=False)


def test_only_gpus_with_such_an_engine_are_asked_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    values: Any = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(paged, "fetches_tiles", lambda _: False)
    assert paged.described(values, [16, 64]) is values
    assert isinstance(paged.described(torch.zeros(2, 3, 16, 64), [16, 64]), TensorDescriptor)


def test_one_workspace_serves_layer_after_layer() -> None:
    case, grid = Case(lengths=[[300, 900], [700, 5]]), DecodeGrid(2 + 9)
    plan = plan_decode(case.counts, grid)
    workspace, pool, expected, pending = case.workspace(grid), case.copy(), case.copy(), case.pending()
    rule = case.launch_rule()
    for layer in (0, 1, 0):
        inputs = (case.q, case.k_new, case.v_new)
        out = decode_attention(
            *inputs, pool, case.table, case.rows, case.positions, plan, layer,
            workspace=workspace, pending=pending, config=DecodeConfig(block=32), **rule,
        )  # fmt: skip
        case.settle(pool, pending, layer)
        tables = (case.table, case.rows, case.positions, case.counts)
        wanted = reference.decode_attention(*inputs, expected, *tables, layer, **case.rule())
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        assert not workspace.arrivals.any()
    torch.testing.assert_close(pool.score, expected.score, rtol=1e-4, atol=1e-6, equal_nan=True)


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


def test_what_does_not_fit_is_refused() -> None:
    case = Case(lengths=[[40]])
    plan, small = plan_decode(case.counts, DecodeGrid(4)), case.workspace(DecodeGrid(3))
    inputs = (case.q, case.k_new, case.v_new, case.pool, case.table, case.rows, case.positions)
    rule = case.launch_rule()
    with pytest.raises(ValueError, match="got 4 items, allowed are the workspace's 3"):
        decode_attention(*inputs, plan, 0, workspace=small, pending=None, **rule)
    rule |= {"window": 7, "pending": case.pending()}
    with pytest.raises(ValueError, match="pending: got scores with a window of 7, allowed is None there"):
        decode_attention(*inputs, plan, 0, workspace=case.workspace(DecodeGrid(4)), **rule)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=gpu) for d in (torch.bfloat16, torch.float16, torch.float32)])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 3), (96, 8), (128, 4), (256, 1)])
def test_real_lengths_on_the_gpu(dtype: torch.dtype, head_dim: int, group: int) -> None:
    case = Case(lengths=[[9000, 1, 4097, 512, 31]], kv_heads=8, group=group, head_dim=head_dim, dtype=dtype)
    grid = DecodeGrid.of(5, 8, torch.device("cuda"))
    case.check(grid=grid)
    case.check(grid=grid, softcap=30.0)
    case.check(grid=grid, window=3000, softcap=30.0, score=False)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [[1500 + 37 * n for n in range(160)], [20000, *range(1, 120)], [131072]])
def test_long_and_many_sequences(lengths: list[int]) -> None:
    case = Case(lengths=[lengths], kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    for at_once in (0, 4, 6):
        case.check(grid=DecodeGrid.of(len(lengths), 8, torch.device("cuda"), at_once))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_launch_tells_how_many_programs_run_at_once() -> None:
    case = Case(lengths=[[600] * 70], kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    grid = DecodeGrid.of(70, 8, torch.device("cuda"), MOST_AT_ONCE)
    workspace = case.workspace(grid)
    inputs = (case.q, case.k_new, case.v_new, case.pool, case.table, case.rows, case.positions)
    for pending in (None, case.pending()):
        plan = plan_decode(case.counts, DecodeGrid.of(70, 8, torch.device("cuda")))
        decode_attention(*inputs, plan, 0, workspace=workspace, pending=pending, **case.launch_rule())
    assert 1 <= workspace.at_once[True] <= workspace.at_once[False] <= 32
    case.check(grid=DecodeGrid.of(70, 8, torch.device("cuda"), workspace.at_once[True]))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_step_follows_the_lengths_that_its_tensors_hold() -> None:
    layer = 1
    case = Case(lengths=[[300, 40], [900, 2000]], kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    grid = DecodeGrid.of(2, 8, torch.device("cuda"))
    workspace, pool, pending = case.workspace(grid), case.copy(), case.pending()
    plan, rule = DecodePlan.empty(case.counts.clone(), grid), case.launch_rule()
    inputs = (case.q, case.k_new, case.v_new, pool, case.table, case.rows, case.positions)

    def step() -> Tensor:
        plan_decode(plan.lengths, grid, out=plan)
        return decode_attention(*inputs, plan, layer, workspace=workspace, pending=pending, **rule)

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
        for row in case.rows.tolist():
            pending.forget(row)
        graph.replay()
        case.settle(pool, pending, layer, plan.lengths[layer])
        after = case.copy(torch.float32)
        new = (case.q.float(), case.k_new.float(), case.v_new.float())
        tables = (case.table, case.rows, case.positions, plan.lengths)
        expected = reference.decode_attention(*new, after, *tables, layer, **case.rule())
        assert (out.float() - expected).norm() < 1e-2 * expected.norm()
        torch.testing.assert_close(pool.score, after.score, rtol=1e-3, atol=1e-6, equal_nan=True)
        assert not workspace.arrivals.any()
