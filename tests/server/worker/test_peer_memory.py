"""Sums over GPUs through shared memory: the same numbers as NCCL's, whatever the size, and where each is used."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from d2o_server.worker import peer_memory
from d2o_server.worker.peer_memory import share_memory, summed_product

INPUTS = 96


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone, whose shared memory is ordinary."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    found = dist.distributed_c10d._get_default_group()
    peer_memory._shared[found.group_name] = peer_memory._Shared(found, torch.empty(0, dtype=torch.uint8))
    yield found
    del peer_memory._shared[found.group_name]
    dist.destroy_process_group()


def test_what_shared_memory_cannot_add_up_the_group_does(group: dist.ProcessGroup) -> None:
    x, weight = torch.randn(1, 5, INPUTS, dtype=torch.float64), torch.randn(7, INPUTS, dtype=torch.float64)
    assert torch.equal(summed_product(x, weight, group.group_name), x @ weight.t())


def test_it_stands_the_compilers_checks(group: dist.ProcessGroup) -> None:
    x, weight = torch.randn(2, 3, INPUTS, dtype=torch.float64), torch.randn(7, INPUTS, dtype=torch.float64)
    torch.library.opcheck(summed_product, (x, weight, group.group_name))


@pytest.mark.parametrize(
    ("rows", "ranks", "dtype", "name"),
    [
        (1, 2, torch.bfloat16, "one_shot_all_reduce_out"),
        (128, 2, torch.bfloat16, "one_shot_all_reduce_out"),
        (128, 4, torch.bfloat16, "two_shot_all_reduce_out"),
        (256, 2, torch.bfloat16, "two_shot_all_reduce_out"),
        (8192, 2, torch.bfloat16, "two_shot_all_reduce_out"),
        (8192, 2, torch.float32, None),
        (8, 2, torch.float16, None),
    ],
)
def test_the_sum_is_chosen_by_size_and_type(rows: int, ranks: int, dtype: torch.dtype, name: str | None) -> None:
    values = torch.empty(rows, 4096, dtype=dtype, device="meta")
    found = peer_memory._sum_for(values, ranks)
    assert (found and str(found).rpartition(".")[2]) == name


def test_a_share_that_does_not_begin_where_16_bytes_do_is_left_to_the_group() -> None:
    assert peer_memory._sum_for(torch.empty(3, 20, dtype=torch.bfloat16), 2) is None


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_add_up_what_nccl_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compare_with_nccl, args=(rank, str(tmp_path / "meeting"))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]


def compare_with_nccl(rank: int, meeting: str) -> None:
    """One rank: products of random inputs, one after another through the same memory, and in a graph."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=rank, world_size=2, device_id=device)
    group = dist.distributed_c10d._get_default_group()
    share_memory(group, device)
    torch.manual_seed(rank)
    cases = [(rows, dtype) for rows in (1, 3, 130, 600, 9000) for dtype in (torch.bfloat16, torch.float32)]
    cases.append((5, torch.float16))
    for rows, dtype in cases:
        for outputs in (4096, 20):
            x = torch.randn(1, rows, INPUTS, dtype=dtype, device=device)
            weight = torch.randn(outputs, INPUTS, dtype=dtype, device=device)
            expected = (x[0] @ weight.t())[None]
            dist.all_reduce(expected)
            peer_memory._shared[group.group_name].buffer.fill_(255)
            torch.testing.assert_close(summed_product(x, weight, group.group_name), expected)
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(64, INPUTS, dtype=torch.bfloat16, device=device)
    weight = torch.randn(INPUTS, INPUTS, dtype=torch.bfloat16, device=device) / INPUTS**0.5
    torch.cuda.synchronize()
    dist.barrier()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(8):
            y = summed_product(y, weight, group.group_name)
    x.normal_()
    expected = x
    for _ in range(8):
        expected = expected @ weight.t()
        dist.all_reduce(expected)
    for _ in range(50):
        graph.replay()
    torch.testing.assert_close(y, expected)
    dist.destroy_process_group()
