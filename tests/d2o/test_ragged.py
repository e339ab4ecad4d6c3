"""Indices over rows of unequal lengths."""

from __future__ import annotations

import pytest
import torch

from d2o.ragged import ragged_indices


@pytest.mark.parametrize("counts", [[], [0], [0, 0], [3], [2, 0, 1, 4], [0, 5, 0]])
def test_every_thing_has_its_row_and_its_number_within_it(counts: list[int]) -> None:
    rows, nth = ragged_indices(torch.tensor(counts, dtype=torch.int64))
    expected = [(row, number) for row, count in enumerate(counts) for number in range(count)]
    assert list(zip(rows.tolist(), nth.tolist(), strict=True)) == expected
