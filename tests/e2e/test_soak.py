"""Many requests of every kind, cancelled and late ones among them: each ends as it should, and nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from d2o_client import AsyncClient, Compression, DeadlineExceededError, Policy

REQUESTS = 500
AT_ONCE = 64
# More tokens than any machine makes before a deadline of at most LONGEST_WAIT seconds.
NEVER_DONE = 3000
LONGEST_WAIT = 0.6


@dataclass(frozen=True)
class Plan:
    """One caller: what it asks for, and how it intends to end (``done``, ``cancelled`` or ``late``)."""

    ending: str
    prompt: tuple[int, ...]
    options: dict[str, Any]
    patience: float


def plans(seed: int) -> list[Plan]:
    dice = random.Random(seed)
    endings = ["cancelled"] * (REQUESTS // 3) + ["late"] * (REQUESTS // 10)
    endings += ["done"] * (REQUESTS - len(endings))
    dice.shuffle(endings)
    return [plan(dice, ending) for ending in endings]


def plan(dice: random.Random, ending: str) -> Plan:
    length = int(dice.choice((30, 200, 900)) * dice.uniform(0.1, 1.5)) + 1
    compression = Compression(
        policy=dice.choice(list(Policy)), ratio=dice.uniform(0.05, 1), min_budget=dice.choice((1, 8, 64, 1024))
    )
    options = {
        "max_new_tokens": NEVER_DONE - length if ending == "late" else dice.randint(1, 60),
        "ignore_end_of_text": True,
        "temperature": dice.choice((0.0, 1.0)),
        "compression": compression,
    }
    prompt = tuple(dice.randrange(256) for _ in range(length))
    return Plan(ending, prompt, options, dice.uniform(0.001, LONGEST_WAIT))


async def play(client: AsyncClient, plan: Plan) -> str:
    """How the request ended."""
    timeout = plan.patience if plan.ending == "late" else 120
    stream = client.stream(plan.prompt, timeout=timeout, **plan.options)
    reading = asyncio.ensure_future(stream.result())
    if plan.ending == "cancelled":
        await asyncio.wait({reading}, timeout=plan.patience)
        reading.cancel()
    try:
        answer = await reading
    except asyncio.CancelledError:
        return "cancelled"
    except DeadlineExceededError:
        return "late"
    seen = len(plan.prompt) + plan.options["max_new_tokens"] - 1
    assert answer.usage.completion_tokens == len(answer.token_ids) == plan.options["max_new_tokens"]
    assert answer.cache.peak_pages <= answer.started.reserved_pages
    for layer in answer.cache.layers:
        assert layer.kept + layer.merged + layer.dropped == pytest.approx(seen)
    return "done"


async def test_500_requests_end_as_they_should_and_leave_nothing(client: AsyncClient) -> None:
    turn = asyncio.Semaphore(AT_ONCE)

    async def take_turn(plan: Plan) -> str:
        async with turn:
            return await play(client, plan)

    planned = plans(seed=2)
    ended = await asyncio.gather(*map(take_turn, planned))
    counts = Counter(zip((plan.ending for plan in planned), ended, strict=True))
    # Who cancels may find the answer finished; nobody else ends otherwise than planned.
    assert set(counts) <= {("done", "done"), ("late", "late"), ("cancelled", "cancelled"), ("cancelled", "done")}
    assert counts["late", "late"] == REQUESTS // 10
    assert counts["cancelled", "cancelled"] > REQUESTS // 10
    async with asyncio.timeout(5):
        while (load := await client.load()).pages_free < load.pages_total or load.running or load.waiting:
            await asyncio.sleep(0.02)
    assert (load.pages_used, load.pages_reserved) == (0, 0)
