"""Telling memory that ran out from every other error."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Torch has a class of its own for a device's memory and none for the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
