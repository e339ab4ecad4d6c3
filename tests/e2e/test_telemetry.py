"""What a live server says of itself: metrics, traces and logs."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from d2o_client import NO_RETRY, AsyncClient, Client, Compression, InvalidArgumentError, ResourceExhaustedError
from d2o_client._cli import main
from tests.e2e.conftest import Launch
from tests.e2e.processes import TINY, ServerProcess, spawn

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a prompt that nobody else may read " * 8
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PATIENCE = 10.0

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP endpoint that keeps the spans it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        register: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        register(self, self._server)
        self.target = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        self.spans += [span for resource in request.resource_spans for of in resource.scope_spans for span in of.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace_id: str, count: int) -> dict[str, Any]:
        """The trace's spans by name, once there are ``count``."""
        found = wait_for(lambda: [span for span in self.spans if span.trace_id.hex() == trace_id], count)
        return {span.name: span for span in found}

    def stop(self) -> None:
        self._server.stop(0).wait()


def wait_for(look: Callable[[], list[Any]], count: int) -> list[Any]:
    give_up = time.monotonic() + PATIENCE
    while len(found := look()) < count:
        assert time.monotonic() < give_up, f"{len(found)} of {count} came: {found}"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


class Observed:
    """A server whose metrics, traces and logs are all on."""

    def __init__(self, launch: Launch, collector: Collector) -> None:
        self.port, self.collector = free_port(), collector
        seen = ("--metrics-port", str(self.port), "--trace", collector.target, "--log-format", "json")
        limits = ("--max-waiting", "1", "--ratio", "0.2", "--min-budget", "32")
        self.server: ServerProcess = launch(*TINY, "--num-pages", "300", *seen, *limits)

    def text(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text

    def samples(self) -> Samples:
        families = text_string_to_metric_families(self.text())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples()[name, frozenset(labels.items())]

    def log(self, logger: str, count: int = 1) -> list[dict[str, Any]]:
        def lines() -> list[dict[str, Any]]:
            documents = [json.loads(line) for line in self.server.log.read_text().splitlines() if line.startswith("{")]
            return [document for document in documents if document["logger"] == logger]

        return wait_for(lines, count)


@pytest.fixture(scope="module")
def observed(launch_for_module: Launch) -> Iterator[Observed]:
    collector = Collector()
    yield Observed(launch_for_module, collector)
    collector.stop()


@pytest.fixture
async def caller(observed: Observed) -> Any:
    async with AsyncClient(observed.server.target, retry=NO_RETRY, timeout=60) as connected:
        yield connected


async def test_a_request_is_counted_with_its_times_and_its_tokens(observed: Observed, caller: AsyncClient) -> None:
    before = observed.samples()
    answer = await caller.generate(SECRET, max_new_tokens=80, ignore_end_of_text=True)
    after = observed.samples()

    def rise(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0.0)

    prompt = answer.usage.prompt_tokens
    assert (rise("d2o_prompt_tokens_total"), rise("d2o_generated_tokens_total")) == (prompt, 80)
    for name in ("time_to_first_token", "request", "queue", "compression"):
        assert rise(f"d2o_{name}_seconds_count") == 1, name
    usage = answer.usage
    assert rise("d2o_time_to_first_token_seconds_sum") == pytest.approx(usage.first_token_seconds, abs=1e-6)
    assert rise("d2o_queue_seconds_sum") == pytest.approx(usage.queue_seconds, abs=1e-6)
    assert rise("d2o_request_seconds_sum") == pytest.approx(usage.total_seconds, abs=0.01)
    assert rise("d2o_compression_seconds_sum") == pytest.approx(answer.cache.compression_seconds)
    # The first message may bring several tokens; all later ones are counted with their share of its gap.
    assert 70 < rise("d2o_inter_token_seconds_count") <= 79
    assert rise("d2o_inter_token_seconds_sum") <= usage.total_seconds - usage.first_token_seconds + 0.01
    fates = {fate: rise("d2o_cache_tokens_total", fate=fate) for fate in ("kept", "merged", "dropped")}
    # The last token is never fed back.
    assert sum(fates.values()) == pytest.approx(prompt + 79)
    assert fates["kept"] == pytest.approx(sum(layer.kept for layer in answer.cache.layers) / 3)
    assert rise("d2o_calls_total", method="GenerateText", code="OK") == 1


async def test_pages_tokens_and_layers_are_those_of_running_requests(observed: Observed, caller: AsyncClient) -> None:
    options: Any = {"max_new_tokens": 2000, "ignore_end_of_text": True}
    async with caller.stream(SECRET, compression=Compression("d2o", budget_tokens=40), **options) as stream:
        await anext(stream)
        await asyncio.sleep(0.8)  # longer than caches' states are apart
        load = await caller.load(max_streams=5, with_layers=True)
        seen = observed.samples()
    assert stream.started is not None
    (running,) = load.streams
    assert (running.generation_id, running.state) == (stream.started.generation_id, "decode")
    assert (running.policy, running.budget_per_layer, running.max_new_tokens) == ("d2o", 40, 2000)
    assert (running.prompt_tokens, running.completion_tokens > 1) == (stream.started.prompt_tokens, True)
    assert len(load.layers) == 3
    assert sum(layer.budget for layer in load.layers) == pytest.approx(3 * 40, abs=3)
    assert load.physical_tokens < 0.6 * load.logical_tokens
    assert load.physical_tokens == pytest.approx(sum(layer.slots for layer in load.layers) / 3)
    none: frozenset[tuple[str, str]] = frozenset()
    assert (seen["d2o_requests_running", none], seen["d2o_requests_waiting", none]) == (1, 0)
    pages = {state: seen["d2o_pages", frozenset({("state", state)})] for state in ("free", "used", "reserved")}
    assert (sum(pages.values()), pages["used"] > 0) == (300, True)
    model = frozenset({("model_name", "random:tiny-llama")})
    assert seen["vllm:num_requests_running", model] == 1
    assert seen["vllm:num_requests_waiting", model] == 0
    assert seen["vllm:kv_cache_usage_perc", model] == pytest.approx(1 - pages["free"] / 300)
    kinds = {kind: seen["d2o_tokens", frozenset({("kind", kind)})] for kind in ("logical", "physical")}
    assert 0 < kinds["physical"] < kinds["logical"]


async def test_refusals_are_counted_by_reason_and_cancels_beside_them(observed: Observed, caller: AsyncClient) -> None:
    options: Any = {"ignore_end_of_text": True, "compression": "none", "max_new_tokens": 1500}
    before = {
        reason: observed.value("d2o_rejections_total", reason=reason) for reason in ("invalid_request", "queue_full")
    }
    cancelled = observed.value("d2o_cancellations_total")
    with pytest.raises(InvalidArgumentError):
        await caller.generate("Hi", temperature=0.5, top_p=1.0, max_new_tokens=100_000)
    async with caller.stream(SECRET, **options) as first:
        await anext(first)
        # 3 layers of 1,780 tokens are 168 pages: a second one waits, a third one finds the queue full.
        waiting = asyncio.create_task(caller.generate(SECRET, **options))
        while not (await caller.load()).waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(ResourceExhaustedError):
            await caller.generate(SECRET, **options)
        assert observed.value("d2o_requests_waiting") == 1
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
    for reason, count in before.items():
        assert observed.value("d2o_rejections_total", reason=reason) == count + 1
    wait_for(lambda: [1] if observed.value("d2o_cancellations_total") == cancelled + 2 else [], 1)


async def test_a_trace_continues_the_callers_and_has_the_stages(observed: Observed, caller: AsyncClient) -> None:
    parent = ("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01")
    stream = caller.stream(SECRET, max_new_tokens=60, ignore_end_of_text=True, metadata=(parent,))
    async with stream:
        async for _ in stream:
            pass
    spans = observed.collector.of_trace(TRACE_ID, 5)
    call = spans["/d2o_inference.v1.InferenceService/StreamGenerateText"]
    assert call.parent_span_id.hex() == SPAN_ID
    stages = [spans[name] for name in ("queue", "prefill", "compress", "decode")]
    assert {stage.parent_span_id for stage in stages} == {call.span_id}
    times = [time for stage in stages for time in (stage.start_time_unix_nano, stage.end_time_unix_nano)]
    assert times == sorted(times)
    assert call.start_time_unix_nano <= times[0]
    assert times[-1] <= call.end_time_unix_nano
    attributes = {pair.key: pair.value for pair in call.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 60
    assert stream.started is not None
    assert attributes["d2o.generation_id"].string_value == stream.started.generation_id
    (line,) = [line for line in observed.log("d2o_server.access") if line.get("trace") == TRACE_ID]
    assert line["generation"] == stream.started.generation_id


async def test_a_refusal_is_one_span_without_a_traceback(observed: Observed, caller: AsyncClient) -> None:
    trace_id = TRACE_ID.replace("0af7", "1af7")
    with pytest.raises(InvalidArgumentError):
        await caller.generate("Hi", max_new_tokens=100_000, metadata=(("traceparent", f"00-{trace_id}-{SPAN_ID}-01"),))
    (span,) = observed.collector.of_trace(trace_id, 1).values()
    attributes = {pair.key: pair.value for pair in span.attributes}
    assert attributes["rpc.grpc.status_code"].int_value == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert attributes["d2o.rejection"].string_value == "invalid_request"
    assert not span.events


async def test_logs_are_json_with_one_access_line_a_call_and_no_prompt(observed: Observed, caller: AsyncClient) -> None:
    answer = await caller.generate(SECRET, max_new_tokens=3, metadata=(("x-request-id", "mine"),))
    (line,) = wait_for(lambda: [one for one in observed.log("d2o_server.access") if one.get("request") == "mine"], 1)
    assert (line["level"], line["method"], line["status"]) == ("INFO", "GenerateText", "OK")
    assert line["generation"] == answer.started.generation_id
    assert (line["prompt_tokens"], line["completion_tokens"]) == (answer.usage.prompt_tokens, 3)
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert SECRET.strip() not in observed.server.log.read_text()


def test_every_metric_of_the_dashboard_is_exported(observed: Observed) -> None:
    with Client(observed.server.target) as client:
        client.generate(SECRET, max_new_tokens=60, ignore_end_of_text=True)
    dashboard = json.loads((ROOT / "docs" / "grafana" / "d2o.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [of["definition"] for of in dashboard["templating"]["list"] if "definition" in of]
    assert len(queries) > 20
    named = {name for query in queries for name in re.findall(r"\b(?:d2o_|vllm:|process_)\w+", query)}
    exported = {name for name, _ in observed.samples()}
    assert named <= exported, named - exported
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if name.startswith("d2o_")}
    assert not [name for name in ours if not any(name in query for query in queries)]


def test_every_exported_metric_is_documented(observed: Observed) -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    families = [family.name for family in text_string_to_metric_families(observed.text())]
    missing = [name for name in families if f"`{name}" not in text and not name.startswith("process_")]
    assert not missing


def test_top_shows_a_frame_of_a_running_server(observed: Observed, capsys: pytest.CaptureFixture[str]) -> None:
    target = observed.server.target
    with Client(target) as client, client.stream(SECRET, max_new_tokens=2000, ignore_end_of_text=True) as stream:
        next(stream)
        time.sleep(0.8)
        assert main(["top", "--once", "--target", target]) == 0
        assert stream.started is not None
        generation = stream.started.generation_id
    out = capsys.readouterr().out
    assert "requests  1 running, 0 waiting" in out
    assert re.search(rf"^{generation} decode +0 +{len(SECRET)} ", out, re.MULTILINE)
    assert re.search(r"^  0: \d+ / \d+ +1: \d+ / \d+ +2: \d+ / \d+$", out, re.MULTILINE)
    assert "\x1b" not in out


async def test_prompts_are_logged_only_where_that_was_asked_for(launch_server: Launch) -> None:
    server = launch_server(*TINY, "--num-pages", "60", "--log-prompts", "--no-access-log")
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        await client.generate([("user", 'say "hi"\nplease')], max_new_tokens=2)
    text = server.log.read_text()
    (line,) = [line for line in text.splitlines() if "prompt=" in line]
    assert 'method=GenerateText prompt="[{' in line
    assert "say" in line
    assert "status=OK" not in text


async def test_a_worker_that_is_started_again_and_a_stream_that_goes_on_are_counted(launch_server: Launch) -> None:
    port = free_port()
    server = launch_server(*TINY, "--num-pages", "60", "--metrics-port", str(port))

    def counted(name: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            (line,) = [of for of in answer.read().decode().splitlines() if of.startswith(f"d2o_{name}_total")]
            return str(line.split()[1])

    assert (counted("worker_restarts"), counted("resumptions")) == ("0.0", "0.0")
    async with AsyncClient(server.target, retry=NO_RETRY) as client:
        stream = client.stream("x", max_new_tokens=200, ignore_end_of_text=True)
        await anext(stream)
        server.worker().kill()
        wait_for(lambda: [1] if counted("worker_restarts") == "1.0" else [], 1)
        assert (await stream.result()).usage.resumed == 1
        assert (await client.load()).workers[0].restarts == 1
    wait_for(lambda: [1] if counted("resumptions") == "1.0" else [], 1)


def test_a_metrics_port_that_is_taken_is_one_line_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = spawn((*TINY, "--port", "0", "--metrics-port", str(port)), tmp_path / "log")
        assert process.wait(PATIENCE) == 1
        assert process.stdout is not None
        process.stdout.close()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(f"d2o-serve: metrics_port: got {port}, allowed is a free port of 127.0.0.1, or 0")


def test_scrapes_at_once_are_all_answered(observed: Observed) -> None:
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(len(observed.text()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
