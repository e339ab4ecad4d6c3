"""The engine in the front process: requests in, events out. Model work happens in the workers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from d2o.config import D2OConfig
from d2o_server import errors
from d2o_server.engine.dispatcher import Dispatcher, Ticket, TicketEvent
from d2o_server.engine.memory import CacheShape, Reservation, reserve
from d2o_server.engine.messages import Admitted, Ended, Failed, NewToken, Ready, Submit
from d2o_server.engine.text import TextCodec, TextStream
from d2o_server.engine.types import (
    ChatMessage,
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Load,
    ModelInfo,
    Prompt,
    SamplingParams,
    Started,
    Tokens,
    Usage,
    WorkerLoad,
)
from d2o_server.engine.validation import validate

_LONGEST_PROMPT_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDefaults:
    """What applies where a request is silent, and the engine's bounds."""

    compression: D2OConfig = D2OConfig()
    sampling: SamplingParams = SamplingParams(max_new_tokens=256)
    max_logprobs: int = 20
    tokenizer_threads: int = 2


class LocalEngine:
    """An engine over worker processes of this machine; implements :class:`d2o_server.engine.interface.Engine`."""

    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        codec: TextCodec,
        dispatcher: Dispatcher,
        defaults: EngineDefaults,
        version: str,
    ) -> None:
        ready = dispatcher.workers[0].ready
        if ready is None:
            raise errors.Unavailable("the engine was made before its workers were ready")
        self._codec, self._dispatcher, self._defaults = codec, dispatcher, defaults
        self._shape = CacheShape(windows=ready.shape.windows, page_size=ready.page_size)
        self._total_pages = ready.pool.total
        self._end_ids = tuple(dict.fromkeys((*codec.end_of_text_ids, *ready.shape.end_of_text_ids)))
        self._info = self._describe(model, dtype, ready, version)
        self._threads = ThreadPoolExecutor(defaults.tokenizer_threads, thread_name_prefix="tokenizer")
        self._draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def _describe(self, model: str, dtype: str, ready: Ready, version: str) -> ModelInfo:
        shape = ready.shape
        return ModelInfo(
            model=model,
            architecture=shape.architecture,
            dtype=dtype,
            layers=shape.layers,
            compressible_layers=self._shape.full_layers,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocabulary_size=shape.vocabulary_size,
            max_model_len=ready.max_model_len,
            page_size=ready.page_size,
            total_pages=ready.pool.total,
            page_bytes=ready.page_bytes,
            has_chat_template=self._codec.has_chat_template,
            default_compression=self._defaults.compression,
            default_sampling=self._defaults.sampling,
            max_logprobs=self._defaults.max_logprobs,
            server_version=version,
            end_of_text_ids=self._end_ids,
        )

    def model_info(self) -> ModelInfo:
        """The model, its limits and the defaults in force."""
        return self._info

    @property
    def serving(self) -> bool:
        """Whether a new request would be taken."""
        return not self._draining and any(worker.serving for worker in self._dispatcher.workers)

    def load(self) -> Load:
        """Pages as of the workers' last step, and requests at this moment."""
        workers = self._dispatcher.workers
        pools = [worker.pool for worker in workers if worker.pool is not None]
        total = sum(pool.total for pool in pools)
        used = sum(pool.used for pool in pools)
        promised = sum(pool.reserved for pool in pools)
        waiting = self._dispatcher.waiting
        return Load(
            pages_total=total,
            pages_free=total - promised,
            pages_used=used,
            pages_reserved=promised - used,
            running=self._dispatcher.running,
            waiting=len(waiting),
            waiting_prompt_tokens=sum(len(ticket.message.prompt) for ticket in waiting),
            draining=self._draining,
            workers=tuple(
                WorkerLoad(
                    index=worker.index,
                    serving=worker.serving,
                    pages_total=worker.pool.total if worker.pool else 0,
                    pages_free=worker.unpromised,
                    running=sum(not ticket.waiting for ticket in worker.tickets.values()),
                )
                for worker in workers
            ),
        )

    async def tokenize(self, prompt: Prompt, with_text: bool = False) -> Tokens:
        """The prompt's token ids as generation would see them."""
        ids = await self._encode(prompt)
        return Tokens(ids, tuple(self._codec.token_text(i) for i in ids) if with_text else ())

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            most = self._info.max_model_len * _LONGEST_PROMPT_CHARACTERS_PER_TOKEN
            if len(prompt) > most:
                raise errors.InvalidRequest("prompt.text", f"{len(prompt)} characters", f"at most {most} characters")
            ids = await self._off_loop(partial(self._codec.encode, prompt))
            field = "prompt.text"
        elif prompt and isinstance(prompt[0], ChatMessage):
            ids = await self._off_loop(partial(self._codec.render_chat, prompt))
            field = "prompt.chat"
        else:
            ids, field = list(prompt), "prompt.tokens"  # type: ignore[arg-type]
            vocabulary = self._info.vocabulary_size
            wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
            if wrong is not None:
                raise errors.InvalidRequest("prompt.tokens.ids", wrong, f"token ids in [0, {vocabulary - 1}]")
        if not ids:
            raise errors.InvalidRequest(field, "an empty prompt", "at least one token")
        return tuple(ids)

    async def _off_loop(self, encode: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields ``Started``, chunks and ``Finished``; see the interface."""
        if self._draining:
            raise errors.Draining("the server is shutting down")
        self._active += 1
        self._idle.clear()
        try:
            arrived = time.monotonic()
            message = await self._prepare(request)
            async with self._ticket(message) as ticket:
                answer = _Answer(self._codec, ticket, request.deadline, arrived, self._dispatcher)
                async with aclosing(answer.events()) as events:
                    async for event in events:
                        yield event
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    @asynccontextmanager
    async def _ticket(self, message: Submit) -> AsyncIterator[Ticket]:
        """Owns a request's stay in a worker: whatever happens, it holds nothing afterwards."""
        ticket = await self._dispatcher.submit(message)
        try:
            yield ticket
        finally:
            await self._dispatcher.release(ticket)

    async def _prepare(self, request: GenerationRequest) -> Submit:
        """Tokenizes and validates; everything that can never succeed is refused here, with nothing reserved."""
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise errors.DeadlineExceeded("the deadline had passed when the request arrived")
        sampling = request.sampling
        default = self._defaults.sampling.max_new_tokens or 1
        validate(
            sampling,
            vocabulary_size=self._info.vocabulary_size,
            max_logprobs=self._info.max_logprobs,
            default_max_new_tokens=default,
        )
        prompt = await self._encode(request.prompt)
        max_new_tokens = self._fit_length(len(prompt), sampling, default)
        config = request.compression or self._defaults.compression
        bound = reserve(self._shape, config, len(prompt), max_new_tokens)
        self._check_fits(len(prompt), bound)
        return Submit(
            id=secrets.token_hex(8),
            prompt=prompt,
            sampling=replace(sampling, max_new_tokens=max_new_tokens),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            config=config,
            end_ids=self._end_ids,
            max_new_tokens=max_new_tokens,
        )

    def _fit_length(self, prompt_tokens: int, sampling: SamplingParams, default: int) -> int:
        most = self._info.max_model_len - prompt_tokens
        if most < 1:
            raise errors.InvalidRequest(
                "prompt", f"{prompt_tokens} tokens", f"at most {self._info.max_model_len - 1} tokens"
            )
        if sampling.max_new_tokens is None:
            return max(min(default, most), 1)
        if sampling.max_new_tokens > most:
            raise errors.InvalidRequest(
                "stopping.max_new_tokens",
                sampling.max_new_tokens,
                f"at most {most} (context of {self._info.max_model_len} tokens less a prompt of {prompt_tokens})",
            )
        return sampling.max_new_tokens

    def _check_fits(self, prompt_tokens: int, bound: Reservation) -> None:
        if bound.pages > self._total_pages:
            raise errors.InvalidRequest(
                "prompt",
                f"{prompt_tokens} tokens, which need {bound.pages} cache pages",
                f"requests of at most {self._total_pages} pages; shorten the prompt or the output, or compress more",
            )

    async def drain(self, grace: float) -> None:
        """Takes no new requests and returns when the running ones have ended, or after ``grace`` seconds."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            return

    async def close(self) -> None:
        """Stops the workers; what still runs ends with an error."""
        self._draining = True
        await asyncio.gather(*(worker.stop() for worker in self._dispatcher.workers))
        self._threads.shutdown(wait=False)


class _Answer:
    """Turns one ticket's events into the caller's."""

    def __init__(
        self, codec: TextCodec, ticket: Ticket, deadline: float | None, arrived: float, dispatcher: Dispatcher
    ) -> None:
        self._ticket, self._deadline, self._arrived, self._dispatcher = ticket, deadline, arrived, dispatcher
        self._text = TextStream.of(codec, ticket.message.sampling, ticket.message.end_ids)
        self._admitted = self._first = arrived

    async def events(self) -> AsyncGenerator[Event, None]:
        stopped = False
        while True:
            event = await self._next()
            match event:
                case Admitted():
                    self._admitted = time.monotonic()
                    yield self._started(event)
                case NewToken():
                    # Tokens that came while the caller was busy go out together.
                    more = self._ticket.events.take_while(lambda item: isinstance(item, NewToken))
                    if self._text.matched is None:
                        yield self._chunk([event, *more])
                    if self._text.matched is not None and not stopped:
                        stopped = True
                        await self._dispatcher.stop_string(self._ticket)
                case Ended():
                    rest = self._text.finish()
                    if rest:
                        yield Chunk(rest, ())
                    yield self._finished(event)
                    return
                case Failed():
                    raise _error(event)

    def _chunk(self, tokens: list[TicketEvent]) -> Chunk:
        if not self._text.tokens:
            self._first = time.monotonic()
        return self._text.push([token for token in tokens if isinstance(token, NewToken)])

    async def _next(self) -> TicketEvent:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(left):
                return await self._ticket.events.get()
        except TimeoutError:
            where = "queued" if self._ticket.waiting else "running"
            raise errors.DeadlineExceeded(f"the deadline passed while the request was {where}") from None

    def _started(self, admitted: Admitted) -> Started:
        message = self._ticket.message
        return Started(
            generation_id=message.id,
            prompt_tokens=len(message.prompt),
            reserved_pages=admitted.reserved_pages,
            compression=admitted.config,
            budget_per_layer=admitted.budget,
            seed=message.seed,
        )

    def _finished(self, ended: Ended) -> Finished:
        now = time.monotonic()
        usage = Usage(
            prompt_tokens=len(self._ticket.message.prompt),
            completion_tokens=self._text.tokens,
            queue_seconds=self._admitted - self._arrived,
            first_token_seconds=self._first - self._arrived,
            total_seconds=now - self._arrived,
        )
        matched = self._text.matched
        return Finished(
            reason=FinishReason.STOP if matched is not None else FinishReason(ended.reason),
            usage=usage,
            cache=ended.facts,
            stop_string=matched,
            stop_token_id=None if matched is not None else ended.stop_token_id,
        )


_WORKER_ERRORS: dict[str, type[errors.ServerError]] = {
    kind.__name__: kind for kind in (errors.OutOfDeviceMemory, errors.EngineFailure, errors.WorkerDied)
}


def _error(failed: Failed) -> errors.ServerError:
    """The exception that a worker named."""
    return _WORKER_ERRORS.get(failed.error, errors.EngineFailure)(failed.message)
