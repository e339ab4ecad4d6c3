"""The composition root: puts tokenizer, workers, engine and RPC server together, and takes them down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from d2o_server.engine.admission import EngineDefaults
from d2o_server.engine.dispatcher import Dispatcher
from d2o_server.engine.engine import LocalEngine
from d2o_server.engine.observer import Observer
from d2o_server.engine.types import SamplingParams
from d2o_server.engine.worker_client import Worker
from d2o_server.errors import StartupError, WorkersLost
from d2o_server.garbage import calm_garbage_collector, collect_when_idle
from d2o_server.models.source import ModelSource, resolve
from d2o_server.rpc.interceptors import current_ids
from d2o_server.rpc.server import RpcServer, RpcSettings, check_files
from d2o_server.settings import Settings
from d2o_server.telemetry import logs
from d2o_server.telemetry.telemetry import Telemetry
from d2o_server.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_SECONDS_TO_SAY_SO = 1.0
Progress = Callable[[str], None]
Started = TypeVar("Started")


@asynccontextmanager
async def running_engine(
    settings: Settings, progress: Progress, observer: Observer | None = None
) -> AsyncIterator[LocalEngine]:
    """A started engine; its workers, which all started at once, are gone when the scope is left.

    ``observer`` is told of every request.

    Raises:
        StartupError: the model or the settings do not allow a start; the message says what to change.
    """
    source = await asyncio.to_thread(resolve, settings.worker.model, report=progress)
    workers = _workers(settings, progress, observer)
    try:
        starting = asyncio.gather(*(worker.start() for worker in workers))
        codec, _ = await asyncio.gather(asyncio.to_thread(_tokenizer, source), starting)
        limits = settings.limits
        dispatcher = Dispatcher(
            workers,
            max_waiting=limits.max_waiting,
            max_waiting_tokens=limits.max_waiting_tokens,
            max_wait=limits.max_wait,
        )
        engine = LocalEngine(
            model=settings.worker.model,
            codec=codec,
            dispatcher=dispatcher,
            defaults=EngineDefaults(
                compression=settings.compression,
                auto_full_tokens=settings.auto_full_tokens,
                sampling=SamplingParams(max_new_tokens=limits.default_max_new_tokens),
                max_logprobs=limits.max_logprobs,
                tensor_parallel=settings.worker.tensor_parallel,
            ),
            version=_version(),
            observer=observer,
        )
        try:
            yield engine
        finally:
            await engine.close()
    finally:
        await asyncio.gather(*(worker.stop() for worker in workers))


def _workers(settings: Settings, progress: Progress, observer: Observer | None) -> list[Worker]:
    environment = {"D2O_LOG_LEVEL": settings.log_level, "D2O_LOG_FORMAT": settings.telemetry.log_format}
    return [
        Worker(
            own.index,
            own,
            progress if settings.data_parallel == 1 else _numbered(progress, own.index),
            environment,
            observer=observer,
            supervision=settings.supervision,
        )
        for own in settings.workers
    ]


def _numbered(progress: Progress, index: int) -> Progress:
    return lambda text: progress(f"worker {index}: {text}")


def _version() -> str:
    """The distribution's version, "0" where a source tree runs that is not installed."""
    try:
        return version("d2o-serve")
    except PackageNotFoundError:
        return "0"


def _tokenizer(source: ModelSource) -> Tokenizer:
    if source.preset is not None:
        return Tokenizer.built_in(source.preset.vocabulary_size)
    return Tokenizer.from_folder(source.folder_or_fail())


