"""Compiles ahead what longer prompts and caches than those of a trial need: in mid-service all streams would wait."""

from __future__ import annotations

from dataclasses import replace

import torch

from d2o.attention import ScoreTarget
from d2o.kernels.column_sums import Tiling, add_column_sums
from d2o.kernels.column_sums_packed import add_column_sums_packed, pack_targets
from d2o.kernels.pairs import Pairs
from d2o.kernels.select import HELD, split

# Blocks of queries and a stride: all count; a sample and the last block, which is not of it; a sample that it is of.
_SAMPLES = ((2, 1), (2, 2), (3, 2))
_BLOCK = 64


def warm_column_sums(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    softcap: float | None = None,
) -> None:
    """Has the kernels compiled that score prompts of up to ``tokens`` tokens, whichever of their queries count.

    A kernel depends on how its work is cut, on which queries count and on whether there is a softcap, not on how many
    or how much. Layers with a sliding window are not scored. Nothing waits for the device.
    """
    for blocks, stride in _SAMPLES:
        length = blocks * _BLOCK
        q = torch.zeros(2 * length, heads, head_dim, dtype=dtype, device=device).transpose(0, 1)
        k, lse, part = q[:kv_heads], torch.zeros(heads, 2 * length, device=device), slice(0, length)
        received, window = (torch.zeros(each, length, device=device) for each in (heads, kv_heads))
        plain = ScoreTarget(received, None, length, length, stride=stride, block=_BLOCK)
        for tiling in Tiling.defaults(dtype, head_dim, tokens):
            add_column_sums(
                q[:, part], k[:, part], lse[:, part], plain, start=0, scale=1.0, softcap=softcap, tiling=tiling
            )
        observed = replace(plain, window=window, window_start=length - 1)
        add_column_sums(q[:, part], k[:, part], lse[:, part], observed, start=0, scale=1.0, softcap=softcap)
        packed = pack_targets([observed, observed], [0, length])
        add_column_sums_packed(q, k, lse, packed, layer=0, scale=1.0, softcap=softcap)


def warm_selection(device: torch.device) -> None:
    """Has the kernels compiled that choose survivors, for caches of any length. Nothing waits for the device."""
    one = torch.ones(1, dtype=torch.int32, device=device)
    keys = torch.arange(2, device=device).view(1, 1, 2)
    for most in (1, *(held + 1 for held, _ in HELD)):
        pairs = Pairs(0 * one, one.view(1, 1), 2 * one, one, 2 * one, one, 0 * one, most, most_kept=1, most_evicted=1)
        split(pairs, keys, torch.empty(1, 1, dtype=torch.int64, device=device), heads=1, into_sinks=False)
