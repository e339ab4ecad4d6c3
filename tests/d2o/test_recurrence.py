"""Where a prompt's end was said before, what followed then is expected; against a plain reading of that."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o.config import D2OConfig
from d2o.recurrence import expect, expected_slots, slots_to_expect
from tests.d2o import oracle


def passage(first: int, count: int) -> list[int]:
    """``count`` tokens that occur nowhere else."""
    return list(range(first, first + count))


def test_what_followed_the_end_s_earlier_occurrence_is_expected() -> None:
    before, said, after = passage(100, 20), passage(200, 8), passage(300, 50)
    tokens = before + said + after + said
    assert expected_slots(tokens, 30) == list(range(28, 58))
    assert expected_slots(tokens, 500) == list(range(28, 86))


def test_a_short_match_is_not_enough() -> None:
    said, after = passage(200, 7), passage(300, 50)
    assert expected_slots(said + after + said, 30) == []


def test_a_short_match_is_enough_where_it_went_on_alike_twice() -> None:
    said, after = passage(200, 4), passage(300, 32)
    tokens = said + after + passage(400, 9) + said + after + passage(500, 9) + said
    assert expected_slots(tokens, 20) == list(range(49, 69))
    assert expected_slots(tokens[1:-4] + said[1:], 20) == []


def test_a_short_match_that_went_on_otherwise_is_not_enough() -> None:
    said = passage(200, 4)
    assert expected_slots(said + passage(300, 40) + said + passage(400, 40) + said, 20) == []


def test_the_longest_match_is_served_first_and_then_the_latest() -> None:
    short, long = passage(208, 8), passage(200, 16)
    tokens = long + passage(300, 20) + short + passage(400, 20) + short + passage(500, 20) + long
    assert expected_slots(tokens, 20) == list(range(16, 36))
    assert expected_slots(tokens, 30) == list(range(16, 46))
    both = short + passage(400, 20) + short + passage(500, 20) + short
    assert expected_slots(both, 20) == list(range(36, 56))


def test_nothing_is_expected_of_little() -> None:
    assert expected_slots([], 9) == []
    assert expected_slots([7], 9) == []
    assert expected_slots(passage(0, 100), 9) == []
    said = passage(200, 8)
    assert expected_slots(said + passage(300, 9) + said, 0) == []


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=12),
    most=st.integers(0, 60),
)
def test_it_agrees_with_a_plain_reading(pieces: list[tuple[int, int]], most: int) -> None:
    texts = (passage(0, 40), passage(100, 40), [5, 5, 6] * 14)
    tokens = [token for kind, count in pieces for token in texts[kind][:count]]
    assert expected_slots(tokens, most) == oracle.expected_slots(tokens, most)


def test_expected_slots_get_four_times_the_mean_attention() -> None:
    tokens = passage(0, 8) + passage(100, 84) + passage(0, 8)
    window = torch.zeros(3, 2, 100)
    expect(window, slots_to_expect(tokens, 40, D2OConfig()), group=3, config=D2OConfig())
    assert window[..., 8:18].eq(4 * 32 * 3 / 100).all()
    window[..., 8:18] = 0
    assert not window.any()


def test_no_share_expects_nothing() -> None:
    window = torch.zeros(1, 1, 100)
    tokens = passage(0, 8) + passage(100, 84) + passage(0, 8)
    config = D2OConfig(recurrence_share=0)
    expect(window, slots_to_expect(tokens, 40, config), group=1, config=config)
    assert not window.any()
