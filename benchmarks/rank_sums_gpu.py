"""What adding up over two GPUs takes: by NCCL, and by memory that they read from one another, in one shot and in two.

Sums of [rows, 4096] in bfloat16, 64 of them in a CUDA graph and nothing else. Writes ``rank_sums_gpu.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from d2o_server.worker.ranks import Ranks

_RANKS = 2
_ROWS = (1, 2, 8, 32, 64, 128, 256, 512, 2048, 8192)
_WIDTH = 4096
_SUMS, _REPLAYS = 64, 10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    if torch.cuda.device_count() < _RANKS:
        print(f"rank_sums_gpu: torch sees fewer than {_RANKS} GPUs here; nothing was measured")
        return
    from benchmarks import _engine, _gpu

    rows = _engine.on_ranks(_RANKS, _measure)
    print(_gpu.write_result(options.out, "rank_sums_gpu", {"ranks": _RANKS, "width": _WIDTH, "microseconds": rows}))


def _measure(ranks: Ranks) -> list[dict[str, Any]]:
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    device = torch.device("cuda", ranks.number)
    group = ranks.connect(device).group
    shared = symmetric_memory.empty(_ROWS[-1] * _WIDTH, dtype=torch.bfloat16, device=device)
    symmetric_memory.rendezvous(shared, dist.distributed_c10d._get_default_group())
    ops = torch.ops.symm_mem
    found = []
    for rows in _ROWS:
        x = torch.randn(rows, _WIDTH, dtype=torch.bfloat16, device=device)
        expected, out, own = x.clone(), torch.empty_like(x), x.clone()
        dist.all_reduce(expected)
        part = shared[: x.numel()].view(x.shape)
        row: dict[str, Any] = {"rows": rows, "nccl": _microseconds(partial(dist.all_reduce, own))}
        for name, add_up in (("one_shot", ops.one_shot_all_reduce_out), ("two_shots", ops.two_shot_all_reduce_out)):
            part.copy_(x)
            torch.cuda.synchronize()
            dist.barrier()
            add_up(part, "sum", group, out)
            torch.testing.assert_close(out, expected)
            row[name] = _microseconds(partial(add_up, part, "sum", group, out))
        print(row, flush=True)
        found.append(row)
    return found


def _microseconds(add_up: Callable[[], object]) -> float:
    """Of one sum among many in a graph; all ranks begin together."""
    import torch.distributed as dist

    from benchmarks import _gpu

    dist.barrier()
    replay = _gpu.captured([add_up] * _SUMS)
    dist.barrier()
    return 1000 * _gpu.mean_ms(replay, _REPLAYS) / _SUMS


if __name__ == "__main__":
    main()
