"""What the pool leaves of a GPU's memory: the requests that are measured, and the sum. On GPUs: test_gpu_worker.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from d2o_server.engine.messages import StepReport
from d2o_server.errors import SettingsError
from d2o_server.models.describe import describe
from d2o_server.settings import worker_settings
from d2o_server.worker.gpu import memory
from d2o_server.worker.gpu.build import assemble
from d2o_server.worker.gpu.memory import SetAside, affordable_pages, trial_pages
from d2o_server.worker.gpu.model import forward_of
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.runner import KernelRunner
from d2o_server.worker.pool_plan import PoolPlan
from d2o_server.worker.warm_up import try_together
from tests.server.worker.conftest import PAGE, load

GIB = 1 << 30
ASIDE = SetAside(others=GIB, model=16 * GIB, graphs=GIB, step=GIB, prompts=GIB)


def plan_of(model: torch.nn.Module, **changes: object) -> PoolPlan:
    settings = worker_settings(model="random:tiny-llama", dtype="float32", page_size=PAGE, **changes)
    return PoolPlan.of(settings, describe(model.config), torch.float32, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "chunk", "prompts"),
    [
        ({}, 100, [100]),
        ({"max_model_len": 34}, 100, [30, 30, 30]),
        ({"max_model_len": 34, "max_sequences": 2}, 100, [30, 30]),
        ({"max_model_len": 2}, 3, [1, 1, 1]),
    ],
)
def test_what_is_measured_fills_a_step(changes: dict[str, object], chunk: int, prompts: list[int]) -> None:
    """A model of short contexts reads several prompts at once."""
    plan = plan_of(load("tiny-llama", "d2o"), **changes)
    assert [trial.prompt for trial in memory._trials(plan, chunk)] == prompts


def test_its_pool_holds_all_of_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("tiny-llama", "d2o")
    plan = plan_of(model, max_model_len=24, max_sequences=4, prefill_tokens=64)
    forward = forward_of(model, plan.shape.layers, compiled=False)
    core = assemble(plan, forward, AttentionOperator(), trial_pages(plan, 64))
    assert isinstance(core.runner, KernelRunner)
    step, running = core.step, []

    def note() -> StepReport:
        report = step()
        running.append(core.pool_state().running)
        return report

    monkeypatch.setattr(core, "step", note)
    assert not try_together(core, memory._trials(plan, 64))
    assert running[0] == 3
    core.runner.rehearse(4)
    state = core.pool_state()
    assert (state.used, state.reserved, state.running, state.waiting) == (0, 0, 0, 0)


def test_the_pool_gets_what_the_share_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=40 * GIB))
    model = load("tiny-llama", "d2o")
    plan = plan_of(model, gpu_memory_utilization=0.75)
    assert affordable_pages(plan, ASIDE) == 10 * GIB // plan.page_bytes
    with pytest.raises(SettingsError) as error:
        affordable_pages(plan_of(model, gpu_memory_utilization=0.5), ASIDE)
    assert str(error.value) == (
        "gpu_memory_utilization: got 0.5, which is 20480 MiB of the GPU, allowed is a share that holds the 20480 MiB of"
        " random:tiny-llama and its largest step (others 1.0, model 16.0, graphs 1.0, step 1.0, prompts 1.0 GiB), and a"
        " page pool"
    )
