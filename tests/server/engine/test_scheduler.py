"""First come, first served, and never more promised than there is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o.config import D2OConfig, Policy
from d2o_server.engine.memory import Reservation
from d2o_server.engine.scheduler import Scheduler
from d2o_server.engine.sequence import Sequence, Stage
from d2o_server.engine.types import SamplingParams

NONE = D2OConfig(policy=Policy.NONE)


def sequence(
    name: str, pages: int = 1, prompt: int = 10, resident: int | None = None, due: float = 0.0, resumed: bool = False
) -> Sequence:
    return Sequence(
        id=name,
        prompt=tuple(range(prompt)),
        sampling=SamplingParams(),
        seed=0,
        config=NONE,
        end_ids=(),
        max_new_tokens=5,
        reservation=Reservation(peak=pages, resident=resident or pages, config=NONE, budget=0),
        due=due,
        resumed=resumed,
    )


def scheduler(pages: int = 10, sequences: int = 8, tokens: int = 64) -> Scheduler:
    return Scheduler(pages=pages, max_sequences=sequences, prefill_tokens=tokens)


def names(sequences: list[Sequence] | tuple[Sequence, ...]) -> list[str]:
    return [each.id for each in sequences]


def run_step(engine: Scheduler) -> list[tuple[str, int, int]]:
    """One step in which everything goes well; returns the chunks that ran."""
    plan = engine.plan()
    engine.launched(plan)
    for each in plan.sampled:
        each.output.append(0)
    return [(part.sequence.id, part.start, part.count) for part in plan.prefill]


def test_requests_are_admitted_in_the_order_they_came_while_pages_last() -> None:
    engine = scheduler(pages=10)
    for name, pages in (("a", 4), ("b", 5), ("c", 3), ("d", 1)):
        engine.add(sequence(name, pages))
    assert names(engine.admit()) == ["a", "b"]
    assert engine.ledger.reserved == 9
    assert names(list(engine.waiting)) == ["c", "d"]


def test_one_that_does_not_fit_holds_back_those_behind_it() -> None:
    """Small requests that overtook a large one would starve it."""
    engine = scheduler(pages=10)
    for name, pages in (("a", 8), ("large", 5), ("small", 1)):
        engine.add(sequence(name, pages))
    assert names(engine.admit()) == ["a"]
    assert engine.admit() == []
    running = engine.find("a")
    assert running is not None
    engine.remove(running)
    assert names(engine.admit()) == ["large", "small"]


def test_no_more_run_at_once_than_are_allowed() -> None:
    engine = scheduler(pages=100, sequences=2)
    for name in "abc":
        engine.add(sequence(name))
    assert names(engine.admit()) == ["a", "b"]
    engine.remove(engine.running["a"])
    assert names(engine.admit()) == ["c"]


def test_a_step_reads_at_most_its_prompt_tokens_and_in_order_of_admission() -> None:
    engine = scheduler(tokens=64)
    for name, prompt in (("a", 100), ("b", 20), ("c", 50)):
        engine.add(sequence(name, prompt=prompt))
    engine.admit()
    assert run_step(engine) == [("a", 0, 64)]
    assert run_step(engine) == [("a", 64, 36), ("b", 0, 20), ("c", 0, 8)]
    assert run_step(engine) == [("c", 8, 42)]
    assert run_step(engine) == []


def test_whole_chunks_begin_at_multiples_of_a_step() -> None:
    engine = Scheduler(pages=10, max_sequences=8, prefill_tokens=64, whole_chunks=True)
    for name, prompt in (("a", 100), ("b", 20), ("c", 150), ("d", 5)):
        engine.add(sequence(name, prompt=prompt))
    engine.admit()
    # What is left of the second step is not enough for a chunk of c, and d does not overtake it.
    assert run_step(engine) == [("a", 0, 64)]
    assert run_step(engine) == [("a", 64, 36), ("b", 0, 20)]
    assert run_step(engine) == [("c", 0, 64)]
    assert run_step(engine) == [("c", 64, 64)]
    assert run_step(engine) == [("c", 128, 22), ("d", 0, 5)]
    assert run_step(engine) == []


def test_every_sequence_that_decodes_is_in_every_step() -> None:
    engine = scheduler(tokens=16)
    for name, prompt in (("a", 10), ("b", 40)):
        engine.add(sequence(name, prompt=prompt))
    engine.admit()
    run_step(engine)
    for _ in range(3):
        assert names(engine.plan().decode) == ["a"]
        run_step(engine)
    assert names(engine.plan().decode) == ["a", "b"]


def test_a_plan_names_its_decoding_sequences_before_its_prompts() -> None:
    engine = scheduler(tokens=16)
    for name, prompt in (("a", 10), ("b", 40)):
        engine.add(sequence(name, prompt=prompt))
    engine.admit()
    run_step(engine)
    plan = engine.plan()
    assert names(list(plan.sequences)) == ["a", "b"]
    assert plan
    assert not scheduler().plan()


def test_a_settled_sequence_gives_the_difference_back_at_once() -> None:
    engine = scheduler(pages=10)
    engine.add(sequence("a", pages=9))
    engine.add(sequence("b", pages=5))
    engine.admit()
    engine.settle(engine.running["a"], 3)
    assert engine.ledger.reserved == 3
    assert names(engine.admit()) == ["b"]


def test_a_sequence_that_would_need_more_than_it_was_promised_is_a_defect() -> None:
    engine = scheduler()
    engine.add(sequence("a", pages=4))
    engine.admit()
    with pytest.raises(AssertionError, match="a: needs 5 pages and reserved 4"):
        engine.settle(engine.running["a"], 5)


@pytest.mark.parametrize("stage", [Stage.WAITING, Stage.PREFILL, Stage.DECODE])
def test_removing_a_sequence_in_any_stage_frees_its_promise(stage: Stage) -> None:
    engine = scheduler(pages=4, tokens=8)
    blocker, one = sequence("blocker", pages=4), sequence("one", pages=3, prompt=10)
    if stage is Stage.WAITING:
        engine.add(blocker)
    engine.add(one)
    engine.admit()
    for _ in range(2 if stage is Stage.DECODE else 1):
        run_step(engine)
    assert one.stage is stage
    before = engine.ledger.reserved
    engine.remove(one)
    assert one.stage is Stage.FINISHED
    assert engine.find("one") is None
    assert before - engine.ledger.reserved == (0 if stage is Stage.WAITING else 3)
    assert bool(engine) == (stage is Stage.WAITING)


def test_a_prompt_that_restarts_is_read_from_its_first_token() -> None:
    engine = scheduler(tokens=8)
    engine.add(sequence("a", prompt=10))
    engine.admit()
    run_step(engine)
    engine.restart(engine.running["a"])
    assert run_step(engine) == [("a", 0, 8)]


def test_a_sequence_knows_where_it_stands() -> None:
    one = sequence("a", prompt=10)
    one.prefilled = 4
    assert (one.prompt_remaining, one.total_tokens) == (6, 15)
    one.output += [7, 9]
    one.launched = 2
    # Of two new tokens the first has been fed at position 10; the second is next.
    assert (one.next_token, one.next_position) == (9, 11)


EVENT = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 12)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 20)),
    st.tuples(st.just("settle"), st.integers(0, 20)),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(EVENT, max_size=60))
def test_promises_add_up_whatever_happens(events: list[tuple[str, int]]) -> None:
    engine = scheduler(pages=16, sequences=4, tokens=16)
    alive: list[Sequence] = []
    admitted: list[str] = []
    for number, (kind, value) in enumerate(events):
        if kind == "add":
            alive.append(sequence(f"{number:03}", pages=value, prompt=value * 3))
            engine.add(alive[-1])
        elif kind == "step":
            admitted += names(engine.admit())
            chunks = run_step(engine)
            assert sum(count for _, _, count in chunks) <= 16
        elif alive and kind == "remove":
            engine.remove(alive.pop(value % len(alive)))
        elif engine.running and kind == "settle":
            one = list(engine.running.values())[value % len(engine.running)]
            engine.settle(one, min(one.reserved_pages, value))
        assert engine.ledger.reserved == sum(one.reserved_pages for one in engine.running.values()) <= 16
        assert len(engine.running) <= 4
        assert {one.id for one in alive} == {*engine.running, *names(list(engine.waiting))}
    assert admitted == sorted(admitted)
    for one in alive:
        engine.remove(one)
    assert (engine.ledger.reserved, bool(engine)) == (0, False)
