"""Steps that are launched while the one before still runs, and compression in between: in which order what happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from d2o.config import D2OConfig
from d2o_server.engine.messages import Cancel, StepReport, Stop
from d2o_server.engine.scheduler import StepPlan
from d2o_server.engine.types import SamplingParams
from d2o_server.worker.cache_state import Heard, SequenceCache
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.gpu import runner as gpu_runner
from d2o_server.worker.gpu.draws import draw_rows
from d2o_server.worker.gpu.model import Logits
from d2o_server.worker.gpu.runner import KernelRunner
from d2o_server.worker.runner import Launched
from d2o_server.worker.sampler import SamplingState
from tests.server.worker.conftest import NONE, Harness, generate, random_prompts, served_model
from tests.server.worker.kernel_harness import NEW, POLICIES, KernelHarness, answers, assert_alike


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


def replayed(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps launch what a graph replays."""
    assert isinstance(harness.core.runner, KernelRunner)
    graphs = harness.core.runner._graphs

    def replay(rows: Tensor, positions: Tensor, lengths: Tensor, *, scored: bool) -> Logits:
        size = max(2, rows.numel())
        graphs._inputs.fill(rows, positions, lengths, size, graphs._ops.padding_row)
        return graphs._run(size, scored).first(rows.numel())

    monkeypatch.setattr(graphs, "run", replay)


def scores(harness: Harness, name: str) -> Tensor:
    """What every slot [layers, kv_heads, slots] of a sequence has received."""
    caches = harness.core.runner.caches
    row, layers = harness.core.runner.running[name].cache.row, torch.arange(caches.pool.layers)
    with torch.inference_mode():
        return caches.ops.read_scores(layers, row, int(caches.pool.used[0, row])).clone()


@pytest.mark.parametrize("config", [NONE, POLICIES["late"]])
def test_memory_that_runs_out_behind_a_captured_step_leaves_its_neighbours_as_they_were(
    config: D2OConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step runs again from the tokens that it ran from, and adds no scores a second time."""
    older, newer = random_prompts((41, 12), seed=4)
    found = []
    for fails in (False, True):
        harness, raised = KernelHarness(), list[int]()

        def short_of_memory(
            result: Logits, states: Sequence[SamplingState], fails: bool = fails, raised: list[int] = raised
        ) -> Tensor:
            if fails and not raised:
                raised.append(len(states))
                raise torch.OutOfMemoryError("device full")
            return draw_rows(result, states)

        replayed(harness, monkeypatch)
        harness.submit(older, config, name="older", seed=0, new=NEW)
        harness.submit(newer, NONE, name="newer", new=NEW, sampling=SamplingParams(temperature=1.0))
        for _ in range(3):
            harness.step()
        with monkeypatch.context() as patched:
            patched.setattr(gpu_runner, "draw_rows", short_of_memory)
            for _ in range(2):
                harness.step()
        assert raised == [2] * fails
        received = scores(harness, "older") if config.enabled else torch.zeros(1)
        assert bool(received.any()) == config.enabled
        answered = harness.run()
        failure = answered["newer"].failure
        assert (failure is not None and failure.error == "OutOfDeviceMemory") == fails
        found.append((answered["older"].tokens, received))
    assert found[1][0] == found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1])


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
