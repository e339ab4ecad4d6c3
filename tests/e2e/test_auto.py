"""Compression auto over gRPC: what was done is said, and costs no stream its place."""

from __future__ import annotations

import pytest

from d2o_client import AsyncClient, Compression, Generation, InvalidArgumentError, MaxLoss, Policy
from tests.e2e.conftest import Launch
from tests.e2e.processes import TINY, ServerProcess

PROMPT = tuple(range(3, 103))
AUTO = Compression("auto", ratio=0.2, min_budget=16)


async def generate(client: AsyncClient, prompt: tuple[int, ...] = PROMPT, compression: object = AUTO) -> Generation:
    return await client.generate(prompt, max_new_tokens=60, ignore_end_of_text=True, compression=compression)  # type: ignore[arg-type]


async def test_a_short_request_on_an_idle_server_gets_the_full_cache_and_is_told(client: AsyncClient) -> None:
    answer = await generate(client)
    assert (answer.started.compression.policy, answer.started.budget_per_layer) == (Policy.NONE, 0)
    assert answer.started.auto
    assert answer.token_ids == (await generate(client, compression="none")).token_ids
    assert not (await generate(client, compression="none")).started.auto


async def test_a_long_request_is_compressed_as_d2o_would(client: AsyncClient) -> None:
    limit = (await client.model_info()).auto_full_tokens
    prompt = PROMPT * (limit // len(PROMPT))
    answer = await generate(client, prompt)
    assert answer.started.auto
    assert answer.started.compression.policy is Policy.D2O
    assert 0 < max(layer.kept for layer in answer.cache.layers) < len(prompt) / 2
    named = await generate(client, prompt, Compression("d2o", ratio=0.2, min_budget=16))
    assert (answer.token_ids, answer.started.compression) == (named.token_ids, named.started.compression)


async def test_a_request_is_compressed_where_its_full_cache_would_leave_no_headroom(
    small_server: ServerProcess,
) -> None:
    prompt = PROMPT * 2
    async with AsyncClient(small_server.target, retry=None) as client:
        async with client.stream(prompt, max_new_tokens=150, ignore_end_of_text=True, compression=AUTO) as first:
            await anext(aiter(first))
            second = await generate(client, prompt)
            assert first.started is not None
            assert [first.started.compression.policy, second.started.compression.policy] == [Policy.NONE, Policy.D2O]
            assert second.started.reserved_pages < first.started.reserved_pages
        alone = await generate(client, prompt, Compression("d2o", ratio=0.2, min_budget=16))
        assert second.token_ids == alone.token_ids


@pytest.mark.parametrize(("max_loss", "ratio"), [("low", 0.5), (MaxLoss.MEDIUM, 0.4), ("high", 0.2)])
@pytest.mark.parametrize("policy", [None, "d2o"])
async def test_a_loss_is_given_instead_of_a_ratio(
    client: AsyncClient, policy: str | None, max_loss: str, ratio: float
) -> None:
    answer = await generate(client, compression=Compression(policy, max_loss=max_loss))
    assert (answer.started.compression.ratio, answer.started.compression.max_loss) == (ratio, None)


@pytest.mark.parametrize(
    ("compression", "text"),
    [
        (
            Compression("auto", max_loss="low", ratio=0.5),
            r"\.max_loss: got low beside ratio, allowed is one of",
        ),
        (
            Compression("snapkv", max_loss="low"),
            r"\.max_loss: got low with policy snapkv, allowed is",
        ),
        (Compression("auto", ratio=2.0), r"compression\.ratio: got 2\.0, allowed is"),
    ],
)
async def test_what_contradicts_itself_is_refused(client: AsyncClient, compression: Compression, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        await generate(client, compression=compression)


async def test_auto_can_be_the_server_s_default(launch_server: Launch) -> None:
    flags = ("--compression", "auto", "--ratio", "0.2", "--min-budget", "16", "--auto-full-tokens", "150")
    server = launch_server(*TINY, "--num-pages", "500", *flags)
    async with AsyncClient(server.target) as client:
        info = await client.model_info()
        assert (info.default_compression.policy, info.auto_full_tokens) == (Policy.AUTO, 150)
        long, short = await generate(client, compression=None), await generate(client, PROMPT[:80], None)
        assert [long.started.compression.policy, short.started.compression.policy] == [Policy.D2O, Policy.NONE]
        assert (await generate(client, PROMPT[:80], Compression(ratio=0.3))).started.auto
        assert not (await generate(client, compression="d2o")).started.auto
