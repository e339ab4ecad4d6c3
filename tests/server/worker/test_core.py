"""What the worker does with each message, and how requests end."""

from __future__ import annotations

from typing import Any

import pytest

from d2o.config import D2OConfig
from d2o_server.engine.messages import Cancel, Stop
from d2o_server.engine.sequence import Sequence
from d2o_server.engine.types import FinishReason, SamplingParams
from d2o_server.worker.runner import StepOutcome
from tests.server.worker.conftest import NONE, VOCABULARY, Harness, generate, random_prompts, served_model

SMALL = D2OConfig(min_budget=1, ratio=0.3)


def test_a_queued_request_is_cancelled_without_having_held_anything() -> None:
    harness = Harness(pages=12)
    first, second = random_prompts((30, 30))
    harness.submit(first, name="runs", new=10)
    harness.submit(second, name="waits", new=10)
    harness.step()
    assert (harness.core.pool_state().running, harness.core.pool_state().waiting) == (1, 1)
    harness.core.handle(Cancel("waits"))
    assert harness.step().cancelled == ("waits",)
    answers = harness.run()
    assert answers["waits"].tokens == []
    assert answers["runs"].reason is FinishReason.LENGTH


@pytest.mark.parametrize("config", [NONE, SMALL])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_cancel_frees_everything_within_a_step_whatever_ran(config: D2OConfig, steps: int) -> None:
    """After 1 and 2 steps the prompt is being read, later the request decodes."""
    harness = Harness(chunk=64)
    (prompt,) = random_prompts((170,))
    name = harness.submit(prompt, config)
    for _ in range(steps):
        harness.step()
    assert bool(harness.answers[name].tokens) == (steps >= 3)
    assert harness.pool.used_pages > 0
    harness.core.handle(Cancel(name))
    assert harness.holds_nothing()
    assert harness.step().cancelled == (name,)
    assert not harness.core


def test_what_a_prompt_needed_and_its_output_does_not_is_given_back_when_it_is_read() -> None:
    """Uncompressed, of layers with a sliding window: they held the whole prompt."""
    harness = Harness(served_model("tiny-gemma2"), chunk=64)
    (prompt,) = random_prompts((120,))
    name = harness.submit(prompt, new=3)
    harness.step()
    sequence = harness.core.scheduler.running[name]
    assert harness.core.pool_state().reserved == sequence.reservation.pages > sequence.reservation.resident
    harness.step()
    assert harness.core.pool_state().reserved == sequence.reservation.resident
    assert harness.run()[name].failure is None


def test_a_cancel_leaves_the_neighbours_tokens_as_they_are() -> None:
    prompts = random_prompts((100, 90, 120))
    expected = generate(prompts, SMALL)
    harness = Harness()
    for index, prompt in enumerate(prompts):
        harness.submit(prompt, SMALL, seed=index)
    for _ in range(6):
        harness.step()
    harness.core.handle(Cancel("1"))
    answers = harness.run()
    assert answers["1"].cancelled
    for index in (0, 2):
        assert answers[str(index)].tokens == expected[index].tokens


@pytest.mark.parametrize("message", [Cancel("nobody"), Stop("nobody")])
def test_a_message_to_a_request_that_is_over_does_nothing(harness: Harness, message: Cancel | Stop) -> None:
    harness.core.handle(message)
    assert not harness.core
    assert not harness.step().cancelled


def test_stop_ends_a_request_as_finished() -> None:
    harness = Harness()
    (prompt,) = random_prompts((20,))
    name = harness.submit(prompt)
    for _ in range(3):
        harness.step()
    harness.core.handle(Stop(name))
    answer = harness.run()[name]
    assert (answer.reason, len(answer.tokens)) == (FinishReason.STOP, 3)
    assert answer.facts is not None
    # The third token was never fed.
    assert [layer.kept for layer in answer.facts.layers] == [22] * 3


