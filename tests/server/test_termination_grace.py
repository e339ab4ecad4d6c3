"""One number says how long a shutdown may take; how long streams may run follows from it."""

from __future__ import annotations

import re

import pytest

from d2o_server.errors import SettingsError
from d2o_server.settings import Settings, from_arguments


def read(flags: str, **variables: str) -> Settings:
    return from_arguments(flags.split(), {f"D2O_SERVE_{name}": value for name, value in variables.items()})


@pytest.mark.parametrize(
    ("flags", "grace"),
    [
        ("", 60),
        ("--drain-grace 5", 5),
        ("--termination-grace 120", 103),
        ("--termination-grace 120 --drain-window 5", 100),
        ("--termination-grace 17.5", 0.5),
    ],
)
def test_streams_get_what_the_window_and_the_reserve_leave(flags: str, grace: float) -> None:
    assert read(flags).limits.drain_grace == grace


def test_it_can_be_set_in_the_environment() -> None:
    assert read("", TERMINATION_GRACE="660").limits.drain_grace == 643


@pytest.mark.parametrize("given", ["17", "0", "-5", "nan", "inf", "1e300"])
def test_one_that_leaves_nothing_is_refused(given: str) -> None:
    named = re.escape(f"termination_grace: got {float(given)}, allowed is more than 17: ")
    with pytest.raises(SettingsError, match=rf"^{named}"):
        read(f"--termination-grace={given}")


def test_a_window_out_of_bounds_is_named_before_what_it_leaves() -> None:
    with pytest.raises(
        SettingsError, match=r"^drain_window: got inf, allowed is at least 0 and at most 86400 seconds$"
    ):
        read("--termination-grace 120 --drain-window inf")


def test_two_answers_to_one_question_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"^drain_grace: got 5\.0 beside termination_grace 120\.0, allowed is one"):
        read("--termination-grace 120", DRAIN_GRACE="5")
