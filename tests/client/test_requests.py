"""Arguments become requests; mistakes are named before anything is sent."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import pytest

from d2o_client import ChatMessage, Compression, InvalidArgumentError, LayerBudgets, MaxLoss, Merge, Policy
from d2o_client._options import GenerationOptions
from d2o_client._requests import generation_fields, prompt_message
from d2o_inference.v1 import inference_service_pb2 as pb


def request(**options: Any) -> pb.GenerateTextRequest:
    return pb.GenerateTextRequest(**generation_fields("Hi", options))  # type: ignore[arg-type]


def test_a_prompt_is_text_token_ids_or_chat() -> None:
    assert prompt_message("Hi").text == "Hi"
    assert list(prompt_message([1, 2]).tokens.ids) == [1, 2]
    assert list(prompt_message(tuple(np.array([1, 2]))).tokens.ids) == [1, 2]
    turns: list[Any] = [ChatMessage("system", "s"), {"role": "user", "content": "u"}, ("assistant", "a")]
    messages = prompt_message(turns).chat.messages
    assert [(m.role, m.content) for m in messages] == [("system", "s"), ("user", "u"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "at least one"),
        (b"bytes", "prompt"),
        (None, "prompt"),
        ([1, "a"], r"prompt\[1\]"),
        ([1, True], r"prompt\[1\]"),
        ([1, -1], r"prompt\[1\]"),
        ([2**32], r"prompt\[0\]"),
        ([1, None], r"prompt\[1\]"),
        (["Hi"], r"prompt\[0\]"),
        ([("user", 1)], r"prompt\[0\]\.content"),
        ([{"role": "user"}], r"prompt\[0\]"),
        ([{"role": "user", "content": "a", "name": "b"}], r"prompt\[0\]"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_wrong_prompt_is_named(prompt: Any, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        prompt_message(prompt)


def test_what_is_left_out_stays_unset() -> None:
    sent = request()
    assert sent.sampling == pb.SamplingParameters()
    assert sent.stopping == pb.StoppingParameters()
    assert not sent.HasField("compression")
    assert not sent.HasField("logprobs")


def test_zero_is_sent_and_not_taken_for_unset() -> None:
    sent = request(temperature=0, top_k=0, seed=0, logprobs=0, min_new_tokens=0)
    assert sent.sampling.HasField("temperature")
    assert sent.sampling.HasField("top_k")
    assert sent.sampling.HasField("seed")
    assert sent.HasField("logprobs")
    assert sent.stopping.HasField("min_new_tokens")


def test_every_option_reaches_its_field() -> None:
    sent = request(
        max_new_tokens=9,
        min_new_tokens=1,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=1,
        logit_bias={3: -2.5},
        seed=2**64 - 1,
        stop=["a", "b"],
        stop_token_ids=[4],
        ignore_end_of_text=True,
        logprobs=2,
        compression="h2o",
        priority=7,
    )
    assert sent.sampling == pb.SamplingParameters(
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=1,
        logit_bias={3: -2.5},
        seed=2**64 - 1,
    )
    assert sent.stopping == pb.StoppingParameters(
        max_new_tokens=9, min_new_tokens=1, stop_strings=["a", "b"], stop_token_ids=[4], ignore_end_of_text=True
    )
    assert (sent.logprobs, sent.priority) == (2, 7)
    assert sent.compression == pb.Compression(policy=pb.COMPRESSION_POLICY_H2O)


def test_the_options_cover_the_contract() -> None:
    sampling = set(pb.SamplingParameters.DESCRIPTOR.fields_by_name)
    stopping = set(pb.StoppingParameters.DESCRIPTOR.fields_by_name) - {"stop_strings"} | {"stop"}
    assert set(GenerationOptions.__optional_keys__) == sampling | stopping | {"logprobs", "compression", "priority"}
    assert set(Compression.__dataclass_fields__) == set(pb.Compression.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("kind", "prefix", "wire"),
    [
        (Policy, "COMPRESSION_POLICY_", pb.CompressionPolicy),
        (Merge, "MERGE_RULE_", pb.MergeRule),
        (LayerBudgets, "LAYER_BUDGET_RULE_", pb.LayerBudgetRule),
        (MaxLoss, "MAX_LOSS_", pb.MaxLoss),
    ],
)
def test_every_choice_of_the_contract_has_a_name_here(kind: type[Enum], prefix: str, wire: Any) -> None:
    assert {prefix + member.name for member in kind} == set(wire.keys()[1:])


def test_one_stop_string_needs_no_list() -> None:
    assert list(request(stop="END").stopping.stop_strings) == ["END"]


def test_compression_is_a_policy_or_a_whole_description() -> None:
    full = Compression("d2o", ratio=0.25, min_budget=16, recent_share=0.5, merge="paper", layer_budgets="uniform")
    assert request(compression=full).compression == pb.Compression(
        policy=pb.COMPRESSION_POLICY_D2O,
        ratio=0.25,
        min_budget=16,
        recent_share=0.5,
        merge=pb.MERGE_RULE_PAPER,
        layer_budgets=pb.LAYER_BUDGET_RULE_UNIFORM,
    )
    loss = request(compression=Compression("auto", max_loss="low")).compression
    assert loss == pb.Compression(policy=pb.COMPRESSION_POLICY_AUTO, max_loss=pb.MAX_LOSS_LOW)
    assert request(compression=Policy.NONE).compression.policy == pb.COMPRESSION_POLICY_NONE
    assert not request(compression=Compression(budget_tokens=9)).compression.policy


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"max_new_tokens": 2**32}, "max_new_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, r"stop\[1\]"),
        ({"stop_token_ids": [1.5]}, r"stop_token_ids\[0\]"),
        ({"stop_token_ids": 1}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, r"logit_bias\[1\]"),
        ({"ignore_end_of_text": 1}, "ignore_end_of_text"),
        ({"compression": "zip"}, "one of none, d2o, h2o, streaming, snapkv"),
        ({"compression": 1}, "compression"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        request(**options)
    assert isinstance(caught.value, InvalidArgumentError)
    assert "allowed is" in str(caught.value)


@pytest.mark.parametrize("field", ["ratio", "min_budget", "merge", "layer_budgets", "max_loss"])
def test_a_wrong_compression_is_named_where_it_is_made(field: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"compression.{field}"):
        Compression(**{field: "x"})  # type: ignore[arg-type]


def test_an_unknown_option_is_a_type_error_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"'max_tokens'.*'max_new_tokens'"):
        request(max_tokens=3)
