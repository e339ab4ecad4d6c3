"""What does compressing a prompt's cache in place cost on the GPU, stage by stage, and what an eviction in decode?

Llama-3.1-8B's cache (32 layers, 8 KV heads, head 128, bfloat16) in pages that are scattered over the pool, with heavy-
tailed scores and keys that share a direction. The kernels are first compared with their torch twin. Then: whole prompts
at ratio 0.2, all layers at once; a page's worth evicted from many sequences; other tilings of the costly kernels.
Times are medians between CUDA events; the caches are restored in between. Writes ``compression_gpu.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks._gpu import RESULTS, Ceilings, time_gpu, write_result
from d2o.config import D2OConfig
from d2o.kernels.evict import evict_in_place, pairs_of
from d2o.kernels.fold import fold, move
from d2o.kernels.history import History
from d2o.kernels.judge import judge
from d2o.kernels.nearest import Tiling, nearest
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pairs import Pairs
from d2o.kernels.reference import evict as reference
from d2o.kernels.select import select

_LAYERS, _HEADS, _DIM, _PAGE = 32, 8, 128, 32
_PROMPTS = (8192, 32768, 131072)
_DECODE_SLOTS = 6592
_SCALARS = ("score", "position", "bias")
_STAGED = (
    Tiling(128, 128, 8, 2),
    Tiling(128, 128, 8, 3),
    Tiling(256, 128, 8, 2),
    Tiling(256, 128, 8, 3),
    Tiling(128, 256, 8, 2),
    Tiling(128, 128, 4, 2),
    Tiling(128, 64, 4, 3),
    Tiling(256, 64, 8, 2),
    Tiling(64, 256, 4, 2),
)
_DIRECT = (
    Tiling(32, 64, 4, 3),
    Tiling(32, 64, 4, 2),
    Tiling(32, 64, 4, 4),
    Tiling(32, 32, 4, 4),
    Tiling(32, 128, 4, 3),
    Tiling(32, 128, 8, 3),
)
_FOLDS = ((4, 1), (8, 1), (16, 1), (8, 2), (16, 2), (32, 2), (32, 4))


@dataclass(frozen=True, slots=True)
class Work:
    """All (layer, row) pairs of ``rows`` sequences, each from ``used`` down to ``keep`` slots."""

    pool: PagedTensors
    block_table: Tensor
    layers: Tensor
    rows: Tensor
    used: Tensor
    keep: Tensor
    seen: Tensor
    history: History
    began: float
    window: Tensor | None
    saved: tuple[Tensor, ...]

    @classmethod
    def random(
        cls, *, used: int, keep: int, layers: int, rows: int, heads: int, dim: int, dtype: torch.dtype, prompt: bool
    ) -> Work:
        """A prompt's slots stand in order and have a window; else they are shuffled and were evicted from before."""
        width = -(-used // _PAGE)
        pages = layers * rows * width
        shape = (pages, heads, _PAGE)
        k, v = (torch.empty(*shape, dim, device="cuda", dtype=dtype).normal_() for _ in range(2))
        k += torch.randn(heads, 1, dim, device="cuda", dtype=dtype)
        table = torch.randperm(pages, device="cuda").view(layers, rows, width).int()
        position = torch.empty(shape, device="cuda", dtype=torch.int32)
        for layer in range(layers):
            order = torch.arange(width * _PAGE, device="cuda").repeat(rows, 1)
            if not prompt:
                order = torch.randn(rows, width * _PAGE, device="cuda").argsort(-1)
            slots = order.view(rows, width, 1, _PAGE).expand(-1, -1, heads, -1)
            position[table[layer].long()] = slots.int()
        pool = PagedTensors(k, v, _heavy(*shape), position, torch.zeros(shape, device="cuda"))
        count = layers * rows
        nth = torch.arange(count)
        return cls(
            pool=pool,
            block_table=table,
            layers=nth % layers,
            rows=nth // layers,
            used=torch.full((count,), used),
            keep=torch.full((count,), keep),
            seen=torch.full((count,), width * _PAGE),
            history=History.empty(layers, rows, heads, "cuda"),
            began=torch.nan if prompt else 0.5,
            window=_heavy(count, heads, used) if prompt else None,
            saved=tuple(getattr(pool, name).clone() for name in _SCALARS),
        )

    def restore(self) -> None:
        for name, saved in zip(_SCALARS, self.saved, strict=True):
            getattr(self.pool, name).copy_(saved)
        self.history.threshold.fill_(self.began)

    def part(self, count: int) -> dict[str, Any]:
        """What evict_in_place takes, for the first ``count`` pairs."""
        names = ("layers", "rows", "used", "keep", "seen", "window")
        chosen = {name: getattr(self, name) for name in names}
        cut = {name: None if value is None else value[:count] for name, value in chosen.items()}
        return {"pool": self.pool, "block_table": self.block_table} | cut

    def evict(self, count: int, config: D2OConfig) -> None:
        evict_in_place(**self.part(count), history=self.history, config=config)

    def pairs(self, count: int, config: D2OConfig) -> Pairs:
        names = ("pool", "block_table", "layers", "rows", "used", "keep", "seen")
        part = self.part(count)
        return pairs_of(**{name: part[name] for name in names}, config=config)

    @property
    def flops(self) -> float:
        """Of the search for the nearest, a pair."""
        keep, used = int(self.keep[0]), int(self.used[0])
        return 2.0 * self.pool.head_dim * keep * (used - keep) * self.pool.kv_heads


def _heavy(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").mul_(2).exp_()


def agreement(dtype: torch.dtype, *, prompt: bool) -> dict[str, float]:
    """Shares of slots that are as the twin leaves them, and the largest difference of thresholds."""
    config = D2OConfig()
    used, keep = (4000, 820) if prompt else (2032, 2000)
    work = Work.random(used=used, keep=keep, layers=2, rows=2, heads=4, dim=_DIM, dtype=dtype, prompt=prompt)
    copy = PagedTensors(*(getattr(work.pool, name).clone() for name in ("k", "v", *_SCALARS)))
    work.restore()
    before = work.history.threshold[work.layers, work.rows]
    work.evict(4, config)
    theirs = reference.evict_in_place(**(work.part(4) | {"pool": copy}), threshold=before, config=config)
    tables = work.block_table[work.layers, work.rows]
    left = []
    for pool in (work.pool, copy):
        slots = reference.slots_of(pool, tables, work.keep)
        order = slots.position[..., :keep].argsort(-1)
        position, score = (each[..., :keep].gather(-1, order) for each in (slots.position, slots.score))
        value = slots.v[..., :keep, :].gather(2, order.unsqueeze(-1).expand(-1, -1, -1, _DIM)).float()
        left.append((position, value, score))
    (position, value, score), (position2, value2, score2) = left
    same = position == position2
    return {
        "survivors": same.float().mean().item(),
        "values": ((value - value2).abs().amax(-1) < 1e-3)[same].float().mean().item(),
        "scores": torch.isclose(score, score2, rtol=1e-4)[same].float().mean().item(),
        "threshold": (work.history.threshold[work.layers, work.rows] - theirs.threshold).abs().max().item(),
        "merged": (work.history.fates[0, work.layers, work.rows] - theirs.merged).abs().max().item(),
    }


def stages(work: Work, count: int, config: D2OConfig, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of the whole call and of its stages without chunks; the medians of ``repeats``."""
    times: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        work.restore()
        for name, value in (_stage_times(work, count, config) | _whole_time(work, count, config)).items():
            times.setdefault(name, []).append(value)
    return {name: median(values[1:]) for name, values in times.items()}


def _stage_times(work: Work, count: int, config: D2OConfig) -> dict[str, float]:
    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(name: str) -> None:
        marks.append((name, torch.cuda.Event(enable_timing=True)))
        marks[-1][1].record()

    pairs, pool = work.pairs(count, config), work.pool
    window = None if work.window is None else work.window[:count]
    mark("start")
    selection = select(pool, pairs, config, window)
    mark("select")
    slot, similarity = nearest(pool, pairs, selection, selection.evicted, into_sinks=config.merge_into_sinks)
    mark("nearest")
    passes = judge(pairs, selection, slot, similarity, work.history, config)
    mark("threshold")
    fold(pool, pairs, selection.evicted, slot, similarity, passes, config)
    mark("fold")
    move(pool, pairs, selection)
    mark("move")
    torch.cuda.synchronize()
    return {name: marks[i][1].elapsed_time(event) for i, (name, event) in enumerate(marks[1:])}


def _whole_time(work: Work, count: int, config: D2OConfig) -> dict[str, float]:
    work.restore()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work.evict(count, config)
    end.record()
    torch.cuda.synchronize()
    return {"all": begin.elapsed_time(end)}


def prompt(tokens: int, dtype: torch.dtype) -> tuple[dict[str, Any], Work]:
    shape = {"layers": _LAYERS, "rows": 1, "heads": _HEADS, "dim": _DIM}
    work = Work.random(used=tokens, keep=tokens // 5, **shape, dtype=dtype, prompt=True)
    times = stages(work, _LAYERS, D2OConfig(), repeats=3)
    return {"tokens": tokens, "ms": times, "nearest_tflop_s": work.flops * _LAYERS / times["nearest"] / 1e9}, work


def decode(dtype: torch.dtype) -> tuple[dict[str, Any], Work]:
    """Pages' worth due in 4 sequences at once, as every step brings with 128 running, and in all at once."""
    each = _LAYERS * (_DECODE_SLOTS + _PAGE) * _HEADS * (2 * _DIM * dtype.itemsize + 24)
    rows = int(min(128, 0.8 * torch.cuda.mem_get_info()[0] // each))
    shape = {"layers": _LAYERS, "rows": rows, "heads": _HEADS, "dim": _DIM}
    work = Work.random(used=_DECODE_SLOTS + _PAGE, keep=_DECODE_SLOTS, **shape, dtype=dtype, prompt=False)
    few = stages(work, 4 * _LAYERS, D2OConfig())
    every = stages(work, rows * _LAYERS, D2OConfig(), repeats=2)
    keys = (_DECODE_SLOTS + _PAGE) * _HEADS * _DIM * dtype.itemsize
    rate = {
        name: keys * n / ms["nearest"] / 1e9
        for name, n, ms in (("few", 4 * _LAYERS, few), ("every", len(work.used), every))
    }
    per_step = 128 / rows * every["all"] / _PAGE
    return {"sequences": rows, "four_due_ms": few, "all_due_ms": every, "key_tb_s": rate, "ms_a_step": per_step}, work


def sweep(work: Work, count: int, tilings: Sequence[Tiling]) -> list[dict[str, Any]]:
    """Milliseconds of the search for the nearest by tiling; None where it does not fit the processor."""
    work.restore()
    config = D2OConfig()
    pairs = work.pairs(count, config)
    selection = select(work.pool, pairs, config, None)
    run = partial(nearest, work.pool, pairs, selection, selection.evicted, into_sinks=False)
    return [asdict(tiling) | {"ms": _try(partial(run, tiling=tiling))} for tiling in tilings]


def fold_sweep(work: Work, count: int) -> list[dict[str, Any]]:
    work.restore()
    config = D2OConfig()
    pairs = work.pairs(count, config)
    selection = select(work.pool, pairs, config, None)
    slot, similarity = nearest(work.pool, pairs, selection, selection.evicted, into_sinks=False)
    passes = judge(pairs, selection, slot, similarity, work.history, config)
    run = partial(fold, work.pool, pairs, selection.evicted, slot, similarity, passes, config)
    return [{"members": m, "warps": w, "ms": _try(partial(run, members=m, warps=w))} for m, w in _FOLDS]


def _try(run: Callable[[], object]) -> float | None:
    try:
        return time_gpu(run, repeats=5, warmup=2)
    except OutOfResources:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = made.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    torch.manual_seed(0)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    agrees = {
        f"{name}, {'prompt' if prompts else 'decode'}": agreement(dtype, prompt=prompts)
        for name, dtype in kinds.items()
        for prompts in (True, False)
    }
    print(*agrees.items(), sep="\n", flush=True)
    result: dict[str, Any] = {"ceilings": asdict(Ceilings.measure()), "agreement": agrees, "prompts": []}
    print(result["ceilings"], flush=True)
    for tokens in _PROMPTS:
        figures, work = prompt(tokens, torch.bfloat16)
        result["prompts"].append(figures)
        print(figures, flush=True)
        if tokens == 32768:
            result["staged_sweep"] = sweep(work, 8, _STAGED)
            result["fold_sweep"] = fold_sweep(work, _LAYERS)
            print(*result["staged_sweep"], *result["fold_sweep"], sep="\n", flush=True)
        del work
        torch.cuda.empty_cache()
    result["decode"], work = decode(torch.bfloat16)
    print(result["decode"], flush=True)
    result["direct_sweep"] = sweep(work, 4 * _LAYERS, _DIRECT)
    print(*result["direct_sweep"], sep="\n", flush=True)
    print(write_result(given.out, "compression_gpu", result))
    # In half precision the twin's rounded cosines tie often, so its choice of survivor to merge into is arbitrary.
    exact = [agrees[name][kind] for name in agrees if "float32" in name for kind in ("values", "scores")]
    if min([*exact, *(shares["survivors"] for shares in agrees.values())]) < 0.999:
        raise SystemExit("the kernels disagree with their twin")


if __name__ == "__main__":
    main()
