"""Puts a worker together: model, page pool, caches, runner, scheduler, and a first forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from d2o.config import D2OConfig, Policy
from d2o.pages import PagePool
from d2o_server.engine.memory import CacheShape
from d2o_server.engine.messages import Failed, Submit, WorkerSettings
from d2o_server.engine.scheduler import Scheduler
from d2o_server.engine.shape import ModelShape
from d2o_server.engine.types import SamplingParams
from d2o_server.errors import SettingsError, StartupError
from d2o_server.models.describe import describe
from d2o_server.models.source import resolve
from d2o_server.worker import hf_attention
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.loader import load_model
from d2o_server.worker.runner import ModelRunner

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MOST_CPU_POOL_BYTES = 4 << 30
_WARM_UP_PROMPT, _WARM_UP_OUTPUT = 4, 2


@dataclass(frozen=True, slots=True)
class BuiltWorker:
    core: WorkerCore
    shape: ModelShape
    page_bytes: int
    max_model_len: int


def build_worker(settings: WorkerSettings, progress: Callable[[str], None]) -> BuiltWorker:
    """Loads the model and sizes the pool.

    Raises:
        StartupError: the model cannot be had or served, or the settings leave no room for a single page a layer.
    """
    torch.set_num_threads(settings.threads)
    hf_attention.register()
    dtype, device = _DTYPES[settings.dtype], _device(settings.device)
    source = resolve(settings.model, report=progress)
    progress(f"loading {settings.model} as {settings.dtype} on {settings.device}")
    model = load_model(source, dtype=dtype, device=device, attn_implementation=hf_attention.ATTENTION_NAME)
    shape = describe(model.config)
    page_bytes = PagePool.bytes_per_page(shape.kv_heads, shape.head_dim, settings.page_size, dtype)
    pages = settings.num_pages or _affordable_pages(settings, page_bytes)
    max_model_len = min(settings.max_model_len or shape.max_positions, shape.max_positions)
    least = shape.layers * -(-(_WARM_UP_PROMPT + _WARM_UP_OUTPUT) // settings.page_size)
    if pages < least:
        raise SettingsError(
            f"num_pages: got {pages}, allowed is at least {least}, which hold"
            f" {_WARM_UP_PROMPT + _WARM_UP_OUTPUT} tokens in each of the {shape.layers} layers of {settings.model}"
        )
    pool = PagePool(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        page_size=settings.page_size,
        num_pages=pages,
        rows=settings.max_sequences,
        max_slots=max_model_len + settings.page_size,
        dtype=dtype,
        device=device,
    )
    cache_shape = CacheShape(windows=shape.windows, page_size=settings.page_size)
    runner = ModelRunner(model, CacheManager(pool, cache_shape, shape.query_heads), shape.vocabulary_size)
    scheduler = Scheduler(pages=pages, max_sequences=settings.max_sequences, prefill_tokens=settings.prefill_tokens)
    core = WorkerCore(runner, scheduler, cache_shape, check_integrity=settings.check_integrity)
    progress("warming up")
    _warm_up(core)
    return BuiltWorker(core, shape, page_bytes, max_model_len)


def _device(name: str) -> torch.device:
    """The device of this name. Caches and attention run on CPUs only so far."""
    if name != "cpu":
        raise SettingsError(f"device: got {name!r}, allowed is cpu (this version has no GPU kernels)")
    return torch.device(name)


def _affordable_pages(settings: WorkerSettings, page_bytes: int) -> int:
    """Pages that fit into the share of available memory that the settings allow."""
    return min(int(_available_bytes() * settings.memory_fraction), _MOST_CPU_POOL_BYTES) // page_bytes


def _available_bytes() -> int:
    """Memory that can be had without swapping, the page cache included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _warm_up(core: WorkerCore) -> None:
    """Runs a prompt and a token: the first request finds everything in place, and a broken model is found now."""
    core.handle(
        Submit(
            id="warm-up",
            prompt=tuple(range(_WARM_UP_PROMPT)),
            sampling=SamplingParams(ignore_end_of_text=True),
            seed=0,
            config=D2OConfig(policy=Policy.NONE),
            end_ids=(),
            max_new_tokens=_WARM_UP_OUTPUT,
        )
    )
    failed: list[Failed] = []
    while core:
        failed += core.step().failed
    if failed:
        raise StartupError(f"the model failed its first forward pass: {failed[0].message}")
