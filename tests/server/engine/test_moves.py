"""Which waiting requests move: those that gain by it, in the order of their turns. No worker is started."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from d2o.config import D2OConfig
from d2o_server.engine.line import Line
from d2o_server.engine.messages import PoolState, Ready, Submit
from d2o_server.engine.moves import moves
from d2o_server.engine.shape import ModelShape
from d2o_server.engine.ticket import Ticket
from d2o_server.engine.types import SamplingParams
from d2o_server.engine.worker_client import Worker
from d2o_server.settings import worker_settings

IDS = map(str, itertools.count())
PAGES, MAX_SEQUENCES = 300, 8
SHAPE = ModelShape(
    architecture="tiny",
    layers=3,
    query_heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary_size=512,
    max_positions=4096,
    windows=(None, None, None),
    end_of_text_ids=(),
)


def serving(index: int, free: int) -> Worker:
    """As if it served, and had so many pages free."""
    worker = Worker(index, worker_settings(model="random:tiny-llama", max_sequences=MAX_SEQUENCES), lambda _: None)
    worker.pool = PoolState(total=PAGES, used=0, reserved=PAGES - free, running=0, waiting=0)
    worker.ready = Ready(shape=SHAPE, page_size=32, page_bytes=1, pool=worker.pool, max_model_len=4096, dtype="float32")
    return worker


def wait_at(worker: Worker, pages: int, due: float) -> Ticket:
    message = Submit(
        id=next(IDS),
        prompt=(1,),
        sampling=SamplingParams(),
        seed=0,
        config=D2OConfig(),
        end_ids=(),
        max_new_tokens=1,
        due=due,
    )
    ticket = Ticket(message, pages, worker, queued=True, most_pages=pages)
    worker.take(ticket)
    return ticket


def move(ticket: Ticket, worker: Worker) -> None:
    ticket.worker.drop(ticket.run)
    ticket.worker = worker
    worker.take(ticket)


def admitted_now(worker: Worker) -> list[Ticket]:
    """What a worker will admit in its next step."""
    pages = worker.free_pages
    admitted: list[Ticket] = []
    for ticket in worker.line:
        pages -= ticket.pages
        if pages < 0 or len(admitted) == MAX_SEQUENCES:
            break
        admitted.append(ticket)
    return admitted


_LINES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), max_size=12)


@given(st.lists(st.tuples(st.integers(0, 60), _LINES), min_size=2, max_size=3))
def test_what_moves_is_admitted_and_gains_by_it(given_lines: list[tuple[int, list[tuple[int, int]]]]) -> None:
    workers = [serving(index, free) for index, (free, _) in enumerate(given_lines)]
    for worker, (_, line) in zip(workers, given_lines, strict=True):
        for pages, due in line:
            wait_at(worker, pages, float(due))
    before = {ticket.id for worker in workers for ticket in admitted_now(worker)}
    moved = moves(workers)
    for ticket, worker in moved:
        move(ticket, worker)
    after = {ticket.id for worker in workers for ticket in admitted_now(worker)}
    assert before | {ticket.id for ticket, _ in moved} <= after
    assert not before & {ticket.id for ticket, _ in moved}
    assert moves(workers) == []


class _Watched(Line):
    looked_at = 0

    def __iter__(self) -> Iterator[Ticket]:
        for ticket in super().__iter__():
            self.looked_at += 1
            yield ticket


def test_a_little_room_beside_thousands_that_wait_for_more_costs_little() -> None:
    crowded, roomy = serving(0, 0), serving(1, 5)
    crowded.line = line = _Watched()
    for number in range(3000):
        wait_at(crowded, 10, float(number))
    assert moves([crowded, roomy]) == []
    assert line.looked_at < 100
    last = wait_at(crowded, 5, -1.0)
    assert moves([crowded, roomy]) == [(last, roomy)]
