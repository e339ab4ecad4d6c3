"""Has all kernels compiled before the first request: in mid-service every stream would wait for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from d2o.config import D2OConfig, LayerBudgets, Policy
from d2o.kernels.decode import DecodeGrid, plan_decode
from d2o.kernels.pairs import FEW
from d2o.kernels.warm import warm_column_sums, warm_selection
from d2o_server.errors import OutOfDeviceMemory, StartupError
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.warm_up import Trial, try_together, warm_up

# Slots that a prompt loses: a few, up to each power of two that kernels for few come in, and many.
_LOST = (10, 28, FEW - 4, 3 * FEW + 8)
_OUTPUT = 4


def run_trials(core: WorkerCore, chunk: int, softcap: float | None = None) -> None:
    """Runs requests of all policies, and kernels by themselves where those would take long prompts.

    One that memory runs out on is left at that: so would a request be, and shorter ones may still do.

    Args:
        core: an idle worker; it is idle again afterwards.
        chunk: most tokens of a prompt that are read at once.
        softcap: of the model's attention.

    Raises:
        StartupError: the shortest failed, or another by anything but memory.
    """
    pool = core.runner.caches.pool
    longest = pool.block_table.shape[2] * pool.page_size
    heads = (core.runner.caches.query_heads, pool.kv_heads, pool.head_dim)
    warm_column_sums(pool.device, pool.k.dtype, *heads, tokens=longest, softcap=softcap)
    warm_selection(pool.device)
    # Steps without a graph, of each size that their plan comes in; one row of the pool is padding.
    most = max(2, pool.block_table.shape[1] - 1)
    for size in (1 << power for power in range((most - 1).bit_length() + 1)):
        lengths = torch.ones(pool.layers, size, dtype=torch.int32, device=pool.device)
        plan_decode(lengths, DecodeGrid.of(size, pool.kv_heads, pool.device))
    warm_up(core)
    for trials in _trials(pool.page_size, chunk):
        for failure in try_together(core, [trial for trial in trials if _fits(core, trial)]):
            if failure.error != OutOfDeviceMemory.__name__:
                raise StartupError(f"the model failed a request before the first: {failure.message}")


def _trials(page: int, chunk: int) -> Iterator[list[Trial]]:
    """Requests to run together. All of the first are compressed at their prompt's end, and in decode once more."""
    budget, output = 2 * page, page + _OUTPUT
    trials = []
    for make in (D2OConfig, D2OConfig.paper, D2OConfig.authors):
        config = make(budget_tokens=budget, layer_budgets=LayerBudgets.UNIFORM)
        trials += [Trial(budget + lost, output, config) for lost in _LOST]
    for policy in (Policy.H2O, Policy.SNAPKV, Policy.STREAMING):
        trials.append(Trial(budget + page, output, D2OConfig.of(policy, budget_tokens=budget)))
    yield trials
    # A prompt in two chunks: the second looks back at pages.
    yield [Trial(chunk + 1, _OUTPUT)]


def _fits(core: WorkerCore, trial: Trial) -> bool:
    """Whether the pool and a row of its table have room for the request's full cache."""
    pages = core.shape.pages(trial.tokens)
    room = core.pool_state().total // len(core.shape.windows)
    return pages <= min(room, core.runner.caches.pool.block_table.shape[2])
