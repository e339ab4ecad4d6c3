"""A decode step's slots are shared out equally, every slot once."""

from __future__ import annotations

import pytest
import torch

from d2o.kernels.decode import DecodePlan, decode_items, plan_decode
from d2o.kernels.decode_plan import SHARE_SLOTS, WORTH_SLOTS
from d2o.kernels.reference import decode as reference
from tests.d2o.kernels.decode_case import DEVICE


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
        share = reference.plan_shares(each, target, SHARE_SLOTS, WORTH_SLOTS)
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
