"""Whatever prompt comes, the kernels that score it have been compiled by then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from d2o.attention import ScoreTarget
from d2o.kernels import column_sums, column_sums_packed, select
from d2o.kernels.column_sums import add_column_sums
from d2o.kernels.column_sums_packed import add_column_sums_packed, pack_targets
from d2o.kernels.pairs import Pairs
from d2o.kernels.warm import warm_column_sums, warm_selection

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS = 4, 2


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """What tells apart the kernels that would have been launched, so far."""
    found: set[tuple[Any, ...]] = set()

    def launch(grid: object, arguments: tuple[Any, ...], constants: tuple[Any, ...], options: object) -> None:
        found.add((arguments[0].dtype, type(arguments[1]), constants, options))

    for module in (column_sums, column_sums_packed):
        monkeypatch.setattr(module, "launch", launch)
    return found


def prompts(most: int) -> Iterator[tuple[int, int, ScoreTarget]]:
    """Chunks from and to positions of prompts of many lengths, and what they add to."""
    for length in (1, 63, 64, 65, 500, 1024, 1025, 2000, 8192, 8193, 9001, 16384, 20000, 20480):
        if length > most:
            return
        for stride, first in ((1, 0), (2, 0), (4, 0), (7, 0), (1, length // 2), (1, max(0, length - 32))):
            received, window = torch.empty(HEADS, length), torch.empty(KV_HEADS, length)
            for observed in (None, window):
                target = ScoreTarget(received, observed, max(0, length - 20), length, stride=stride, first_query=first)
                for start in range(0, length, 8192):
                    yield start, min(start + 8192, length), target


@pytest.mark.parametrize(
    ("dtype", "head_dim", "most"),
    [(torch.bfloat16, 128, 40000), (torch.float16, 64, 1024), (torch.bfloat16, 96, 8192), (torch.float32, 64, 9000)],
)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_prompt_needs_another_kernel(
    launched: set[tuple[Any, ...]], dtype: torch.dtype, head_dim: int, most: int, softcap: float | None
) -> None:
    warm_column_sums(CPU, dtype, HEADS, KV_HEADS, head_dim, most, softcap)
    warmed = set(launched)
    assert warmed
    memory = torch.empty(most, HEADS + KV_HEADS, head_dim, dtype=dtype).transpose(0, 1)
    q, k, lse = memory[:HEADS], memory[HEADS:], torch.empty(HEADS, most)
    launched.clear()
    for start, end, target in prompts(most):
        part = slice(start, end)
        add_column_sums(q[:, part], k[:, :end], lse[:, part], target, start=start, scale=0.1, softcap=softcap)
        if end == target.prompt_tokens <= 1024:
            packed = pack_targets([target], [0])
            add_column_sums_packed(q[:, part], k, lse[:, part], packed, layer=0, scale=0.1, softcap=softcap)
    # Nor does it have any compiled that no prompt needs.
    assert launched == warmed
    # Tiles of half precision whose width is a power of two come by the copy engine.
    assert any(kind is TensorDescriptor for _, kind, *_ in launched) == (dtype != torch.float32 and head_dim != 96)


def test_it_runs() -> None:
    warm_column_sums(DEVICE, torch.float16, HEADS, KV_HEADS, 64, 1024)
    warm_selection(DEVICE)


class Noting:
    """In a kernel's place: notes what tells the forms apart that would have been launched."""

    def __init__(self) -> None:
        self.forms: set[tuple[object, ...]] = set()

    def __getitem__(self, grid: object) -> Any:
        return lambda *_, HELD, BLOCK, num_warps: self.forms.add((HELD, BLOCK, num_warps))


def test_no_cache_needs_another_kernel_for_choosing_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Noting()
    monkeypatch.setattr(select, "split_kernel", kernel)
    warm_selection(CPU)
    warmed = kernel.forms
    kernel.forms = set()
    one = torch.ones(1, dtype=torch.int32)
    for used in (2, 33, 1024, 2048, 2049, 4096, 4097, 8192, 8193, 100_000):
        pairs = Pairs(one, one.view(1, 1), one, one, one, one, one, used, most_kept=1, most_evicted=1)
        select.split(pairs, torch.empty(1, 1, used), torch.empty(1, 1, dtype=torch.int64), heads=1, into_sinks=False)
    assert kernel.forms == warmed
    assert len(warmed) == 4
