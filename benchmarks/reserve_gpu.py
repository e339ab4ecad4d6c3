"""How much memory does PyTorch take from the driver while steps grow, and what does a block that is held ready change?

A worker in this process, started without the block that ``worker/gpu/build.py`` has held ready. Loads of many short
prompts, whose steps have ever more decoding tokens, run without it and with it; then mixed ones with it. Writes
``reserve_gpu.json``: bytes by which what was allocated and what was reserved grew at most, and what of the GPU was in
use at the end, beside the share that the worker may have.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from d2o.config import D2OConfig, Policy

if TYPE_CHECKING:
    from d2o_server.worker.core import WorkerCore

Load = list[tuple[int, int, D2OConfig]]

NONE = D2OConfig(policy=Policy.NONE)
TIGHT = D2OConfig(budget_tokens=400)
LONG = D2OConfig(ratio=0.2, min_budget=1024)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="random:llama-3.1-8b")
    parser.add_argument("--max-sequences", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("reserve_gpu: torch sees no GPU here; nothing was measured")
        return
    from benchmarks import _engine, _gpu
    from d2o_server.settings import worker_settings
    from d2o_server.worker.gpu.runner import KernelRunner

    settings = worker_settings(model=options.model, max_sequences=options.max_sequences)
    with patch.object(KernelRunner, "hold_ready") as skipped:
        core = _engine.start(settings).core
    assert isinstance(core.runner, KernelRunner)
    (held,), device = skipped.call_args.args, core.runner.caches.pool.device
    loads = loads_of(options.max_sequences)
    rows = []
    for name in ("even", "uneven"):
        torch.cuda.empty_cache()
        rows.append({"load": name, "held": False, **_run(core, name, loads[name])})
    core.runner.hold_ready(held)
    rows += [{"load": name, "held": True, **_run(core, name, load)} for name, load in loads.items()]
    result = {
        "model": options.model,
        "max_sequences": options.max_sequences,
        "share_bytes": int(torch.cuda.get_device_properties(device).total_memory * settings.gpu_memory_utilization),
        "held_bytes": held,
        "loads": rows,
    }
    print(_gpu.write_result(options.out, "reserve_gpu", result))


def loads_of(requests: int) -> dict[str, Load]:
    """Prompt tokens, output tokens and compression of each request."""
    return {
        "even": [(512, 24, NONE)] * requests,
        "uneven": [(300 + 37 * index % 400, 24, TIGHT if index % 2 else NONE) for index in range(requests)],
        "mixed": [
            *[(30_000, 40, NONE), (30_000, 40, LONG)] * 2,
            *((100 + 61 * index % 3000, 30, TIGHT if index % 3 else NONE) for index in range(requests // 2)),
        ],
    }


def _run(core: WorkerCore, name: str, load: Load) -> dict[str, Any]:
    """Submits a load at once and runs it to its end."""
    from benchmarks import _engine

    torch.cuda.reset_peak_memory_stats()
    allocated, reserved, began = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), time.perf_counter()
    vocabulary = core.runner.vocabulary_size
    for index, (tokens, new, config) in enumerate(load):
        prompt = tuple((7919 * index + 7 * place) % vocabulary for place in range(tokens))
        _engine.submit(core, f"{name}-{index}", prompt, config, new)
    failed = 0
    while core:
        failed += len(core.step().failed)
    free, total = torch.cuda.mem_get_info()
    row = {
        "requests": len(load),
        "failed": failed,
        "seconds": time.perf_counter() - began,
        "allocated_growth_bytes": torch.cuda.max_memory_allocated() - allocated,
        "reserved_growth_bytes": torch.cuda.max_memory_reserved() - reserved,
        "in_use_bytes": total - free,
    }
    print(name, row, flush=True)
    return row


if __name__ == "__main__":
    main()