def test_a_request_ends_at_its_length_and_at_nothing_else() -> None:
    (prompt,) = random_prompts((20,))
    (answer,) = generate([prompt], new=9)
    assert (answer.reason, len(answer.tokens)) == (FinishReason.LENGTH, 9)


PROMPT = random_prompts((20,))[0]


def greedy_tokens() -> list[int]:
    return generate([PROMPT])[0].tokens


def ended(end_ids: tuple[int, ...] = (), **sampling: Any) -> tuple[str | None, int, int | None]:
    """Reason, number of tokens and stop id of the greedy answer to ``PROMPT``."""
    harness = Harness()
    harness.submit(PROMPT, name="a", end_ids=end_ids, sampling=SamplingParams(**sampling))
    answer = harness.run()["a"]
    return answer.reason, len(answer.tokens), answer.stop_token_id


@pytest.mark.parametrize("at", [0, 5])
def test_a_stop_token_ends_a_request_and_is_named(at: int) -> None:
    token = greedy_tokens()[at]
    assert ended(stop_token_ids=(token,)) == (FinishReason.STOP, at + 1, token)


@pytest.mark.parametrize("at", [0, 5])
def test_an_end_of_text_token_ends_a_request(at: int) -> None:
    assert ended((greedy_tokens()[at],)) == (FinishReason.END_OF_TEXT, at + 1, None)


def test_a_stop_token_that_also_ends_the_text_is_named() -> None:
    token = greedy_tokens()[5]
    assert ended((token,), stop_token_ids=(token,)) == (FinishReason.STOP, 6, token)


def test_end_of_text_can_be_ignored() -> None:
    assert ended((greedy_tokens()[5],), ignore_end_of_text=True) == (FinishReason.LENGTH, 20, None)


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_ends_a_request_before_its_least_tokens(ends: bool) -> None:
    """Every token would end it: the first that may is the one after the least."""
    every = tuple(range(VOCABULARY))
    few = every[: VOCABULARY - 100]
    reason, tokens, _ = ended(few if ends else (), stop_token_ids=() if ends else few, min_new_tokens=8)
    assert tokens > 8
    assert reason in (FinishReason.STOP, FinishReason.END_OF_TEXT)


def test_a_prompts_first_token_is_told_before_it_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(chunk=200)
    harness.submit(random_prompts((60,))[0], SMALL, name="a", new=3)
    told: list[int] = []
    compress = harness.core.runner.compress_prompts

    def note(sequences: list[Sequence]) -> StepOutcome:
        told.append(len(harness.answers["a"].tokens))
        return compress(sequences)

    monkeypatch.setattr(harness.core.runner, "compress_prompts", note)
    harness.run()
    assert told == [1]


def test_what_compression_leaves_of_a_prompt_does_not_depend_on_when_it_ends() -> None:
    prompts = random_prompts((60, 60), seed=3)[:1] * 2
    harness = Harness(chunk=200)
    for name, prompt, new in zip(("one", "more"), prompts, (1, 3), strict=True):
        harness.submit(prompt, SMALL, name=name, new=new)
    one, more = (answer.facts for answer in harness.run().values())
    assert one is not None
    assert more is not None
    budgets = [layer.budget for layer in one.layers]
    assert budgets == [layer.budget for layer in more.layers]
    assert budgets == [layer.kept for layer in one.layers]
    assert 0 < max(budgets) < 60


def test_a_request_that_cannot_be_reserved_fails_alone() -> None:
    harness = Harness()
    first, second = random_prompts((200, 20))
    harness.submit(first, SMALL.with_changes(dense_layers=(0, 1)), name="bad")
    harness.submit(second, name="good")
    answers = harness.run()
    assert answers["bad"].failure is not None
    assert answers["bad"].failure.error == "InvalidRequest"
    assert "dense_layers" in answers["bad"].failure.message
    assert answers["good"].reason is FinishReason.LENGTH
