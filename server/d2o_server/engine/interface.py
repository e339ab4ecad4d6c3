"""All that the RPC layer sees of the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from d2o_server.engine.types import Event, GenerationRequest, Load, ModelInfo, Prompt, StreamLoad, Tokens


class Engine(Protocol):
    """A running engine. Errors are those of :mod:`d2o_server.errors`."""

    def model_info(self) -> ModelInfo:
        """The model, its limits and the defaults in force."""
        ...

    def load(self) -> Load:
        """Pages and requests at this moment."""
        ...

    def streams(self, most: int) -> tuple[StreamLoad, ...]:
        """Requests that have not ended, the oldest first, ``most`` at most."""
        ...

    async def tokenize(self, prompt: Prompt, with_text: bool = False) -> Tokens:
        """The prompt's token ids as generation would see them.

        Raises:
            InvalidRequest: the prompt cannot be tokenized (empty, or chat without a chat template).
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields one ``Started``, any number of ``Chunk`` and one ``Finished``.

        Closing the generator (``aclose``) cancels the request and frees what it holds within one step.

        Raises:
            InvalidRequest, Overloaded, DeadlineExceeded, OutOfDeviceMemory, Unavailable, EngineFailure.
        """
        ...

    async def drain(self, grace: float) -> None:
        """Takes no new requests and returns when the running ones have ended, or after ``grace`` seconds."""
        ...
