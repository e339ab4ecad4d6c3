"""The GPU's worker, kernels interpreted on a CPU where there is no GPU, against the worker in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from d2o.config import D2OConfig
from d2o.kernels.decode_plan import DecodeGrid
from d2o_server.engine.messages import Cancel
from d2o_server.engine.types import SamplingParams
from d2o_server.worker.distribution import greedy, pad_vocabulary
from d2o_server.worker.gpu import cache_ops
from d2o_server.worker.gpu.batch_sizes import BatchSize, largest
from d2o_server.worker.gpu.draws import draw_rows
from d2o_server.worker.gpu.model import Logits, join_projections
from d2o_server.worker.gpu.runner import KernelRunner
from d2o_server.worker.sampler import SamplingState
from tests.server.worker.conftest import NONE, Harness, load, random_prompts, served_model
from tests.server.worker.kernel_harness import NEW, POLICIES, KernelHarness, answers, assert_alike
from tests.server.worker.test_failures import failing_forward, memory_once


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


def test_a_step_may_be_padded_to_more_sequences_than_ever_run_at_once() -> None:
    """Each of padding alone: every row says the same, however many there are."""
    runner = KernelHarness(sequences=8).core.runner
    assert isinstance(runner, KernelRunner)
    graphs, rows = runner._graphs, largest(8)
    assert rows > 8
    logits = []
    for size in (2, rows):
        graphs._fill_with_padding(size)
        logits.append(graphs._run(size, scored=True).logits)
    few, many = logits
    assert len(many) == rows
    # Logits are as large as 33; products of other sizes add in another order.
    torch.testing.assert_close(many, few[:1].expand(rows, -1), rtol=1e-5, atol=1e-4)


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
