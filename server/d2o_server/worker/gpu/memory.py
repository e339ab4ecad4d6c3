"""How much of a GPU's memory the page pool may have: what everything else takes is measured before it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch

from d2o.config import D2OConfig
from d2o.kernels.prefill import cudnn_takes_groups
from d2o_server.errors import SettingsError, StartupError
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.gpu.body_graphs import body_sizes
from d2o_server.worker.gpu.runner import KernelRunner
from d2o_server.worker.pool_plan import PoolPlan
from d2o_server.worker.warm_up import Trial, try_together

_TRIAL_OUTPUT = 4
_TRIAL_RATIO = 0.25
_PROMPTS_AT_ONCE = 2
# Of a captured step over the same step run once: the libraries' workspaces, and what CUDA keeps for each graph.
_GRAPHS_SHARE, _GRAPHS_BYTES = 1.25, 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """Bytes of a GPU that the page pool cannot have.

    ``others`` is held outside of PyTorch, by other processes too; ``model`` has the weights and all that is made once
    beside the pool; ``graphs`` serve captured steps; ``step`` is what the largest step takes while it runs;
    ``prompts`` are column sums and one layer's context of the longest prompts that are read at once.
    """

    others: int
    model: int
    graphs: int
    step: int
    prompts: int

    @property
    def total(self) -> int:
        return self.others + self.model + self.graphs + self.passing

    @property
    def passing(self) -> int:
        """What comes and goes while steps run."""
        return self.step + self.prompts

    def __str__(self) -> str:
        parts = (f"{field.name} {getattr(self, field.name) / 2**30:.1f}" for field in fields(self))
        return f"{', '.join(parts)} GiB"


def set_aside(core: WorkerCore, plan: PoolPlan, chunk: int) -> SetAside:
    """What a worker needs beside its pool, measured on requests that fill a step.

    Args:
        core: an idle worker over :func:`trial_pages`; it is idle again afterwards.
        chunk: most prompt tokens in one step.

    Raises:
        StartupError: the model failed the trial.
    """
    runner, most = core.runner, plan.settings.max_sequences
    made = torch.cuda.memory_allocated()
    trials = _trials(plan, chunk)
    torch.cuda.reset_peak_memory_stats()
    for failure in try_together(core, trials):
        raise StartupError(f"the model failed its first forward pass: {failure.message}")
    # Beside as many prompt tokens all other sequences may decode.
    step = _taken_since(made) * (chunk + most) // sum(trial.prompt for trial in trials)
    graphs = 0
    if plan.settings.graphs and isinstance(runner, KernelRunner):
        tokens = body_sizes(chunk + most)[-1]
        taken = _taken_by(runner.rehearse) + _taken_by(partial(runner.rehearse_body, tokens))
        graphs = int(taken * _GRAPHS_SHARE) + _GRAPHS_BYTES
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(plan.device)
    return SetAside(
        others=total - free - torch.cuda.memory_reserved(),
        model=made - core.pool_state().total * plan.page_bytes,
        graphs=graphs,
        step=step,
        prompts=_prompt_bytes(plan, chunk),
    )


def trial_pages(plan: PoolPlan, chunk: int) -> int:
    """Pages that the trial's requests need."""
    per_layer = sum(-(-trial.tokens // plan.settings.page_size) + 1 for trial in _trials(plan, chunk))
    return plan.shape.layers * per_layer


def affordable_pages(plan: PoolPlan, aside: SetAside) -> int:
    """Pages for what is left of the share of the GPU's memory that the settings allow.

    Raises:
        SettingsError: nothing is.
    """
    share = plan.settings.gpu_memory_utilization
    total = torch.cuda.get_device_properties(plan.device).total_memory
    pages: int = (int(total * share) - aside.total) // plan.page_bytes
    if pages < 1:
        raise SettingsError(
            f"gpu_memory_utilization: got {share}, which is {int(total * share) >> 20} MiB of the GPU, allowed is a"
            f" share that holds the {aside.total >> 20} MiB of {plan.settings.model} and its largest step ({aside}),"
            " and a page pool"
        )
    return pages


def _taken_by(step: Callable[[], None]) -> int:
    """Bytes at the peak of a step that runs again: what is met for the first time is compiled and tuned."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
    return _taken_since(before)


def _taken_since(before: int) -> int:
    return int(torch.cuda.max_memory_allocated()) - before


def _trials(plan: PoolPlan, chunk: int) -> list[Trial]:
    """Requests whose prompts fill one step, or nearly."""
    longest = max(1, min(chunk, plan.max_model_len - _TRIAL_OUTPUT))
    count = max(1, min(chunk // longest, plan.settings.max_sequences))
    return [Trial(longest, _TRIAL_OUTPUT, D2OConfig(ratio=_TRIAL_RATIO, min_budget=1))] * count


def _prompt_bytes(plan: PoolPlan, chunk: int) -> int:
    """Column sums and one layer's gathered context of the longest prompts that are read at once.

    While a step reads prompts, those that ended in the one before wait to be compressed: a long one, and short ones
    that filled the step.
    """
    shape = plan.shape
    sums = 4 * shape.layers * (shape.query_heads + shape.kv_heads)
    heads, group = shape.kv_heads, shape.query_heads // shape.kv_heads
    if group > 1 and not cudnn_takes_groups(plan.device.index or 0, plan.dtype, shape.head_dim, group):
        heads += shape.query_heads
    context = 2 * plan.dtype.itemsize * shape.head_dim * heads
    return sums * (_PROMPTS_AT_ONCE * plan.max_model_len + chunk) + context * plan.max_model_len
