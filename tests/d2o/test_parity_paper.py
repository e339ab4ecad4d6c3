"""To the paper's letter, ours agrees with an independent reading of its equations."""

from __future__ import annotations

import pytest
import torch

from d2o.compressor import Compressed
from d2o.config import D2OConfig
from tests.d2o.golden_vectors import Replay, assert_parity, assert_state, settings, tensors

TRACE = settings()["paper_gqa"]


def assert_survivors(result: Compressed, step: int | str) -> None:
    assert torch.equal(result.slots.position[0].long(), tensors()[f"paper_gqa.pos.{step}"])
    assert_state(result.slots, "paper_gqa", step, TRACE["sinks"])


@pytest.mark.parametrize("recent", [{"recent_tokens": TRACE["recent"]}, {}], ids=["in tokens", "as the default share"])
def test_prompt_and_every_decode_step_match(recent: dict[str, int]) -> None:
    config = D2OConfig.paper(sinks=TRACE["sinks"], beta=TRACE["beta"], merge_weight=TRACE["e"], **recent)
    replay = Replay("paper_gqa", config)
    result = replay.evict(TRACE["budget"])
    assert_survivors(result, "prefill")
    assert_parity(result.threshold[0], torch.tensor(TRACE["taus"][0]))
    for step, thresholds in enumerate(TRACE["taus"][1:]):
        assert_parity(replay.decode(), tensors()[f"paper_gqa.attn_out.{step}"])
        result = replay.evict(TRACE["budget"])
        assert_parity(result.threshold[0], torch.tensor(thresholds))
        if f"paper_gqa.k.{step}" in tensors():
            assert_survivors(result, step)
