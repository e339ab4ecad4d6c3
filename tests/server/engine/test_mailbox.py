"""One reader gets what was put, in order, and waits where there is nothing."""

from __future__ import annotations

import asyncio

from d2o_server.engine.mailbox import Mailbox


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
