"""The inference service: each call is one conversion in, the engine, and conversions out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1 import inference_service_pb2_grpc as pb_grpc
from d2o_server.engine.interface import Engine
from d2o_server.engine.types import ChatMessage, Chunk, Event, GenerationRequest, Prompt, Started
from d2o_server.rpc import bounds, convert
from d2o_server.rpc.call_limits import CallLimits
from d2o_server.rpc.interceptors import CallRecord, caller_of, current_call, time_remaining
from d2o_server.telemetry.logs import FIELDS, Pairs

Context = grpc.aio.ServicerContext[Any, Any]

MAX_STREAMS = 1024

_prompts = logging.getLogger("d2o_server.prompts")


class InferenceService(pb_grpc.InferenceServiceServicer):
    """d2o_inference.v1.InferenceService over an engine. Errors pass through; the interceptor maps them.

    A caller that goes away cancels the call's task, and leaving the scope of the engine's generator cancels the
    generation, wherever either stands. Prompts are written to the log only with ``log_prompts``.
    """

    def __init__(self, engine: Engine, *, log_prompts: bool = False) -> None:
        self._engine, self._limits, self._log_prompts = engine, CallLimits(), log_prompts

    async def GenerateText(self, request: pb.GenerateTextRequest, context: Context) -> pb.GenerateTextResponse:
        """Collects a whole generation."""
        response = pb.GenerateTextResponse()
        texts: list[str] = []
        call = current_call()
        async with self._generating(request, context, call) as events:
            async for event in events:
                _note(call, event)
                if isinstance(event, Chunk):
                    texts.append(event.text)
                    convert.append_tokens(response, event)
                elif isinstance(event, Started):
                    response.started.CopyFrom(convert.started_message(event))
                else:
                    response.finished.CopyFrom(convert.finished_message(event))
        response.text = "".join(texts)
        return response

    async def StreamGenerateText(self, request: pb.StreamGenerateTextRequest, context: Context) -> None:
        """Writes a generation's events as they come."""
        call = current_call()
        async with self._generating(request, context, call) as events:
            async for event in events:
                _note(call, event)
                await context.write(convert.stream_message(event))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """The prompt's tokens as generation would see them."""
        await self._limits.tokenization(caller_of(current_call()))
        prompt = convert.prompt(request.prompt, self._engine.model_info())
        tokens = await self._engine.tokenize(prompt, request.with_text)
        current_call().prompt_tokens = len(tokens.ids)
        return convert.tokens_message(tokens)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        """The model, its limits and the server's defaults."""
        return convert.model_info_message(self._engine.model_info())

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        """Pages and requests at this moment, and the layers and requests themselves where they are asked for."""
        bounds.at_most("max_streams", request.max_streams, MAX_STREAMS, "streams")
        streams = self._engine.streams(request.max_streams) if request.max_streams else ()
        return convert.load_message(self._engine.load(), streams, with_layers=request.with_layers)

    @asynccontextmanager
    async def _generating(
        self, message: pb.GenerateTextRequest | pb.StreamGenerateTextRequest, context: Context, call: CallRecord
    ) -> AsyncIterator[AsyncGenerator[Event, None]]:
        """The events of a generation that its caller may start now; the generation ends with the scope."""
        async with (
            self._limits.generation(caller_of(call)),
            aclosing(self._engine.generate(self._read(message, context, call))) as events,
        ):
            yield events

    def _read(
        self, message: pb.GenerateTextRequest | pb.StreamGenerateTextRequest, context: Context, call: CallRecord
    ) -> GenerationRequest:
        remaining = time_remaining(context)
        deadline = None if remaining is None else time.monotonic() + remaining
        caller = caller_of(call)
        read = convert.generation_request(
            message, self._engine.model_info(), deadline, call.client_id, highest_priority=caller.priority
        )
        if caller.named:
            read = replace(read, owner=caller.name, max_pages=caller.pages)
        if self._log_prompts:
            fields = {"method": call.method, **call.ids(), "prompt": _readable(read.prompt)}
            _prompts.info(Pairs(fields), extra={FIELDS: fields})
        return read


def _readable(prompt: Prompt) -> str:
    """Text as it is, a conversation as JSON, token ids as a list."""
    if isinstance(prompt, str):
        return prompt
    turns = [{"role": item.role, "content": item.content} for item in prompt if isinstance(item, ChatMessage)]
    return json.dumps(turns or prompt)


def _note(call: CallRecord, event: Event) -> None:
    if isinstance(event, Chunk):
        call.completion_tokens = (call.completion_tokens or 0) + len(event.token_ids)
    elif isinstance(event, Started):
        call.generation_id = event.generation_id
        call.prompt_tokens = event.prompt_tokens
    else:
        usage = event.usage
        call.completion_tokens = usage.completion_tokens
        call.queue_seconds, call.first_token_seconds = usage.queue_seconds, usage.first_token_seconds
