"""The Python client of d2o-serve: text generation over gRPC from caches that D2O compresses.

    async with AsyncClient() as client:
        async with client.stream("Once upon a time") as stream:
            async for chunk in stream:
                print(chunk.text, end="")

:class:`Client` is its blocking twin. Every error is a :class:`D2OError`.
"""

from d2o_client._async import AsyncClient, AsyncStream
from d2o_client._channel import DEFAULT_TARGET, TLS
from d2o_client._core import NO_RETRY, RetryPolicy
from d2o_client._errors import (
    ClientClosedError,
    D2OError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from d2o_client._options import (
    ChatMessage,
    Compression,
    GenerationOptions,
    LayerBudgets,
    MaxLoss,
    Merge,
    Policy,
    Prompt,
)
from d2o_client._sync import Client, Stream
from d2o_client._types import (
    CacheFacts,
    Chunk,
    Finished,
    FinishReason,
    Generation,
    HealthStatus,
    LayerCache,
    LayerLoad,
    Load,
    ModelInfo,
    Sampling,
    Started,
    StreamLoad,
    StreamState,
    TokenLogprob,
    Tokens,
    TopLogprob,
    Usage,
    WorkerLoad,
)

__all__ = [
    "DEFAULT_TARGET",
    "NO_RETRY",
    "TLS",
    "AsyncClient",
    "AsyncStream",
    "CacheFacts",
    "ChatMessage",
    "Chunk",
    "Client",
    "ClientClosedError",
    "Compression",
    "D2OError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FinishReason",
    "Finished",
    "Generation",
    "GenerationOptions",
    "HealthStatus",
    "InternalError",
    "InvalidArgumentError",
    "LayerBudgets",
    "LayerCache",
    "LayerLoad",
    "Load",
    "MaxLoss",
    "Merge",
    "ModelInfo",
    "NotFoundError",
    "PermissionDeniedError",
    "Policy",
    "Prompt",
    "RequestCancelledError",
    "ResourceExhaustedError",
    "RetryPolicy",
    "Sampling",
    "Started",
    "Stream",
    "StreamLoad",
    "StreamState",
    "TokenLogprob",
    "Tokens",
    "TopLogprob",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
    "WorkerLoad",
]
