"""The page pool as kernels see it: plain tensors of one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, slots=True)
class PagedTensors:
    """Views of a :class:`d2o.pages.PagePool`.

    Attributes:
        k, v: [pages, kv_heads, page_size, head_dim], model dtype.
        score, bias: [pages, kv_heads, page_size] float32.
        position: [pages, kv_heads, page_size] int32.
    """

    k: Tensor
    v: Tensor
    score: Tensor
    position: Tensor
    bias: Tensor

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def device(self) -> torch.device:
        return self.k.device


def described(values: Tensor, tile: list[int]) -> TensorDescriptor:
    """Keys or values as rows, one a slot, to be loaded by tiles [slots, padded head_dim]."""
    rows = values.view(-1, values.shape[-1])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), tile)
