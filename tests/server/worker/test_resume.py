"""A request that another worker had before: what comes is what would have come, however much was known already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from d2o.config import D2OConfig, Policy
from d2o_server.engine.messages import Stop
from d2o_server.engine.types import CacheFacts, SamplingParams
from tests.server.worker.conftest import NONE, Harness, random_prompts, served_model

NEW = 40
PROMPTS = random_prompts((90, 5, 33))
TIGHT = D2OConfig(min_budget=1, ratio=0.3)
POLICIES = {
    "none": NONE,
    "d2o": TIGHT,
    "compressed late": D2OConfig(budget_tokens=100),
    "h2o": D2OConfig.of(Policy.H2O, ratio=0.3, min_budget=1),
    "streaming": D2OConfig.of(Policy.STREAMING, ratio=0.3, min_budget=1),
    "snapkv": D2OConfig.of(Policy.SNAPKV, ratio=0.3, min_budget=1),
}
SAMPLING = {
    "greedy": SamplingParams(),
    "seeded": SamplingParams(temperature=1.0, top_p=0.9),
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((7, 3.0),)
    ),
    "held off": SamplingParams(min_new_tokens=30, stop_token_ids=tuple(range(0, 512, 2)), logprobs=2),
}


@dataclass
class Whole:
    """What a request that nothing happened to came to."""

    tokens: list[int]
    reason: str | None
    facts: CacheFacts | None


def run(
    config: D2OConfig,
    sampling: SamplingParams,
    known: Sequence[Sequence[int] | None] = (None, None, None),
    *,
    model: str = "tiny-llama",
    chunk: int = 64,
) -> list[Whole]:
    """The prompts run together, each from where its ``known`` output ends."""
    harness = Harness(served_model(model), chunk=chunk)
    for index, (prompt, output) in enumerate(zip(PROMPTS, known, strict=True)):
        harness.submit(prompt, config, new=NEW, seed=index, sampling=sampling, output=output)
    return [Whole(a.tokens, a.reason, a.facts) for a in harness.run().values()]


def fates(facts: CacheFacts | None) -> list[tuple[int, int, float, float]]:
    assert facts is not None
    return [(layer.budget, layer.kept, layer.merged, layer.dropped) for layer in facts.layers]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_what_follows_is_what_would_have_come(policy: str, sampling: str) -> None:
    whole = run(POLICIES[policy], SAMPLING[sampling])
    for cuts in ((1, 4, 31), (25, 2, 0)):
        known = [one.tokens[: min(cut, len(one.tokens) - 1)] for one, cut in zip(whole, cuts, strict=True)]
        rest = run(POLICIES[policy], SAMPLING[sampling], known)
        assert [list(k) + one.tokens for k, one in zip(known, rest, strict=True)] == [one.tokens for one in whole]
        assert [one.reason for one in rest] == [one.reason for one in whole]
        assert [fates(one.facts) for one in rest] == [fates(one.facts) for one in whole]


@pytest.mark.parametrize("model", ["tiny-gemma2"])
@pytest.mark.parametrize("policy", ["none", "d2o"])
def test_layers_with_a_sliding_window_are_replayed(model: str, policy: str) -> None:
    whole = run(POLICIES[policy], SAMPLING["greedy"], model=model)
    known = [one.tokens[:33] for one in whole]
    rest = run(POLICIES[policy], SAMPLING["greedy"], known, model=model, chunk=16)
    assert [k + one.tokens for k, one in zip(known, rest, strict=True)] == [one.tokens for one in whole]


def test_a_full_cache_is_read_again_in_chunks_and_not_token_by_token() -> None:
    whole = run(NONE, SAMPLING["greedy"])[0]
    harness = Harness(chunk=64)
    harness.submit(PROMPTS[0], new=NEW, output=whole.tokens[:30])
    steps = 0
    while not harness.answers["0"].over:
        harness.step()
        steps += 1
    assert harness.answers["0"].tokens == whole.tokens[30:]
    assert steps == 2 + 9


@pytest.mark.parametrize("policy", ["none", "d2o"])
def test_a_stop_that_comes_before_it_is_where_it_was_ends_it_there(policy: str) -> None:
    whole = run(POLICIES[policy], SAMPLING["greedy"])[0]
    harness = Harness()
    harness.submit(PROMPTS[0], POLICIES[policy], new=NEW, output=whole.tokens[:10])
    harness.core.handle(Stop("0"))
    answer = harness.run()["0"]
    assert (answer.tokens, answer.reason) == ([], "stop")


def test_the_resumed_have_their_turn_before_those_who_wait_for_their_first() -> None:
    harness = Harness(sequences=1)
    harness.submit(PROMPTS[1], name="running", new=5)
    harness.step()
    harness.submit(PROMPTS[1], name="new", new=5)
    for name in ("first", "second"):
        harness.submit(PROMPTS[1], name=name, new=5, output=())
    assert [sequence.id for sequence in harness.core.scheduler.waiting] == ["first", "second", "new"]
    harness.run()
