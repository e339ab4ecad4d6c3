"""Many prompts in one launch receive what each receives alone, in every layer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from d2o.attention import AttentionRule, ScoreTarget
from d2o.kernels.column_sums_packed import add_column_sums_packed, pack_targets
from d2o.kernels.reference import column_sums as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
LAYERS = 3


def stage(
    lengths: list[int], heads: int, kv_heads: int, windows: list[int | None]
) -> list[tuple[Tensor, Tensor | None]]:
    """Zeros [layers, heads, prompt] and [layers, kv_heads, prompt] or None of each prompt."""
    return [
        (
            torch.zeros(LAYERS, heads, length, device=DEVICE),
            None if window is None else torch.zeros(LAYERS, kv_heads, length, device=DEVICE),
        )
        for length, window in zip(lengths, windows, strict=True)
    ]


def targets_of(
    staged: list[tuple[Tensor, Tensor | None]], layer: int, windows: list[int | None], fields: list[dict[str, int]]
) -> list[ScoreTarget]:
    made = []
    for (received, observed), window, more in zip(staged, windows, fields, strict=True):
        length = received.shape[-1]
        begin = length if window is None else max(0, length - window)
        made.append(ScoreTarget(received[layer], None if observed is None else observed[layer], begin, length, **more))
    return made


def check(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    windows: list[int | None],
    fields: list[dict[str, int]],
    rule: AttentionRule,
) -> None:
    """One layer is filled by a pack made from an earlier layer's targets; the others stay as they were."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3
    borders = [0, *itertools.accumulate(lengths)]
    lead = 5  # other tokens stand before the prompts
    q = torch.randn(lead + borders[-1], heads, head_dim, device=DEVICE).to(dtype).transpose(0, 1)
    k = torch.full((lead + borders[-1] + 9, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    k[lead:-9] = torch.randn(borders[-1], kv_heads, head_dim, device=DEVICE)
    k = k.transpose(0, 1)
    parts = [slice(lead + low, lead + high) for low, high in itertools.pairwise(borders)]
    lse = torch.full((heads, q.shape[1]), torch.nan, device=DEVICE)
    for part in parts:
        lse[:, part] = reference.logsumexp(q[:, part], k[:, part], 0, rule)
    ours, theirs = (stage(lengths, heads, kv_heads, windows) for _ in range(2))
    packed = pack_targets(targets_of(ours, 1, windows, fields), [part.start - lead for part in parts], layer=1)
    more: dict[str, Any] = {"scale": rule.scale, "softcap": rule.softcap, "window": rule.window}
    add_column_sums_packed(q[:, lead:], k[:, lead:], lse[:, lead:], packed, layer=2, **more)
    for part, target in zip(parts, targets_of(theirs, 2, windows, fields), strict=True):
        reference.add_column_sums(q[:, part], k[:, part], lse[:, part], target, start=0, **more)
    for found, expected in zip(ours, theirs, strict=True):
        for left, right in zip(found, expected, strict=True):
            if left is not None:
                torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rule"),
    [
        (2, 2, 64, AttentionRule(0.125)),
        (3, 1, 96, AttentionRule(0.1, window=50)),
        (4, 1, 128, AttentionRule(0.2, softcap=4.0)),
    ],
)
def test_prompts_of_all_lengths(heads: int, kv_heads: int, head_dim: int, rule: AttentionRule) -> None:
    lengths = [1, 64, 63, 130]
    check(lengths, heads, kv_heads, head_dim, torch.float32, [32, None, 7, 32], [{}] * 4, rule)


def test_every_prompt_has_its_own_sample() -> None:
    fields = [{"stride": 2}, {}, {"first_query": 70}, {"stride": 3, "first_query": 5}]
    check([200, 65, 90, 150], 2, 1, 64, torch.float32, [None] * 4, fields, AttentionRule(0.3))


def test_blocks_of_different_size_are_refused() -> None:
    received = torch.zeros(2, 10, device=DEVICE)
    targets = [ScoreTarget(received, None, 10, 10, block=block) for block in (32, 64)]
    with pytest.raises(ValueError, match=r"block: got \[32, 64\]"):
        pack_targets(targets, [0, 10])


def test_scattered_targets_are_refused() -> None:
    target = ScoreTarget(torch.zeros(10, 2, device=DEVICE).t(), None, 10, 10)
    with pytest.raises(ValueError, match="not contiguous"):
        pack_targets([target], [0])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_real_shapes(head_dim: int, window: int | None) -> None:
    lengths = [512, 1, 1000, 777]
    fields = [{}, {"stride": 4}, {"stride": 4}, {"first_query": 700}]
    rule = AttentionRule(head_dim**-0.5, window)
    check(lengths, 8, 2, head_dim, torch.bfloat16, [32, None, 32, 32], fields, rule)
