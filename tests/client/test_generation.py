"""What both clients return, how streams behave, and that leaving a stream cancels it."""

from __future__ import annotations

import time
from typing import Any

import grpc
import pytest

from d2o_client import (
    CacheFacts,
    ChatMessage,
    Chunk,
    Compression,
    FinishReason,
    HealthStatus,
    InternalError,
    InvalidArgumentError,
    LayerCache,
    Merge,
    Policy,
    RequestCancelledError,
    Usage,
)
from d2o_inference.v1 import inference_service_pb2 as pb
from tests.client.scripted_service import FINISHED, HANG, HELLO, PATIENCE, STARTED, Abort, ScriptedServer, chunk

USAGE = Usage(prompt_tokens=100, completion_tokens=2, queue_seconds=0.1, first_token_seconds=0.2, total_seconds=0.5)
CACHE = CacheFacts(
    layers=(
        LayerCache(budget=50, kept=50, merged=30, dropped=22),
        LayerCache(budget=30, kept=30, merged=10, dropped=62),
    ),
    ratio_reached=0.4,
    peak_pages=6,
    compression_seconds=0.01,
)


def test_generate_returns_the_answer_with_the_facts_of_its_start_and_end(client: Any) -> None:
    answer = client.generate("Hi")
    assert (answer.text, answer.token_ids) == ("Hello world", (1, 2))
    assert (answer.finish_reason, answer.stop_string, answer.stop_token_id) == (FinishReason.STOP, "END", None)
    assert (answer.usage, answer.cache) == (USAGE, CACHE)
    assert answer.started.compression == Compression(policy=Policy.D2O, ratio=0.4, merge=Merge.CONSERVE)
    assert (answer.started.budget_per_layer, answer.started.seed) == (40, 7)


def test_a_stream_yields_chunks_and_gathers_them(client: Any) -> None:
    with client.stream("Hi") as stream:
        assert (stream.started, stream.finished, stream.text) == (None, None, "")
        assert next(stream) == Chunk("Hello", (1,))
        assert stream.started.generation_id == "g-1"
        assert (stream.text, stream.finished) == ("Hello", None)
        assert list(stream) == [Chunk(" world", (2,))]
        assert (stream.text, stream.token_ids) == ("Hello world", (1, 2))
        assert (stream.finished.usage, stream.finished.cache) == (USAGE, CACHE)


def test_a_streams_result_is_what_generate_returns(client: Any) -> None:
    assert client.stream("Hi").result() == client.generate("Hi")


def test_a_finished_stream_stays_finished(client: Any) -> None:
    stream = client.stream("Hi")
    assert len(list(stream)) == 2
    assert list(stream) == []


def test_logprobs_arrive_with_their_tokens(client: Any, server: ScriptedServer) -> None:
    logprobs = [pb.TokenLogprobs(token_id=1, token="a", logprob=-0.5, top=[pb.TopLogprob(token_id=2, logprob=-1)])]
    message = pb.StreamGenerateTextResponse(chunk=pb.GenerationChunk(text="a", token_ids=[1], logprobs=logprobs))
    server.script("StreamGenerateText", STARTED, message, FINISHED)
    (logprob,) = client.stream("Hi", logprobs=1).result().logprobs
    assert (logprob.token_id, logprob.token, logprob.logprob, logprob.top[0].token_id) == (1, "a", -0.5, 2)
    assert server.calls[-1].request.logprobs == 1


def test_an_unread_stream_sends_nothing(client: Any, server: ScriptedServer) -> None:
    with client.stream("Hi"):
        pass
    client.load()
    assert [call.method for call in server.calls] == ["GetLoad"]


