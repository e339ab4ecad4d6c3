"""What evictions leave behind of each row of the pool, besides its slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class History:
    """Of every (layer, row), on the device; evictions change it in place.

    Attributes:
        threshold: [layers, rows, kv_heads] float32, the moving similarity threshold; NaN where there was no eviction.
        fates: [2, layers, rows] float32, tokens merged and tokens dropped so far, means over KV heads.
    """

    threshold: Tensor
    fates: Tensor

    @classmethod
    def empty(cls, layers: int, rows: int, kv_heads: int, device: torch.device | str) -> History:
        return cls(
            torch.full((layers, rows, kv_heads), torch.nan, device=device), torch.zeros(2, layers, rows, device=device)
        )

    def forget(self, row: int) -> None:
        """Has the row begin anew."""
        self.threshold[:, row] = torch.nan
        self.fates[:, :, row] = 0

    def thresholds_of(self, places: Tensor) -> Tensor:
        """[pairs, kv_heads] of the pairs ``layer * rows + row``."""
        return self.threshold.flatten(0, 1).index_select(0, places)

    def note(self, places: Tensor, threshold: Tensor | None, merged: Tensor, dropped: Tensor) -> None:
        """Replaces thresholds [pairs, kv_heads], where given, and adds to fates [pairs]; pairs are unique."""
        if threshold is not None:
            self.threshold.view(-1, self.threshold.shape[-1]).index_copy_(0, places.long(), threshold)
        self.fates.view(2, -1).index_add_(1, places, torch.stack([merged, dropped]))
