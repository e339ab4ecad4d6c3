from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o_server.errors import InvalidRequest
from d2o_server.rpc import bounds


def over_the_wire(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@given(st.decimals(min_value=-1000, max_value=1000, places=3))
def test_a_decimal_of_six_digits_comes_back_as_it_was_written(decimal: object) -> None:
    written = float(f"{float(str(decimal)):.6g}")
    assert bounds.shortest_float32(over_the_wire(written)) == written


@given(st.floats(width=32, allow_nan=False))
def test_the_shortest_decimal_is_the_same_float_on_the_wire(value: float) -> None:
    assert over_the_wire(bounds.shortest_float32(value)) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.1, 1.1])
def test_a_number_out_of_bounds_is_refused(value: float) -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling\.min_p: got .*, allowed is \[0, 1\]$"):
        bounds.number("sampling.min_p", value, 0, 1)


def test_an_open_lower_bound_refuses_itself() -> None:
    assert bounds.number("f", 1, 0, 1, above_low=True) == 1
    with pytest.raises(InvalidRequest, match=r"allowed is \(0, 1\]"):
        bounds.number("f", 0, 0, 1, above_low=True)


@given(st.lists(st.integers(0, 2**32 - 1)), st.integers(1, 2**32))
def test_token_ids_pass_exactly_when_all_are_of_the_vocabulary(ids: list[int], vocabulary_size: int) -> None:
    outside = [index for index, token in enumerate(ids) if token >= vocabulary_size]
    if outside:
        with pytest.raises(InvalidRequest, match=rf"^ids\[{outside[0]}\]: got {ids[outside[0]]}, "):
            bounds.token_ids("ids", ids, vocabulary_size)
    else:
        assert bounds.token_ids("ids", ids, vocabulary_size) == tuple(ids)
