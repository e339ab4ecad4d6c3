"""The page pool as kernels see it: plain tensors of one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from d2o.kernels.launch import fetches_tiles


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


def described(values: Tensor, tile: list[int]) -> TensorDescriptor | Tensor:
    """Keys or values as rows, one a slot, to be loaded by tiles [slots, padded head_dim].

    The values themselves on a GPU without an engine that copies tiles: there none would be fetched ahead.
    """
    if values.device.type == "cuda" and not fetches_tiles(values.device):
        return values
    rows = values.view(-1, values.shape[-1])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), tile)


@triton.jit  # type: ignore[untyped-decorator]
def whole_rows(cells: tl.tensor, DIM: tl.constexpr, DIM_PAD: tl.constexpr) -> tl.tensor:
    """What lies at pointers [slots, DIM_PAD], of which all slots are there; zero beyond DIM."""
    if DIM == DIM_PAD:
        return tl.load(cells)
    return tl.load(cells, mask=(tl.arange(0, DIM_PAD) < DIM)[None, :], other=0.0)
