"""What a sequence's cache holds at every moment of its life, and that what it reports adds up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2o.config import D2OConfig, Policy
from d2o_server.engine.scheduler import StepPlan
from d2o_server.engine.sequence import Sequence
from d2o_server.worker.cache_ops import Fetched, TorchCacheOps
from d2o_server.worker.cache_state import Heard
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.runner import StepOutcome
from tests.server.worker.conftest import NONE, PAGE, Harness, generate, random_prompts, served_model

SMALL = D2OConfig(min_budget=1, ratio=0.3)
NEW = 40
CONFIGS = {
    "none": NONE,
    "default": SMALL,
    "paper": D2OConfig.paper(min_budget=1, ratio=0.3),
    "late": D2OConfig(budget_tokens=110),
    "h2o": D2OConfig.of(Policy.H2O, budget_tokens=50),
    "streaming": D2OConfig.of(Policy.STREAMING, budget_tokens=50),
    "snapkv": D2OConfig.of(Policy.SNAPKV, budget_tokens=50),
}


def positions(harness: Harness, name: str, layer: int) -> Tensor:
    """Positions [kv_heads, slots] that a layer of a running sequence holds, ascending."""
    pool, row = harness.pool, harness.core.runner.running[name].cache.row
    slots = torch.arange(int(pool.used[layer, row]))
    flat = pool.slot_rows(torch.tensor(layer), torch.tensor(row), slots)
    return pool.position.view(-1)[flat].T.sort(-1).values


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gemma3", "tiny-mistral"])
@pytest.mark.parametrize("name", CONFIGS)
def test_kept_merged_and_dropped_are_all_that_was_seen(model: str, name: str) -> None:
    prompts = random_prompts((20, 100, 250))
    answers = generate(prompts, CONFIGS[name], model=served_model(model), new=NEW)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.facts is not None
        # The last token is never fed.
        seen = len(prompt) + NEW - 1
        layers = answer.facts.layers
        for layer in layers:
            assert layer.kept + layer.merged + layer.dropped == pytest.approx(seen, abs=1e-3)
        assert answer.facts.ratio_reached == pytest.approx(sum(x.kept for x in layers) / (seen * len(layers)))
        assert 0 < answer.facts.peak_pages <= answer.reserved


def test_only_merging_policies_merge() -> None:
    prompts = random_prompts((250,))
    merged = {}
    for name, config in CONFIGS.items():
        facts = generate(prompts, config, new=NEW)[0].facts
        assert facts is not None
        merged[name] = any(layer.merged > 0 for layer in facts.layers)
    assert {name for name, did in merged.items() if did} == {"default", "paper", "late"}


@pytest.mark.parametrize("name", ["default", "paper", "h2o", "streaming"])
def test_sinks_and_recent_tokens_are_there_at_every_step(name: str) -> None:
    config = CONFIGS[name]
    harness = Harness(chunk=500)
    (prompt,) = random_prompts((200,))
    harness.submit(prompt, config, name="a", new=NEW)
    for step in range(NEW - 1):
        harness.step()
        seen = len(prompt) + step
        cache = harness.core.runner.running["a"].cache
        for layer in range(3):
            budget = cache.budgets[layer]
            recent = budget - config.sinks if config.policy is Policy.STREAMING else int(budget * config.recent_share)
            for head in positions(harness, "a", layer).tolist():
                assert len(set(head)) == len(head) < budget + (config.evict_interval or PAGE)
                assert head[: config.sinks] == list(range(config.sinks))
                assert head[len(head) - recent :] == list(range(seen - recent, seen))


def test_a_sliding_layer_never_loses_what_its_window_still_sees() -> None:
    harness = Harness(served_model("tiny-gemma3"), chunk=50)
    (prompt,) = random_prompts((230,))
    harness.submit(prompt, SMALL, name="a", new=NEW)
    for step in range(5 + NEW - 2):
        harness.step()
        if step < 4:
            # While the prompt is read every layer has all of it, in order.
            assert positions(harness, "a", 0)[0].tolist() == list(range(50 * (step + 1)))
            continue
        seen = len(prompt) + step - 4
        for layer in (0, 1, 3):
            for head in positions(harness, "a", layer).tolist():
                assert head[-64:] == list(range(seen - 64, seen))
                assert len(head) < 64 + PAGE


def test_decoding_evicts_a_page_at_a_time_and_as_often_as_it_is_asked_to() -> None:
    (prompt,) = random_prompts((200,))
    for config, every in ((SMALL, PAGE), (SMALL.with_changes(evict_interval=1), 1)):
        harness = Harness(chunk=500)
        harness.submit(prompt, config, name="a", new=3 * PAGE)
        lengths = []
        for _ in range(3 * PAGE - 1):
            harness.step()
            lengths.append(positions(harness, "a", 1).shape[1])
        budget = harness.core.runner.running["a"].cache.budgets[1]
        assert lengths == [budget + step % every for step in range(3 * PAGE - 1)]


def test_a_short_prompt_is_left_alone_until_decoding_reaches_the_budget() -> None:
    config = D2OConfig(budget_tokens=50)
    harness = Harness()
    (prompt,) = random_prompts((40,))
    harness.submit(prompt, config, name="a", new=60)
    compressed = []
    for _ in range(59):
        harness.step()
        compressed.append(harness.core.runner.running["a"].cache.compressed)
    # Slots are 40 after the first step; one page of slack above 50 is reached 26 steps later.
    assert compressed == [False] * 26 + [True] * 33


def test_prompts_that_end_together_are_waited_for_once_and_looked_through_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a prompt's end leads to expect is known, and no budget fixed, when the host begins to wait."""
    first, between, other = random_prompts((30, 100, 150), seed=3)
    harness = Harness(chunk=500)
    asked: list[list[int]] = []
    found: list[list[tuple[list[int], bool]]] = []
    fetch, densities = TorchCacheOps.fetch, Heard.densities

    def ask(ops: TorchCacheOps, values: Tensor) -> Fetched:
        asked.append(list(values.shape))
        return fetch(ops, values)

    def wait(heard: Heard) -> Tensor:
        found.append([(each.cache.expected, each.cache.compressed) for each in harness.core.runner.running.values()])
        return densities(heard)

    monkeypatch.setattr(TorchCacheOps, "fetch", ask)
    monkeypatch.setattr(Heard, "densities", wait)
    for name, prompt in (("repeats", [*first, *between, *first]), ("not", other), ("short", first)):
        harness.submit(prompt, SMALL.with_changes(min_budget=40), name=name, new=2)
    harness.step()
    # A quarter of a budget of 48 may be spent on what followed.
    assert asked == [[2, harness.pool.layers]]
    assert found[0] == [(list(range(30, 42)), False), ([], False), ([], False)]
    caches = [running.cache for running in harness.core.runner.running.values()]
    assert [cache.compressed for cache in caches] == [True, True, False]
    assert all(cache.heard is None and cache.scores is None and not cache.expected for cache in caches)


