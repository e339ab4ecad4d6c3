"""Launches whose cost on the host does not depend on how many arguments Triton would have to look at."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

_QUARTERS = 4
_SHARED_OF_ITS_OWN = 1024
"""Bytes that a program has besides those it asks for."""


@cache
def fetches_tiles(device: torch.device) -> bool:
    """Whether it is a GPU with an engine that copies tiles of tensors by itself: compute capability 9.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiplies_by_warp_groups(device: torch.device) -> bool:
    """Whether it is a GPU whose groups of four warps multiply tiles in shared memory: compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def programs_at_once(kernel: Any, warps: int, device: torch.device) -> int:
    """Programs of a compiled kernel that a processor of a GPU runs at once, by registers, shared memory and threads.

    Args:
        kernel: what its launch has returned.
        warps: of a program.
        device: that it was launched on.
    """
    gpu = torch.cuda.get_device_properties(device)
    # A quarter of a processor has a quarter of its registers, and gives them to warps by eight a thread.
    registers = -(-kernel.n_regs // 8) * 8 * gpu.warp_size
    quarter = gpu.regs_per_multiprocessor // _QUARTERS  # type: ignore[attr-defined]  # left out of torch's stubs
    by_registers = _QUARTERS * (quarter // registers) // warps
    by_memory = gpu.shared_memory_per_multiprocessor // (kernel.metadata.shared + _SHARED_OF_ITS_OWN)
    by_threads = gpu.max_threads_per_multi_processor // (warps * gpu.warp_size)
    return int(max(1, min(by_registers, by_memory, by_threads)))


class Options(NamedTuple):
    """Of a compiled kernel: warps, pipeline stages, most registers of a thread (None: as the compiler likes)."""

    warps: int
    stages: int = 3
    registers: int | None = None


def eighths(*tensors: torch.Tensor) -> tuple[int, ...]:
    """First and second strides of tensors by eight: a kernel that multiplies them again knows that they are aligned.

    Raises:
        ValueError: one is not a multiple of 8.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    for stride in strides:
        if stride & 7:
            raise ValueError(f"strides: got {strides}, allowed are multiples of 8: head_dim must be one")
    return tuple([stride >> 3 for stride in strides])


class Launcher:
    """A kernel whose compiled forms are found again by its constants, options, device and its first tensor's dtype.

    Triton finds them by the type, the value and the alignment of every argument, which takes longer than many kernels
    run. So nothing else may decide which form is right: the kernel's integers are ``do_not_specialize``, the alignment
    of its pointers is either unspecialised or the same in all calls, and all dtypes follow from the first one.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options
    ) -> None:
        """Launches on the current stream; ``arguments`` then ``constants`` are the kernel's parameters in order."""
        first: torch.Tensor = arguments[0]
        key = (first.device, first.dtype, constants, options)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants)
            return
        named = dict(zip(self._kernel.arg_names[len(arguments) :], constants, strict=True))
        chosen = {"num_warps": options.warps, "num_stages": options.stages}
        if options.registers is not None:
            chosen["maxnreg"] = options.registers
        compiled = self._kernel[grid](*arguments, **named, **chosen)
        if compiled is not None:
            self._compiled[key] = compiled
