"""The GPU's worker to test with: kernels interpreted on a CPU where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from d2o.config import D2OConfig
from d2o_server.engine.types import SamplingParams
from d2o_server.models.describe import describe
from d2o_server.settings import worker_settings
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.gpu.build import assemble
from d2o_server.worker.gpu.model import forward_of, join_projections
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.pool_plan import PoolPlan
from tests.server.worker.conftest import PAGE, Answer, Harness, load

NEW = 7
# Interpreted, a step takes seconds: these two go through every kernel, the first at a prompt's end and again in decode.
POLICIES = {
    "default": D2OConfig(min_budget=1, ratio=0.3, evict_interval=3),
    "late": D2OConfig(budget_tokens=46, evict_interval=4),
}


def kernel_core(model: nn.Module, *, pages: int = 400, chunk: int = 64, sequences: int = 8) -> WorkerCore:
    settings = worker_settings(
        model="random:tiny-llama",
        dtype="float32",
        page_size=PAGE,
        max_sequences=sequences,
        prefill_tokens=chunk,
        max_model_len=512,
        check_integrity=True,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = PoolPlan.of(settings, describe(model.config), torch.float32, device)  # type: ignore[arg-type]
    forward = forward_of(model.to(device), plan.shape.layers, compiled=False)
    return assemble(plan, forward, AttentionOperator(), pages)


class KernelHarness(Harness):
    """A harness over the GPU's worker."""

    def __init__(self, name: str = "tiny-llama", *, chunk: int = 64, sequences: int = 8, pages: int = 400) -> None:
        self.model = load(name, "d2o")
        join_projections(self.model)
        self.core = kernel_core(self.model, chunk=chunk, sequences=sequences, pages=pages)
        self.pool = self.core.runner.caches.pool
        self.answers: dict[str, Answer] = {}

    def holds_nothing(self) -> bool:
        state = self.core.pool_state()
        # One row pads batches.
        rows = self.pool.free_rows == self.pool.used.shape[1] - 1
        return (state.used, state.reserved, state.running) == (0, 0, 0) and rows and not self.core.runner.running


def answers(
    harness: Harness, prompts: Sequence[list[int]], config: D2OConfig, sampling: SamplingParams | None = None
) -> list[Answer]:
    for index, prompt in enumerate(prompts):
        harness.submit(prompt, config, seed=index, new=NEW, sampling=sampling)
    return list(harness.run().values())


def assert_alike(kernel: list[Answer], torch_answers: list[Answer]) -> None:
    for ours, theirs in zip(kernel, torch_answers, strict=True):
        assert ours.failure is None
        assert ours.tokens == theirs.tokens
        assert ours.facts is not None
        assert theirs.facts is not None
        for a, b in zip(ours.facts.layers, theirs.facts.layers, strict=True):
            assert (a.budget, a.kept) == (b.budget, b.kept)
            assert a.merged == pytest.approx(b.merged)
            assert a.dropped == pytest.approx(b.dropped)
