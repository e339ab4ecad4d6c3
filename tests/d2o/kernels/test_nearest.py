"""Every evicted key finds the survivor with the highest cosine; near ties may fall either way."""

from __future__ import annotations

import pytest
import torch

from d2o.config import D2OConfig
from d2o.kernels.nearest import Tiling, nearest
from d2o.kernels.reference.evict import slots_of
from d2o.kernels.select import select
from d2o.merging import take
from tests.d2o.kernels.caches import DEVICE, Case, random_case

HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16  # the interpreter multiplies bfloat16 by its bits
# A name takes up to 7 bits of a value.
LOSS = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_nearest(case: Case, config: D2OConfig, tiling: Tiling | None = None) -> None:
    slots, pairs = slots_of(case.pool, case.tables, case.used), case.pairs(config)
    selection = select(case.pool, pairs, config, None)
    found, similarity = nearest(
        case.pool, pairs, selection, selection.evicted, into_sinks=config.merge_into_sinks, tiling=tiling
    )
    unit = torch.nn.functional.normalize(slots.k.double(), dim=-1)
    for pair, (used, keep) in enumerate(zip(case.used.tolist(), case.keep.tolist(), strict=True)):
        one = slice(pair, pair + 1)
        kept, evicted = selection.kept[one, :, :keep].long(), selection.evicted[one, :, : used - keep].long()
        cosine = take(unit[one], evicted) @ take(unit[one], kept).transpose(-1, -2)
        if not config.merge_into_sinks:
            sinks = slots.position[one].gather(-1, kept) < config.sinks
            cosine = cosine.masked_fill(sinks.unsqueeze(2), -2)
        chosen = found[one, :, : used - keep].long()
        place = torch.searchsorted(kept, chosen)
        assert torch.equal(kept.gather(-1, place.clamp_max(keep - 1)), chosen)
        reached = cosine.gather(-1, place.unsqueeze(-1)).squeeze(-1)
        assert (reached >= cosine.amax(-1) - LOSS[case.pool.k.dtype]).all()
        torch.testing.assert_close(similarity[one, :, : used - keep].double(), reached, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("dim", "evicted"), [(64, 1), (96, 33), (128, 64), (256, 20), (64, 65), (96, 150), (128, 90)])
def test_decode_and_prompt_kernels_find_the_nearest(dtype: torch.dtype, dim: int, evicted: int) -> None:
    case = random_case([170, 160], [170 - evicted, 159], dim=dim, dtype=dtype, page=32, shuffled=True, seed=dim)
    assert_nearest(case, D2OConfig(sinks=4))


@pytest.mark.parametrize("evicted", [10, 100])
@pytest.mark.parametrize("into_sinks", [True, False])
def test_sinks_are_found_only_if_they_may_be(evicted: int, into_sinks: bool) -> None:
    case = random_case([120], [120 - evicted], dim=16, shuffled=True, seed=evicted)
    slots = slots_of(case.pool, case.tables, case.used)
    place = slots.position[0, 0, :120].argmin()
    page, inner = case.tables[0, place // case.pool.page_size].long(), place % case.pool.page_size
    case.pool.k[page, 0, inner] = 1.0  # the keys' common direction
    assert_nearest(case, D2OConfig(sinks=4, merge_into_sinks=into_sinks))


@pytest.mark.parametrize("evicted", [10, 100])
def test_negative_cosines_and_zero_keys(evicted: int) -> None:
    case = random_case([120], [120 - evicted], dim=16, shuffled=True, seed=evicted + 1)
    slots = slots_of(case.pool, case.tables, case.used)
    late = slots.position[0, 0] > 60
    for place in range(120):
        page, inner = case.tables[0, place // case.pool.page_size].long(), place % case.pool.page_size
        case.pool.k[page, 0, inner] *= 1 if late[place] else -1
        if place % 10 == 0:
            case.pool.k[page, 1, inner] = 0
    assert_nearest(case, D2OConfig(sinks=4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("evicted", [32, 2500])
def test_middle_sizes_on_the_device(dtype: torch.dtype, dim: int, evicted: int) -> None:
    case = random_case([4000, 3000], [4000 - evicted, 2990], dim=dim, dtype=dtype, page=32, shuffled=True, seed=dim)
    assert_nearest(case, D2OConfig())
