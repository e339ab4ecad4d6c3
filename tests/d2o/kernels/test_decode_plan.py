"""A decode step's slots are shared out equally, every slot once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from d2o.kernels.decode import DecodeGrid, DecodePlan, plan_decode
from d2o.kernels.decode_plan import MOST_AT_ONCE, ROUNDS, SHARE_SLOTS, WORTH_SLOTS
from d2o.kernels.reference import decode as reference
from tests.d2o.kernels.decode_case import DEVICE


@pytest.mark.parametrize("at_once", [0, 3, 66])
@pytest.mark.parametrize(
    ("lengths", "target"),
    [
        ([1], 1),
        ([6592] * 64, 264),
        ([512, 32768] * 20, 33),
        ([1, 2, 3], 50),
        ([129, 128, 127, 100000], 7),
        ([1040] * 67, 198),
        ([1040] * 72 + [1] * 8, 198),
        ([2048, 700] * 45, 198),
    ],
)
def test_the_plan_covers_every_slot_once_in_equal_shares(lengths: list[int], target: int, at_once: int) -> None:
    layers = [lengths, lengths[::-1]]
    counts = torch.tensor(layers, dtype=torch.int32, device=DEVICE)
    grid = DecodeGrid(target + len(lengths) + at_once, at_once=at_once)
    plan = plan_decode(counts, grid, out=DecodePlan.empty(counts, grid))
    for layer, each in enumerate(layers):
        share = reference.plan_shares(each, target, SHARE_SLOTS, WORTH_SLOTS, at_once)
        assert plan.share[layer].tolist() == share
        items = [-(-length // size) for length, size in zip(each, share, strict=True)]
        owners = [sequence for sequence, count in enumerate(items) for _ in range(count)]
        assert len(owners) <= grid.items
        assert plan.owner[layer].tolist() == owners + [-1] * (grid.items - len(owners))
        assert plan.first[layer].tolist() == [sum(items[:n]) for n in range(len(items) + 1)]


@pytest.mark.parametrize(
    ("sequences", "parts"),
    [(66, 1), (67, 9), (72, 9), (76, 5), (95, 3), (96, 1), (132, 1), (134, 9)],
)
def test_sequences_that_begin_a_last_round_are_cut_as_finely_as_fills_it(sequences: int, parts: int) -> None:
    counts = torch.tensor([[1040] * sequences + [1] * 5], dtype=torch.int32, device=DEVICE)
    grid = DecodeGrid(sequences + 5 + 198 + 66, at_once=66)
    given = plan_decode(counts, grid).first[0].diff().tolist()
    whole = sequences // 66 * 66
    assert given == [1] * whole + [parts] * (sequences - whole) + [1] * 5


@pytest.mark.parametrize("worth", [256, 512, WORTH_SLOTS])
def test_sequences_stay_whole_up_to_what_the_grid_says(worth: int) -> None:
    lengths = [worth, worth + 1] * 4
    counts = torch.tensor([lengths], dtype=torch.int32, device=DEVICE)
    grid = DecodeGrid(len(lengths) + 16, worth=worth)
    assert plan_decode(counts, grid).first[0].diff().tolist() == [1, 2] * 4


def test_the_plan_needs_more_items_than_sequences() -> None:
    counts = torch.ones(1, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="items: got 2, 0 of them at once, allowed is more than the batch of 2"):
        plan_decode(counts, DecodeGrid(2))
    with pytest.raises(ValueError, match="items: got 9, 7 of them at once, allowed is more than the batch of 2"):
        plan_decode(counts, DecodeGrid(9, at_once=7))


@pytest.mark.parametrize("kv_heads", [1, 8, 300])
def test_a_gpu_is_given_rounds_of_programs_beside_one_a_sequence(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    items = DecodeGrid.of(64, kv_heads, torch.device("cuda")).items
    assert (items - 64) * kv_heads >= 2 * 132 * ROUNDS > (items - 65) * kv_heads
    for at_once, known in ((4, 4), (20, MOST_AT_ONCE)):
        grid = DecodeGrid.of(64, kv_heads, torch.device("cuda"), at_once)
        assert grid.shares == items
        assert grid.at_once == known * 132 // kv_heads
