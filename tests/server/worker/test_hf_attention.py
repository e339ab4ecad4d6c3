"""The attention function refuses what it would get wrong, and needs nothing but the step it is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from d2o.attention import AttentionRule, prefill_attention
from d2o.pages import PagePool
from d2o_server.worker.hf_attention import ATTENTION_NAME, PrefillChunk, StepContext, attention, register
from tests.server.worker.conftest import Harness, served_model

HEADS, KV_HEADS, DIM, TOKENS = 4, 2, 16, 20


def make_pool() -> PagePool:
    return PagePool(
        layers=2,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        page_size=16,
        num_pages=8,
        rows=1,
        max_slots=64,
        dtype=torch.float32,
    )


@pytest.fixture
def pool() -> PagePool:
    return make_pool()


def prefill_step(pool: PagePool) -> StepContext:
    """A prompt of ``TOKENS`` tokens, read at once."""
    row = pool.open_row()
    rows, counts = torch.tensor([row]), torch.tensor([TOKENS])
    pool.grow(rows, counts)
    pool.used[:, rows] += counts
    slot_rows = pool.slot_rows(torch.arange(2)[:, None], torch.tensor(row), torch.arange(TOKENS))
    chunk = PrefillChunk(slice(0, TOKENS), 0, pool.block_table[:, row, :2], (None, None))
    return StepContext(
        pool=pool,
        slot_rows=slot_rows,
        decode_tokens=0,
        segments=None,
        prefills=(chunk,),
        bias=False,
        score=False,
        scored=set(),
    )


def call(layer: int = 0, **named: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, TOKENS, DIM, generator=draw)
    k, v = torch.randn(2, 1, KV_HEADS, TOKENS, DIM, generator=draw)
    mask = named.pop("attention_mask", None)
    module: Any = SimpleNamespace(layer_idx=layer)
    out, weights = attention(module, q, k, v, mask, **named)
    assert weights is None
    return out


def test_it_is_registered_without_a_mask_function() -> None:
    register()
    assert AttentionInterface._global_mapping[ATTENTION_NAME] is attention
    assert ATTENTION_NAME not in AttentionMaskInterface._global_mapping


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3", "tiny-gpt-neox"])
def test_a_step_does_not_ask_whether_its_positions_are_of_several_sequences(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host would wait for the device, and with it for all steps before."""

    def asked(*_: object) -> None:
        raise AssertionError("the positions were looked at")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", asked)
    harness = Harness(served_model(name))
    for length in (5, 30):
        harness.submit(range(1, length), new=3)
    assert [answer.failure for answer in harness.run().values()] == [None, None]


def test_the_result_has_the_shape_that_transformers_expects(pool: PagePool) -> None:
    assert call(step=prefill_step(pool)).shape == (1, TOKENS, HEADS, DIM)


@pytest.mark.parametrize("layer", [0, 1])
def test_keys_and_values_are_written_to_their_layers_slots_only(pool: PagePool, layer: int) -> None:
    step = prefill_step(pool)
    call(layer=layer, step=step)
    written = [bool(pool.k[pool.block_table[each, 0, :2]].any()) for each in range(2)]
    assert written == [layer == 0, layer == 1]
    draw = torch.Generator().manual_seed(0)
    torch.randn(1, HEADS, TOKENS, DIM, generator=draw)
    k, v = torch.randn(2, 1, KV_HEADS, TOKENS, DIM, generator=draw)
    for store, new in ((pool.k, k), (pool.v, v)):
        assert torch.equal(store.view(-1, DIM)[step.slot_rows[layer]], new[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("named", "rule"),
    [
        ({}, AttentionRule(DIM**-0.5)),
        ({"scaling": 0.3}, AttentionRule(0.3)),
        ({"scaling": 0.3, "sliding_window": 5}, AttentionRule(0.3, window=5)),
        ({"softcap": 2.0}, AttentionRule(DIM**-0.5, softcap=2.0)),
    ],
)
def test_the_models_own_scale_window_and_cap_are_honoured(
    pool: PagePool, named: dict[str, Any], rule: AttentionRule
) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, TOKENS, DIM, generator=draw)
    k, v = torch.randn(2, 1, KV_HEADS, TOKENS, DIM, generator=draw)
    expected = prefill_attention(q[0], k[0], v[0], start=0, rule=rule)
    assert torch.equal(call(step=prefill_step(pool), **named)[0], expected)
    if named:
        assert not torch.allclose(call(step=prefill_step(make_pool()))[0], expected)


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"attention_mask": torch.ones(1)}, "no attention mask"),
        ({"dropout": 0.1}, "no dropout"),
        ({"s_aux": torch.ones(HEADS)}, "passes s_aux, which"),
        ({"softmax_scale": 0.5, "position_bias": 1}, "passes position_bias, softmax_scale, which"),
    ],
)
def test_what_would_change_the_result_unseen_is_refused(pool: PagePool, named: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call(step=prefill_step(pool), **named)


def test_an_unknown_argument_that_is_unset_is_none_of_its_business(pool: PagePool) -> None:
    call(step=prefill_step(pool), s_aux=None, use_cache=False, position_ids=torch.zeros(1))


def test_a_call_outside_of_a_step_is_a_defect() -> None:
    with pytest.raises(ValueError, match="without its step context"):
        call()
