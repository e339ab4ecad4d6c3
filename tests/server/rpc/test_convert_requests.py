"""What a request may say, and how each refusal names the field, what was given and what is allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_server.engine.types import ChatMessage, SamplingParams
from d2o_server.errors import InvalidRequest
from d2o_server.rpc import convert
from tests.server.rpc.scripted_engine import MODEL

TEXT = pb.Prompt(text="hello")
NAN, INF = float("nan"), float("inf")


def sampling_of(
    sampling: pb.SamplingParameters | None = None, stopping: pb.StoppingParameters | None = None
) -> SamplingParams:
    request = pb.GenerateTextRequest(prompt=TEXT, sampling=sampling, stopping=stopping)
    return convert.generation_request(request, MODEL).sampling


def test_a_request_that_names_nothing_takes_every_default() -> None:
    request = convert.generation_request(pb.StreamGenerateTextRequest(prompt=TEXT), MODEL)
    assert request.prompt == "hello"
    # The engine fills in the default length, which it may shorten where the context ends.
    assert request.sampling == replace(MODEL.default_sampling, max_new_tokens=None)
    assert (request.compression, request.deadline, request.client_id) == (None, None, None)


def test_every_sampling_and_stopping_field_arrives() -> None:
    request = pb.GenerateTextRequest(
        prompt=TEXT,
        sampling=pb.SamplingParameters(
            temperature=0.3,
            top_k=40,
            top_p=0.8,
            min_p=0.05,
            repetition_penalty=1.1,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            logit_bias={7: -100, 3: 2.5},
            seed=2**64 - 1,
        ),
        stopping=pb.StoppingParameters(
            max_new_tokens=64,
            min_new_tokens=8,
            stop_strings=["\n\n", "END"],
            stop_token_ids=[5, 999],
            ignore_end_of_text=True,
        ),
        logprobs=5,
    )
    assert convert.generation_request(request, MODEL).sampling == SamplingParams(
        temperature=0.3,
        top_k=40,
        top_p=0.8,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=((3, 2.5), (7, -100)),
        seed=2**64 - 1,
        max_new_tokens=64,
        min_new_tokens=8,
        stop_strings=("\n\n", "END"),
        stop_token_ids=(5, 999),
        ignore_end_of_text=True,
        logprobs=5,
    )


def test_a_field_set_to_zero_is_not_a_field_left_unset() -> None:
    assert sampling_of(pb.SamplingParameters(temperature=0)).temperature == 0
    assert sampling_of(pb.SamplingParameters(seed=0)).seed == 0
    assert sampling_of(pb.SamplingParameters(top_k=0)).temperature == MODEL.default_sampling.temperature
    request = pb.GenerateTextRequest(prompt=TEXT, logprobs=0)
    assert convert.generation_request(request, MODEL).sampling.logprobs == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (pb.Prompt(text="hi \N{SNOWMAN}"), "hi \N{SNOWMAN}"),
        (pb.Prompt(tokens=pb.TokenIds(ids=[0, 999])), (0, 999)),
        (
            pb.Prompt(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="")])),
            (ChatMessage("user", ""),),
        ),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_conversation(prompt: pb.Prompt, expected: object) -> None:
    assert convert.prompt(prompt, MODEL) == expected


def chat(role: str) -> pb.Prompt:
    return pb.Prompt(chat=pb.ChatMessages(messages=[pb.ChatMessage(role=role, content="hi")]))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (pb.Prompt(), "prompt: got nothing, allowed is one of text, tokens or chat"),
        (pb.Prompt(text=""), "prompt.text: got an empty string, allowed is at least one character"),
        (pb.Prompt(tokens=pb.TokenIds()), "prompt.tokens.ids: got no ids, allowed is at least one"),
        (
            pb.Prompt(tokens=pb.TokenIds(ids=[1] * 2049)),
            "prompt.tokens.ids: got 2049 ids, allowed is at most 2048",
        ),
        (
            pb.Prompt(tokens=pb.TokenIds(ids=[1, 1000])),
            "prompt.tokens.ids[1]: got 1000, allowed is [0, 999] (the vocabulary)",
        ),
        (pb.Prompt(chat=pb.ChatMessages()), "prompt.chat.messages: got no messages, allowed is at least one"),
        (chat(""), "prompt.chat.messages[0].role: got 0 characters, allowed is 1 to 64"),
        (chat("r" * 65), "prompt.chat.messages[0].role: got 65 characters, allowed is 1 to 64"),
    ],
)
def test_a_prompt_that_says_nothing_or_too_much_is_refused(prompt: pb.Prompt, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        convert.prompt(prompt, MODEL)
    assert str(refused.value) == message


def test_a_conversation_needs_a_model_with_a_chat_template() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt\.chat: .*no chat template$"):
        convert.prompt(chat("user"), replace(MODEL, has_chat_template=False))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -0.1}, "sampling.temperature: got -0.1, allowed is [0, 10]"),
        ({"temperature": 10.5}, "sampling.temperature: got 10.5, allowed is [0, 10]"),
        ({"temperature": NAN}, "sampling.temperature: got nan, allowed is [0, 10]"),
        ({"top_p": 1.5}, "sampling.top_p: got 1.5, allowed is (0, 1]"),
        ({"top_p": 0}, "sampling.top_p: got 0, allowed is (0, 1]"),
        ({"min_p": 1.01}, "sampling.min_p: got 1.01, allowed is [0, 1]"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty: got 0, allowed is (0, 10]"),
        ({"repetition_penalty": INF}, "sampling.repetition_penalty: got inf, allowed is (0, 10]"),
        ({"presence_penalty": 2.5}, "sampling.presence_penalty: got 2.5, allowed is [-2, 2]"),
        ({"frequency_penalty": -INF}, "sampling.frequency_penalty: got -inf, allowed is [-2, 2]"),
        ({"logit_bias": {3: 100.5}}, "sampling.logit_bias[3]: got 100.5, allowed is [-100, 100]"),
        ({"logit_bias": {3: NAN}}, "sampling.logit_bias[3]: got nan, allowed is [-100, 100]"),
        (
            {"logit_bias": {1000: 1.0}},
            "sampling.logit_bias: got 1000, allowed is [0, 999] (the vocabulary)",
        ),
        (
            {"logit_bias": dict.fromkeys(range(1025), 1.0)},
            "sampling.logit_bias: got 1025 entries, allowed is at most 1024",
        ),
    ],
)
def test_a_sampling_field_out_of_bounds_is_refused(sampling: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampling_of(pb.SamplingParameters(**sampling))  # type: ignore[arg-type]
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("stopping", "message"),
    [
        ({"max_new_tokens": 0}, "stopping.max_new_tokens: got 0, allowed is [1, 2048] (the model's context)"),
        ({"max_new_tokens": 2049}, "stopping.max_new_tokens: got 2049, allowed is [1, 2048] (the model's context)"),
        (
            {"max_new_tokens": 9, "min_new_tokens": 10},
            "stopping.min_new_tokens: got 10, allowed is [0, 9] (max_new_tokens)",
        ),
        ({"min_new_tokens": 257}, "stopping.min_new_tokens: got 257, allowed is [0, 256] (max_new_tokens)"),
        ({"stop_strings": ["x"] * 17}, "stopping.stop_strings: got 17 strings, allowed is at most 16"),
        ({"stop_strings": ["x", ""]}, "stopping.stop_strings[1]: got 0 characters, allowed is 1 to 256"),
        ({"stop_strings": ["x" * 257]}, "stopping.stop_strings[0]: got 257 characters, allowed is 1 to 256"),
        ({"stop_token_ids": [1000]}, "stopping.stop_token_ids[0]: got 1000, allowed is [0, 999] (the vocabulary)"),
        ({"stop_token_ids": [1] * 1025}, "stopping.stop_token_ids: got 1025 ids, allowed is at most 1024"),
    ],
)
def test_a_stopping_field_out_of_bounds_is_refused(stopping: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampling_of(stopping=pb.StoppingParameters(**stopping))  # type: ignore[arg-type]
    assert str(refused.value) == message


def test_logprobs_are_bounded_by_the_server() -> None:
    with pytest.raises(InvalidRequest, match=r"^logprobs: got 21, allowed is \[0, 20\]"):
        convert.generation_request(pb.GenerateTextRequest(prompt=TEXT, logprobs=21), MODEL)


@pytest.mark.parametrize(
    "sampling",
    [
        pb.SamplingParameters(temperature=10, top_p=1, min_p=1, repetition_penalty=10),
        pb.SamplingParameters(temperature=0, top_p=1e-6, min_p=0, repetition_penalty=1e-6),
        pb.SamplingParameters(presence_penalty=-2, frequency_penalty=2, logit_bias={0: -100, 999: 100}),
    ],
)
def test_bounds_themselves_are_allowed(sampling: pb.SamplingParameters) -> None:
    assert sampling_of(sampling) != MODEL.default_sampling


def test_top_k_beyond_the_vocabulary_keeps_all_of_it() -> None:
    assert sampling_of(pb.SamplingParameters(top_k=2**32 - 1)).top_k == MODEL.vocabulary_size


def test_a_default_minimum_gives_way_to_a_smaller_maximum() -> None:
    info = replace(MODEL, default_sampling=SamplingParams(min_new_tokens=50, max_new_tokens=100))
    request = pb.GenerateTextRequest(prompt=TEXT, stopping=pb.StoppingParameters(max_new_tokens=10))
    sampling = convert.generation_request(request, info).sampling
    assert (sampling.min_new_tokens, sampling.max_new_tokens) == (10, 10)


numbers = st.floats(width=32) | st.sampled_from([0.0, 0.5, 1.0, 2.0])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": numbers,
            "top_p": numbers,
            "min_p": numbers,
            "repetition_penalty": numbers,
            "presence_penalty": numbers,
            "frequency_penalty": numbers,
            "top_k": st.integers(0, 2**32 - 1),
            "logit_bias": st.dictionaries(st.integers(0, 2000), numbers, max_size=5),
        },
    )
)
def test_whatever_is_let_in_is_within_bounds(fields: dict[str, object]) -> None:
    try:
        sampling = sampling_of(pb.SamplingParameters(**fields))  # type: ignore[arg-type]
    except InvalidRequest as refused:
        assert refused.field.split(".")[0] == "sampling"  # noqa: PT017 - either outcome is right
        return
    assert 0 <= sampling.temperature <= 10
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert 0 < sampling.repetition_penalty <= 10
    assert -2 <= sampling.presence_penalty <= 2
    assert -2 <= sampling.frequency_penalty <= 2
    assert 0 <= sampling.top_k <= MODEL.vocabulary_size
    assert all(token < MODEL.vocabulary_size and -100 <= bias <= 100 for token, bias in sampling.logit_bias)
