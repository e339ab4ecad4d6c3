"""Moving small things between host and device without either waiting for the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the device; neither side waits."""
    if device.type != "cuda":
        return values.clone()
    # The caching allocator of pinned memory keeps the block until the copy that reads it is done.
    return values.pin_memory().to(device, non_blocking=True)


def hold_ready(size: int, device: torch.device) -> None:
    """Has PyTorch keep one block of ``size`` bytes for all that comes and goes, and nothing else that is free.

    Steps of ever more tokens would otherwise ask the driver for a little larger blocks each time, and keep them all.
    Whatever empties PyTorch's cache afterwards gives the block back, as the capture of a graph does.
    """
    torch.cuda.empty_cache()
    torch.empty(size, dtype=torch.uint8, device=device)


@dataclass(frozen=True, slots=True)
class Download:
    """Device tensors on their way to the host."""

    host: tuple[Tensor, ...]
    done: torch.cuda.Event | None

    @classmethod
    def start(cls, *tensors: Tensor) -> Download:
        """Enqueues the copies behind the work that is enqueued already."""
        if tensors[0].device.type != "cuda":
            return cls(tuple(tensor.clone() for tensor in tensors), None)
        host = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
        for to, tensor in zip(host, tensors, strict=True):
            to.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return cls(host, done)

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are there."""
        if self.done is not None:
            self.done.synchronize()
        return self.host


class DeviceSpan:
    """A span of the device's time on the current stream."""

    __slots__ = ("_begin", "_end")

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()

    def stop(self) -> None:
        self._end.record()

    def seconds(self) -> float:
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1000
