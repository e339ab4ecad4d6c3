"""Evicted tokens are merged as d2o.merging does it, hubs included, and moves close every gap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2o import merging, scores
from d2o.config import D2OConfig, Merge
from d2o.kernels.fold import fold, move
from d2o.kernels.reference.evict import slots_of
from d2o.kernels.select import Selection, select
from tests.d2o.kernels.caches import Case, random_case

CONFIGS = {
    "paper": D2OConfig.paper(),
    "authors": D2OConfig.authors(),
    "conserve": D2OConfig(),
    "conserve, keys too, no bias": D2OConfig(merge_keys=True, merge_bias=False),
    "conserve, tight bias": D2OConfig(bias_limit=0.2),
    "a lighter survivor": D2OConfig.paper(merge_weight=0.1),
}


def chosen(case: Case, selection: Selection, hub: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random targets, similarities and passes; with ``hub`` all go to one survivor."""
    generator = torch.Generator().manual_seed(seed)
    kept, evicted = selection.kept.cpu(), selection.evicted.cpu()
    index = torch.randint(0, 1 if hub else int(case.keep.min()), evicted.shape, generator=generator)
    target = kept.gather(-1, index)
    similarity = torch.rand(evicted.shape, generator=generator)
    real = torch.arange(evicted.shape[-1]) < (case.used - case.keep).view(-1, 1, 1)
    passes = (torch.rand(evicted.shape, generator=generator) < 0.7) & real
    similarity = similarity.masked_fill(~real, torch.nan)
    device = case.pool.device
    return target.to(device), similarity.to(device), passes.to(device)


def expected(
    case: Case, selection: Selection, target: Tensor, similarity: Tensor, passes: Tensor, config: D2OConfig
) -> dict[str, Tensor]:
    """All slots after the merge, computed by d2o.merging on whole caches."""
    slots, seen = slots_of(case.pool, case.tables, case.used), case.seen.to(case.pool.device)
    matches = merging.Matches(target.long(), similarity, passes)
    pairs = merging.pair(matches, passes, slots.score.shape[-1])
    evicted = torch.where(passes, selection.evicted, 0).long()
    mass = scores.mean_attention(slots.score, slots.position, seen)
    gone = mass.gather(-1, evicted).flatten()[pairs.source]
    share = merging.weights(pairs, similarity.flatten()[pairs.source], mass.flatten()[pairs.target], gone, config)
    out = {name: getattr(slots, name).clone() for name in ("k", "v", "score", "bias")}
    conserves = config.merge is Merge.CONSERVE
    for name in ("k", "v") if not conserves or config.merge_keys else ("v",):
        flat = out[name].view(-1, out[name].shape[-1])
        pulled = merging.take(getattr(slots, name), evicted).flatten(0, 2)[pairs.source]
        flat[pairs.target] = merging.blended(pairs, share, flat[pairs.target], pulled)
    if conserves:
        received = slots.score.gather(-1, evicted).flatten()[pairs.source]
        out["score"].view(-1).index_add_(0, pairs.target[pairs.group], received)
        if config.merge_bias:
            bias = out["bias"].view(-1)
            bias[pairs.target] = merging.raised_bias(bias[pairs.target], share, config)
    return out


def assert_folds(case: Case, config: D2OConfig, *, hub: bool = False, seed: int = 0, exact: float = 1e-5) -> None:
    pairs = case.pairs(config)
    selection = select(case.pool, pairs, config, None)
    target, similarity, passes = chosen(case, selection, hub, seed)
    wanted = expected(case, selection, target, similarity, passes, config)
    fold(case.pool, pairs, selection.evicted, target, similarity, passes, config)
    slots = slots_of(case.pool, case.tables, case.used)
    for pair, used in enumerate(case.used.tolist()):
        for name, values in wanted.items():
            ours, theirs = getattr(slots, name)[pair, :, :used], values[pair, :, :used]
            tolerance = exact if ours.dtype is torch.float32 else 1e-2
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("hub", [False, True], ids=["spread", "hub"])
@pytest.mark.parametrize("used", [60, 110], ids=["few", "many"])
def test_merges_agree_with_the_twin(config: D2OConfig, hub: bool, used: int) -> None:
    case = random_case([used, 30], [20, 27], heads=3, dim=24, shuffled=True, seed=7)
    assert_folds(case, config, hub=hub, seed=len(str(config)))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims_and_types(dim: int, dtype: torch.dtype) -> None:
    assert_folds(random_case([40], [20], dim=dim, dtype=dtype, page=64, shuffled=True), CONFIGS["paper"], seed=dim)


def test_where_nothing_passes_nothing_is_written() -> None:
    case = random_case([40], [20], shuffled=True)
    before, config = case.copy(), CONFIGS["conserve"]
    selection = select(case.pool, case.pairs(config), config, None)
    target, similarity, passes = chosen(case, selection, hub=False, seed=1)
    fold(case.pool, case.pairs(config), selection.evicted, target, similarity, torch.zeros_like(passes), config)
    for name in ("k", "v", "score", "bias"):
        assert torch.equal(getattr(case.pool, name).nan_to_num(9), getattr(before.pool, name).nan_to_num(9))


@pytest.mark.parametrize(("used", "keep"), [([70, 33], [12, 32]), ([40, 90], [1, 45])])
@pytest.mark.parametrize("dim", [64, 96])
def test_after_moving_the_first_slots_are_the_survivors(used: list[int], keep: list[int], dim: int) -> None:
    case = random_case(used, keep, dim=dim, shuffled=True, seed=dim)
    config = CONFIGS["conserve"]
    before = slots_of(case.pool, case.tables, case.used)
    selection = select(case.pool, case.pairs(config), config, None)
    move(case.pool, case.pairs(config), selection)
    for pair, left in enumerate(keep):
        kept = selection.kept[pair, :, :left].long()
        order = before.position[pair].gather(-1, kept).argsort(-1)
        kept = kept.gather(-1, order)
        after = case.survivors(pair)
        for name in ("k", "v", "score", "position", "bias"):
            old = getattr(before, name)[pair]
            index = kept.view(*kept.shape, *[1] * (old.dim() - 2)).expand(*kept.shape, *old.shape[2:])
            assert torch.equal(after[name], old.gather(1, index))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("hub", [False, True], ids=["spread", "hub"])
@pytest.mark.parametrize("name", CONFIGS)
def test_many_members_on_the_device(hub: bool, name: str) -> None:
    case = random_case([6000, 300], [1000, 290], heads=3, dim=128, page=32, shuffled=True)
    assert_folds(case, CONFIGS[name], hub=hub, exact=1e-4)
