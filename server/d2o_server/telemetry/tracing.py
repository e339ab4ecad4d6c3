"""OpenTelemetry traces: a span a call, and below it those of a generation's stages, made when it is over."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc._aio_server import OpenTelemetryAioServerInterceptor
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode

from d2o_server.engine.observer import Timeline
from d2o_server.settings import TRACE_CONSOLE

_TRACED = frozenset(
    f"/d2o_inference.v1.InferenceService/{name}" for name in ("GenerateText", "StreamGenerateText", "Tokenize")
)
# What OpenTelemetry counts as a server's error; the others are the caller's.
_FAULTS = {
    *(grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED),
    *(grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS),
}
_CUT = "the generation was cancelled or failed in this stage"
_EXPORT_SECONDS = 1.0
_EXPORT_TIMEOUT = 5

_Attributes = dict[str, str | int | float]


class Tracing:
    """Spans of one server, sent in batches from a thread of their own.

    ``target`` is an OTLP endpoint (``http://host:port``, or ``https``) or ``console``: JSON lines on standard error.
    OpenTelemetry's own environment variables (sampler, headers, resource attributes) hold.
    """

    def __init__(self, target: str, version: str) -> None:
        resource = _HashedOnce.of(Resource.create({SERVICE_NAME: "d2o-serve", SERVICE_VERSION: version}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._sent = BatchSpanProcessor(_exporter(target), schedule_delay_millis=1000 * _EXPORT_SECONDS)
        self._provider.add_span_processor(self._sent)
        self._scope = InstrumentationScope("d2o_server", version)

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """Opens a span for every call that takes a prompt, in the trace that the caller's metadata names."""
        spans: Any = _CallSpans
        interceptor: grpc.aio.ServerInterceptor = spans(self._provider.get_tracer("d2o_server.rpc"), filter_=_is_traced)
        return interceptor

    def ended(self, timeline: Timeline) -> None:
        """Adds a generation's stages to the span of the call that runs in this task."""
        call = trace.get_current_span()
        if not call.is_recording():
            return
        call.set_attributes(_facts(timeline))
        offset = time.time_ns() - time.monotonic_ns()
        for name, began, ended, attributes in _stages(timeline):
            cut = timeline.reason is None and ended == timeline.ended
            self._sent.on_end(
                # What is over needs no span that can still change, which costs several times as much.
                ReadableSpan(
                    name,
                    self._below(call.get_span_context()),
                    call.get_span_context(),
                    self._provider.resource,
                    attributes,
                    instrumentation_scope=self._scope,
                    status=Status(StatusCode.ERROR, _CUT) if cut else Status(),
                    start_time=offset + int(1e9 * began),
                    end_time=offset + int(1e9 * ended),
                )
            )

    def _below(self, call: SpanContext) -> SpanContext:
        identity = self._provider.id_generator.generate_span_id()
        return SpanContext(call.trace_id, identity, is_remote=False, trace_flags=call.trace_flags)

    def call_ended(self, status: str, rejection: str | None) -> None:
        """Notes on the span of the call that runs in this task how it ended."""
        call = trace.get_current_span()
        code = grpc.StatusCode[status]
        call.set_attribute("rpc.grpc.status_code", code.value[0])
        if rejection is not None:
            call.set_attribute("d2o.rejection", rejection)
        if code in _FAULTS:
            call.set_status(StatusCode.ERROR, status)

    async def close(self) -> None:
        """Sends what is left, and gives up after some seconds."""
        await asyncio.to_thread(self._provider.shutdown)


def trace_id() -> str | None:
    """The id of the trace that this task works for, if any."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


class _HashedOnce(Resource):
    """A resource that knows its hash, which the exporter asks for with every span and the library makes from JSON."""

    _hash: int

    @classmethod
    def of(cls, resource: Resource) -> _HashedOnce:
        made = cls(resource.attributes, resource.schema_url)
        made._hash = hash(resource)
        return made

    def __hash__(self) -> int:
        return self._hash


class _CallSpans(OpenTelemetryAioServerInterceptor):
    """The library's interceptor, which knows streams that a generator makes, for those that a coroutine writes.

    How a call ended is set by :meth:`Tracing.call_ended`: an abort is an exception to gRPC, and its traceback no news.
    """

    def _intercept_aio_server_unary(self, behavior: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        library: Any = self

        async def call(request: Any, context: Any) -> Any:
            with library._set_remote_context(context), library._start_span(handler_call_details, context):
                try:
                    return await behavior(request, context)
                except BaseException as error:  # noqa: BLE001 - raised again outside of the span, which would note it
                    end = error
            try:
                raise end
            finally:
                # Else its traceback would hold this frame, which holds it.
                del end

        return call

    _intercept_aio_server_stream = _intercept_aio_server_unary


def _is_traced(details: grpc.HandlerCallDetails) -> bool:
    return details.method in _TRACED


def _exporter(target: str) -> SpanExporter:
    if target == TRACE_CONSOLE:
        return ConsoleSpanExporter(out=sys.stderr, formatter=_line)
    return OTLPSpanExporter(endpoint=target, insecure=target.startswith("http://"), timeout=_EXPORT_TIMEOUT)


def _line(span: ReadableSpan) -> str:
    line: str = span.to_json(indent=None)
    return line + "\n"


def _facts(timeline: Timeline) -> _Attributes:
    return {
        "d2o.generation_id": timeline.generation_id,
        "gen_ai.usage.input_tokens": timeline.prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.completion_tokens,
        **({} if timeline.reason is None else {"gen_ai.response.finish_reasons": timeline.reason}),
    }


def _stages(timeline: Timeline) -> list[tuple[str, float, float, _Attributes]]:
    """Name, begin, end and attributes of the stages that a generation went through."""
    stages: list[tuple[str, float, float, _Attributes]] = []
    admitted, first, ended = timeline.admitted, timeline.first_token, timeline.ended
    stages.append(("queue", timeline.arrived, ended if admitted is None else admitted, {}))
    if admitted is None:
        return stages
    if first is None:
        return [*stages, ("prefill", admitted, ended, {"d2o.prompt_tokens": timeline.prompt_tokens})]
    cache = timeline.cache
    # A prompt is compressed when its first token has been told, unless that is its last.
    compressing = 0.0 if cache is None else min(cache.prompt_compression_seconds, ended - admitted)
    read = min(first, ended - compressing)
    stages.append(("prefill", admitted, read, {"d2o.prompt_tokens": timeline.prompt_tokens}))
    if compressing:
        stages.append(("compress", read, read + compressing, {}))
    facts: _Attributes = {"d2o.completion_tokens": timeline.completion_tokens}
    if cache is not None:
        facts["d2o.eviction_seconds"] = cache.compression_seconds - cache.prompt_compression_seconds
        facts["d2o.cache_ratio"] = cache.ratio_reached
        facts["d2o.peak_pages"] = cache.peak_pages
    return [*stages, ("decode", read + compressing, ended, facts)]
