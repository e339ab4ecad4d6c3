"""Indices over rows of unequal lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_indices(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For ``counts[i]`` things of each row i, in order: the row of each thing, and how many of its row's come before.

    Args:
        counts: [rows] int64, each at least 0.

    Returns:
        row [things], nth [things], int64 on the device of ``counts``.
    """
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
    return rows, torch.arange(rows.numel(), device=counts.device) - (counts.cumsum(0) - counts)[rows]
