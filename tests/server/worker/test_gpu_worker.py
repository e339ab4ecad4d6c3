"""The worker as it serves on a GPU, compiled and captured in graphs, against the worker in plain torch on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2o.config import D2OConfig, Policy
from d2o_server.engine.types import SamplingParams
from d2o_server.settings import worker_settings
from d2o_server.worker.build import build_worker
from d2o_server.worker.core import WorkerCore
from tests.server.worker.conftest import NONE, PAGE, Answer, Harness, random_prompts, served_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]

NEW = 48
POLICIES = {
    "none": NONE,
    "default": D2OConfig(min_budget=1, ratio=0.3),
    "late": D2OConfig(budget_tokens=90),
    "paper": D2OConfig.paper(min_budget=1, ratio=0.3),
    "authors": D2OConfig.authors(min_budget=1, ratio=0.3),
    "h2o": D2OConfig.of(Policy.H2O, min_budget=20, ratio=0.2),
    "snapkv": D2OConfig.of(Policy.SNAPKV, min_budget=40, ratio=0.2),
    "streaming": D2OConfig.of(Policy.STREAMING, min_budget=20, ratio=0.2),
}
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, top_p=0.9, top_k=40),
    SamplingParams(temperature=1.1, min_p=0.02),
)


class GpuHarness(Harness):
    """A harness over a worker that was built as the server builds it."""

    def __init__(self, core: WorkerCore) -> None:
        self.core = core
        self.pool = core.runner.caches.pool
        self.answers: dict[str, Answer] = {}

    def holds_nothing(self) -> bool:
        state = self.core.pool_state()
        return (state.used, state.reserved, state.running, state.waiting) == (0, 0, 0, 0)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gemma3"])
def cores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, WorkerCore]:
    """A model and a worker over the same weights: random ones are others on a GPU."""
    name: str = request.param
    folder: Path = tmp_path_factory.mktemp(name)
    served_model(name).save_pretrained(str(folder))
    settings = worker_settings(
        model=str(folder),
        dtype="float32",
        device="cuda",
        page_size=PAGE,
        num_pages=4000,
        max_sequences=16,
        prefill_tokens=128,
        max_model_len=1024,
        check_integrity=True,
    )
    return name, build_worker(settings, print).core


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_and_caches_are_those_of_the_cpu(cores: tuple[str, WorkerCore], name: str) -> None:
    model, core = cores
    prompts = random_prompts((1, 30, 77, 150, 260), seed=9)
    sides: list[list[Answer]] = []
    for harness in (Harness(served_model(model)), GpuHarness(core)):
        for index, prompt in enumerate(prompts):
            harness.submit(prompt, POLICIES[name], seed=index, new=NEW, sampling=SAMPLINGS[index % len(SAMPLINGS)])
            harness.step()
        sides.append(list(harness.run().values()))
    for ours, theirs in zip(*sides, strict=True):
        assert ours.failure is None
        assert ours.tokens == theirs.tokens
        assert ours.facts is not None
        assert theirs.facts is not None
        assert [(x.budget, x.kept) for x in ours.facts.layers] == [(x.budget, x.kept) for x in theirs.facts.layers]
