"""When pages come free: a queue that is played ahead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o_server.engine.forecast import Admission, Holding, Pace, Waiting, admissions, seconds_until


def test_who_waits_is_admitted_when_enough_has_ended() -> None:
    holdings = [Holding(9, 4), Holding(2, 3), Holding(5, 3)]
    queue = [Waiting(5, 100, 10), Waiting(1, 20, 10), Waiting(9, 30, 10)]
    # 3 + 3 pages are back after 5 s, one of them is left for the second, and the third waits for the first.
    assert admissions(0, 10, holdings, queue) == [Admission(5, 100), Admission(5, 20), Admission(15, 30)]


def test_what_fits_already_is_admitted_now() -> None:
    assert admissions(6, 1, [Holding(3, 1)], [Waiting(5, 7, 1)]) == [Admission(0.0, 7)]


def test_places_are_waited_for_as_pages_are() -> None:
    assert admissions(100, 0, [Holding(3, 1), Holding(1, 1)], [Waiting(1, 7, 9)] * 2) == [
        Admission(1, 7),
        Admission(3, 7),
    ]


def test_a_request_that_is_more_than_ever_comes_back_does_not_stop_the_play() -> None:
    assert admissions(0, 1, [Holding(2, 1)], [Waiting(50, 1, 1)]) == [Admission(2, 1)]


@given(
    st.integers(0, 20),
    st.integers(0, 5),
    st.lists(st.builds(Holding, st.floats(0, 100), st.integers(1, 20)), max_size=10),
    st.lists(st.builds(Waiting, st.integers(1, 20), st.integers(1, 50), st.floats(0, 100)), max_size=20),
)
def test_nobody_is_expected_before_those_ahead(
    free: int, places: int, holdings: list[Holding], queue: list[Waiting]
) -> None:
    expected = [admission.seconds for admission in admissions(free, places, holdings, queue)]
    assert len(expected) == len(queue)
    assert expected == sorted(expected)


def test_pages_of_one_owner_come_back_in_the_order_of_their_ends() -> None:
    holdings = [Holding(5, 10), Holding(1, 4)]
    assert [seconds_until(pages, holdings) for pages in (0, 4, 5, 14, 99)] == [0, 1, 5, 5, 5]


def test_the_pace_is_learnt_from_what_ended_and_follows_it() -> None:
    pace = Pace()
    pace.ended(10.0, 100)
    assert pace.seconds(50) == pytest.approx(5.0)
    assert pace.seconds_left(100, 4.0) == pytest.approx(6.0)
    assert pace.seconds_left(100, 40.0) == pytest.approx(1.0)
    for _ in range(40):
        pace.ended(1.0, 100)
    assert pace.seconds(100) == pytest.approx(1.0, rel=0.02)
