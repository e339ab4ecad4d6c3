"""The GPU's worker, kernels interpreted on a CPU where there is no GPU, against the worker in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from d2o.config import D2OConfig
from d2o.kernels.decode_plan import DecodeGrid
from d2o_server.engine.messages import Cancel, StepReport, Stop
from d2o_server.engine.scheduler import StepPlan
from d2o_server.engine.types import SamplingParams
from d2o_server.models.describe import describe
from d2o_server.settings import worker_settings
from d2o_server.worker.cache_state import Heard, SequenceCache
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.distribution import greedy, pad_vocabulary
from d2o_server.worker.gpu import cache_ops
from d2o_server.worker.gpu.batch_sizes import BatchSize
from d2o_server.worker.gpu.build import assemble
from d2o_server.worker.gpu.draws import draw_rows
from d2o_server.worker.gpu.model import Logits, forward_of, join_projections
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.runner import KernelRunner
from d2o_server.worker.pool_plan import PoolPlan
from d2o_server.worker.runner import Launched
from d2o_server.worker.sampler import SamplingState
from tests.server.worker.conftest import NONE, PAGE, Answer, Harness, generate, load, random_prompts, served_model
from tests.server.worker.test_failures import failing_forward, memory_once

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


@pytest.mark.parametrize(
    ("model", "policy"), [("tiny-llama", "default"), ("tiny-llama", "late"), ("tiny-gemma2", "default")]
)
def test_kernels_give_the_tokens_of_plain_torch(model: str, policy: str) -> None:
    """The last has softcaps, and layers with a sliding window, which keep no scores."""
    prompts = random_prompts((45 if model == "tiny-llama" else 85, 21), seed=9)
    expected = answers(Harness(served_model(model)), prompts, POLICIES[policy])
    assert_alike(answers(KernelHarness(model, chunk=32), prompts, POLICIES[policy]), expected)
    assert any(layer.merged or layer.dropped for answer in expected if answer.facts for layer in answer.facts.layers)


def test_drawn_tokens_are_those_of_the_host() -> None:
    """Drawn on the device without the host, and by the host where penalties need the history."""
    prompts = random_prompts((9,), seed=4)
    for sampling in (
        SamplingParams(temperature=0.9, top_p=0.9, top_k=40),
        SamplingParams(temperature=1.2, repetition_penalty=1.3, logprobs=2),
    ):
        expected = answers(Harness(served_model("tiny-llama")), prompts, NONE, sampling)
        assert_alike(answers(KernelHarness(), prompts, NONE, sampling), expected)


def test_each_batch_size_is_captured_with_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    preferred = ["cublas"]

    def prefer(library: str | None = None) -> str:
        """Torch's own refuses where it was built without a GPU's libraries."""
        preferred.append(library or preferred[-1])
        return preferred[-1]

    captured = []

    def capture(size: int, scored: bool, pool: object) -> SimpleNamespace:
        captured.append((size, scored, preferred[-1], pool))
        return SimpleNamespace(graph=SimpleNamespace(pool=lambda: "shared"))

    runner = KernelHarness().core.runner
    assert isinstance(runner, KernelRunner)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", prefer)
    monkeypatch.setattr(runner._graphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(
        runner._bodies, "_capture", lambda size, pool, _: captured.append((size, False, preferred[-1], pool))
    )
    runner.capture([BatchSize(2), BatchSize(8, "cublaslt")], [BatchSize(32), BatchSize(64, "cublaslt")], lambda _: None)
    # The largest first, whose memory serves all.
    assert captured == [
        (8, True, "cublaslt", None),
        (8, False, "cublaslt", "shared"),
        (2, True, "cublas", "shared"),
        (2, False, "cublas", "shared"),
        (64, False, "cublaslt", "shared"),
        (32, False, "cublas", "shared"),
    ]
    assert preferred[-1] == "cublas"


def test_steps_are_shared_out_by_how_many_programs_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scores and without these are not as many; steps that are captured ask as others do."""
    harness, of, asked = KernelHarness(), DecodeGrid.of, set()

    def note(batch: int, kv_heads: int, device: torch.device, at_once: int = 0) -> DecodeGrid:
        asked.add(at_once)
        return of(batch, kv_heads, device)

    runner = harness.core.runner
    assert isinstance(runner, KernelRunner)
    runner._workspace.at_once.update({True: 4, False: 6})
    monkeypatch.setattr(DecodeGrid, "of", note)
    for config, known in ((NONE, {6}), (POLICIES["default"], {4})):
        harness.submit(random_prompts((9,), seed=4)[0], config, name=str(known), new=3)
        harness.run()
        assert asked == known
        asked.clear()
    for scored, known in ((False, {6}), (True, {4})):
        runner._graphs._fill_with_padding(2)
        runner._graphs._run(2, scored)
        assert asked == known
        asked.clear()


