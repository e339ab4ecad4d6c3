"""Sampling parameters out of bounds are refused by name; those on the bounds are taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o_server.engine.types import SamplingParams
from d2o_server.engine.validation import (
    MAX_LOGIT_BIASES,
    MAX_STOP_STRING_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    validate,
)
from d2o_server.errors import InvalidRequest


def check(**given: Any) -> None:
    validate(SamplingParams(**given), vocabulary_size=100, max_logprobs=20, default_max_new_tokens=64)


def refused(**given: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(**given)
    return caught.value


RANGES = [
    ("temperature", [0, 0.0, 1, 10.0], [-0.001, 10.001]),
    ("top_p", [1e-9, 1, 1.0], [0, 0.0, 1.001, -1]),
    ("min_p", [0, 0.0, 1.0], [-0.001, 1.001]),
    ("repetition_penalty", [1e-9, 1, 10.0], [0, 0.0, -1.0, 10.001]),
    ("presence_penalty", [-2, 0, 2.0], [-2.001, 2.001]),
    ("frequency_penalty", [-2, 0, 2.0], [-2.001, 2.001]),
]
NUMBERS = [name for name, _, _ in RANGES]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, fit, _ in RANGES for value in fit])
def test_numbers_on_their_bounds_are_taken(name: str, value: float) -> None:
    check(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, _, unfit in RANGES for value in unfit])
def test_numbers_beyond_their_bounds_are_refused(name: str, value: float) -> None:
    error = refused(**{name: value})
    assert error.field == f"sampling.{name}"
    assert repr(value) in str(error)
    assert "allowed is a number in" in str(error)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, True, "1", None])
def test_what_is_no_finite_number_is_refused(name: str, value: object) -> None:
    assert refused(**{name: value}).field == f"sampling.{name}"


WHOLE: list[tuple[str, str, list[Any], list[Any]]] = [
    ("top_k", "sampling.top_k", [0, 1, 2**32], [-1, 1.0, True, None]),
    ("seed", "sampling.seed", [None, 0, 2**64 - 1], [-1, 2**64, 0.5, True]),
    ("max_new_tokens", "stopping.max_new_tokens", [None, 1, 10**6], [0, -1, 2.0]),
    ("min_new_tokens", "stopping.min_new_tokens", [0, 64], [-1, 65, 1.0]),
    ("logprobs", "logprobs", [None, 0, 20], [-1, 21, 1.0, True]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, _, fit, _ in WHOLE for value in fit])
def test_whole_numbers_on_their_bounds_are_taken(name: str, value: int | None) -> None:
    check(**{name: value})


@pytest.mark.parametrize(
    ("name", "field", "value"), [(name, field, value) for name, field, _, unfit in WHOLE for value in unfit]
)
def test_whole_numbers_beyond_their_bounds_are_refused(name: str, field: str, value: object) -> None:
    assert refused(**{name: value}).field == field


def test_min_new_tokens_is_at_most_max_new_tokens() -> None:
    check(max_new_tokens=70, min_new_tokens=70)
    assert "at most max_new_tokens = 3" in str(refused(max_new_tokens=3, min_new_tokens=4))


def test_without_max_new_tokens_the_default_bounds_min_new_tokens() -> None:
    assert "at most max_new_tokens = 64" in str(refused(min_new_tokens=65))


def test_logit_bias_on_its_bounds_is_taken() -> None:
    check(logit_bias=((0, -100.0), (99, 100.0)))
    many = tuple((token, 1.0) for token in range(MAX_LOGIT_BIASES))
    validate(
        SamplingParams(logit_bias=many), vocabulary_size=MAX_LOGIT_BIASES, max_logprobs=0, default_max_new_tokens=1
    )


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (((100, 0.0),), "got 100, allowed is a whole number in [0, 99]"),
        (((-1, 0.0),), "got -1"),
        (((3, 100.5),), "sampling.logit_bias[3]: got 100.5"),
        (((3, math.nan),), "sampling.logit_bias[3]: got nan"),
        (((3, 1.0), (3, 2.0)), "token id 3 twice"),
        (((3, 1.0),) * (MAX_LOGIT_BIASES + 1), f"at most {MAX_LOGIT_BIASES} entries"),
    ],
)
def test_logit_bias_beyond_its_bounds_is_refused(bias: tuple[tuple[int, float], ...], said: str) -> None:
    assert said in str(refused(logit_bias=bias))


def test_stops_on_their_bounds_are_taken() -> None:
    check(stop_strings=("x" * MAX_STOP_STRING_CHARACTERS,) * MAX_STOP_STRINGS)
    check(stop_token_ids=(0, 99))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"stop_strings": ("",)}, "stopping.stop_strings[0]"),
        ({"stop_strings": ("a", "x" * (MAX_STOP_STRING_CHARACTERS + 1))}, "stopping.stop_strings[1]"),
        ({"stop_strings": (b"a",)}, "stopping.stop_strings[0]"),
        ({"stop_strings": ("a",) * (MAX_STOP_STRINGS + 1)}, "stopping.stop_strings"),
        ({"stop_token_ids": (100,)}, "stopping.stop_token_ids"),
        ({"stop_token_ids": (-1,)}, "stopping.stop_token_ids"),
        ({"stop_token_ids": (1,) * (MAX_STOP_TOKEN_IDS + 1)}, "stopping.stop_token_ids"),
    ],
)
def test_stops_beyond_their_bounds_are_refused(given: dict[str, Any], field: str) -> None:
    assert refused(**given).field == field


@given(text=st.text(min_size=MAX_STOP_STRING_CHARACTERS + 1, max_size=400))
def test_a_stop_string_that_is_too_long_is_not_echoed(text: str) -> None:
    assert str(refused(stop_strings=(text,))) == (
        f"stopping.stop_strings[0]: got {len(text)} characters, allowed is a string of 1 to 256 characters"
    )