def test_budgets_of_layers_differ_and_never_exceed_their_total() -> None:
    (answer,) = generate(random_prompts((250,)), SMALL, new=NEW)
    assert answer.facts is not None
    budgets = [layer.budget for layer in answer.facts.layers]
    assert len(set(budgets)) > 1
    assert sum(budgets) <= 3 * SMALL.average_budget(250)


def test_compression_frees_staging_pages_in_the_same_step_for_those_who_wait() -> None:
    first, second = random_prompts((300, 300))
    reserved = generate([first], SMALL, new=NEW)[0].reserved
    harness = Harness(pages=reserved + reserved // 2, chunk=500)
    harness.submit(first, SMALL, name="a", new=NEW)
    harness.submit(second, SMALL, name="b", new=NEW)
    harness.step()
    assert [bool(answer.reserved) for answer in harness.answers.values()] == [True, False]
    assert harness.core.pool_state().reserved < reserved // 2
    harness.step()
    assert [bool(answer.reserved) for answer in harness.answers.values()] == [True, True]
    answers = harness.run()
    assert all(answer.reason for answer in answers.values())


def test_taking_slots_back_restores_lengths_and_pages() -> None:
    harness = Harness(chunk=500)
    for index, prompt in enumerate(random_prompts((31, 64))):
        harness.submit(prompt, name=str(index))
    harness.step()
    caches: CacheManager = harness.core.runner.caches
    rows = torch.tensor([harness.core.runner.running[name].cache.row for name in "01"])
    before = (harness.pool.used.clone(), harness.pool.held.clone(), caches.seen.clone(), harness.pool.free_pages)
    mark = caches.lengths(rows)
    caches.append(rows, torch.tensor([2, 17]))
    assert harness.pool.free_pages < before[3]
    caches.take_back(mark)
    assert torch.equal(harness.pool.used, before[0])
    assert torch.equal(harness.pool.held, before[1])
    assert torch.equal(caches.seen, before[2])
    assert harness.pool.free_pages == before[3]
    harness.pool.check_integrity()


@pytest.mark.parametrize(("config", "waits"), [(NONE, False), (D2OConfig(budget_tokens=40), True)])
def test_only_budgets_make_the_host_wait(config: D2OConfig, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves a sliding window goes without: of windows nothing is computed."""
    harness = Harness(served_model("tiny-gemma2"), chunk=500)
    (prompt,) = random_prompts((37,))
    harness.submit(prompt, config, new=120)
    runner, seen = harness.core.runner, []
    compress = runner.compress

    def note(plan: StepPlan) -> tuple[list[Sequence], StepOutcome]:
        due = bool((harness.pool.used >= runner.caches.limit).any())
        seen.append((due, runner.compression_waits()))
        return compress(plan)

    monkeypatch.setattr(runner, "compress", note)
    harness.run()
    assert any(due for due, _ in seen)
    assert [each for _, each in seen].count(True) == waits
