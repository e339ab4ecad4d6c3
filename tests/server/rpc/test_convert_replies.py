"""Everything that the engine says arrives: every field of every message is set from its namesake."""

from __future__ import annotations

from dataclasses import replace

import pytest
from google.protobuf.message import Message

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_server.engine.types import Chunk, FinishReason, SamplingParams, Tokens
from d2o_server.rpc import convert
from tests.server.rpc.scripted_engine import CHUNKS, FINISHED, LOAD, MODEL, STARTED, STREAMS


def unset_fields(message: Message) -> list[str]:
    return [field.name for field in message.DESCRIPTOR.fields if field not in dict(message.ListFields())]


def test_started_reports_every_field_of_the_compression_in_force() -> None:
    started = convert.stream_message(STARTED).started
    assert unset_fields(started) == []
    # It stood for the ratio, which is there.
    assert unset_fields(started.compression) == ["max_loss"]
    assert started.compression.policy == pb.COMPRESSION_POLICY_D2O
    assert (started.prompt_tokens, started.reserved_pages, started.budget_per_layer, started.seed) == (5, 12, 1024, 9)


def test_a_chunk_carries_text_tokens_and_log_probabilities() -> None:
    chunk = convert.stream_message(CHUNKS[0]).chunk
    top = [
        pb.TopLogprob(token_id=11, token="Par", logprob=-0.25),
        pb.TopLogprob(token_id=12, token="Lon", logprob=-2.5),
    ]
    assert chunk == pb.GenerationChunk(
        text="Par", token_ids=[11], logprobs=[pb.TokenLogprobs(token_id=11, token="Par", logprob=-0.25, top=top)]
    )


def test_an_empty_chunk_is_still_a_chunk() -> None:
    assert convert.stream_message(Chunk("", ())).WhichOneof("event") == "chunk"


def test_finished_carries_usage_and_cache_facts() -> None:
    finished = convert.stream_message(FINISHED).finished
    assert unset_fields(finished) == ["stop_token_id"]
    assert unset_fields(finished.usage) == []
    assert unset_fields(finished.cache) == []
    assert finished.cache.layers[0] == pb.LayerCacheFacts(budget=6, kept=6, merged=1.5, dropped=1.5)
    assert finished.usage.first_token_seconds == 0.5


@pytest.mark.parametrize(
    ("changes", "kind"), [({"stop_string": None, "stop_token_id": 0}, "stop_token_id"), ({"stop_string": None}, None)]
)
def test_what_stopped_a_generation_is_told_apart_from_nothing(changes: dict[str, int | None], kind: str | None) -> None:
    message = convert.finished_message(replace(FINISHED, **changes))  # type: ignore[arg-type]
    assert message.WhichOneof("stopped_by") == kind


@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_has_its_namesake(reason: FinishReason) -> None:
    message = convert.finished_message(replace(FINISHED, reason=reason))
    assert pb.FinishReason.Name(message.finish_reason) == f"FINISH_REASON_{reason.name}"


def test_model_info_sets_every_field() -> None:
    message = convert.model_info_message(MODEL)
    assert unset_fields(message) == []
    assert message.default_max_new_tokens == 256
    assert list(message.end_of_text_ids) == [0, 2]
    assert unset_fields(message.default_sampling) == ["logit_bias", "seed"]
    assert message.default_sampling.HasField("min_p")


def test_the_reported_default_sampling_asked_for_is_the_default() -> None:
    default = SamplingParams(
        temperature=0.7, top_k=40, top_p=0.95, min_p=0.1, repetition_penalty=1.2, logit_bias=((3, -1.5),), seed=4
    )
    info = replace(MODEL, default_sampling=default)
    reported = convert.model_info_message(info).default_sampling
    request = pb.GenerateTextRequest(prompt=pb.Prompt(text="hello"), sampling=reported)
    plain = replace(MODEL, default_sampling=SamplingParams())
    assert convert.generation_request(request, plain).sampling == default


def test_load_sets_every_field() -> None:
    message = convert.load_message(LOAD, STREAMS, with_layers=True)
    assert unset_fields(message) == []
    assert unset_fields(message.workers[0]) == []
    assert unset_fields(message.streams[0]) == []
    assert unset_fields(message.layers[0]) == []
    assert [stream.state for stream in message.streams] == [
        *(pb.STREAM_STATE_DECODE, pb.STREAM_STATE_PREFILL, pb.STREAM_STATE_WAITING)
    ]
    assert message.streams[0].policy == pb.COMPRESSION_POLICY_H2O
    assert message.waiting_prompt_tokens == 4000


def test_streams_and_layers_are_left_out_unless_they_are_asked_for() -> None:
    message = convert.load_message(LOAD)
    assert (len(message.streams), len(message.layers)) == (0, 0)
    assert message.generated_tokens == 2**33


def test_tokens_keep_their_order() -> None:
    assert convert.tokens_message(Tokens((3, 1, 2), ("c", "a", "b"))) == pb.TokenizeResponse(
        token_ids=[3, 1, 2], tokens=["c", "a", "b"]
    )
