"""Requests that a worker of several ranks could not run are refused before it hears of them."""

from __future__ import annotations

from typing import Any

import pytest

from d2o.config import D2OConfig, Policy, Scope
from d2o_server.engine.admission import Admission, EngineDefaults
from d2o_server.engine.memory import CacheShape
from d2o_server.engine.types import GenerationRequest, ModelInfo, SamplingParams
from d2o_server.errors import InvalidRequest


def admission(tensor_parallel: int) -> Admission:
    defaults = EngineDefaults(tensor_parallel=tensor_parallel)
    info = ModelInfo(
        model="m",
        architecture="a",
        dtype="float32",
        layers=2,
        compressible_layers=2,
        query_heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary_size=100,
        max_model_len=1000,
        page_size=16,
        total_pages=500,
        page_bytes=1,
        has_chat_template=False,
        default_compression=defaults.compression,
        auto_full_tokens=2048,
        default_sampling=defaults.sampling,
        max_logprobs=20,
        server_version="0",
        end_of_text_ids=(),
    )
    codec: Any = None  # token ids need none
    return Admission(codec, info, CacheShape(windows=(None, None), page_size=16), defaults)


def request(config: D2OConfig) -> GenerationRequest:
    return GenerationRequest(prompt=(1, 2), sampling=SamplingParams(max_new_tokens=5), compression=config)


@pytest.mark.parametrize(
    ("config", "field"), [(D2OConfig(heads=Scope.LAYER), "heads"), (D2OConfig.authors(), "threshold_scope")]
)
async def test_heads_on_several_ranks_share_no_choice(config: D2OConfig, field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^compression\.{field}: got layer, allowed is head where .* 2 ranks$"):
        await admission(2).prepare(request(config))
    await admission(1).prepare(request(config))


@pytest.mark.parametrize("config", [D2OConfig(), D2OConfig.paper(), D2OConfig(heads=Scope.LAYER, policy=Policy.NONE)])
async def test_all_else_is_taken(config: D2OConfig) -> None:
    message, _ = await admission(2).prepare(request(config))
    assert message.config == config
