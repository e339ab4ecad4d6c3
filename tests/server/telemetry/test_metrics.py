"""What is counted, by itself; what a live server exports is tested end to end."""

from __future__ import annotations

import math
import socket
import threading
from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from d2o_server import errors
from d2o_server.engine.observer import Timeline
from d2o_server.engine.types import AutoOutcome, CacheFacts, LayerCache
from d2o_server.errors import EngineFailure, InvalidRequest, Overloaded, ServerError, StartupError
from d2o_server.telemetry.calls import rejection_of
from d2o_server.telemetry.metrics import Metrics, MetricsServer


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def timeline(*layers: LayerCache, seconds: float) -> Timeline:
    cache = CacheFacts(layers=layers, ratio_reached=1.0, peak_pages=1, compression_seconds=seconds)
    return Timeline(
        generation_id="g",
        arrived=1.0,
        admitted=1.5,
        first_token=2.0,
        ended=3.0,
        prompt_tokens=4,
        completion_tokens=5,
        reason="length",
        cache=cache,
    )


async def test_tokens_of_one_message_share_its_gap() -> None:
    metrics = Metrics()
    metrics.between_tokens(1, 0.04)
    metrics.between_tokens(4, 0.08)  # four tokens, 0.02 s each
    metrics.between_tokens(1, 99.0)
    assert value(metrics, "d2o_inter_token_seconds_count") == 6
    assert value(metrics, "d2o_inter_token_seconds_sum") == pytest.approx(99.12)
    by_bound = {"0.015": 0, "0.02": 4, "0.03": 4, "0.04": 5, "5.0": 5, "+Inf": 6}
    assert {le: value(metrics, "d2o_inter_token_seconds_bucket", le=le) for le in by_bound} == by_bound


async def test_a_histogram_s_buckets_never_fall_and_end_with_the_count() -> None:
    metrics = Metrics()
    for step in range(200):
        metrics.between_tokens(1 + step % 3, step / 20)
    lines = [line for line in generate_latest(metrics.registry).decode().splitlines() if "inter_token" in line]
    counts = [float(line.split()[1]) for line in lines if "_bucket" in line]
    assert counts == sorted(counts)
    assert counts[-1] == value(metrics, "d2o_inter_token_seconds_count")


async def test_compression_is_timed_only_where_a_layer_was_compressed() -> None:
    metrics = Metrics()
    metrics.ended(timeline(LayerCache(budget=0, kept=9, merged=0.0, dropped=0.0), seconds=1e-6))
    assert value(metrics, "d2o_compression_seconds_count") == 0
    metrics.ended(
        timeline(
            LayerCache(budget=4, kept=4, merged=3.0, dropped=2.0),
            LayerCache(budget=6, kept=6, merged=1.0, dropped=2.0),
            seconds=0.5,
        )
    )
    assert value(metrics, "d2o_compression_seconds_sum") == 0.5
    fates = {fate: value(metrics, "d2o_cache_tokens_total", fate=fate) for fate in ("kept", "merged", "dropped")}
    assert fates == {"kept": 14, "merged": 2, "dropped": 2}


async def test_what_auto_chose_is_counted_and_what_was_named_is_not() -> None:
    metrics = Metrics()
    named = timeline(seconds=0.0)
    for each in (
        named,
        replace(named, auto="full"),
        replace(named, auto="pages", cache=None),
        replace(named, auto="full"),
    ):
        metrics.ended(each)
    counts = {outcome: value(metrics, "d2o_auto_choices_total", outcome=outcome) for outcome in AutoOutcome}
    assert counts == {"full": 2, "long": 0, "pages": 1}


async def test_every_reason_is_there_before_the_first_refusal() -> None:
    metrics = Metrics()
    assert value(metrics, "d2o_rejections_total", reason="queue_full") == 0
    metrics.call_ended("GenerateText", "RESOURCE_EXHAUSTED", "queue_full")
    assert value(metrics, "d2o_rejections_total", reason="queue_full") == 1
    assert value(metrics, "d2o_calls_total", method="GenerateText", code="RESOURCE_EXHAUSTED") == 1
    assert value(metrics, "d2o_cancellations_total") == 0
    metrics.call_ended("GenerateText", "CANCELLED", None)
    assert value(metrics, "d2o_cancellations_total") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InvalidRequest("prompt", "nothing", "something"), "invalid_request"),
        (Overloaded("the queue is full", 100), "queue_full"),
        (Overloaded("too many", 100, "rate_limit"), "rate_limit"),
        (errors.Draining("bye"), "draining"),
        (errors.OutOfDeviceMemory("full"), "out_of_device_memory"),
        (EngineFailure("a defect"), None),
        (RuntimeError("a defect"), None),
    ],
)
def test_a_refusal_has_a_short_reason_and_a_defect_none(error: Exception, reason: str | None) -> None:
    assert rejection_of(error) == reason


def test_every_error_of_ours_has_a_reason_fit_for_a_label() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServerError)}
    for kind in kinds - {EngineFailure}:
        error = kind.__new__(kind)
        if isinstance(error, Overloaded):
            error.bound = "queue_full"
        reason = rejection_of(error)
        assert reason is not None
        assert reason.replace("_", "").isalpha()
        assert reason.islower()


async def test_an_engine_that_is_not_there_yet_leaves_only_what_was_counted() -> None:
    metrics = Metrics()
    assert value(metrics, "d2o_requests_running") is None
    assert not math.isnan(value(metrics, "d2o_worker_restarts_total") or 0.0)


async def test_a_port_that_is_taken_is_refused_and_a_closed_server_leaves_no_thread() -> None:
    metrics, before = Metrics(), threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"metrics_port: got {port}, allowed is a free port of 127\.0\.0\.1"):
            MetricsServer(metrics.registry, "127.0.0.1", port)
    server = MetricsServer(metrics.registry, "127.0.0.1", port)
    assert server.port == port
    await server.close()
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert threading.active_count() <= before + 1  # of asyncio.to_thread
