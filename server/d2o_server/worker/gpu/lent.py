"""Tensors over memory that nothing holds: what captured graphs read and write at every replay."""

from __future__ import annotations

import torch
from torch import Tensor


class _Lent:
    """A tensor's memory without a hold on it, in the form that ``torch.as_tensor`` takes over as it is."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<i{size}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def lent(tensor: Tensor) -> Tensor:
    """The same memory, which others may get once ``tensor`` is gone: a captured graph writes to it all the same."""
    if not tensor.is_cuda:
        return tensor
    return torch.as_tensor(_Lent(tensor), device=tensor.device).view(tensor.dtype)
