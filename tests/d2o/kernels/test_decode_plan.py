"""A decode step's slots are shared out equally, every slot once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from d2o.kernels.decode import DecodeGrid, DecodePlan, plan_decode
from d2o.kernels.decode_plan import ROUNDS, SHARE_SLOTS, WORTH_SLOTS
from d2o.kernels.reference import decode as reference
from tests.d2o.kernels.decode_case import DEVICE


@pytest.mark.parametrize(
    ("lengths", "target"),
    [([1], 1), ([6592] * 64, 264), ([512, 32768] * 20, 33), ([1, 2, 3], 50), ([129, 128, 127, 100000], 7)],
)
def test_the_plan_covers_every_slot_once_in_equal_shares(lengths: list[int], target: int) -> None:
    layers = [lengths, lengths[::-1]]
    counts = torch.tensor(layers, dtype=torch.int32, device=DEVICE)
    grid = DecodeGrid(target + len(lengths))
    plan = plan_decode(counts, grid, out=DecodePlan.empty(counts, grid))
    for layer, each in enumerate(layers):
        share = reference.plan_shares(each, target, SHARE_SLOTS, WORTH_SLOTS)
        assert plan.share[layer].tolist() == share
        items = [-(-length // size) for length, size in zip(each, share, strict=True)]
        owners = [sequence for sequence, count in enumerate(items) for _ in range(count)]
        assert len(owners) <= grid.items
        assert plan.owner[layer].tolist() == owners + [-1] * (grid.items - len(owners))
        assert plan.first[layer].tolist() == [sum(items[:n]) for n in range(len(items) + 1)]


@pytest.mark.parametrize("worth", [256, 512, WORTH_SLOTS])
def test_sequences_stay_whole_up_to_what_the_grid_says(worth: int) -> None:
    lengths = [worth, worth + 1] * 4
    counts = torch.tensor([lengths], dtype=torch.int32, device=DEVICE)
    grid = DecodeGrid(len(lengths) + 16, worth=worth)
    assert plan_decode(counts, grid).first[0].diff().tolist() == [1, 2] * 4


def test_the_plan_needs_more_items_than_sequences() -> None:
    with pytest.raises(ValueError, match="items: got 2, allowed is more than the batch of 2"):
        plan_decode(torch.ones(1, 2, dtype=torch.int32, device=DEVICE), DecodeGrid(2))


@pytest.mark.parametrize("kv_heads", [1, 8, 300])
def test_a_gpu_is_given_rounds_of_programs_beside_one_a_sequence(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    items = DecodeGrid.of(64, kv_heads, torch.device("cuda")).items
    assert (items - 64) * kv_heads >= 2 * 132 * ROUNDS > (items - 65) * kv_heads
