"""What the trials before the first request have compiled is all that requests need: no stream waits for a compiler."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from d2o.config import D2OConfig, LayerBudgets, Policy, ScoreQueries
from d2o_server.errors import StartupError
from d2o_server.worker.gpu.trials import run_trials
from tests.server.worker.conftest import NONE, random_prompts
from tests.server.worker.kernel_harness import KernelHarness
from tests.server.worker.test_failures import failing_forward, memory_once

# More than a trial's prompt has, and than there are trials.
CHUNK, SEQUENCES = 256, 40
POLICIES = {
    "none": NONE,
    "default": D2OConfig(min_budget=1, ratio=0.3),
    "small": D2OConfig(budget_tokens=20, min_budget=1),
    "late": D2OConfig(budget_tokens=90),
    "seldom": D2OConfig(budget_tokens=40, evict_interval=50),
    "even": D2OConfig(budget_tokens=40, layer_budgets=LayerBudgets.UNIFORM),
    "sampled": D2OConfig(budget_tokens=40, score_queries=ScoreQueries.parse("stride:2")),
    "paper": D2OConfig.paper(min_budget=1, ratio=0.3),
    "authors": D2OConfig.authors(min_budget=1, ratio=0.3),
    "h2o": D2OConfig.of(Policy.H2O, min_budget=20, ratio=0.2),
    "snapkv": D2OConfig.of(Policy.SNAPKV, min_budget=40, ratio=0.2),
    "streaming": D2OConfig.of(Policy.STREAMING, min_budget=20, ratio=0.2),
}

Kernels = set[tuple[object, ...]]


@pytest.fixture
def harness() -> KernelHarness:
    return KernelHarness(chunk=CHUNK, sequences=SEQUENCES)


@pytest.fixture
def launched(harness: KernelHarness, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels launched so far, by name and constants. None runs: what they would have computed is zeros."""
    found: Kernels = set()

    def run(self: Any, *arguments: Any, grid: object, warmup: bool = False, **named: Any) -> None:
        signature = inspect.signature(self.fn)
        known = {name: value for name, value in named.items() if name in signature.parameters}
        constants = signature.bind(*arguments, **known).arguments
        for name in ("num_warps", "num_stages", "maxnreg"):
            constants[name.upper()] = named.get(name)
        shape = sorted((name, str(value)) for name, value in constants.items() if name.isupper())
        found.add((self.fn.__name__, *shape))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    return found


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_prompts_longer_than_a_trial_s_are_scored_by_kernels_for_the_model_s_softcap(
    harness: KernelHarness, launched: Kernels, softcap: float | None
) -> None:
    run_trials(harness.core, CHUNK, softcap)
    assert any(("SOFTCAP", "True") in kernel and "column_sums" in str(kernel[0]) for kernel in launched) == (
        softcap is not None
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_worker asks the compiler itself")
def test_no_request_needs_a_kernel_that_the_trials_did_not(harness: KernelHarness, launched: Kernels) -> None:
    run_trials(harness.core, CHUNK)
    assert harness.holds_nothing()
    compiled = set(launched)
    launched.clear()
    for name, config in POLICIES.items():
        for index, length in enumerate((1, 40, 65, 150, 400)):
            (prompt,) = random_prompts((length,), seed=index)
            harness.submit(prompt, config, seed=index, new=45)
        harness.run()
        assert not launched - compiled, name
    configs = list(POLICIES.values())
    for index in range(SEQUENCES):
        (prompt,) = random_prompts((1 + index % 7,), seed=index)
        harness.submit(prompt, configs[index % len(configs)], seed=index, new=5)
    harness.run()
    assert not launched - compiled
    assert all(answer.failure is None for answer in harness.answers.values())


@pytest.mark.usefixtures("launched")
def test_trials_that_memory_runs_out_on_do_not_keep_a_server_from_starting(harness: KernelHarness) -> None:
    # The shortest request takes two passes.
    with failing_forward(harness, lambda n: torch.OutOfMemoryError("device full") if n > 2 else None) as failed:
        run_trials(harness.core, CHUNK)
    assert failed
    assert harness.holds_nothing()


@pytest.mark.usefixtures("launched")
def test_a_server_whose_model_fails_does_not_start(harness: KernelHarness) -> None:
    with failing_forward(harness, memory_once(1)), pytest.raises(StartupError, match="first forward pass: the device"):
        run_trials(harness.core, CHUNK)
    broken = RuntimeError("no such kernel")
    with (
        failing_forward(harness, lambda n: broken if n == 3 else None),
        pytest.raises(StartupError, match="failed a request before the first: "),
    ):
        run_trials(harness.core, CHUNK)
