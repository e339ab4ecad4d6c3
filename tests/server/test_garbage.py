"""The front collects its garbage in the pauses, and leaves it where there is work or little of it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from d2o_server import garbage
from d2o_server.engine.types import Load
from d2o_server.garbage import calm_garbage_collector, collect_when_idle
from tests.server.rpc.scripted_engine import LOAD, ScriptedEngine


class Knot:
    """What only a collection frees."""

    def __init__(self) -> None:
        self.self = self


class LoadedEngine(ScriptedEngine):
    """An engine that has so much to do."""

    def __init__(self, running: int, waiting: int) -> None:
        super().__init__()
        self._load = replace(LOAD, running=running, waiting=waiting)

    def load(self) -> Load:
        return self._load


@pytest.fixture(autouse=True)
def calm_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(garbage, "_POLL_SECONDS", 0.01)
    before = gc.get_threshold()
    calm_garbage_collector()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


async def left_of(knots: int, engine: LoadedEngine) -> int:
    """How many of so many knots are there after the front had its time."""
    made = [Knot() for _ in range(knots)]
    known = [weakref.ref(knot) for knot in made]
    del made
    task = asyncio.create_task(collect_when_idle(engine))
    await asyncio.sleep(0.2)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return sum(knot() is not None for knot in known)


async def test_garbage_goes_when_there_is_nothing_to_do() -> None:
    assert await left_of(2_000, LoadedEngine(running=0, waiting=0)) == 0


@pytest.mark.parametrize(("running", "waiting"), [(1, 0), (0, 1)])
async def test_it_waits_where_there_is_something_to_do(running: int, waiting: int) -> None:
    assert await left_of(2_000, LoadedEngine(running, waiting)) == 2_000


async def test_a_little_is_not_worth_a_collection() -> None:
    gc.collect()
    assert await left_of(20, LoadedEngine(running=0, waiting=0)) == 20
