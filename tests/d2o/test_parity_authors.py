"""With the authors' variants selected, ours reproduces what their own code did."""

from __future__ import annotations

import torch

from d2o import budget
from d2o.config import D2OConfig
from tests.d2o.golden_vectors import Replay, assert_parity, assert_state, settings, tensors


def test_every_decode_step_matches_the_authors_cache() -> None:
    trace = settings()["mha_1to1"]
    first_length = trace["prompt"] + 1
    heavy, recent = (int(first_length * trace[name]) for name in ("hh_ratio", "recent_ratio"))
    config = D2OConfig.authors(recent_tokens=recent, beta=trace["belta"], alpha=trace["alpha"])
    replay = Replay("mha_1to1", config)
    for step, (size, threshold) in enumerate(zip(trace["cache_sizes"], trace["thresholds"], strict=True)):
        assert_parity(replay.decode(), tensors()[f"mha_1to1.attn_out.{step}"])
        assert size == heavy + recent
        result = replay.evict(size)
        assert result.merged + result.dropped == (first_length - size if step == 0 else 1)
        assert_parity(result.threshold[0], torch.full((trace["heads"],), threshold))
        if step in trace["saved_steps"]:
            assert_state(result.slots, "mha_1to1", step, config.sinks)


def test_a_recent_half_is_what_the_authors_scripts_ask_for() -> None:
    replay = Replay("mha_1to1", D2OConfig.authors())
    replay.decode()
    assert_parity(replay.evict(24).slots.k[0], tensors()["mha_1to1.k.0"])


def test_layer_densities_and_ratios_match_the_authors_statements() -> None:
    trace = settings()["alloc"]
    config = D2OConfig.authors(ratio=trace["rho"])
    densities = torch.stack([budget.density(layer, config) for layer in tensors()["alloc.attn_colsum"]])
    assert_parity(densities, tensors()["alloc.density"])
    ratios = torch.tensor(budget.ratios(densities, config))
    assert_parity(ratios, tensors()["alloc.ratios"])
    assert_parity(ratios * trace["hh_ratio"] / trace["rho"], tensors()["alloc.hh_ratios"])