async def serve(settings: Settings, progress: Progress, listening: Callable[[int], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains: no stream that runs is cut within the grace.

    ``listening`` is called with the bound port once the model answered a first forward pass.

    Raises:
        StartupError: the settings do not allow a start; the message says what to change.
        WorkersLost: all workers have died and cannot be started again.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    rpc = _rpc_settings(settings)
    check_files(rpc)
    await _check_address(rpc)
    async with AsyncExitStack() as scope:
        telemetry = Telemetry(settings.telemetry, rpc.host, _version())
        scope.push_async_callback(telemetry.close)
        engine = await _unless(stop, scope.enter_async_context(running_engine(settings, progress, telemetry)))
        if engine is None:
            return
        telemetry.attach(engine)
        server = RpcServer(engine, rpc, telemetry, telemetry.interceptors)
        calm_garbage_collector()
        listening(await server.start())
        beside = [asyncio.create_task(_follow_health(engine, server)), asyncio.create_task(collect_when_idle(engine))]
        lost = await _unless(stop, engine.worker_loss())
        for task in beside:
            task.cancel()
        if lost is None:
            await _drain(engine, server, settings)
            return
        await server.set_serving(False)
        await engine.drain(_SECONDS_TO_SAY_SO)
        await server.stop(_SECONDS_TO_SAY_SO)
        raise WorkersLost(lost)


async def _unless(stop: asyncio.Event, starting: Coroutine[Any, Any, Started]) -> Started | None:
    """What ``starting`` returns, or None where it was cancelled because ``stop`` was set first."""
    start, stopped = asyncio.create_task(starting), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        if not start.done():
            start.cancel()
            await asyncio.wait({start})
    return None if start.cancelled() else start.result()


def configure_logs(settings: Settings) -> None:
    """Sends this process's log to standard error as the settings say."""
    logs.configure(settings.log_level, settings.telemetry.log_format, current_ids)
    if not settings.telemetry.access_log:
        logging.getLogger("d2o_server.access").setLevel(logging.CRITICAL)


def _rpc_settings(settings: Settings) -> RpcSettings:
    listen = settings.listen
    return RpcSettings(
        host=listen.host,
        port=listen.port,
        reflection=listen.reflection,
        api_keys=listen.api_keys,
        rate_limit=listen.rate_limit,
        max_client_streams=listen.max_client_streams,
        max_client_pages=listen.max_client_pages,
        max_connections=listen.max_connections,
        max_connection_age=listen.max_connection_age,
        max_connection_age_grace=listen.max_connection_age_grace,
        log_prompts=settings.telemetry.log_prompts,
        tls_certificate=listen.tls_certificate,
        tls_key=listen.tls_key,
        tls_client_ca=listen.tls_client_ca,
    )


async def _check_address(rpc: RpcSettings) -> None:
    """Finds out before the model is loaded, which takes a while, whether the port can be had."""
    try:
        probe = await asyncio.get_running_loop().create_server(asyncio.Protocol, rpc.host, rpc.port)
    except OSError as error:
        allowed = f"an address of this machine with a free port ({error.strerror or error})"
        raise StartupError(f"host, port: got {rpc.host}:{rpc.port}, allowed is {allowed}") from error
    probe.close()
    await probe.wait_closed()


async def _follow_health(engine: LocalEngine, server: RpcServer) -> None:
    """Keeps grpc.health.v1 in step with the workers."""
    serving: bool | None = None
    while True:
        if engine.serving != serving:
            serving = engine.serving
            await server.set_serving(serving)
        await asyncio.sleep(0.2)


async def _drain(engine: LocalEngine, server: RpcServer, settings: Settings) -> None:
    """NOT_SERVING first, a window in which calls are still taken if any run, then running streams finish."""
    limits = settings.limits
    await server.set_serving(False)
    load = engine.load()
    if load.running or load.waiting:
        refusing, finishing = limits.drain_window, limits.drain_grace
        _log.info("draining: refusing new calls in %.1f s, %.1f s for running streams", refusing, finishing)
        await asyncio.sleep(limits.drain_window)
    else:
        _log.info("draining: nothing runs or waits")
    await engine.drain(limits.drain_grace)
    await server.stop(_SECONDS_TO_SAY_SO)
