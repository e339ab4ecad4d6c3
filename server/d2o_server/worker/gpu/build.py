"""A worker on a GPU: compiles the model, measures what a step needs, and gives the rest of the memory to the pool."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from d2o.kernels.prefill import warm_plans
from d2o_server.engine.memory import CacheShape
from d2o_server.engine.scheduler import Scheduler
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.gpu.batch_sizes import LIBRARIES, BatchSize, candidates, product_seconds, worth_capturing
from d2o_server.worker.gpu.body_graphs import body_sizes
from d2o_server.worker.gpu.cache_ops import KernelCacheOps
from d2o_server.worker.gpu.memory import SetAside, affordable_pages, set_aside, trial_pages
from d2o_server.worker.gpu.model import ModelForward, forward_of, join_projections
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.runner import KernelRunner
from d2o_server.worker.gpu.trials import run_trials
from d2o_server.worker.pool_plan import PoolPlan

PREFILL_TOKENS = 8192
# What the host computes is small, and torch wakes all of its threads for some of it (repeat_interleave): where other
# processes keep the cores busy, waiting for the last of them takes longer than a step.
_THREADS = 1


def kernel_core(model: nn.Module, plan: PoolPlan, progress: Callable[[str], None]) -> WorkerCore:
    """A worker over a pool that fills the share of the GPU's memory that the settings allow.

    Raises:
        SettingsError: that share does not hold the model and the shortest request.
        StartupError: the model failed a first request.
    """
    settings = plan.settings
    torch.set_num_threads(_THREADS)
    torch.cuda.set_device(plan.device)
    if settings.compile:
        _keep_compiled_code(settings.compile_cache)
    join_projections(model)
    operator = AttentionOperator()
    forward = forward_of(model, plan.shape.layers, compiled=settings.compile)
    progress("compiling and measuring the model" if settings.compile else "measuring the model")
    shape, chunk = plan.shape, settings.prefill_tokens or PREFILL_TOKENS
    heads = (shape.query_heads, shape.kv_heads, shape.head_dim)
    warm_plans(plan.device, plan.dtype, *heads, chunk, plan.max_model_len)
    pages, aside = settings.num_pages, None
    if pages is None:
        aside = _measure(plan, forward, operator, chunk)
        pages = affordable_pages(plan, aside)
    core = assemble(plan, forward, operator, plan.checked(pages))
    if aside is not None:
        total = core.pool_state().total
        progress(f"{total} pages take {total * plan.page_bytes / 2**30:.1f} GiB, beside {aside}")
    if settings.graphs and isinstance(core.runner, KernelRunner):
        most, tokens = settings.max_sequences, body_sizes(chunk + settings.max_sequences)
        batches = _worth(model, plan, candidates(most), most)
        core.runner.capture(batches, _worth(model, plan, tokens, tokens[-1]), progress)
    if aside is not None and isinstance(core.runner, KernelRunner):
        core.runner.hold_ready(aside.passing)
    progress("warming up")
    run_trials(core, chunk, plan.shape.softcap)
    return core


def _worth(model: nn.Module, plan: PoolPlan, sizes: list[int], most: int) -> list[BatchSize]:
    """Those of ``sizes`` whose products take notably less time than those of the next, as measured by all ranks."""
    layers = plan.shape.layers
    seconds = {each: plan.ranks.mean(product_seconds(model, sizes, layers, each)) for each in LIBRARIES}
    return worth_capturing(sizes, seconds, most)


def assemble(plan: PoolPlan, forward: ModelForward, operator: AttentionOperator, pages: int) -> WorkerCore:
    """The parts of a worker over a pool of this many pages."""
    settings, shape = plan.settings, plan.shape
    ops = KernelCacheOps(plan.pool(pages, mirrored=True), shape.query_heads)
    cache_shape = CacheShape(windows=shape.windows, page_size=settings.page_size)
    runner = KernelRunner(
        forward,
        operator,
        CacheManager(ops, cache_shape, shape.query_heads),
        ops,
        vocabulary_size=shape.vocabulary_size,
        max_sequences=settings.max_sequences,
    )
    scheduler = Scheduler(
        pages=pages,
        max_sequences=settings.max_sequences,
        prefill_tokens=settings.prefill_tokens or PREFILL_TOKENS,
        whole_chunks=True,
    )
    return WorkerCore(runner, scheduler, cache_shape, check_integrity=settings.check_integrity)


def _keep_compiled_code(folder: str | None) -> None:
    """Lets the compilers find at the next start what they made at this one."""
    cache = Path(folder) if folder else Path.home() / ".cache" / "d2o-serve" / "compile"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))


def _measure(plan: PoolPlan, forward: ModelForward, operator: AttentionOperator, chunk: int) -> SetAside:
    """What a worker over a small pool needs beside it. Nothing of that worker is left."""
    core = assemble(plan, forward, operator, trial_pages(plan, chunk))
    aside = set_aside(core, plan, chunk)
    del core
    gc.collect()
    torch.cuda.empty_cache()
    return aside
