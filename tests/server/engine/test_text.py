"""Tokens become text at the pace that whole characters and possible stop strings allow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o_server.engine.messages import NewToken
from d2o_server.engine.text import TextStream
from d2o_server.engine.types import SamplingParams, TopLogprob
from d2o_server.tokenizer import Tokenizer

CODEC = Tokenizer.built_in(512)
END = 258


def stream(**sampling: object) -> TextStream:
    return TextStream.of(CODEC, SamplingParams(**sampling), (END,))  # type: ignore[arg-type]


def tokens(text: str) -> list[NewToken]:
    return [NewToken("a", byte) for byte in text.encode()]


def test_text_comes_with_the_tokens_that_it_came_from() -> None:
    answer = stream()
    chunk = answer.push(tokens("Hi!"))
    assert (chunk.text, chunk.token_ids, chunk.logprobs) == ("Hi!", tuple(b"Hi!"), ())
    assert answer.finish() == ""


def test_half_a_character_waits_for_its_other_half() -> None:
    answer = stream()
    first, second = tokens("é")
    assert answer.push([first]).text == ""
    assert answer.push([second]).text == "é"


def test_a_character_that_never_completes_is_told_at_the_end() -> None:
    answer = stream()
    assert answer.push(tokens("a€")[:-1]).text == "a"
    assert answer.finish() == "\ufffd"


@pytest.mark.parametrize("pieces", [["Hello ST", "OP more"], ["Hello STOP more"], list("Hello STOP more")])
def test_a_stop_string_ends_the_text_before_it_however_it_is_cut(pieces: list[str]) -> None:
    answer = stream(stop_strings=("STOP",))
    text, ids = "", 0
    for piece in pieces:
        chunk = answer.push(tokens(piece))
        text, ids = text + chunk.text, ids + len(chunk.token_ids)
        if answer.matched:
            break
    assert (text, answer.matched, ids) == ("Hello ", "STOP", len("Hello STOP"))
    assert answer.finish() == ""


def test_what_might_become_a_stop_string_is_held_back_and_sent_when_it_does_not() -> None:
    answer = stream(stop_strings=("STOP",))
    assert answer.push(tokens("a ST")).text == "a "
    assert answer.push(tokens("AR")).text == "STAR"
    assert answer.push(tokens(" ST")).text == " "
    assert answer.finish() == "ST"
    assert answer.matched is None


def test_a_stop_string_that_the_last_half_character_completes_is_found() -> None:
    answer = stream(stop_strings=("\ufffd",))
    assert answer.push(tokens("a€")[:-1]).text == "a"
    assert answer.finish() == ""
    assert answer.matched == "\ufffd"


@pytest.mark.parametrize("hidden", [END, ord("x")])
def test_tokens_that_end_generation_are_counted_and_not_shown(hidden: int) -> None:
    answer = stream(stop_token_ids=(ord("x"),))
    chunk = answer.push([*tokens("ab"), NewToken("a", hidden)])
    assert (chunk.text, chunk.token_ids, answer.tokens) == ("ab", (97, 98, hidden), 3)


def test_log_probabilities_name_their_tokens() -> None:
    answer = stream(logprobs=2)
    new = NewToken("a", 104, -0.5, ((104, -0.5), (105, -1.5)))
    (entry,) = answer.push([new]).logprobs
    assert (entry.token_id, entry.token, entry.logprob) == (104, "h", -0.5)
    assert entry.top == (TopLogprob(104, "h", -0.5), TopLogprob(105, "i", -1.5))


def test_log_probabilities_stop_with_the_tokens_at_a_stop_string() -> None:
    answer = stream(logprobs=0, stop_strings=("b",))
    chunk = answer.push(tokens("abc"))
    assert len(chunk.token_ids) == len(chunk.logprobs) == 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="abé€😀 ", max_size=30),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2).map(tuple),
    cuts=st.lists(st.integers(1, 7), max_size=30),
)
def test_the_cut_never_changes_the_text(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    answer = stream(stop_strings=stops)
    left, out = tokens(text), ""
    for cut in [*cuts, len(left)]:
        piece, left = left[:cut], left[cut:]
        out += answer.push(piece).text
        if answer.matched:
            break
    out += answer.finish()
    # The stop string that is complete first; of those that end together the longest.
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = text if not ends else text[: sum(min(ends))]
    assert out == expected
    assert (answer.matched is None) == (not ends)
