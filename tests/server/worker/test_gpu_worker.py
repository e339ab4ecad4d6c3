"""The worker as it serves on a GPU, compiled and captured in graphs, against the worker in plain torch on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from d2o.config import D2OConfig, Policy
from d2o_server.engine.types import SamplingParams
from d2o_server.settings import worker_settings
from d2o_server.worker.build import build_worker
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.gpu import body_graphs
from d2o_server.worker.gpu.batch_sizes import BatchSize, largest
from d2o_server.worker.gpu.runner import KernelRunner
from d2o_server.worker.gpu.step import KernelStep
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


def tiny_core(name: str, folder: Path, **changes: Any) -> WorkerCore:
    """A worker over the weights that the CPU's have, which it reads from a folder."""
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
        **changes,
    )
    return build_worker(settings, print).core


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gemma3"])
def cores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, WorkerCore]:
    """A model and a worker over the same weights: random ones are others on a GPU."""
    name: str = request.param
    folder: Path = tmp_path_factory.mktemp(name)
    return name, tiny_core(name, folder, check_integrity=True)


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


@contextmanager
def no_memory_left(spare: int) -> Iterator[None]:
    """PyTorch may take ``spare`` bytes more than it has, and no more."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_prompt_that_memory_runs_out_on_fails_alone() -> None:
    settings = worker_settings(
        model="random:tiny-llama",
        dtype="float32",
        device="cuda",
        page_size=PAGE,
        num_pages=4000,
        max_sequences=8,
        prefill_tokens=4096,
        max_model_len=4096,
        check_integrity=True,
    )
    core = build_worker(settings, print).core
    short, (long,) = random_prompts((30, 77, 150), seed=3), random_prompts((3500,), seed=4)
    configs = (NONE, POLICIES["default"], POLICIES["late"])

    def started() -> GpuHarness:
        harness = GpuHarness(core)
        for index, (prompt, config) in enumerate(zip(short, configs, strict=True)):
            harness.submit(prompt, config, seed=index, new=NEW)
        for _ in range(10):
            harness.step()
        return harness

    alone = [answer.tokens for answer in started().run().values()]
    harness = started()
    # Small blocks come from segments of 2 MiB; one of 20, which a chunk's activations need, does not fit.
    with no_memory_left(16 * 2**20):
        harness.submit(long, NONE, name="long", new=NEW)
        answers = harness.run()
    assert answers["long"].failure is not None
    assert answers["long"].failure.error == "OutOfDeviceMemory"
    assert [answers[str(index)].tokens for index in range(len(short))] == alone
    assert harness.holds_nothing()
    again = GpuHarness(core)
    again.submit(long, NONE, name="long", new=NEW)
    assert len(again.run()["long"].tokens) == NEW


SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 32768,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, attn_logit_softcapping=50.0)),
}


@pytest.mark.parametrize("model", MODELS)
def test_no_kernel_is_compiled_in_mid_service(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker that is told its pages, and so reads no large prompt at its start."""
    triton = pytest.importorskip("triton")
    made: list[str] = []

    def note(*, fn: Any, **_: Any) -> None:
        made.append(fn.name.rpartition(".")[2])

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    MODELS[model]().save_pretrained(str(tmp_path))
    settings = worker_settings(
        model=str(tmp_path),
        dtype="bfloat16",
        device="cuda",
        num_pages=20000,
        max_sequences=12,
        max_model_len=20000,
    )
    core = build_worker(settings, print).core
    assert made
    made.clear()
    late: dict[tuple[str, int], list[str]] = {}
    policies = list(POLICIES.values())
    for lengths in ([1], [40], [1500], [9000], [18000], [60, 100], [30 + 90 * nth for nth in range(12)]):
        for turn in range(len(policies)):
            harness = GpuHarness(core)
            for index, length in enumerate(lengths):
                policy, sampling = policies[(turn + index) % len(policies)], SAMPLINGS[index % len(SAMPLINGS)]
                (prompt,) = random_prompts((length,), seed=index)
                harness.submit(prompt, policy, seed=index, new=70 + index, sampling=sampling)
            harness.run()
            if made:
                late[str(lengths), turn] = [*made]
                made.clear()
    assert not late