def test_a_sequence_that_ends_has_run_one_token_more_which_nobody_sees() -> None:
    (prompt,) = random_prompts((9,), seed=4)
    (free,) = answers(Harness(served_model("tiny-llama")), [prompt], NONE)
    end = free.tokens[2]
    harness = KernelHarness()
    harness.submit(prompt, NONE, name="ends", new=NEW, end_ids=(end,))
    harness.submit(prompt, NONE, name="goes on", new=NEW)
    answered = harness.run()
    assert answered["ends"].tokens == free.tokens[: free.tokens.index(end) + 1]
    assert answered["ends"].reason == "end_of_text"
    facts = answered["ends"].facts
    assert facts is not None
    # Its last token has been fed as well, before the host knew that it was the last.
    assert {layer.kept for layer in facts.layers} == {len(prompt) + len(answered["ends"].tokens)}
    assert answered["goes on"].tokens == free.tokens


def test_a_cancelled_sequence_leaves_the_step_that_is_under_way_and_its_neighbours_alone() -> None:
    prompts = random_prompts((9, 12), seed=4)
    expected = answers(Harness(served_model("tiny-llama")), prompts, NONE)
    harness = KernelHarness()
    for name, prompt in zip(("gone", "stays"), prompts, strict=True):
        harness.submit(prompt, NONE, name=name, new=NEW)
    harness.step()
    harness.step()
    harness.core.handle(Cancel("gone"))
    answered = harness.run()
    assert answered["gone"].cancelled
    assert answered["stays"].tokens == expected[1].tokens


class NothingThatWaits(TorchFunctionMode):
    """Fails where the host makes a tensor on the pool's device of its own numbers, and so waits for all that runs."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Any = None
    ) -> object:
        named = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and isinstance(named.get("device"), torch.device):
            pytest.fail(f"{func.__name__} of {args} on the pool's device")
        return func(*args, **named)


@pytest.mark.parametrize(
    ("policy", "length", "early", "reported"),
    [("default", 45, {"runs", "compressed"}, set()), ("late", 42, {"runs"}, {"runs", "compressed"})],
)
def test_a_step_that_compression_waits_for_holds_back_no_earlier_token(
    policy: str, length: int, early: set[str], reported: set[str]
) -> None:
    """A prompt of two chunks is compressed when it has been read, before the next step; another after the step in which
    it has outgrown its budget."""
    first, begins = random_prompts((9, 32), seed=4)
    # Its end has been said before, so that what followed there is expected.
    prompts = (first, begins + begins[: length - 32])
    settings = (NONE, POLICIES[policy])
    expected = Harness(served_model("tiny-llama"))
    harness = KernelHarness(chunk=32)
    for name, prompt, config in zip(("runs", "compressed"), prompts, settings, strict=True):
        expected.submit(prompt, config, name=name, new=2 * NEW)
        harness.submit(prompt, config, name=name, new=2 * NEW)
    while harness.core:
        waiting: list[StepReport] = []
        with NothingThatWaits():
            report = harness.core.step(waiting.append)
        for each in (*waiting, report):
            harness.take(each)
        if waiting:
            # What the step before brought came first, and a step that was waited for is not kept back either.
            assert early <= {token.id for token in waiting[0].tokens}
            assert {token.id for token in report.tokens} == reported
            assert len(harness.core._under_way) == (not reported)
            break
    else:
        pytest.fail("compression waited for no step")
    assert harness.run()["compressed"].tokens == expected.run()["compressed"].tokens
    assert harness.answers["runs"].tokens == expected.answers["runs"].tokens


def test_a_prompt_is_compressed_behind_the_step_that_reads_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for its budgets when that step is under way; with nothing left to read, before the next.

    Its first token has been told by then.
    """
    prompts = random_prompts((45, 40, 20), seed=9)
    expected = answers(Harness(served_model("tiny-llama")), prompts, POLICIES["default"])
    harness = KernelHarness(chunk=32)
    events = events_of(harness, monkeypatch)
    assert_alike(answers(harness, prompts, POLICIES["default"]), expected)
    assert events[:5] == ["32 of 0", "13 of 0", "32 of 1", "0 begins", "waits"]
    assert events[5:11] == ["1 decode + 8 of 1 + 20 of 2", "1 begins", "2 begins", "waits", "waits", "3 decode"]
    assert events.count("waits") == len(prompts)


