"""One reader gets what was put, in order, and waits where there is nothing."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from d2o_server.engine.mailbox import Mailbox, Turns


async def test_items_come_out_in_the_order_they_went_in() -> None:
    box: Mailbox[int] = Mailbox()
    for item in (3, 1, 2):
        box.put(item)
    assert [await box.get() for _ in range(3)] == [3, 1, 2]


async def test_a_reader_waits_until_something_comes() -> None:
    box: Mailbox[str] = Mailbox()
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    assert not reader.done()
    box.put("here")
    assert await reader == "here"


async def test_a_reader_waits_again_once_all_is_read() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    await box.get()
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    assert not reader.done()
    box.put(2)
    assert await reader == 2


async def test_a_cancelled_reader_loses_nothing() -> None:
    box: Mailbox[int] = Mailbox()
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    box.put(1)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    box.put(2)
    assert [await box.get(), await box.get()] == [1, 2]


async def test_items_that_are_here_are_taken_up_to_the_first_that_is_not_wanted() -> None:
    box: Mailbox[int] = Mailbox()
    for item in (2, 4, 5, 6):
        box.put(item)
    assert box.take_while(lambda item: item % 2 == 0) == [2, 4]
    assert box.take_while(lambda item: item % 2 == 0) == []
    assert await box.get() == 5
    assert box.take_while(lambda _: True) == [6]
    assert box.take_while(lambda _: True) == []


async def test_a_reader_that_waits_is_told_when_the_deadline_passes() -> None:
    box: Mailbox[int] = Mailbox()
    with box.expiring(time.monotonic() + 0.05):
        box.put(1)
        assert await box.get() == 1
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await box.get()
    assert 0.04 < time.monotonic() - began < 1


async def test_nothing_can_be_got_after_the_deadline_whatever_is_there() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    with box.expiring(time.monotonic() - 1):
        await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await box.get()


async def test_a_deadline_ends_with_its_scope() -> None:
    box: Mailbox[int] = Mailbox()
    with box.expiring(time.monotonic() + 0.01):
        pass
    with box.expiring(None):
        await asyncio.sleep(0.02)
        box.put(1)
        assert await box.get() == 1


async def test_no_round_of_the_loop_has_more_readers_than_it_may_and_each_gets_its_turn() -> None:
    """What else wants the loop, such as a new call, waits for a few readers and not for all of them."""
    turns, rounds = Turns(a_round=4), [0]
    boxes: list[Mailbox[int]] = [Mailbox(turns) for _ in range(10)]
    read: list[tuple[int, int]] = []

    async def follow(name: int) -> None:
        for _ in range(3):
            await boxes[name].get()
            read.append((rounds[0], name))

    async def count() -> None:
        while True:
            rounds[0] += 1
            await asyncio.sleep(0)

    readers = [asyncio.create_task(follow(name)) for name in range(10)]
    counter = asyncio.create_task(count())
    await asyncio.sleep(0)
    for item in range(3):
        for box in boxes:
            box.put(item)
    await asyncio.gather(*readers)
    counter.cancel()
    assert max(Counter(when for when, _ in read).values()) == 4
    assert [name for _, name in read] == list(range(10)) * 3


async def test_a_reader_that_gave_up_takes_no_turn() -> None:
    turns = Turns(a_round=1)
    boxes: list[Mailbox[int]] = [Mailbox(turns) for _ in range(3)]
    readers = [asyncio.create_task(box.get()) for box in boxes]
    await asyncio.sleep(0)
    for item, box in enumerate(boxes):
        box.put(item)
    readers[0].cancel()
    assert await asyncio.gather(*readers[1:]) == [1, 2]
    assert await boxes[0].get() == 0
