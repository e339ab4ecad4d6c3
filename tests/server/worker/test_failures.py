"""A failure costs no more than it must: bad numbers, a defect, memory that runs out."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2o.config import D2OConfig, Policy
from d2o_server.engine.messages import Cancel
from d2o_server.engine.types import FinishReason
from d2o_server.worker.caches import CacheManager
from tests.server.worker.conftest import NONE, Harness, generate, load, random_prompts

SMALL = D2OConfig(min_budget=1, ratio=0.3)
EVERY_STEP = D2OConfig.paper(min_budget=1, ratio=0.3)
BAD_TOKEN = 511


def last_layer(harness: Harness) -> nn.Module:
    layers = harness.model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers[-1]


@contextmanager
def failing_forward(harness: Harness, fails: Callable[[int], BaseException | None]) -> Iterator[list[int]]:
    """The model's last layer raises what ``fails`` says of its n-th call; yields the numbers that failed.

    So a failed step has already written keys and added scores in the layers before.
    """
    calls = 0
    failed: list[int] = []

    def before(*_: object) -> None:
        nonlocal calls
        calls += 1
        error = fails(calls)
        if error is not None:
            failed.append(calls)
            raise error

    hook = last_layer(harness).register_forward_pre_hook(before)
    try:
        yield failed
    finally:
        hook.remove()


def memory_until(call: int) -> Callable[[int], BaseException | None]:
    return lambda n: torch.OutOfMemoryError("device full") if n <= call else None


def memory_once(call: int) -> Callable[[int], BaseException | None]:
    return lambda n: torch.OutOfMemoryError("device full") if n == call else None


def with_broken_token(name: str) -> Harness:
    """A model of its own in which one token embeds as NaN."""
    model = load(name, "d2o")
    with torch.no_grad():
        embedding = model.get_submodule("model.embed_tokens")
        assert isinstance(embedding, nn.Embedding)
        embedding.weight[BAD_TOKEN] = torch.nan
        # No answer may come upon it by itself.
        head = model.get_submodule("lm_head")
        assert isinstance(head, nn.Linear)
        assert head.weight is not embedding.weight
        head.weight[BAD_TOKEN] = 0
    return Harness(model, pages=200)


@pytest.fixture
def broken_token() -> Harness:
    return with_broken_token("tiny-llama")


def good_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[token % BAD_TOKEN for token in prompt] for prompt in random_prompts(lengths)]


@pytest.mark.parametrize("config", [NONE, SMALL, EVERY_STEP])
def test_logits_that_are_no_numbers_fail_their_request_only(broken_token: Harness, config: D2OConfig) -> None:
    prompts = good_prompts((70, 100, 33))
    expected = generate(prompts, config, model=broken_token.model)
    bad = [*good_prompts((90,))[0], BAD_TOKEN]
    for index, prompt in enumerate(prompts):
        broken_token.submit(prompt, config, name=str(index), seed=index)
        if index == 1:
            broken_token.submit(bad, config, name="bad")
    answers = broken_token.run()
    assert answers["bad"].failure is not None
    assert answers["bad"].failure.error == "EngineFailure"
    assert answers["bad"].tokens == []
    assert [answers[str(index)].tokens for index in range(3)] == [answer.tokens for answer in expected]


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-gemma3", "tiny-mistral"])
def test_so_it_is_with_experts_and_with_windows(name: str) -> None:
    harness = with_broken_token(name)
    prompts = good_prompts((70, 100))
    expected = generate(prompts, SMALL, model=harness.model)
    bad = [*good_prompts((150,))[0], BAD_TOKEN]
    harness.submit(prompts[0], SMALL, name="0", seed=0)
    harness.submit(bad, SMALL, name="bad")
    harness.submit(prompts[1], SMALL, name="1", seed=1)
    answers = harness.run()
    assert answers["bad"].failure is not None
    assert [answers[name].tokens for name in ("0", "1")] == [answer.tokens for answer in expected]


@pytest.mark.parametrize("config", [NONE, SMALL])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pages_that_held_no_numbers_poison_nobody_after(broken_token: Harness, config: D2OConfig, steps: int) -> None:
    """Cancelled while its prompt is read, or failed with a part of its pages freed by compression before."""
    bad = [BAD_TOKEN, *good_prompts((159,))[0]]
    broken_token.submit(bad, config, name="bad")
    for _ in range(steps):
        broken_token.step()
    broken_token.core.handle(Cancel("bad"))
    broken_token.step()
    assert broken_token.answers["bad"].over
    prompts = good_prompts((70, 100, 33))
    expected = generate(prompts, config, model=broken_token.model)
    for index, prompt in enumerate(prompts):
        broken_token.submit(prompt, config, name=str(index), seed=index)
    answers = broken_token.run()
    assert [answers[str(index)].tokens for index in range(3)] == [answer.tokens for answer in expected]


def test_a_step_that_raises_costs_its_requests_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    prompts = random_prompts((70, 100, 33))
    expected = generate(prompts, SMALL)
    harness = Harness()
    doomed = [harness.submit(prompt, SMALL) for prompt in prompts]
    with failing_forward(harness, lambda n: ValueError("a defect") if n == 5 else None) as failed:
        while not failed:
            harness.step()
    assert "a defect" in caplog.text
    assert harness.holds_nothing()
    for name in doomed:
        failure = harness.answers[name].failure
        assert failure is not None
        assert (failure.error, failure.message) == (
            "EngineFailure",
            "the step that ran the request failed: ValueError",
        )
    later = [harness.submit(prompt, SMALL, seed=index) for index, prompt in enumerate(prompts)]
    answers = harness.run()
    assert [answers[name].tokens for name in later] == [answer.tokens for answer in expected]


def test_a_step_that_raises_spares_requests_that_were_not_in_it() -> None:
    first, second = random_prompts((20, 200))
    (expected,) = generate([second])
    harness = Harness(pages=60, sequences=1)
    harness.submit(first, name="in it")
    harness.submit(second, name="waits", seed=0)
    with failing_forward(harness, lambda n: ValueError("a defect") if n == 1 else None):
        harness.step()
    answers = harness.run()
    assert answers["in it"].failure is not None
    assert answers["waits"].tokens == expected.tokens


@pytest.mark.parametrize("config", [NONE, SMALL, EVERY_STEP, D2OConfig.of(Policy.H2O, min_budget=20, ratio=0.2)])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 9])
def test_out_of_memory_costs_the_newest_prompt_of_the_step_only(config: D2OConfig, call: int) -> None:
    """Prompts of 70, 100, 30 and 200 tokens are read 64 at a time: at every call shown, one is being read."""
    # Steps of other sizes round otherwise (1e-5 of logits): these prompts have no eviction that hangs on so little.
    prompts = random_prompts((70, 100, 30, 200), seed=4)
    expected = generate(prompts, config)
    harness = Harness()
    for index, prompt in enumerate(prompts):
        harness.submit(prompt, config, seed=index)
    with failing_forward(harness, memory_once(call)) as failed:
        answers = harness.run()
    assert failed == [call]
    lost = [name for name, answer in answers.items() if answer.failure is not None]
    assert len(lost) == 1
    failure = answers[lost[0]].failure
    assert failure is not None
    assert failure.error == "OutOfDeviceMemory"
    for index, wanted in enumerate(expected):
        if str(index) not in lost:
            answer = answers[str(index)]
            assert answer.tokens == wanted.tokens
            # Scores that a failed attempt added twice would show here first.
            assert answer.facts is not None
            assert wanted.facts is not None
            assert [(x.budget, x.kept, x.merged) for x in answer.facts.layers] == [
                (x.budget, x.kept, x.merged) for x in wanted.facts.layers
            ]


def _scores(harness: Harness, name: str) -> Tensor:
    cache = harness.core.runner.running[name].cache
    used = int(harness.pool.used[0, cache.row])
    layers = torch.arange(harness.pool.layers)[:, None]
    slots = harness.pool.slot_rows(layers, torch.tensor(cache.row), torch.arange(used))
    return harness.pool.score.view(-1)[slots]


def test_a_step_that_runs_again_adds_its_scores_once() -> None:
    """To the bit: the layers that ran before memory was out have added theirs already."""
    late = D2OConfig(budget_tokens=60)
    old, new = random_prompts((40, 30))
    scores = []
    for call in (0, 4):
        harness = Harness()
        harness.submit(old, late, name="old")
        with failing_forward(harness, memory_once(call)) as failed:
            for step in range(6):
                if step == 3:
                    harness.submit(new, late, name="new")
                harness.step()
            assert bool(failed) == bool(call)
        scores.append(_scores(harness, "old"))
    assert torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_that_runs_again_keeps_what_its_own_tokens_received(times: int) -> None:
    """Their slots are taken anew, and layers that have added their scores do not add them again."""
    prompts = random_prompts((70, 100, 30, 200), seed=8)
    scores = []
    for attempts in (0, times):
        harness = Harness()
        for index, prompt in enumerate(prompts):
            harness.submit(prompt, SMALL, name=str(index), seed=index)
        for _ in range(5):
            harness.step()
        with failing_forward(harness, memory_until(attempts)) as failed:
            harness.step()
        assert len(failed) == attempts
        left = [name for name, answer in harness.answers.items() if answer.failure is None]
        assert len(left) == len(prompts) - attempts
        scores.append({name: _all_scores(harness, name) for name in left})
    for name, given in scores[1].items():
        for again, once in zip(given, scores[0][name], strict=True):
            torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-6)


def _all_scores(harness: Harness, name: str) -> list[Tensor]:
    """By layer: the scores [slots, kv_heads] of all that the sequence holds."""
    pool, row = harness.pool, torch.tensor(harness.core.runner.running[name].cache.row)
    held = pool.used[:, int(row)].tolist()
    places = (pool.slot_rows(torch.tensor(layer), row, torch.arange(slots)) for layer, slots in enumerate(held))
    return [pool.score.view(-1)[place] for place in places]


def test_out_of_memory_with_nothing_but_decoding_costs_the_newest_request() -> None:
    prompts = random_prompts((20, 30, 10))
    expected = generate(prompts)
    harness = Harness()
    for index, prompt in enumerate(prompts):
        harness.submit(prompt, seed=index)
    with failing_forward(harness, memory_once(5)) as failed:
        answers = harness.run()
    assert failed == [5]
    assert answers["2"].failure is not None
    assert answers["2"].tokens == expected[2].tokens[: len(answers["2"].tokens)]
    assert [answers[name].tokens for name in ("0", "1")] == [answer.tokens for answer in expected[:2]]


def test_memory_that_never_comes_back_ends_every_request_and_not_the_worker() -> None:
    prompts = random_prompts((20, 30, 100))
    harness = Harness()
    for prompt in prompts:
        harness.submit(prompt)
    with failing_forward(harness, lambda n: torch.OutOfMemoryError("device full") if n > 3 else None):
        answers = harness.run()
    assert {answer.failure.error for answer in answers.values() if answer.failure} == {"OutOfDeviceMemory"}
    assert all(answer.failure for answer in answers.values())
    assert generate(prompts)[0].reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")],
)
def test_a_host_out_of_memory_is_told_like_a_device(error: BaseException) -> None:
    prompts = random_prompts((20, 30))
    harness = Harness()
    for prompt in prompts:
        harness.submit(prompt)
    with failing_forward(harness, lambda n: error if n == 2 else None):
        answers = harness.run()
    assert answers["1"].failure is not None
    assert answers["1"].failure.error == "OutOfDeviceMemory"
    assert answers["0"].reason is FinishReason.LENGTH


@pytest.mark.parametrize(("config", "told"), [(SMALL, 1), (NONE, 0)])
def test_out_of_memory_where_a_prompt_ends_costs_that_prompt(
    monkeypatch: pytest.MonkeyPatch, config: D2OConfig, told: int
) -> None:
    """The first token of one that is compressed comes before; of one that is not it is void."""
    prompts = random_prompts((70, 90, 33))
    expected = generate(prompts, config)
    finish = CacheManager.finish_prompt

    def short_of_memory(self: CacheManager, cache: Any) -> int:
        if cache.prompt_tokens == 90:
            raise torch.OutOfMemoryError("device full")
        return finish(self, cache)

    monkeypatch.setattr(CacheManager, "finish_prompt", short_of_memory)
    harness = Harness()
    for index, prompt in enumerate(prompts):
        harness.submit(prompt, config, seed=index)
    answers = harness.run()
    assert answers["1"].failure is not None
    assert answers["1"].failure.error == "OutOfDeviceMemory"
    assert answers["1"].tokens == expected[1].tokens[:told]
    assert [answers[name].tokens for name in ("0", "2")] == [expected[0].tokens, expected[2].tokens]


LATE = D2OConfig(budget_tokens=40, evict_interval=4)


@pytest.mark.parametrize("failing", ["_evict", "_fix_late"])
def test_out_of_memory_in_eviction_costs_those_that_were_to_be_evicted_from(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """What the step sampled for the others is told."""
    prompts, configs = random_prompts((20, 30, 36)), (NONE, NONE, LATE)
    expected = [generate([prompt], config)[0] for prompt, config in zip(prompts, configs, strict=True)]

    def short_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("device full")

    monkeypatch.setattr(CacheManager, failing, short_of_memory)
    harness = Harness()
    for prompt, config in zip(prompts, configs, strict=True):
        harness.submit(prompt, config)
    answers = list(harness.run().values())
    failure = answers[2].failure
    assert failure is not None
    assert (failure.error, failure.message) == (
        "OutOfDeviceMemory",
        "the device ran out of memory compressing the request's cache",
    )
    # The step in which it was due has fed its 44th token.
    assert answers[2].tokens == expected[2].tokens[: 44 - 36]
    assert [answer.tokens for answer in answers[:2]] == [answer.tokens for answer in expected[:2]]
    assert harness.holds_nothing()


@pytest.mark.parametrize("lost", [0, 1])
def test_sequences_that_reach_their_budgets_together_are_tried_one_by_one_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    config = D2OConfig(budget_tokens=32, evict_interval=4)
    prompts = random_prompts((21, 21, 21))
    expected = generate(prompts, config)
    fix, tried = CacheManager._fix_late, list[list[int]]()

    def short_of_memory(self: CacheManager, caches: list[Any]) -> None:
        names = [prompts.index(list(cache.prompt)) for cache in caches]
        tried.append(names)
        if len(caches) > 1 or (lost and names == [1]):
            raise torch.OutOfMemoryError("device full")
        fix(self, caches)

    monkeypatch.setattr(CacheManager, "_fix_late", short_of_memory)
    harness = Harness()
    for index, prompt in enumerate(prompts):
        harness.submit(prompt, config, seed=index)
    answers = harness.run()
    assert tried == [[0, 1, 2], [0], [1], [2]]
    assert [name for name, answer in answers.items() if answer.failure] == ["1"] * lost
    for index, wanted in enumerate(expected):
        if answers[str(index)].failure is None:
            assert answers[str(index)].tokens == wanted.tokens


def test_a_failed_step_keeps_none_of_its_tensors_alive() -> None:
    """Memory that is out is only found again if the failed attempt lets go of it before the next one."""
    prompt, newest = random_prompts((20, 30))
    harness = Harness()
    harness.submit(prompt)
    harness.step()
    harness.submit(newest)
    hidden: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def before(_: object, given: tuple[Tensor, ...]) -> None:
        alive.extend(reference() is not None for reference in hidden)
        hidden.append(weakref.ref(given[0]))
        if len(hidden) == 1:
            raise torch.OutOfMemoryError("device full")

    hook = last_layer(harness).register_forward_pre_hook(before)
    gc.disable()
    try:
        harness.step()
    finally:
        gc.enable()
        hook.remove()
    assert alive == [False]


def test_running_out_of_memory_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    harness.submit(random_prompts((20,))[0])
    with caplog.at_level(logging.WARNING), failing_forward(harness, memory_once(1)):
        harness.run()
    assert "out of memory" in caplog.text
