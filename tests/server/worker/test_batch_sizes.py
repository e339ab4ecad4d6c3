"""Which batch sizes decode steps are captured for."""

from __future__ import annotations

import pytest
import torch

from d2o_server.worker.gpu.batch_sizes import candidates, product_seconds, worth_capturing
from tests.server.worker.conftest import load


@pytest.mark.parametrize("most", [1, 2, 3, 8, 33, 256, 300, 512])
def test_candidates_reach_the_most_and_waste_little(most: int) -> None:
    sizes = candidates(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max(2, most)
    for batch in range(8, most + 1):
        assert next(size for size in sizes if size >= batch) < batch + 16


def test_a_size_that_is_slower_than_a_larger_one_is_padded() -> None:
    assert worth_capturing([8, 16, 24, 32], [1.0, 2.0, 5.0, 4.0]) == [8, 16, 32]


def test_sizes_that_cost_the_same_are_one() -> None:
    assert worth_capturing([2, 4, 8, 16], [1.0, 1.001, 1.002, 1.003]) == [16]


def test_the_largest_is_always_there() -> None:
    assert worth_capturing([2, 3], [1.0, 9.0]) == [2, 3]
    assert worth_capturing([2], [1.0]) == [2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_rows_are_measured_as_more_work() -> None:
    model = load("tiny-llama", "d2o")
    model.to("cuda")  # type: ignore[arg-type]
    few, many = product_seconds(model, [2, 65536], layers=3)
    assert 0 < few < many
