"""Which batch sizes decode steps are captured for."""

from __future__ import annotations

import pytest
import torch

from d2o_server.models.describe import describe
from d2o_server.worker.gpu.batch_sizes import (
    LIBRARIES,
    BatchSize,
    candidates,
    largest,
    multiplied_weights,
    multiplying_by,
    product_seconds,
    worth_capturing,
)
from d2o_server.worker.gpu.model import join_projections
from d2o_server.worker.tensor_parallel import Part, split_model
from tests.server.worker.conftest import load


@pytest.mark.parametrize("most", [1, 2, 3, 8, 33, 256, 300, 512])
def test_candidates_reach_the_most_and_waste_little(most: int) -> None:
    sizes = candidates(most)
    assert sizes == sorted(set(sizes))
    assert max(2, most) in sizes
    assert most * 1.12 - 8 < sizes[-1] <= largest(most) <= max(2, most * 1.125)
    for batch in range(8, most + 1):
        assert next(size for size in sizes if size >= batch) < batch + 16


def kept(sizes: list[int], seconds: list[float], most: int | None = None) -> list[int]:
    """What is captured where both libraries are equally quick."""
    chosen = worth_capturing(sizes, dict.fromkeys(LIBRARIES, seconds), most or sizes[-1])
    assert {size.library for size in chosen} == {LIBRARIES[0]}
    return [size.rows for size in chosen]


def test_a_size_that_is_slower_than_a_larger_one_is_padded() -> None:
    assert kept([8, 16, 24, 32], [1.0, 2.0, 5.0, 4.0]) == [8, 16, 32]


def test_sizes_that_cost_the_same_are_one() -> None:
    assert kept([2, 4, 8, 16], [1.0, 1.001, 1.002, 1.003]) == [16]


def test_the_largest_is_always_there() -> None:
    assert kept([2, 3], [1.0, 9.0]) == [2, 3]
    assert kept([2], [1.0]) == [2]


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        ([1.0, 3.0, 2.0, 2.1], [8, 24]),
        ([1.0, 3.0, 2.5, 2.0], [8, 32]),
        ([1.0, 2.0, 2.5, 3.0], [8, 16]),
        ([1.0, 2.0, 2.0, 2.01], [8, 32]),
        ([3.0, 3.0, 2.0, 2.0], [32]),
    ],
    ids=["the next", "the last", "the most itself", "all alike", "smaller ones too"],
)
def test_the_largest_batch_is_padded_to_the_quickest_of_those_that_hold_it(
    seconds: list[float], sizes: list[int]
) -> None:
    """On an H200 the products of 448 rows took 14 ms where those of 464 took 10."""
    assert kept([8, 16, 24, 32], seconds, most=16) == sizes


def test_each_size_has_the_library_that_is_quicker_at_it() -> None:
    seconds = {"cublas": [1.0, 2.0, 3.0, 4.0], "cublaslt": [1.1, 1.9, 2.99, 3.9]}
    assert worth_capturing([8, 16, 24, 32], seconds, 32) == [
        BatchSize(8, "cublas"),
        BatchSize(16, "cublaslt"),
        BatchSize(24, "cublas"),
        BatchSize(32, "cublaslt"),
    ]


def test_a_size_is_padded_where_the_other_library_makes_a_larger_one_quicker() -> None:
    assert worth_capturing([8, 16], {"cublas": [2.0, 3.0], "cublaslt": [2.0, 1.9]}, 16) == [BatchSize(16, "cublaslt")]


@pytest.mark.parametrize("parts", [1, 2])
def test_every_layer_of_a_block_and_the_output_are_multiplied_by(parts: int) -> None:
    model = load("tiny-llama", "d2o")
    if parts > 1:
        split_model(model, model.tp_plan, describe(model.config), Part(0, parts, "0"))
    join_projections(model)
    weights = multiplied_weights(model)
    # Query, key and value are one product, gate and up another, and two layers of a block have one of their own.
    assert len(weights) == 4 * model.config.num_hidden_layers + 1
    whole = sum(weight.numel() for weight in multiplied_weights(load("tiny-llama", "d2o")))
    assert sum(weight.numel() for weight in weights) == whole / parts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_rows_are_measured_as_more_work() -> None:
    model = load("tiny-llama", "d2o")
    model.to("cuda")  # type: ignore[arg-type]
    few, many = product_seconds(model, [2, 65536], layers=3)
    assert 0 < few < many


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("library", LIBRARIES)
def test_both_libraries_give_the_same_products_and_the_first_is_used_again_afterwards(library: str) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    x, weight = (torch.randn(n, 512, device="cuda", generator=generator) for n in (48, 96))
    before = torch.backends.cuda.preferred_blas_library()
    with multiplying_by(library):
        assert str(torch.backends.cuda.preferred_blas_library()).lower().endswith(f".{library}")
        ours = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16())
    assert torch.backends.cuda.preferred_blas_library() == before
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(ours.double(), exact, rtol=0.01, atol=0.1)
