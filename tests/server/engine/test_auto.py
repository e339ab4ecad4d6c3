"""Compression auto: the full cache for a short sequence where there is room, decided once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o.config import D2OConfig, Policy
from d2o_server.engine.auto import HEADROOM, choice_of
from d2o_server.engine.loss_table import RATIOS, with_max_loss
from d2o_server.engine.memory import CacheShape, reserve
from d2o_server.engine.messages import Admitted, AutoTerms, Submit
from d2o_server.engine.scheduler import Scheduler
from d2o_server.engine.sequence import Sequence
from d2o_server.engine.ticket import Ticket
from d2o_server.engine.types import AutoOutcome, MaxLoss, SamplingParams
from d2o_server.errors import InvalidRequest

SHAPE = CacheShape(windows=(None, None), page_size=16)
D2O = D2OConfig(ratio=0.25, min_budget=16)
# 160 tokens and 32 new ones: 24 pages in full, 20 while the prompt is staged.
FULL, COMPRESSED = 24, 20


def submit(name: str = "a", prompt: int = 160, new: int = 32, terms: AutoTerms | None = AutoTerms(2048)) -> Submit:  # noqa: B008
    return Submit(
        id=name,
        prompt=tuple(range(prompt)),
        sampling=SamplingParams(),
        seed=0,
        config=D2O,
        auto=terms,
        end_ids=(),
        max_new_tokens=new,
    )


def sequence(message: Submit) -> Sequence:
    return Sequence(
        id=message.id,
        prompt=message.prompt,
        sampling=message.sampling,
        seed=0,
        config=message.config,
        end_ids=(),
        max_new_tokens=message.max_new_tokens,
        reservation=reserve(SHAPE, message.config, len(message.prompt), message.max_new_tokens),
        choice=choice_of(SHAPE, message),
    )


def admitted(pages: int, *messages: Submit) -> list[tuple[AutoOutcome | None, int]]:
    """What becomes of each that is admitted at once into an empty pool, and the pages that it reserves."""
    engine = Scheduler(pages=pages, max_sequences=64, prefill_tokens=64)
    for message in messages:
        engine.add(sequence(message))
    came = [(each.outcome, each.reserved_pages) for each in engine.admit()]
    assert engine.ledger.reserved == sum(reserved for _, reserved in came)
    assert engine.waiting_pages == sum(each.reservation.pages for each in engine.waiting)
    return came


def test_a_short_request_gets_the_full_cache_where_that_leaves_the_headroom() -> None:
    least = next(pages for pages in range(FULL, 99) if pages - HEADROOM * pages >= FULL)
    assert admitted(least, submit()) == [(AutoOutcome.FULL, FULL)]
    assert admitted(least - 1, submit()) == [(AutoOutcome.PAGES, COMPRESSED)]


def test_a_long_request_is_compressed_however_many_pages_are_free() -> None:
    assert admitted(1000, submit(terms=AutoTerms(192))) == [(AutoOutcome.FULL, FULL)]
    assert admitted(1000, submit(terms=AutoTerms(191))) == [(AutoOutcome.LONG, COMPRESSED)]


def test_full_caches_end_where_those_that_wait_could_not_all_come_in() -> None:
    came = admitted(100, *(submit(name) for name in "abcd"))
    assert [outcome for outcome, _ in came] == [AutoOutcome.PAGES] * 4
    came = admitted(150, *(submit(name) for name in "abcd"))
    assert [outcome for outcome, _ in came] == [AutoOutcome.FULL] * 4


def test_an_owner_s_ceiling_holds_for_the_full_cache() -> None:
    assert admitted(1000, submit(terms=AutoTerms(2048, FULL))) == [(AutoOutcome.FULL, FULL)]
    assert admitted(1000, submit(terms=AutoTerms(2048, FULL - 1))) == [(AutoOutcome.PAGES, COMPRESSED)]


def test_a_budget_that_covers_the_sequence_is_the_full_cache_whatever_is_free() -> None:
    message = msgspec.structs.replace(submit(terms=AutoTerms(10)), config=D2O.with_changes(min_budget=500))
    assert admitted(FULL, message) == [(AutoOutcome.FULL, FULL)]


def test_a_request_that_names_its_policy_is_left_alone() -> None:
    assert admitted(1000, submit(terms=None)) == [(None, COMPRESSED)]


@given(
    pages=st.integers(30, 400),
    wanted=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 100), st.booleans()), max_size=30),
)
def test_auto_never_admits_fewer_at_once_than_compressing_everything(
    pages: int, wanted: list[tuple[int, int, bool]]
) -> None:
    def messages(auto: bool) -> list[Submit]:
        return [
            submit(str(index), prompt, new, AutoTerms(2048) if auto and of_auto else None)
            for index, (prompt, new, of_auto) in enumerate(wanted)
        ]

    assert len(admitted(pages, *messages(True))) >= len(admitted(pages, *messages(False)))


@pytest.mark.parametrize("policy", [Policy.NONE, Policy.D2O])
def test_another_worker_goes_on_with_what_was_chosen(policy: Policy) -> None:
    worker: Any = None  # nothing is sent
    ticket = Ticket(submit(), COMPRESSED, worker, queued=False, most_pages=FULL)
    assert ticket.continuation().auto is not None
    chosen = D2O.with_changes(policy=policy)
    ticket.admit(Admitted(id="a", reserved_pages=22, budget=0, config=chosen, auto=AutoOutcome.FULL))
    assert (ticket.pages, ticket.most_pages) == (22, 22)
    again = ticket.continuation()
    assert (again.config, again.auto, again.resumed) == (chosen, None, True)


@pytest.mark.parametrize("max_loss", MaxLoss)
def test_a_loss_sets_the_ratio_and_leaves_the_rest(max_loss: MaxLoss) -> None:
    absolute = D2O.with_changes(budget_tokens=77)
    assert with_max_loss(absolute, max_loss) == D2O.with_changes(ratio=RATIOS[max_loss])


def test_less_loss_is_a_larger_ratio() -> None:
    ratios = [RATIOS[max_loss] for max_loss in MaxLoss]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 3


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.D2O])
def test_no_loss_is_promised_for_what_was_not_measured(policy: Policy) -> None:
    with pytest.raises(InvalidRequest, match=rf"^compression\.max_loss: got low with policy {policy}, allowed is"):
        with_max_loss(D2OConfig.of(policy), MaxLoss.LOW)
