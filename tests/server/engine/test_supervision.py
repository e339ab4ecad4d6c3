"""Pauses between starts, when a worker is given up, and what counts as hung: without processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from d2o_server.engine.pulse import Pulse, keep_beating, pulse_file
from d2o_server.engine.supervision import Restarts, Silence, Supervision, watch
from d2o_server.errors import SettingsError


def test_pauses_double_up_to_the_longest() -> None:
    restarts = Restarts(Supervision(first_pause=0.5, longest_pause=3, worker_restarts=9))
    assert [restarts.pause(0, worked=True) for _ in range(5)] == [0.5, 1, 2, 3, 3]


def test_service_for_a_while_starts_the_pauses_again() -> None:
    restarts = Restarts(Supervision(first_pause=0.5, settled=10))
    assert [restarts.pause(served, worked=False) for served in (0, 0, 11, 0)] == [0.5, 1, 0.5, 1]


def test_a_worker_is_given_up_after_starts_in_a_row_that_came_to_nothing() -> None:
    restarts = Restarts(Supervision(worker_restarts=2))
    assert restarts.pause(0, worked=False) is not None
    assert restarts.pause(0, worked=False) is not None
    # This one brought a request further before it died.
    assert restarts.pause(0, worked=True) is not None
    assert restarts.pause(0, worked=False) is not None
    assert restarts.pause(0, worked=False) is None
    assert restarts.in_a_row == 3


def test_without_restarts_the_first_death_is_the_last() -> None:
    assert Restarts(Supervision(worker_restarts=0)).pause(3600, worked=True) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"worker_timeout": 0.5}, "worker_timeout: got 0.5, allowed is at least 1 second"),
        ({"worker_timeout": float("nan")}, "worker_timeout: got nan, allowed is at least 1 second"),
        ({"worker_timeout": float("inf")}, "worker_timeout: got inf, allowed is at least 1 second"),
        ({"worker_restarts": -1}, "worker_restarts: got -1, allowed is at least 0"),
    ],
)
def test_what_is_out_of_bounds_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{message}$"):
        Supervision(**changes)  # type: ignore[arg-type]


def test_a_device_decides_how_long_a_worker_may_be_silent() -> None:
    assert [Supervision().timeout(device) for device in ("cuda:0", "cpu", None)] == [60, 300, 300]
    assert Supervision(worker_timeout=7).timeout("cuda:0") == 7


def test_silence_counts_while_something_is_expected() -> None:
    number = 0
    silence = Silence(lambda: number)
    assert [silence.look(1), silence.look(1)] == [1, 2]
    number = 1
    assert [silence.look(1), silence.look(1), silence.look(1, expected=False), silence.look(1)] == [0, 1, 0, 1]


async def watched(*, beating: bool, reporting: bool, busy: bool) -> str:
    looks = 0

    def count() -> int:
        nonlocal looks
        looks += 1
        return looks

    return await watch(
        timeout=lambda: 0.1,
        beats=count if beating else lambda: 0,
        reports=count if reporting else lambda: 0,
        busy=lambda: busy,
    )


async def test_a_process_that_stands_still_is_told_from_one_whose_step_hangs() -> None:
    async with asyncio.timeout(5):
        assert "stopped, or starved" in await watched(beating=False, reporting=False, busy=False)
        assert "its step has not ended" in await watched(beating=True, reporting=False, busy=True)


@pytest.mark.parametrize(("reporting", "busy"), [(False, False), (True, True)])
async def test_a_process_that_is_idle_or_gets_on_is_left_alone(reporting: bool, busy: bool) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watched(beating=True, reporting=reporting, busy=busy), 0.4)


async def test_a_pulse_is_seen_through_its_file(tmp_path: Path) -> None:
    path = pulse_file(f"ipc://{tmp_path}/0")
    seen = Pulse(path, create=True)
    assert seen.count == 0
    keep_beating(path)
    async with asyncio.timeout(5):
        while seen.count < 3:
            await asyncio.sleep(0.05)
    seen.close()