def test_a_prompt_that_ends_with_its_first_token_is_compressed_before_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its end tells what compression left of it, and need not wait for another prompt's step."""
    harness = KernelHarness(chunk=32)
    events = events_of(harness, monkeypatch)
    for name, prompt, new in zip("ab", random_prompts((45, 70), seed=9), (1, 2), strict=True):
        harness.submit(prompt, POLICIES["default"], name=name, new=new)
    answered = harness.run()
    assert events[:5] == ["32 of a", "13 of a", "waits", "a begins", "32 of b"]
    facts = answered["a"].facts
    assert facts is not None
    assert all(0 < layer.kept == layer.budget < 45 for layer in facts.layers)


def events_of(harness: KernelHarness, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens from now on: tokens of prompts that steps read, waits for budgets, first tokens that are told."""
    events: list[str] = []
    run, densities = harness.core.runner._run, Heard.densities

    def launch(plan: StepPlan, scored: set[int]) -> Launched:
        parts = [f"{len(plan.decode)} decode"] if plan.decode else []
        events.append(" + ".join([*parts, *(f"{part.count} of {part.sequence.id}" for part in plan.prefill)]))
        return run(plan, scored)

    def wait(heard: Heard) -> Tensor:
        events.append("waits")
        return densities(heard)

    def take(report: StepReport) -> None:
        events.extend(f"{token.id} begins" for token in report.tokens if not harness.answers[token.id].tokens)
        KernelHarness.take(harness, report)

    monkeypatch.setattr(harness, "take", take)
    monkeypatch.setattr(harness.core.runner, "_run", launch)
    monkeypatch.setattr(Heard, "densities", wait)
    return events


def reading_another(config: D2OConfig, end_ids: tuple[int, ...] = ()) -> KernelHarness:
    """A worker in which "read" waits for its compression while "other" is there to be read."""
    first, second = random_prompts((45, 70), seed=9)
    harness = KernelHarness(chunk=32)
    harness.submit(first, config, name="read", new=NEW, end_ids=end_ids)
    harness.submit(second, config, name="other", new=2)
    harness.step()
    harness.step()
    sequence = harness.core.scheduler.find("read")
    assert sequence is not None
    assert sequence.compressing
    assert not harness.answers["read"].tokens
    return harness


@pytest.mark.parametrize("way", ["cancel", "stop", "end of text"])
def test_a_sequence_that_waits_for_its_compression_can_leave(way: str) -> None:
    config = POLICIES["default"]
    prompts = random_prompts((45, 70), seed=9)
    expected = answers(Harness(served_model("tiny-llama")), prompts, config)
    first = expected[0].tokens[0]
    harness = reading_another(config, (first,) if way == "end of text" else ())
    if way != "end of text":
        harness.core.handle(Cancel("read") if way == "cancel" else Stop("read"))
    answered = harness.run()
    assert answered["other"].tokens == expected[1].tokens[:2]
    if way == "cancel":
        assert answered["read"].cancelled
        assert not answered["read"].tokens
        return
    # It leaves as it would have a step earlier: compressed. Who stops it has all tokens that it wants.
    assert answered["read"].reason == way.replace(" ", "_")
    assert answered["read"].tokens == ([] if way == "stop" else [first])
    facts = answered["read"].facts
    assert facts is not None
    assert expected[0].facts is not None
    assert [layer.budget for layer in facts.layers] == [layer.budget for layer in expected[0].facts.layers]


@pytest.mark.parametrize(
    ("error", "named"), [(torch.OutOfMemoryError("device full"), "OutOfDeviceMemory"), (ValueError(), "EngineFailure")]
)
def test_compression_that_fails_behind_another_step_costs_its_prompt_only(
    error: Exception, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = POLICIES["default"]
    expected = answers(Harness(served_model("tiny-llama")), random_prompts((45, 70), seed=9), config)
    harness = reading_another(config)
    finish = CacheManager.finish_prompt

    def fail(caches: CacheManager, cache: SequenceCache) -> int:
        if cache.prompt_tokens == 45:
            raise error
        return finish(caches, cache)

    monkeypatch.setattr(CacheManager, "finish_prompt", fail)
    answered = harness.run()
    failure = answered["read"].failure
    assert failure is not None
    assert failure.error == named
    assert answered["read"].tokens == expected[0].tokens[:1]
    assert answered["other"].tokens == expected[1].tokens[:2]


def test_pages_that_compression_gives_back_admit_the_next_prompt_to_the_next_step() -> None:
    config = D2OConfig(budget_tokens=16)
    first, second = random_prompts((60, 60), seed=9)
    (alone,) = generate([first], config, new=NEW)
    harness = KernelHarness(pages=2 * alone.reserved - 4)
    harness.submit(first, config, name="first", new=NEW)
    harness.submit(second, config, name="second", new=NEW)
    assert [each.id for each in harness.step().admitted] == ["first"]
    told: list[StepReport] = []
    report = harness.core.step(told.append)
    assert [token.id for token in told[0].tokens] == ["first"]
    assert [each.id for each in told[1].admitted] == ["second"]
    for each in (*told, report):
        harness.take(each)
    sequence = harness.core.scheduler.find("second")
    assert sequence is not None
    # Read in the step that was launched then.
    assert sequence.prefilled == 60
    answered = harness.run()
    assert all(answer.reason for answer in answered.values())


def test_compression_that_fails_costs_none_that_ended_a_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest token of one, told before compression waits, ends it although it takes part in the step that fails."""
    first, second = random_prompts((9, 20), seed=4)
    (free,) = answers(Harness(served_model("tiny-llama")), [first], NONE)
    harness = KernelHarness(chunk=32)
    harness.submit(first, NONE, name="ends", new=NEW, end_ids=(free.tokens[1],))
    harness.step()
    harness.step()
    harness.submit(second, D2OConfig(budget_tokens=12), name="fails", new=NEW)

    def fail(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(harness.core.runner, "compress", fail)
    harness.step()
    assert harness.answers["ends"].tokens == free.tokens[:2]
    assert harness.answers["ends"].reason == "end_of_text"
    assert harness.answers["ends"].failure is None
    assert harness.answers["fails"].failure is not None
    assert harness.holds_nothing()


def test_joined_projections_are_the_layers_that_they_replace() -> None:
    plain, joined = load("tiny-qwen2", "d2o"), load("tiny-qwen2", "d2o")
    join_projections(joined)
    torch.manual_seed(0)
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"model.layers.1.self_attn.{name}"
        x = torch.randn(1, 5, 64)
        # Other inputs in between must not get this one's parts.
        torch.testing.assert_close(joined.get_submodule(path)(x), plain.get_submodule(path)(x))
    attention = joined.get_submodule("model.layers.1.self_attn")
    x = torch.randn(1, 5, 64)
    parts = [getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        torch.testing.assert_close(part, plain.get_submodule(f"model.layers.1.self_attn.{name}")(x))


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(top_p=0.5, temperature=1.0)]
)
def test_logits_that_are_no_numbers_fail_their_request_only(sampling: SamplingParams) -> None:
    harness = KernelHarness()
    with torch.no_grad():
        harness.model.get_submodule("model.embed_tokens").weight[511] = torch.nan  # type: ignore[operator]
    prompt = [token % 511 for token in random_prompts((9,), seed=4)[0]]
    (expected,) = answers(Harness(served_model("tiny-llama")), [prompt], NONE)
    harness.submit([*prompt, 511], NONE, name="bad", new=NEW, sampling=sampling)
    harness.submit(prompt, NONE, name="good", new=NEW)
    answered = harness.run()
    assert answered["bad"].failure is not None
    assert answered["bad"].failure.error == "EngineFailure"
    assert answered["good"].tokens == expected.tokens


def test_a_row_that_is_used_again_starts_with_nothing_merged() -> None:
    config, (prompt,) = POLICIES["default"], random_prompts((45,), seed=9)
    harness = KernelHarness(chunk=64)
    facts = []
    for name in ("first", "second"):
        harness.submit(prompt, config, name=name, new=2)
        facts.append(harness.run()[name].facts)
    assert facts[0] is not None
    assert facts[1] is not None
    assert any(layer.merged + layer.dropped for layer in facts[0].layers)
    assert facts[0].layers == facts[1].layers


def scores(harness: Harness, name: str, tokens: int) -> Tensor:
    """Of the sequence's slots [layers, kv_heads, tokens], as soon as it has seen that many tokens."""
    caches = harness.core.runner.caches
    while name not in harness.core.runner.running:
        harness.step()
    row = harness.core.runner.running[name].cache.row
    while int(caches.seen[row]) < tokens:
        harness.step()
    assert int(caches.seen[row]) == tokens
    return caches.ops.read_scores(torch.arange(harness.pool.layers), row, tokens)


def test_scores_of_any_number_of_layers_are_read_by_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles another for vectors that do not begin at multiples of 16 bytes, and all streams would wait."""
    vectors: list[Tensor] = []

    def note(pool: object, pending: object, places: Tensor, tables: Tensor, used: Tensor, **_: int) -> None:
        vectors.extend((places, tables, used))

    monkeypatch.setattr(cache_ops, "settle", note)
    harness = KernelHarness()
    (prompt,) = random_prompts((9,))
    harness.submit(prompt, NONE, name="one", new=4)
    harness.step()
    row = harness.core.runner.running["one"].cache.row
    for layers in range(1, harness.pool.layers + 1):
        harness.core.runner.caches.ops.read_scores(torch.arange(layers), row, 9)
    assert len(vectors) == 3 * harness.pool.layers > 3
    assert all(vector.data_ptr() % 16 == 0 and vector.is_contiguous() for vector in vectors)


def test_scores_that_are_read_have_all_that_the_queries_gave() -> None:
    """Whatever the row's former owner left pending, however many are, and though a step had to run again."""
    late = D2OConfig(budget_tokens=40)
    prompt, other = random_prompts((12, 9), seed=4)
    plain, kernel = Harness(served_model("tiny-llama")), KernelHarness()
    kernel.submit(other, late, name="before", new=40)
    for _ in range(4):
        kernel.step()
    kernel.core.handle(Cancel("before"))
    kernel.run()
    pending = kernel.core.runner.caches.ops.pending  # type: ignore[attr-defined]
    assert pending.count.any()
    # Every decode step has counted, so that all rows add in the same ones.
    assert int(pending.clock) == 3
    for harness in (plain, kernel):
        harness.submit(prompt, late, name="old", new=40)
    for tokens in (13, 16, 17, 18):
        ours, theirs = scores(kernel, "old", tokens), scores(plain, "old", tokens)
        torch.testing.assert_close(ours.to(theirs.device), theirs, rtol=1e-3, atol=1e-5)
    kernel.submit(other, late, name="new", new=40)
    with failing_forward(kernel, memory_once(1)) as failed:
        kernel.step()
    assert failed == [1]
    ours, theirs = scores(kernel, "old", 21), scores(plain, "old", 21)
    torch.testing.assert_close(ours.to(theirs.device), theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [slice(3, 4), slice(None)])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_draw_from_logits_that_are_no_numbers_is_a_token_all_the_same(
    bad: float, columns: slice, top_p: float
) -> None:
    """It is discarded later; until then the next step looks it up, and a device does not survive a wrong index."""
    vocabulary = 500
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.0, top_p=top_p)
    states = [SamplingState(params, seed=seed, prompt_ids=(1,)) for seed in range(3)]
    good = draw_rows(Logits(logits, *greedy(pad_vocabulary(logits))), states)
    logits[1, columns] = bad
    ids = draw_rows(Logits(logits, *greedy(pad_vocabulary(logits))), states)
    assert 0 <= int(ids[1]) < vocabulary
    assert (ids[0], ids[2]) == (good[0], good[2])


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=1.0), SamplingParams(repetition_penalty=1.3)])
def test_what_is_resumed_goes_on_as_it_would_have_beside_what_is_new(sampling: SamplingParams) -> None:
    """One that is replayed step by step, one that is read again and one that starts now."""
    prompts, configs = random_prompts((45, 9, 12), seed=9), (POLICIES["default"], NONE, NONE)
    whole, known = Harness(served_model("tiny-llama")), (4, 3, 0)
    for index, prompt in enumerate(prompts):
        whole.submit(prompt, configs[index], seed=index, new=NEW, sampling=sampling)
    expected = list(whole.run().values())
    harness = KernelHarness(chunk=64)
    for index, prompt in enumerate(prompts):
        output = expected[index].tokens[: known[index]]
        harness.submit(prompt, configs[index], seed=index, new=NEW, sampling=sampling, output=output)
    answered = harness.run().values()
    assert [answer.tokens for answer in answered] == [
        answer.tokens[count:] for answer, count in zip(expected, known, strict=True)
    ]