def test_captured_steps_of_all_sizes_share_memory_and_leave_their_own_logits(tmp_path: Path) -> None:
    """In an order in which each size follows a larger and a smaller one, the last larger than any batch."""
    rows, vocabulary = 64, 50_000
    LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": vocabulary})).save_pretrained(str(tmp_path))
    settings = worker_settings(
        model=str(tmp_path), dtype="bfloat16", device="cuda", num_pages=2000, max_sequences=rows, graphs=False
    )
    runner = build_worker(settings, print).core.runner
    assert isinstance(runner, KernelRunner)
    graphs, sizes = runner._graphs, list(range(8, largest(rows) + 1, 8))
    assert sizes[-1] > rows
    # The stream that captures is given workspaces to multiply in, once for a process.
    square = torch.eye(64, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        square @ square
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    runner.capture([BatchSize(size) for size in sizes], [], print)
    assert torch.cuda.memory_allocated() - before < 2 * sum(sizes) * vocabulary * 2 / 3
    padding, layers = graphs._ops.padding_row, graphs._ops.pool.layers
    for turn, size in enumerate([*sizes, *reversed(sizes), *sizes[1::2], *sizes[::2]]):
        scored = turn % 3 == 0
        places = torch.full((size,), padding, dtype=torch.int32)
        positions, lengths = torch.zeros_like(places), torch.ones(layers, size, dtype=torch.int32)
        with torch.inference_mode():
            runner._last_token[padding] = 3 + turn
            result = graphs.run(places, positions, lengths, scored=scored)
            assert result is not None
            found, best_ids, best = result.logits.clone(), result.best_ids.clone(), result.best.clone()
            runner._last_token[padding] = 3 + turn
            expected = graphs._run(size, scored)
        torch.testing.assert_close(found, expected.logits)
        assert torch.equal(found.argmax(-1), best_ids)
        assert torch.equal(found.amax(-1), best)


@pytest.mark.parametrize("name", ["none", "default", "late"])
def test_steps_that_read_short_prompts_replay_what_they_share(
    cores: tuple[str, WorkerCore], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Beside decoding sequences, in chunks that look back at pages, several prompts at once; answers are the same."""
    _, core = cores
    runner = core.runner
    assert isinstance(runner, KernelRunner)
    prompts = [prompt for seed in range(2) for prompt in random_prompts((1, 30, 77, 150, 260), seed=seed)]
    replay, replayed = body_graphs._Captured.replay, []

    def note(captured: body_graphs._Captured, step: KernelStep, tokens: int) -> Any:
        replayed.append(tokens)
        return replay(captured, step, tokens)

    monkeypatch.setattr(body_graphs._Captured, "replay", note)

    def answers() -> list[Answer]:
        harness = GpuHarness(core)
        for index, prompt in enumerate(prompts):
            harness.submit(prompt, POLICIES[name], seed=index, new=NEW, sampling=SAMPLINGS[index % len(SAMPLINGS)])
            if index % 3:
                harness.step()
        found = list(harness.run().values())
        assert harness.holds_nothing()
        return found

    ours = answers()
    # A step reads 128 tokens of prompts at most, beside 16 sequences at most.
    assert runner._bodies._sizes[-1] == 144
    assert sum(replayed) > sum(map(len, prompts))
    assert max(replayed) > 128
    replayed.clear()
    monkeypatch.setattr(runner._bodies, "_sizes", [])
    assert [answer.tokens for answer in answers()] == [answer.tokens for answer in ours]
    assert not replayed


def test_steps_stay_within_the_share_of_memory_that_the_settings_give(tmp_path: Path) -> None:
    """The pool takes what is left of it. What the block held ready saves shows with large models: reserve_gpu."""
    MODELS["llama"]().save_pretrained(str(tmp_path))
    share = 8 << 30
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    settings = worker_settings(
        model=str(tmp_path),
        dtype="bfloat16",
        device="cuda",
        gpu_memory_utilization=(total - free + share) / total,
        max_sequences=128,
        max_model_len=32768,
    )
    worker = build_worker(settings, print)
    core = worker.core
    assert core.pool_state().total * worker.page_bytes > share // 2
    assert isinstance(core.runner, KernelRunner)
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() >= core.runner._ready > 0
    torch.cuda.reset_peak_memory_stats()
    harness = GpuHarness(core)
    for index in range(128):
        (prompt,) = random_prompts((500 + index,), seed=index)
        harness.submit(prompt, D2OConfig(budget_tokens=300), seed=index, new=60)
    for index in range(2):
        (prompt,) = random_prompts((30000 + index,), seed=index)
        harness.submit(prompt, POLICIES["h2o"], name=f"long {index}", seed=index, new=60)
    assert all(answer.failure is None for answer in harness.run().values())
    assert torch.cuda.max_memory_reserved() - reserved < share


def test_the_host_waits_for_the_device_only_where_it_has_to_decide(tmp_path: Path) -> None:
    """For densities that budgets are fixed by, and for what became of evicted slots; never to launch a step."""
    core = tiny_core("tiny-llama", tmp_path)
    prompts = random_prompts((1, 30, 77, 150, 260, 40, 90), seed=9)

    def run() -> None:
        harness = GpuHarness(core)
        for index, (prompt, config) in enumerate(zip(prompts, POLICIES.values(), strict=False)):
            harness.submit(prompt, config, seed=index, new=NEW, sampling=SAMPLINGS[index % len(SAMPLINGS)])
            harness.step()
        assert all(answer.failure is None for answer in harness.run().values())

    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    assert waits
    assert {Path(each.filename).name for each in waits} <= {"caches.py", "cache_ops.py"}
