"""Column sums of many whole prompts that stand side by side: one launch, or two where some observe a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.attention import ScoreTarget
from d2o.kernels.column_sums import Tiling, constants, extra_block, factors, launch
from d2o.kernels.launch import Options, eighths

_KEYS = 64


@dataclass(frozen=True, slots=True, eq=False)
class PackedTargets:
    """Where the sums of a step's prompts go, in all layers.

    Attributes:
        received, window: [blocks of keys, 8] int64 on the device, the kernel's table, or None without such targets.
        block: queries of a sampled block; ``extra`` whether any prompt's last block is not sampled.
        layer: the layer of the targets they were made from.
        targets: keep the memory alive that the tables point to.
    """

    received: Tensor
    window: Tensor | None
    block: int
    extra: bool
    layer: int
    targets: tuple[ScoreTarget, ...]


def pack_targets(targets: Sequence[ScoreTarget], begins: Sequence[int], *, layer: int = 0) -> PackedTargets:
    """Describes whole prompts for :func:`add_column_sums_packed`, once a step. Neither host nor device waits.

    Args:
        targets: one a prompt, those of ``layer``. The sums of a layer n further lie n whole [heads, prompt] or
            [kv_heads, prompt] further in memory, as slices of [layers, heads, prompt] do.
        begins: where each prompt begins among the tokens of q, k and lse.
        layer: whose targets they are.

    Raises:
        ValueError: there is no target, they differ in ``block``, or their tensors are not contiguous.
    """
    blocks = {target.block for target in targets}
    if len(blocks) != 1:
        raise ValueError(f"block: got {sorted(blocks)}, allowed is one size for all prompts of a pack")
    outs = [out for target in targets for out in (target.received, target.window) if out is not None]
    if not all(out.is_contiguous() for out in outs):
        raise ValueError("targets of a pack: got a tensor that is not contiguous, allowed are contiguous ones")
    received, window = [], []
    for target, begin in zip(targets, begins, strict=True):
        extra = extra_block(target)
        tokens = target.prompt_tokens
        kept = [target.first_query, target.stride, tokens if extra is None else extra, 0]
        received += _lines(begin, tokens, target.received, kept)
        if target.window is not None:
            window += _lines(begin, tokens, target.window, [target.window_start, 1, tokens, 0])
    device = targets[0].received.device
    return PackedTargets(
        _upload(received, device),
        _upload(window, device) if window else None,
        blocks.pop(),
        any(extra_block(target) is not None for target in targets),
        layer,
        tuple(targets),
    )


def add_column_sums_packed(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    packed: PackedTargets,
    *,
    layer: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> None:
    """:func:`d2o.kernels.column_sums.add_column_sums` of all prompts of a pack, for one layer, in place.

    Args:
        q, k: [heads, tokens, head_dim] and [kv_heads, tokens, head_dim] of all prompts; strides as there.
        lse: [heads, tokens] float32.
        packed: where the sums go.
        layer: at or after ``packed.layer``.
        scale, softcap, window: as in :class:`d2o.attention.AttentionRule`.
    """
    tiling = Tiling.default(q.dtype, q.shape[2], tokens=0, queries=0, rows=0)
    extra_tiles = -(-packed.block // tiling.queries) if packed.extra else 0
    group = q.shape[0] // k.shape[0]
    _launch(q, k, lse, packed, packed.received, 1, extra_tiles, layer, scale, softcap, window, tiling)
    if packed.window is not None:
        _launch(q, k, lse, packed, packed.window, group, 0, layer, scale, softcap, window, tiling)


def _launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    packed: PackedTargets,
    table: Tensor,
    heads: int,
    extra_tiles: int,
    layer: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    tiling: Tiling,
) -> None:
    launch(
        (1, table.shape[0], q.shape[0] // heads),
        (q, q, k, lse, lse, table, *eighths(q, k), lse.stride(0), 0,
         0, 0, 0, 1, 0, layer - packed.layer, *factors(scale, softcap)),
        constants(
            q, k, tiling, packed=True, heads=heads, sample=packed.block, extra=extra_tiles, described=False,
            softcap=softcap is not None, window=window or 0,
        ),
        Options(tiling.warps, tiling.stages, tiling.registers),
    )  # fmt: skip


def _lines(begin: int, tokens: int, out: Tensor, kept: list[int]) -> list[list[int]]:
    """The table's lines of one prompt: see the kernel."""
    address = out.data_ptr()
    return [[begin, tokens, low, address, *kept] for low in range(0, tokens, _KEYS)]


def _upload(lines: list[list[int]], device: torch.device) -> Tensor:
    host = torch.tensor(lines, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
