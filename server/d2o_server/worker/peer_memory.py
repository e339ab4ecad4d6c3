"""Sums over the GPUs that a model is split over, through memory that each of them reads from the others.

A decode step adds up a few hundred rows twice a layer: it waits for latency, not for bandwidth. torch's symmetric
memory takes half of NCCL's time for that, and products are written where the others read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

_BYTES = 64 << 20
# Up to here each rank reads all parts and adds them up; above, each adds up its share and reads the others' sums.
# Two H200s, in a graph: 13.1 and 14.7 us for 1 MiB, 18.7 and 17.5 us for 2 MiB (NCCL: 18.7 and 32.2).
_MOST_READ_WHOLE = 5 << 18
# torch's kernels for these types only; and rows of every rank's share begin where 16 bytes are read at once.
_DTYPES = (torch.bfloat16, torch.float32)
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class _Shared:
    group: dist.ProcessGroup
    buffer: Tensor


_shared: dict[str, _Shared] = {}


def share_memory(group: dist.ProcessGroup, device: torch.device) -> None:
    """Allocates the memory that the GPUs of ``group`` share; all of them must call it.

    Raises:
        RuntimeError: they cannot read one another's memory.
    """
    buffer = symmetric_memory.empty(_BYTES, dtype=torch.uint8, device=device)
    symmetric_memory.rendezvous(buffer, group)
    _shared[group.group_name] = _Shared(group, buffer)


def give_up(group: dist.ProcessGroup) -> None:
    """Frees what :func:`share_memory` allocated here, where it failed on another rank."""
    _shared.pop(group.group_name, None)


@torch.library.custom_op("d2o::summed_product", mutates_args=())
def summed_product(x: Tensor, weight: Tensor, group: str) -> Tensor:
    """The sum over ``group`` of every rank's ``x`` [..., its inputs] times its ``weight`` [outputs, its inputs].

    The shared memory is free again when a call's kernels have run: they end when all ranks have read.

    Returns:
        [..., outputs], the same on every rank.
    """
    shared = _shared[group]
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], weight.shape[0])
    add_up = _sum_for(out, shared.group.size())
    if add_up is None:
        torch.mm(rows, weight.t(), out=out)
        dist.all_reduce(out, group=shared.group)
    else:
        product = shared.buffer.view(x.dtype)[: out.numel()].view(out.shape)
        torch.mm(rows, weight.t(), out=product)
        add_up(product, "sum", group, out)
    return out.view(*x.shape[:-1], weight.shape[0])


@summed_product.register_fake
def _shape(x: Tensor, weight: Tensor, _group: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _sum_for(values: Tensor, ranks: int) -> Callable[..., Tensor] | None:
    """torch's quickest sum of such values, None where only NCCL has one."""
    size = values.nbytes
    if values.dtype not in _DTYPES or size > _BYTES or size % (_ALIGNMENT * ranks):
        return None
    whole = size * (ranks - 1) <= _MOST_READ_WHOLE
    ops = torch.ops.symm_mem
    found: Callable[..., Tensor] = ops.one_shot_all_reduce_out if whole else ops.two_shot_all_reduce_out
    return found
