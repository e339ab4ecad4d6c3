"""The inference service: each call is one conversion in, the engine, and conversions out."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

import grpc

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1 import inference_service_pb2_grpc as pb_grpc
from d2o_server.engine.interface import Engine
from d2o_server.engine.types import Chunk, Event, GenerationRequest, Started
from d2o_server.rpc import convert
from d2o_server.rpc.interceptors import CallRecord, current_call, time_remaining
from d2o_server.rpc.rate_limit import RateLimit

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(pb_grpc.InferenceServiceServicer):
    """d2o_inference.v1.InferenceService over an engine. Errors pass through; the interceptor maps them.

    A caller that goes away cancels the call's task, and leaving the scope of the engine's generator cancels the
    generation, wherever either stands.
    """

    def __init__(self, engine: Engine, rate_limit: RateLimit) -> None:
        self._engine, self._rate_limit = engine, rate_limit

    async def GenerateText(self, request: pb.GenerateTextRequest, context: Context) -> pb.GenerateTextResponse:
        """Collects a whole generation."""
        await self._rate_limit.admit(context.peer())
        response = pb.GenerateTextResponse()
        texts: list[str] = []
        call = current_call()
        async with aclosing(self._engine.generate(self._read(request, context, call))) as events:
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
        await self._rate_limit.admit(context.peer())
        call = current_call()
        async with aclosing(self._engine.generate(self._read(request, context, call))) as events:
            async for event in events:
                _note(call, event)
                await context.write(convert.stream_message(event))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """The prompt's tokens as generation would see them."""
        prompt = convert.prompt(request.prompt, self._engine.model_info())
        tokens = await self._engine.tokenize(prompt, request.with_text)
        current_call().prompt_tokens = len(tokens.ids)
        return convert.tokens_message(tokens)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        """The model, its limits and the server's defaults."""
        return convert.model_info_message(self._engine.model_info())

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        """Pages and requests at this moment."""
        return convert.load_message(self._engine.load())

    def _read(
        self, message: pb.GenerateTextRequest | pb.StreamGenerateTextRequest, context: Context, call: CallRecord
    ) -> GenerationRequest:
        remaining = time_remaining(context)
        deadline = None if remaining is None else time.monotonic() + remaining
        return convert.generation_request(message, self._engine.model_info(), deadline, call.client_id)


def _note(call: CallRecord, event: Event) -> None:
    if isinstance(event, Chunk):
        call.completion_tokens = (call.completion_tokens or 0) + len(event.token_ids)
    elif isinstance(event, Started):
        call.generation_id = event.generation_id
        call.prompt_tokens = event.prompt_tokens
    else:
        call.completion_tokens = event.usage.completion_tokens
