"""One program a pair judges as torch does, for every rule and scope, and moves what is remembered of the pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from d2o.config import D2OConfig, Scope, Threshold
from d2o.kernels.history import History
from d2o.kernels.judge import judge, judge_by_torch
from d2o.kernels.pairs import Pairs
from d2o.kernels.select import Selection
from tests.d2o.kernels.caches import DEVICE

LAYERS, ROWS = 2, 3
# Pairs (0, 1), (1, 0) and (1, 2) of the history.
PLACES = (1, 3, 5)


def pairs_of(gone: tuple[int, int, int]) -> Pairs:
    def vector(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    unread = vector((0, 0, 0))
    return Pairs(
        places=vector(PLACES),
        tables=unread.view(3, 1),
        used=vector(tuple(20 + each for each in gone)),
        keep=vector((20, 20, 20)),
        seen=unread,
        recent_from=unread,
        quota=unread,
        most_used=20 + max(gone),
        most_kept=20,
        most_evicted=max(gone),
    )


def search(heads: int, width: int, served: Tensor, generator: torch.Generator) -> tuple[Selection, Tensor, Tensor]:
    """Random similarities; what no kernel may read is NaN."""
    shape = (3, heads, width)
    slot = torch.zeros(shape, dtype=torch.int32)
    similarity = torch.rand(shape, generator=generator).masked_fill(~served[..., None], torch.nan)
    fallback = torch.where(served, 0, -1).int()
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    selection = Selection(kept=slot, evicted=slot, fallback=fallback.to(DEVICE), keys=nothing, cut=nothing)
    return selection, slot.to(DEVICE), similarity.to(DEVICE)


def copy_of(history: History) -> History:
    return History(history.threshold.clone(), history.fates.clone())


@pytest.mark.parametrize("rule", list(Threshold))
@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize(("heads", "gone"), [(1, (1, 1, 1)), (3, (9, 5, 8)), (8, (64, 1, 33))])
def test_it_judges_as_torch_does(
    rule: Threshold, scope: Scope, alpha: float | None, heads: int, gone: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(heads)
    config = D2OConfig(threshold=rule, threshold_scope=scope, alpha=alpha)
    served = torch.ones(3, heads, dtype=torch.bool)
    served[0, 0] = heads == 1
    served[1] = False
    pairs = pairs_of(gone)
    selection, slot, similarity = search(heads, max(gone), served, generator)
    listed = torch.arange(max(gone)) < torch.tensor(gone).view(3, 1, 1)
    similarity = similarity.masked_fill(~listed.to(DEVICE), torch.nan)
    history = History.empty(LAYERS, ROWS, heads, DEVICE)
    history.threshold[1] = torch.rand(ROWS, heads, generator=generator).to(DEVICE)
    history.fates.copy_(torch.rand(history.fates.shape, generator=generator))
    twin = copy_of(history)
    passes = judge(pairs, selection, slot, similarity, history, config)
    expected = judge_by_torch(pairs, selection, slot, similarity, twin, config)
    assert torch.equal(passes, expected)
    torch.testing.assert_close(history.threshold, twin.threshold, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(history.fates, twin.fates)
    assert passes.any()
    assert not passes[1].any()


def test_equal_similarities_are_not_torn_apart_by_the_rounding_of_their_mean() -> None:
    pairs = pairs_of((7, 7, 7))
    served = torch.ones(3, 3, dtype=torch.bool)
    selection, slot, similarity = search(3, 7, served, torch.Generator())
    same = torch.full_like(similarity, 0.1234567)
    history = History.empty(LAYERS, ROWS, 3, DEVICE)
    assert judge(pairs, selection, slot, same, history, D2OConfig()).all()


def test_a_row_that_begins_anew_has_no_threshold_and_no_fates() -> None:
    history = History.empty(LAYERS, ROWS, 2, DEVICE)
    pairs = replace(pairs_of((3, 3, 3)), places=torch.tensor([1, 4, 5], dtype=torch.int32, device=DEVICE))
    selection, slot, similarity = search(2, 3, torch.ones(3, 2, dtype=torch.bool), torch.Generator().manual_seed(1))
    judge(pairs, selection, slot, similarity, history, D2OConfig())
    history.forget(1)
    assert history.threshold[:, 1].isnan().all()
    assert not history.fates[:, :, 1].any()
    assert not history.threshold[1, 2].isnan().any()
    assert history.fates[:, 1, 2].sum() == 3


@pytest.mark.parametrize(("gone", "lanes"), [(1, 16), (16, 16), (17, 32), (64, 64)])
def test_kernels_of_decode_come_in_three_sizes_whatever_is_evicted(gone: int, lanes: int) -> None:
    assert pairs_of((1, gone, 1)).lanes == lanes
