"""What the pool leaves of a GPU's memory: the requests that are measured, and the sum. On GPUs: test_gpu_worker.py."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from d2o_server.engine.messages import StepReport
from d2o_server.errors import SettingsError, StartupError
from d2o_server.models.describe import describe
from d2o_server.settings import worker_settings
from d2o_server.worker.gpu import build, memory
from d2o_server.worker.gpu import runner as gpu_runner
from d2o_server.worker.gpu.build import assemble
from d2o_server.worker.gpu.memory import SetAside, affordable_pages, trial_pages
from d2o_server.worker.gpu.model import Logits, ModelForward, forward_of
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
    core.runner.rehearse()
    state = core.pool_state()
    assert (state.used, state.reserved, state.running, state.waiting) == (0, 0, 0, 0)


def kernel_runner() -> KernelRunner:
    model = load("tiny-llama", "d2o")
    plan = plan_of(model, num_pages=8)
    runner = assemble(plan, forward_of(model, plan.shape.layers, compiled=False), AttentionOperator(), 8).runner
    assert isinstance(runner, KernelRunner)
    return runner


def test_the_block_is_held_once_nothing_gives_it_back_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture empties PyTorch's cache."""
    done: list[object] = []
    monkeypatch.setattr(build, "_measure", lambda *_: ASIDE)
    monkeypatch.setattr(build, "affordable_pages", lambda *_: 400)
    monkeypatch.setattr(build, "warm_plans", lambda *_: None)
    monkeypatch.setattr(build, "_worth", lambda *_: [])
    monkeypatch.setattr(build, "run_trials", lambda *_: done.append("trials"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(KernelRunner, "capture", lambda *_: done.append("capture"))
    monkeypatch.setattr(KernelRunner, "hold_ready", lambda _, size: done.append(size))
    model = load("tiny-llama", "d2o")
    build.kernel_core(model, plan_of(model, max_model_len=64, compile=False), lambda _: None)
    assert done == ["capture", ASIDE.passing, "trials"]


def test_the_block_is_held_again_after_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    monkeypatch.setattr(gpu_runner, "hold_ready", lambda size, _: held.append(size))
    runner = kernel_runner()
    runner._tidy_memory()
    assert not held
    runner.hold_ready(512)
    runner._tidy_memory()
    assert held == [512, 512]


def test_a_block_that_does_not_fit_any_more_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def short_of_memory(size: int, _: torch.device) -> None:
        raise torch.OutOfMemoryError(f"no {size} bytes")

    runner = kernel_runner()
    runner._ready = 512
    monkeypatch.setattr(gpu_runner, "hold_ready", short_of_memory)
    runner._tidy_memory()


def count_memory(monkeypatch: pytest.MonkeyPatch, made: int, peak: int) -> None:
    """A GPU of 40 GiB on which PyTorch holds 9 and others 1."""
    counters = {
        "memory_allocated": made,
        "max_memory_allocated": made + peak,
        "memory_reserved": 9 * GIB,
        "mem_get_info": (30 * GIB, 40 * GIB),
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    for name, value in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.parametrize("takes_groups", [True, False])
def test_what_is_set_aside_adds_up(monkeypatch: pytest.MonkeyPatch, takes_groups: bool) -> None:
    """On a device whose counters say that each thing that runs takes 3,000,000 bytes beside what was made."""
    model = load("tiny-llama", "d2o")
    plan = plan_of(model, max_model_len=24, max_sequences=4, prefill_tokens=64)
    shape, pages = plan.shape, trial_pages(plan, 64)
    peak = 3_000_000
    count_memory(monkeypatch, 500_000 + pages * plan.page_bytes, peak)
    monkeypatch.setattr(memory, "cudnn_takes_groups", lambda *_: takes_groups)
    core = assemble(plan, forward_of(model, shape.layers, compiled=False), AttentionOperator(), pages)
    aside = memory.set_aside(core, plan, 64)
    # Three prompts of 20 tokens were read; a full step has 64, and four sequences that decode.
    assert aside.step == peak * 68 // 60
    # A decode step and the body of one that reads prompts.
    assert aside.graphs == 2 * peak * 5 // 4 + 2**28
    assert (aside.model, aside.others) == (500_000, GIB)
    heads = shape.kv_heads + (0 if takes_groups else shape.query_heads)
    sums, context = 4 * shape.layers * (shape.query_heads + shape.kv_heads), 2 * 4 * shape.head_dim * heads
    # Two of the longest prompts, and short ones that fill a step and wait to be compressed while the next are read.
    assert aside.prompts == sums * (2 * 24 + 64) + context * 24
    assert aside.total == sum(asdict(aside).values())


def test_a_model_that_fails_the_trial_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("tiny-llama", "d2o")
    plan = plan_of(model, max_model_len=24, prefill_tokens=64)
    count_memory(monkeypatch, 0, 0)

    def broken(*_: object) -> Logits:
        raise ValueError("no such kernel")

    monkeypatch.setattr(ModelForward, "__call__", broken)
    forward = forward_of(model, plan.shape.layers, compiled=False)
    core = assemble(plan, forward, AttentionOperator(), trial_pages(plan, 64))
    with pytest.raises(
        StartupError, match=r"^the model failed its first forward pass: the step .* failed: ValueError$"
    ):
        memory.set_aside(core, plan, 64)


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
