"""Runs a Gluon kernel's own Python on CPU tensors: Triton's interpreter does not know Gluon.

Layouts mean nothing here, and a group of warps is a thread of the host, so that groups which wait for one another do.
What is asynchronous stays so: copied memory is NaN until a copy that takes a while is done, and a product reads its
operands only when it is waited for.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0
"""Seconds after which whoever still waits at a barrier gives up."""


@dataclass(frozen=True)
class Pointer:
    """Places in a tensor's memory."""

    memory: Tensor
    at: Tensor

    def __add__(self, more: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.at + more)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    @classmethod
    def of(cls, tensor: Tensor) -> Pointer:
        """Its first element; what stands before and behind it in memory can be reached as well."""
        whole = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        return cls(whole, torch.tensor(tensor.storage_offset()))

    def load(self, mask: Tensor | None = None, other: float = 0.0) -> Tensor:
        if mask is None:
            return self.memory[self.at]
        return torch.where(mask, self.memory[torch.where(mask, self.at, 0)], other)

    def store(self, value: Tensor, mask: Tensor) -> None:
        self.memory[self.at[mask]] = value[mask]


@dataclass(frozen=True)
class Described:
    """A tensor that is copied by tiles; what is outside of it is zero."""

    tensor: Tensor
    block: Sequence[int]
    layout: None = None

    @property
    def block_type(self) -> SimpleNamespace:
        return SimpleNamespace(nbytes=torch.Size(self.block).numel() * self.tensor.itemsize)

    def tile(self, corner: Sequence[int]) -> Tensor:
        tile = torch.zeros(tuple(self.block), dtype=self.tensor.dtype)
        lows = [max(0, at) for at in corner]
        highs = [min(at + n, size) for at, n, size in zip(corner, self.block, self.tensor.shape, strict=True)]
        if all(low < high for low, high in zip(lows, highs, strict=True)):
            here = tuple(slice(low, high) for low, high in zip(lows, highs, strict=True))
            there = tuple(slice(part.start - at, part.stop - at) for part, at in zip(here, corner, strict=True))
            tile[there] = self.tensor[here]
        return tile


class Barrier:
    """A phase ends when so many have arrived and all bytes have come that were expected."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = self._missing = self._bytes = self._phase = 0

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def arrive(self, expected: int = 0) -> None:
        with self._changed:
            assert self._missing > 0, "more arrived than were counted"
            self._missing -= 1
            self._bytes += expected
            self._advance()

    def bring(self, count: int) -> None:
        with self._changed:
            self._bytes -= count
            self._advance()

    def wait(self, phase: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._phase != phase, PATIENCE), "nobody comes"

    def _advance(self) -> None:
        if self._missing == self._bytes == 0:
            self._phase, self._missing = self._phase ^ 1, self._count
            self._changed.notify_all()


@dataclass
class Shared:
    """Shared memory; barriers are kept as objects."""

    data: Any

    @property
    def shape(self) -> Sequence[int]:
        return self.data.shape if isinstance(self.data, Tensor) else (len(self.data), 1)

    def index(self, i: int) -> Any:
        return Shared(self.data[i]) if isinstance(self.data, Tensor) else self.data[i]

    def slice(self, low: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, low, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: None) -> Shared:
        return Shared(self.data.view(dtype).view(*shape))

    def load(self, layout: object) -> Tensor:
        loaded: Tensor = self.data.clone()
        return loaded

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    @classmethod
    def allocate(cls, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Shared:
        barriers = dtype == torch.int64
        return cls([Barrier() for _ in range(shape[0])] if barriers else torch.full(shape, torch.nan, dtype=dtype))


@dataclass
class Product:
    """Products that have begun, in order, and what those that ended add up to."""

    begun: list[Callable[[], Tensor]] = field(default_factory=list)
    ended: Tensor | None = None


def _multiply(a: Shared, b: Shared, to: Tensor | Product, *, use_acc: bool = True, is_async: bool) -> Product:
    assert is_async
    if not use_acc:
        to = Product()
    assert isinstance(to, Product)
    to.begun.append(lambda: a.data.float() @ b.data.float())
    return to


def _wait(left: int, deps: list[Product]) -> Any:
    product = deps[0]
    while len(product.begun) > left:
        value = product.begun.pop(0)()
        product.ended = value if product.ended is None else product.ended + value
    return product if left else product.ended


def _copy(source: Described, corner: Sequence[int], barrier: Barrier, to: Shared) -> None:
    """Copies after a while, as the copy engine does."""
    to.data.fill_(torch.nan)

    def bring() -> None:
        time.sleep(random.choice((0.0, 0.0, 0.001)))
        to.data.copy_(source.tile([int(at) for at in corner]))
        barrier.bring(source.block_type.nbytes)

    threading.Thread(target=bring, daemon=True).start()


def _specialize(work: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: list[int], _: list[int]) -> None:
    """Every group is a thread; the first that failed is heard of."""
    assert len(warps) == len(work) - 1
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(function, *arguments) for function, arguments in work]:
            done.result()


def _layout(*_: object, **__: object) -> None:
    """Says nothing on a CPU."""


def _elementwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _language(program: tuple[int, int, int], grid: tuple[int, int, int]) -> SimpleNamespace:
    return SimpleNamespace(
        constexpr=None, float32=torch.float32, int64=torch.int64,
        program_id=lambda axis: torch.tensor(program[axis]), num_programs=lambda axis: grid[axis],
        arange=lambda low, high, layout: torch.arange(low, high), static_range=range,
        minimum=_elementwise(torch.minimum), maximum=_elementwise(torch.maximum),
        where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
        cdiv=lambda a, b: -(-a // b), exp2=torch.exp2, sum=torch.sum, reshape=torch.reshape,
        expand_dims=torch.unsqueeze, zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        load=Pointer.load, store=Pointer.store, convert_layout=lambda value, layout: value,
        inline_asm_elementwise=lambda assembly, constraints, places, **_: places[0].load(),
        allocate_shared_memory=Shared.allocate, warp_specialize=_specialize,
        NVMMADistributedLayout=_layout, BlockedLayout=_layout, SliceLayout=_layout, NVMMASharedLayout=_layout,
    )  # fmt: skip


BARRIERS = SimpleNamespace(
    MBarrierLayout=_layout, init=Barrier.init, arrive=lambda barrier, count: barrier.arrive(), wait=Barrier.wait,
    expect=Barrier.arrive,
)  # fmt: skip


def run(module: object, kernel: str, grid: tuple[int, int, int], *arguments: object, **known: object) -> None:
    """Runs every program of a module's kernel; tensors among the arguments become pointers.

    ``known``: what stands for the module's other names, such as functions that are not Gluon's.
    """
    for program in itertools.product(*map(range, grid)):
        names: dict[str, Any] = {
            "gl": _language((program[0], program[1], program[2]), grid), "range": range, "float": float,
            "mbarrier": BARRIERS, "tma": SimpleNamespace(async_copy_global_to_shared=_copy), "barrier": _layout,
            "warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait, "fence_async_shared": _layout, **known,
        }  # fmt: skip
        for name, value in vars(module).items():
            if name not in names and hasattr(value, "is_gluon"):
                function = FunctionType(value.fn.__code__, names, name)
                function.__kwdefaults__ = value.fn.__kwdefaults__
                names[name] = function
        names[kernel](*(Pointer.of(each) if isinstance(each, Tensor) else each for each in arguments))
