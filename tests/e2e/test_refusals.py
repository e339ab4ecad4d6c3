"""Requests that can never succeed: INVALID_ARGUMENT, which names the field, what was given and what is allowed."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from d2o_client import AsyncClient, InvalidArgumentError
from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub

NAN, INFINITY = float("nan"), float("inf")


def chat(*roles: str, content: str = "hello") -> pb.Prompt:
    return pb.Prompt(chat=pb.ChatMessages(messages=[pb.ChatMessage(role=role, content=content) for role in roles]))


def tokens(*ids: int) -> pb.Prompt:
    return pb.Prompt(tokens=pb.TokenIds(ids=ids))


PROMPTS: list[tuple[str, pb.Prompt]] = [
    ("prompt: got nothing, allowed is one of", pb.Prompt()),
    ("prompt.text: got an empty string", pb.Prompt(text="")),
    ("prompt.tokens.ids: got no ids", tokens()),
    ("prompt.tokens.ids[1]: got 512, allowed is [0, 511]", tokens(3, 512)),
    ("prompt.tokens.ids: got 5000 ids, allowed is at most 4096", tokens(*[1] * 5000)),
    ("prompt.chat.messages: got no messages", pb.Prompt(chat=pb.ChatMessages())),
    ("prompt.chat.messages[0].role: got 0 characters", chat("")),
    ("prompt.chat.messages: got 5000 messages, allowed is at most 4096", chat(*["user"] * 5000)),
    ("prompt.chat.messages: got 300000 characters, allowed is at most 262144", chat("user", content="x" * 300_000)),
    ("prompt.text: got 300000 characters, allowed is at most 262144", pb.Prompt(text="x" * 300_000)),
    ("prompt.text: got 8000000 characters, allowed is at most 262144", pb.Prompt(text="x" * 8_000_000)),
]
PARAMETERS: list[tuple[str, dict[str, Any]]] = [
    ("sampling.temperature: got -1", {"sampling": {"temperature": -1}}),
    ("sampling.temperature: got nan, allowed is [0, 10]", {"sampling": {"temperature": NAN}}),
    ("sampling.temperature: got inf", {"sampling": {"temperature": INFINITY}}),
    ("sampling.top_p: got 0, allowed is (0, 1]", {"sampling": {"top_p": 0}}),
    ("sampling.min_p: got 1.5", {"sampling": {"min_p": 1.5}}),
    ("sampling.repetition_penalty: got 0", {"sampling": {"repetition_penalty": 0}}),
    ("sampling.presence_penalty: got 2.5", {"sampling": {"presence_penalty": 2.5}}),
    ("sampling.frequency_penalty: got -3", {"sampling": {"frequency_penalty": -3}}),
    ("sampling.logit_bias: got 512", {"sampling": {"logit_bias": {512: 1}}}),
    ("sampling.logit_bias[3]: got nan", {"sampling": {"logit_bias": {3: NAN}}}),
    ("stopping.max_new_tokens: got 0", {"stopping": {"max_new_tokens": 0}}),
    ("stopping.max_new_tokens: got 9999", {"stopping": {"max_new_tokens": 9999}}),
    ("stopping.min_new_tokens: got 9", {"stopping": {"max_new_tokens": 8, "min_new_tokens": 9}}),
    ("stopping.stop_strings[1]: got 0 characters", {"stopping": {"stop_strings": ["a", ""]}}),
    ("stopping.stop_strings[0]: got 300 characters", {"stopping": {"stop_strings": ["a" * 300]}}),
    ("stopping.stop_strings: got 17 strings", {"stopping": {"stop_strings": ["a"] * 17}}),
    ("stopping.stop_token_ids[0]: got 4000", {"stopping": {"stop_token_ids": [4000]}}),
    ("compression.policy: got 99", {"compression": {"policy": 99}}),
    ("compression.merge: got 99", {"compression": {"merge": 99}}),
    ("compression.layer_budgets: got 99", {"compression": {"layer_budgets": 99}}),
    ("compression.ratio: got 0", {"compression": {"ratio": 0}}),
    ("compression.ratio: got nan", {"compression": {"ratio": NAN}}),
    ("compression.recent_share: got -0.5", {"compression": {"recent_share": -0.5}}),
    ("compression.window_quota: got 0.8", {"compression": {"window_quota": 0.8, "recent_share": 0.5}}),
    ("logprobs: got 21", {"logprobs": 21}),
    ("priority: got 10, allowed is [0, 9]", {"priority": 10}),
]


async def to_the_end(stream: Any) -> None:
    async for _ in stream:
        pass


async def assert_refused(call: Any, message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith(message)


@pytest.mark.parametrize(("message", "prompt"), PROMPTS, ids=[message for message, _ in PROMPTS])
async def test_a_prompt_that_cannot_be_taken_is_refused(
    stub: InferenceServiceStub, message: str, prompt: pb.Prompt
) -> None:
    await assert_refused(stub.GenerateText(pb.GenerateTextRequest(prompt=prompt)), message)
    stream = stub.StreamGenerateText(pb.StreamGenerateTextRequest(prompt=prompt))
    await assert_refused(to_the_end(stream), message)
    await assert_refused(stub.Tokenize(pb.TokenizeRequest(prompt=prompt)), message)


@pytest.mark.parametrize(("message", "fields"), PARAMETERS, ids=[message for message, _ in PARAMETERS])
async def test_a_parameter_out_of_bounds_is_refused(
    stub: InferenceServiceStub, message: str, fields: dict[str, Any]
) -> None:
    await assert_refused(stub.GenerateText(pb.GenerateTextRequest(prompt=tokens(1), **fields)), message)
    stream = stub.StreamGenerateText(pb.StreamGenerateTextRequest(prompt=tokens(1), **fields))
    await assert_refused(to_the_end(stream), message)


async def test_a_prompt_as_long_as_the_context_leaves_no_room(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^prompt: got 4096 tokens, allowed is at most 4095 tokens$"):
        await client.generate("x" * 4096)


async def test_prompt_and_output_beyond_the_context_are_refused(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^stopping.max_new_tokens: got 100, allowed is at most 96 \(cont"):
        await client.generate("x" * 4000, max_new_tokens=100)


async def test_a_request_that_the_whole_pool_cannot_hold_is_refused(small_client: AsyncClient) -> None:
    needs = "^prompt: got 600 tokens, which need 75 cache pages, allowed is requests of at most 60 pages; shorten the"
    with pytest.raises(InvalidArgumentError, match=needs):
        await small_client.generate("x" * 600, max_new_tokens=200, compression="none")


async def test_a_refused_request_reserves_nothing(small_client: AsyncClient) -> None:
    before = await small_client.load()
    with pytest.raises(InvalidArgumentError):
        await small_client.generate("x" * 3000, max_new_tokens=200)
    assert await small_client.load() == before
