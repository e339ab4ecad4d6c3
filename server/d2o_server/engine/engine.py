"""The engine in the front process: requests in, events out. Model work happens in the workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

from d2o_server import errors
from d2o_server.engine.admission import Admission, EngineDefaults
from d2o_server.engine.answer import Answer
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.memory import CacheShape, Demand
from d2o_server.engine.messages import CacheState, Ready, Submit
from d2o_server.engine.observer import Observer
from d2o_server.engine.text import TextCodec
from d2o_server.engine.ticket import Ticket
from d2o_server.engine.types import (
    Event,
    GenerationRequest,
    LayerLoad,
    Load,
    ModelInfo,
    Prompt,
    StreamLoad,
    Tokens,
    WorkerLoad,
)
from d2o_server.engine.worker_client import Worker


class LocalEngine:
    """An engine over worker processes of this machine; implements :class:`d2o_server.engine.interface.Engine`."""

    def __init__(
        self,
        *,
        model: str,
        codec: TextCodec,
        dispatcher: Dispatcher,
        defaults: EngineDefaults,
        version: str,
        observer: Observer | None = None,
    ) -> None:
        ready = _smallest([worker.ready for worker in dispatcher.workers])
        self._codec, self._dispatcher, self._observer = codec, dispatcher, observer or Observer()
        shape = CacheShape(windows=ready.shape.windows, page_size=ready.page_size)
        self._info = _describe(ready, shape, codec, defaults, model=model, version=version)
        self._admission = Admission(codec, self._info, shape, defaults)
        self._draining = False
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def model_info(self) -> ModelInfo:
        """The model, its limits and the defaults in force; the pages are those of the worker with fewest."""
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
        caches = [worker.cache for worker in workers if worker.cache is not None]
        layers = _layer_loads(caches)
        return Load(
            pages_total=total,
            pages_free=total - promised,
            pages_used=used,
            pages_reserved=promised - used,
            running=self._dispatcher.running,
            waiting=len(waiting),
            waiting_prompt_tokens=sum(len(ticket.message.prompt) for ticket in waiting),
            draining=self._draining,
            workers=tuple(map(_worker_load, workers)),
            logical_tokens=sum(cache.tokens for cache in caches),
            physical_tokens=sum(layer.slots for layer in layers) / (len(layers) or 1),
            read_tokens=sum(worker.read_tokens for worker in workers),
            generated_tokens=sum(worker.generated_tokens for worker in workers),
            layers=layers,
        )

    def streams(self, most: int) -> tuple[StreamLoad, ...]:
        """Requests that have not ended, the oldest first, ``most`` at most."""
        now = time.monotonic()
        tickets = [ticket for worker in self._dispatcher.workers for ticket in worker.tickets.values()]
        tickets.sort(key=lambda ticket: ticket.sent)
        return tuple(_stream_load(ticket, now) for ticket in tickets[:most])

    async def tokenize(self, prompt: Prompt, with_text: bool = False) -> Tokens:
        """The prompt's token ids as generation would see them; their texts are made off the event loop."""
        ids = await self._admission.tokenize(prompt)
        if not with_text:
            return Tokens(ids)
        return Tokens(ids, await asyncio.to_thread(lambda: tuple(map(self._codec.token_text, ids))))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields ``Started``, chunks and ``Finished``; see the interface."""
        if self._draining:
            raise errors.Draining("the server is shutting down")
        self._active += 1
        self._idle.clear()
        try:
            arrived = time.monotonic()
            message, demand = await self._admission.prepare(request)
            with self._ticket(message, demand, request) as ticket, ticket.events.expiring(request.deadline):
                answer = Answer(self._codec, ticket, arrived, self._dispatcher, self._observer)
                try:
                    for event in await self._first(answer, ticket):
                        yield event
                    while not answer.over:
                        for event in await answer.next():
                            yield event
                finally:
                    self._observer.ended(answer.timeline())
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def _first(self, answer: Answer, ticket: Ticket) -> tuple[Event, ...]:
        """What an answer begins with: word that it was admitted, which is waited for so long and no longer."""
        try:
            async with asyncio.timeout(self._dispatcher.backlog.max_wait):
                return await answer.next()
        except TimeoutError:
            raise self._dispatcher.backlog.waited_too_long(ticket) from None

    @contextmanager
    def _ticket(self, message: Submit, demand: Demand, request: GenerationRequest) -> Iterator[Ticket]:
        """Owns a request's stay in a worker: whatever happens, it holds nothing afterwards."""
        ticket = self._dispatcher.submit(
            message, demand.least, most_pages=demand.most, owner=request.owner, max_pages=request.max_pages
        )
        try:
            yield ticket
        finally:
            self._dispatcher.release(ticket)

    async def drain(self, grace: float) -> None:
        """Takes no new requests and returns when the running ones have ended, or after ``grace`` seconds."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace)
        except TimeoutError:
            return

    async def worker_loss(self) -> str:
        """Returns why no worker is left, once none is and none will be."""
        await self._dispatcher.lost.wait()
        return "; ".join(worker.given_up or "" for worker in self._dispatcher.workers)

    async def close(self) -> None:
        """Stops the workers; what still runs ends with an error."""
        self._draining = True
        await asyncio.gather(*(worker.stop() for worker in self._dispatcher.workers))
        self._admission.close()


def _smallest(ready: Sequence[Ready | None]) -> Ready:
    """The worker with the smallest pool: a request must fit into whichever it is sent to."""
    started = [one for one in ready if one is not None]
    if len(started) < len(ready):
        raise errors.Unavailable("the engine was made before its workers were ready")
    return min(started, key=lambda one: one.pool.total)


def _describe(
    ready: Ready, cache: CacheShape, codec: TextCodec, defaults: EngineDefaults, *, model: str, version: str
) -> ModelInfo:
    shape = ready.shape
    return ModelInfo(
        model=model,
        architecture=shape.architecture,
        dtype=ready.dtype,
        layers=shape.layers,
        compressible_layers=cache.full_layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocabulary_size=shape.vocabulary_size,
        max_model_len=ready.max_model_len,
        page_size=ready.page_size,
        total_pages=ready.pool.total,
        page_bytes=ready.page_bytes,
        has_chat_template=codec.has_chat_template,
        default_compression=defaults.compression,
        auto_full_tokens=defaults.auto_full_tokens,
        default_sampling=defaults.sampling,
        max_logprobs=defaults.max_logprobs,
        server_version=version,
        end_of_text_ids=tuple(dict.fromkeys((*codec.end_of_text_ids, *shape.end_of_text_ids))),
    )


def _worker_load(worker: Worker) -> WorkerLoad:
    return WorkerLoad(
        index=worker.index,
        serving=worker.serving,
        pages_total=worker.pool.total if worker.pool else 0,
        pages_free=worker.free_pages,
        running=len(worker.tickets) - len(worker.waiting),
        restarts=worker.restarts,
    )


def _layer_loads(caches: Sequence[CacheState]) -> tuple[LayerLoad, ...]:
    """The layers of all workers' models as one."""
    compressed = sum(cache.compressed for cache in caches) or 1
    sums = ([cache.compressed * budget for budget in cache.budgets] for cache in caches)
    slots = map(sum, zip(*(cache.slots for cache in caches), strict=True))
    budgets = (sum(of) / compressed for of in zip(*sums, strict=True))
    return tuple(LayerLoad(budget=budget, slots=count) for budget, count in zip(budgets, slots, strict=True))


def _stream_load(ticket: Ticket, now: float) -> StreamLoad:
    message, admission = ticket.message, ticket.admission
    undecided = admission is None and message.auto is not None
    return StreamLoad(
        generation_id=ticket.id,
        worker=ticket.worker.index,
        state="waiting" if ticket.waiting else "decode" if ticket.tokens else "prefill",
        prompt_tokens=len(message.prompt),
        completion_tokens=ticket.tokens,
        max_new_tokens=message.max_new_tokens,
        reserved_pages=0 if admission is None else admission.reserved_pages,
        policy=None if undecided else (message if admission is None else admission).config.policy,
        budget_per_layer=0 if admission is None else admission.budget,
        seconds=now - ticket.sent,
    )
