"""Puts a worker together: model, page pool, caches, runner, scheduler, and a first forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from d2o_server.engine.memory import CacheShape
from d2o_server.engine.messages import WorkerSettings
from d2o_server.engine.scheduler import Scheduler
from d2o_server.engine.shape import ModelShape
from d2o_server.errors import SettingsError
from d2o_server.models.describe import describe
from d2o_server.models.source import resolve
from d2o_server.worker import hf_attention
from d2o_server.worker.cache_ops import TorchCacheOps
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.dtype import choose_dtype, dtype_name
from d2o_server.worker.host_memory import available_bytes
from d2o_server.worker.loader import keep_part, load_model, weight_bytes
from d2o_server.worker.pool_plan import PoolPlan
from d2o_server.worker.ranks import Ranks
from d2o_server.worker.torch_runner import TorchRunner
from d2o_server.worker.warm_up import warm_up

_MOST_CPU_POOL_BYTES = 4 << 30
_CPU_PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class BuiltWorker:
    """``weight_bytes``: weights that every step reads whole, so all but an embedding that is not the output's too.

    They are this rank's; ``shape`` is the whole model's and ``page_bytes`` those of a page on all ranks.
    """

    core: WorkerCore
    shape: ModelShape
    page_bytes: int
    max_model_len: int
    weight_bytes: int


def build_worker(settings: WorkerSettings, progress: Callable[[str], None], ranks: Ranks | None = None) -> BuiltWorker:
    """Loads the model, or this rank's part of it, and sizes the pool.

    Raises:
        StartupError: the model cannot be had or served, or the settings leave no room for a single page a layer.
    """
    torch.set_num_threads(settings.threads)
    hf_attention.register()
    ranks = ranks or Ranks()
    with ranks.together():
        device = _device(settings)
        dtype = choose_dtype(settings.dtype, device)
        source = resolve(settings.model, report=progress)
        progress(f"loading {settings.model} as {dtype_name(dtype)} on {device}")
        # Random weights are the same on every rank only where all draw them whole; a checkpoint may not fit one GPU.
        place = device if ranks.count == 1 or source.preset is not None else torch.device("cpu")
        model = load_model(source, dtype=dtype, device=place, attn_implementation=hf_attention.ATTENTION_NAME)
        shape = describe(model.config)
    own = shape if ranks.count == 1 else keep_part(model, shape, ranks.connect(device), device)
    weights = weight_bytes(model)
    plan = PoolPlan.of(settings, own, dtype, device, ranks)
    core = _torch_core(model, plan, progress) if device.type == "cpu" else _kernel_core(model, plan, progress)
    core.in_lockstep, core.runner.caches.ranks = ranks.count > 1, ranks
    return BuiltWorker(core, shape, plan.page_bytes * ranks.count, plan.max_model_len, weights)


def _device(settings: WorkerSettings) -> torch.device:
    """The device that ``settings.device`` means for this worker.

    Raises:
        SettingsError: there is no such GPU.
    """
    gpus = torch.cuda.device_count()
    name = settings.device
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    number = int(name.partition(":")[2] or settings.index) if name != "auto" else settings.index
    if number >= gpus:
        seen = f"torch sees {gpus} of them" if gpus else "torch sees none"
        raise SettingsError(f"device: got {name!r}, which takes GPU {number}, allowed is a GPU that is there: {seen}")
    return torch.device("cuda", number)


def _torch_core(model: nn.Module, plan: PoolPlan, progress: Callable[[str], None]) -> WorkerCore:
    """A worker in plain torch on a CPU."""
    pages = plan.checked(plan.settings.num_pages or _affordable_pages(plan))
    pool = plan.pool(pages)
    cache_shape = CacheShape(windows=plan.shape.windows, page_size=pool.page_size)
    caches = CacheManager(TorchCacheOps(pool), cache_shape, plan.shape.query_heads)
    core = WorkerCore(
        TorchRunner(model, caches, plan.shape.vocabulary_size),
        Scheduler(
            pages=pages,
            max_sequences=plan.settings.max_sequences,
            prefill_tokens=plan.settings.prefill_tokens or _CPU_PREFILL_TOKENS,
        ),
        cache_shape,
        check_integrity=plan.settings.check_integrity,
    )
    progress("warming up")
    warm_up(core)
    return core


def _kernel_core(model: nn.Module, plan: PoolPlan, progress: Callable[[str], None]) -> WorkerCore:
    # Kernels need Triton, which a CPU does without.
    try:
        from d2o_server.worker.gpu.build import kernel_core
    except ImportError as error:
        raise SettingsError(f"device: a GPU needs Triton ({error}); install d2o-serve[gpu]") from error
    return kernel_core(model, plan, progress)


def _affordable_pages(plan: PoolPlan) -> int:
    """Pages that fit into the share of available memory that the settings allow; a container's limit counts."""
    return min(int(available_bytes() * plan.settings.memory_fraction), _MOST_CPU_POOL_BYTES) // plan.page_bytes
