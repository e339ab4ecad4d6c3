"""What queries give reaches the scores when enough have come together, or when it is settled, and exactly once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2o.kernels.decode import DecodeGrid, decode_attention, plan_decode
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pending import PART_SLOTS
from d2o.kernels.reference import decode as reference
from tests.d2o.kernels.decode_case import DEVICE, Case


class Steps:
    """Decode steps in a row of one layer, a page more at most.

    Beside them goes the twin, which adds what every query gives at once.
    """

    def __init__(self, case: Case, *, softcap: float | None = None, extra: int = 4) -> None:
        self.case, self.softcap = case, softcap
        self.pool, self.expected, self.pending = case.copy(), case.copy(torch.float32), case.pending()
        self.lengths = case.counts.clone()
        self.grid = DecodeGrid(len(case.lengths[0]) + extra)
        self.owed: list[Tensor] = []

    def step(self, rows: list[int] | None = None) -> None:
        """Of all sequences, or of these."""
        case, some = self.case, slice(None) if rows is None else rows
        q, k_new, v_new = (torch.randn_like(x)[some] for x in (case.q, case.k_new, case.v_new))
        tables = (case.table, case.rows[some], self.lengths[0][some] + 100)
        lengths = self.lengths[:, some].contiguous()
        rule: dict[str, Any] = {"scale": 0.2, "window": None, "softcap": self.softcap, "bias": True}
        before = self.expected.score.clone()
        wanted = reference.decode_attention(
            q.float(), k_new.float(), v_new.float(), self.expected, *tables, lengths, 0, score=True, **rule
        )
        turn = int(self.pending.clock) % self.pending.depth == self.pending.depth - 1
        if turn or len(self.owed) == self.pending.depth:
            self.owed.clear()
        self.owed.append((self.expected.score - before.nan_to_num()).nan_to_num())
        rule |= {"workspace": case.workspace(self.grid), "pending": self.pending}
        out = decode_attention(q, k_new, v_new, self.pool, *tables, plan_decode(lengths, self.grid), 0, **rule)
        assert (out.float() - wanted).norm() < (1e-5 if out.dtype == torch.float32 else 1e-2) * wanted.norm()
        self.lengths[:, some] += 1

    def settle(self, part: int = PART_SLOTS) -> None:
        self.case.settle(self.pool, self.pending, 0, self.lengths[0] - 1, part)
        self.owed.clear()

    def assert_scores(self) -> None:
        """They are the twin's but for what is owed."""
        wanted = self.expected.score - sum(self.owed, torch.zeros_like(self.expected.score))
        torch.testing.assert_close(self.pool.score, wanted, rtol=1e-3, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("head_dim", "group", "depth"), [(64, 4, 4), (96, 3, 4), (128, 8, 2), (64, 1, 8)])
def test_steps_in_a_row_add_what_the_twin_adds_but_for_what_is_pending(
    head_dim: int, group: int, depth: int, softcap: float | None
) -> None:
    steps = Steps(Case(lengths=[[40, 125, 5, 1]], kv_heads=1, head_dim=head_dim, group=group), softcap=softcap)
    assert steps.pending.depth == depth
    for _ in range(2 * depth + 2):
        steps.step()
        steps.assert_scores()
    assert steps.owed
    steps.settle()
    steps.assert_scores()


@pytest.mark.parametrize("begin", [0, 1, 3])
def test_by_the_clock_all_sequences_add_what_they_have_in_the_same_step(begin: int) -> None:
    steps = Steps(Case(lengths=[[40, 125, 5]], kv_heads=1))
    pending = steps.pending
    for _ in range(begin):
        pending.tick()
    rows = steps.case.rows.long()
    for _ in range(9):
        pending.tick()
        turn = int(pending.clock) % pending.depth == pending.depth - 1
        # One sits out all other steps: whose turn it is does not depend on how many it has.
        steps.step([0, 1, 2] if turn else [1, 0])
        steps.assert_scores()
        if turn:
            assert pending.count[0, rows, 0].tolist() == [1, 1, 1]
    steps.settle()
    steps.assert_scores()


@pytest.mark.parametrize("extra", [1, 60])
def test_split_and_whole_sequences_leave_the_same_pending(extra: int) -> None:
    steps = Steps(Case(lengths=[[1500, 700]], kv_heads=1, group=8), extra=extra)
    for _ in range(6):
        steps.step()
        steps.assert_scores()
    steps.settle()
    steps.assert_scores()


def test_the_newest_queries_of_a_tile_give_nothing_to_what_came_after_them() -> None:
    # Logits of later slots are large, so that what a query must not see would show.
    steps = Steps(Case(lengths=[[28]], kv_heads=1, group=1))
    steps.case.k_new = 5 * torch.ones_like(steps.case.k_new)
    for _ in range(12):
        steps.step()
        steps.assert_scores()


@pytest.mark.parametrize("part", [1, 32, 70])
def test_parts_of_a_sequence_settle_what_the_whole_does(part: int) -> None:
    steps = Steps(Case(lengths=[[40, 125, 5, 1]], kv_heads=2, head_dim=64, group=4))
    for _ in range(3):
        steps.step()
    steps.settle(part)
    steps.assert_scores()
    assert not steps.pending.count.any()
    assert not steps.pending.arrivals.any()


def test_settled_queries_give_nothing_more() -> None:
    steps = Steps(Case(lengths=[[90, 33]]))
    steps.step()
    steps.settle()
    steps.assert_scores()
    steps.settle()
    steps.assert_scores()
    assert not steps.pending.count.any()
    steps.step()
    steps.assert_scores()


def test_sequences_come_and_go_with_as_many_pending_as_they_have_steps() -> None:
    steps = Steps(Case(lengths=[[90, 33, 150]], group=8))
    for rows in ([0, 1, 2], [2, 0], [0], [1, 0], [0, 1], [2, 1, 0], [0]):
        steps.step(rows)
    assert steps.pending.count[0, steps.case.rows.long(), 0].tolist() == [1, 2, 1]
    steps.owed.clear()
    steps.settle()
    steps.assert_scores()


def test_a_forgotten_row_begins_anew_whatever_it_held() -> None:
    steps = Steps(Case(lengths=[[90, 33]]))
    steps.step()
    for row in steps.case.rows.tolist():
        steps.pending.forget(row)
    steps.pending.query.fill_(torch.nan)
    kept = steps.pool.score.clone()
    steps.settle()
    torch.testing.assert_close(steps.pool.score, kept, rtol=0, atol=0, equal_nan=True)
    steps.expected.score.copy_(kept)
    steps.step()
    steps.settle()
    steps.assert_scores()


def test_half_precision_settles_near_the_float32_twin() -> None:
    # Float16 only: the interpreter multiplies bfloat16 by its bits.
    dtypes = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        steps = Steps(Case(lengths=[[200, 64]], head_dim=128, dtype=dtype))
        steps.step()
        steps.step()
        steps.settle()
        steps.assert_scores()


def test_nothing_beyond_a_sequences_slots_is_written() -> None:
    case = Case(lengths=[[50, 31]])
    before = case.copy()
    _, after = case.run()

    def unused(pool: PagedTensors) -> Tensor:
        return pool.score[before.score.isnan()]

    # Of the NaN that unused memory holds only the new tokens' slots have become numbers.
    assert int(unused(after).isfinite().sum()) == 2 * case.kv_heads