def test_leaving_the_block_cancels_the_call_at_the_server(client: Any, server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    with client.stream("Hi") as stream:
        next(stream)
    assert server.calls[0].cancelled.wait(PATIENCE)


def test_leaving_by_an_error_cancels_the_call_too(client: Any, server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    with pytest.raises(ZeroDivisionError), client.stream("Hi") as stream:
        len(next(stream).token_ids) / 0
    assert server.calls[0].cancelled.wait(PATIENCE)


def test_breaking_out_of_a_bare_loop_cancels_the_call(client: Any, server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    for _ in client.stream("Hi"):
        break
    client.load()
    assert server.calls[0].cancelled.wait(PATIENCE)


def test_a_stream_read_to_its_end_is_not_cancelled(client: Any, server: ScriptedServer) -> None:
    with client.stream("Hi") as stream:
        stream.result()
    assert server.calls[0].ended.wait(PATIENCE)
    assert not server.calls[0].cancelled.is_set()


def test_reading_a_closed_stream_says_that_it_is_closed(client: Any) -> None:
    with client.stream("Hi") as stream:
        next(stream)
    with pytest.raises(RequestCancelledError, match="closed"):
        next(stream)


def test_the_result_of_a_stream_that_failed_is_refused(client: Any, server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), Abort(grpc.StatusCode.INTERNAL, "boom"))
    stream = client.stream("Hi")
    with pytest.raises(InternalError, match="boom"):
        stream.result()
    with pytest.raises(InternalError, match="no whole answer"):
        stream.result()
    assert stream.text == "a"


@pytest.mark.parametrize(("steps", "missing"), [(HELLO[:-1], "finished"), (HELLO[1:], "started")])
def test_a_stream_without_its_first_or_last_event_is_an_error(
    client: Any, server: ScriptedServer, steps: tuple[Any, ...], missing: str
) -> None:
    server.script("StreamGenerateText", *steps)
    with pytest.raises(InternalError, match=missing):
        client.stream("Hi").result()


def test_a_response_without_its_facts_is_an_error(client: Any, server: ScriptedServer) -> None:
    server.script("GenerateText", pb.GenerateTextResponse(text="a"))
    with pytest.raises(InternalError, match="started"):
        client.generate("Hi")


def test_values_newer_than_this_client_do_not_break_it(client: Any, server: ScriptedServer) -> None:
    finished = pb.StreamGenerateTextResponse(finished=pb.GenerationFinished(finish_reason="FINISH_REASON_STOP"))
    finished.finished.finish_reason = 99  # type: ignore[assignment]
    server.script("StreamGenerateText", STARTED, pb.StreamGenerateTextResponse(), chunk("a", 1), finished)
    assert client.stream("Hi").result().finish_reason is FinishReason.UNKNOWN


def test_tokenize_returns_ids_and_texts(client: Any, server: ScriptedServer) -> None:
    tokens = client.tokenize([ChatMessage("user", "Hi")], with_text=True)
    assert (tokens.ids, tokens.texts) == ((5, 6), ("a", "b"))
    assert server.calls[0].request.with_text


def test_model_info_reports_the_defaults_as_they_were_meant(client: Any) -> None:
    info = client.model_info()
    assert (info.model, info.max_model_len, info.has_chat_template) == ("tiny", 512, True)
    assert info.default_compression == Compression(policy="d2o", ratio=0.4, min_budget=1024)
    assert (info.default_sampling.temperature, info.default_sampling.top_k) == (0.7, 0)
    assert info.default_sampling.top_p is None
    assert info.end_of_text_ids == (0, 2)


def test_load_reports_pages_and_workers(client: Any) -> None:
    load = client.load()
    assert load.pages_used + load.pages_reserved + load.pages_free == load.pages_total
    assert (load.running, load.waiting, load.workers[0].serving) == (3, 1, True)


def test_health_reads_the_standard_protocol(client: Any, server: ScriptedServer) -> None:
    assert client.health() is HealthStatus.SERVING
    server.health.enter_graceful_shutdown()
    assert client.health() is HealthStatus.NOT_SERVING


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_must_be_positive(client: Any, timeout: float) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout"):
        client.generate("Hi", timeout=timeout)
    with pytest.raises(InvalidArgumentError, match="timeout"):
        client.stream("Hi", timeout=timeout)


def test_a_timeout_ends_a_stream_in_the_middle(client: Any, server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a", 1), HANG)
    begin = time.monotonic()
    with pytest.raises(TimeoutError), client.stream("Hi", timeout=0.3) as stream:
        stream.result()
    assert time.monotonic() - begin < PATIENCE / 2
    assert server.calls[0].ended.wait(PATIENCE)


def test_no_timeout_sends_no_deadline(client: Any, server: ScriptedServer) -> None:
    client.generate("Hi", timeout=None)
    client.generate("Hi")
    unlimited, limited = (call.time_remaining for call in server.calls)
    assert unlimited is None or unlimited > 1e6
    assert limited is not None
    assert 15 < limited < 21
