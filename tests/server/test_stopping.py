"""Stop strings are found wherever the text is cut, and nothing of them is ever sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o_server.engine.stopping import StopMatcher

_TEXT = st.text(alphabet="ab\n", max_size=40)
_STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def _first_complete(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Start and stop string of the occurrence that ends first; the longest of those that end together."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    if not found:
        return None
    _, start, stop = min(found)
    return start, stop


def _run(chunks: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    emitted = ""
    for chunk in chunks:
        emit, matched = matcher.push(chunk)
        emitted += emit
        if matched is not None:
            return emitted, matched
    return emitted + matcher.finish(), None


@given(chunks=st.lists(_TEXT, max_size=12), stops=_STOPS)
def test_any_cut_of_the_text_gives_what_searching_the_whole_text_gives(chunks: list[str], stops: list[str]) -> None:
    text = "".join(chunks)
    expected = _first_complete(text, stops)
    emitted, matched = _run(chunks, stops)
    if expected is None:
        assert (emitted, matched) == (text, None)
    else:
        assert (emitted, matched) == (text[: expected[0]], expected[1])


@given(text=_TEXT, stops=_STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emit, matched = matcher.push(text)
    if matched is None:
        held = text[len(emit) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_is_held_back_until_it_can_no_longer_become_a_stop_string() -> None:
    matcher = StopMatcher(["</answer>"])
    assert matcher.push("42 </ans") == ("42 ", None)
    assert matcher.push("i") == ("</ansi", None)


def test_a_candidate_that_overlaps_a_failed_one_is_not_lost() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.push(character) for character in "aaab"] == [("", None), ("", None), ("a", None), ("", "aab")]


@pytest.mark.parametrize("stops", [["bc", "abc"], ["abc", "bc"]])
def test_of_stop_strings_that_end_together_the_longest_wins(stops: list[str]) -> None:
    assert StopMatcher(stops).push("xabcd") == ("x", "abc")


def test_text_held_back_is_returned_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", None)
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""
