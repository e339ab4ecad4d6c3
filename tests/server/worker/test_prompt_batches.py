"""Which of a step's prompts are attended for and scored by one launch."""

from __future__ import annotations

import pytest
import torch

from d2o.attention import AttentionRule, ScoreTarget
from d2o_server.worker.gpu.prompts import Batch, Chunk, PrefillPart

HEADS, LAYERS = 2, 3
PLAIN = AttentionRule(1.0)


def batches(*chunks: tuple[int, int, int], scored: bool = True, rule: AttentionRule = PLAIN) -> list[Batch]:
    """Of chunks given as (first position, tokens, tokens of the prompt), side by side."""
    found: list[Chunk] = []
    end = 0
    for start, count, prompt in chunks:
        target = ScoreTarget(torch.zeros(HEADS, prompt), None, prompt, prompt)
        found.append(Chunk(end, end + count, start, len(found), (target if scored else None,) * LAYERS))
        end += count
    tokens = torch.zeros(end, dtype=torch.int32)
    return PrefillPart(tokens, tokens, tokens, tuple(found)).batched(rule, torch.bfloat16, 128)


def sizes(found: list[Batch]) -> list[list[int]]:
    return [[chunk.count for chunk in batch.chunks] for batch in found]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([500, 600], [[500, 600]]),
        ([1024, 1024, 30], [[1024, 1024, 30]]),
        ([500, 1025, 600, 700], [[500], [1025], [600, 700]]),
        ([1500, 2000], [[1500], [2000]]),
    ],
)
def test_short_prompts_stand_side_by_side(counts: list[int], expected: list[list[int]]) -> None:
    found = batches(*((0, count, count) for count in counts))
    assert sizes(found) == expected
    assert [batch.borders is not None for batch in found] == [len(each) > 1 for each in expected]


def test_a_chunk_that_looks_back_stands_alone() -> None:
    assert sizes(batches((0, 300, 300), (512, 300, 812), (0, 300, 300))) == [[300], [300], [300]]


def test_what_a_softcap_rules_out_stands_alone() -> None:
    assert sizes(batches((0, 300, 300), (0, 300, 300), rule=AttentionRule(1.0, softcap=30.0))) == [[300], [300]]


@pytest.mark.parametrize(("tokens", "packed"), [(40, True), (1024, True), (2048, True), (2049, False)])
def test_a_short_prompt_alone_is_scored_as_several_are(tokens: int, packed: bool) -> None:
    (found,) = batches((0, tokens, tokens))
    assert (found.packed is not None) == packed
    assert len(found.apart) == (not packed)


def test_a_part_of_a_prompt_is_scored_by_itself() -> None:
    first, then = batches((0, 300, 700)), batches((300, 400, 700))
    for (found,) in (first, then):
        assert found.packed is None
        assert len(found.apart) == 1


def test_nothing_is_scored_that_nobody_asks_for() -> None:
    (found,) = batches((0, 300, 300), scored=False)
    assert (found.packed, found.apart) == (None, ())
