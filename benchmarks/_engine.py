"""A GPU worker in this process, and caches that stand as if long prompts had been read."""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
import zmq

from d2o.config import D2OConfig
from d2o.pages import PagePool
from d2o_server.engine.messages import Cancel, Submit, WorkerSettings
from d2o_server.engine.sequence import Stage
from d2o_server.engine.types import SamplingParams
from d2o_server.worker.build import BuiltWorker, build_worker
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.ranks import Follower, Leader, Ranks
from d2o_server.worker.runner import Scored

Result = TypeVar("Result")

_RANDOM_SEED = 7
_PAGES_AT_ONCE = 1 << 14


def progress(text: str) -> None:
    """What the worker does while it starts, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def on_ranks(count: int, measure: Callable[[Ranks], Result]) -> Result:
    """What ``measure`` returns here as rank 0 of ``count``; each other rank is a process, which measures beside it."""
    if count == 1:
        return measure(Ranks())
    with TemporaryDirectory() as folder:
        places = [f"ipc://{folder}/{number}" for number in range(count)]
        meeting = f"{folder}/meeting"
        leader = Leader([_bound(place) for place in places[1:]], meeting)
        others = [
            multiprocessing.get_context("spawn").Process(
                target=_follow, args=(measure, place, number, count, meeting), daemon=True
            )
            for number, place in enumerate(places)
            if number
        ]
        for other in others:
            other.start()
        threading.Thread(target=_end_with, args=(others,), daemon=True).start()
        return measure(leader)


def _bound(place: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.bind(place)
    return socket


def _follow(measure: Callable[[Ranks], object], place: str, number: int, count: int, meeting: str) -> None:
    """A rank other than 0, which says nothing."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(place)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        measure(Follower(socket, number, count, meeting))


def _end_with(others: Sequence[BaseProcess]) -> None:
    """Ends this process when another rank has failed: no step of it would end."""
    multiprocessing.connection.wait([other.sentinel for other in others])
    if any(other.exitcode for other in others):
        os._exit(1)


def start(settings: WorkerSettings, ranks: Ranks | None = None) -> BuiltWorker:
    """A worker, or one rank of it, whose pool holds random numbers: zeros would flatter a GPU."""
    ranks = ranks or Ranks()
    worker = build_worker(settings.rank(ranks.number), progress, ranks)
    pool = worker.core.runner.caches.pool
    torch.manual_seed(_RANDOM_SEED)
    for store in (pool.k, pool.v):
        for part in store.split(_PAGES_AT_ONCE):
            part.normal_()
    pool.score.uniform_(0.1, 1.0)
    return worker


def submit(core: WorkerCore, name: str, prompt: tuple[int, ...], config: D2OConfig, new_tokens: int) -> None:
    """A greedy request that runs past the end of text."""
    core.handle(
        Submit(
            id=name,
            prompt=prompt,
            sampling=SamplingParams(ignore_end_of_text=True),
            seed=0,
            config=config,
            end_ids=(),
            max_new_tokens=new_tokens,
        )
    )


@contextmanager
def occupied(core: WorkerCore, *, sequences: int, slots: int, config: D2OConfig, steps: int) -> Iterator[None]:
    """``sequences`` that hold ``slots`` slots a layer and decode, without having read a prompt.

    Compressed ones stand at their budget, spread over its slack, so that about as many of them are due at every step.
    """
    for index in range(sequences):
        submit(core, str(index), (1,) * slots, config, steps)
    admitted = core.scheduler.admit()
    if len(admitted) != sequences:
        raise RuntimeError(f"the pool holds {len(admitted)} of {sequences} sequences of {slots} slots")
    caches = core.runner.caches
    for index, sequence in enumerate(admitted):
        core.runner.open(sequence)
        cache = core.runner.running[sequence.id].cache
        slack = core.shape.slack(config, cache.budget) if config.enabled else 1
        caches.append(torch.tensor([cache.row]), torch.tensor([slots - index * slack // sequences % slack]))
        _number(caches.pool, cache.row)
        if config.enabled:
            cache.compressed = True
            cache.budgets = [slots - slack] * caches.pool.layers
            caches.keep[:, cache.row] = slots - slack
            caches.limit[:, cache.row] = slots
        sequence.prefilled, sequence.stage, sequence.launched = slots, Stage.DECODE, 1
        sequence.output.append(1)
    try:
        yield
    finally:
        for index in range(sequences):
            core.handle(Cancel(str(index)))
        while core:
            core.step()


def _number(pool: PagePool, row: int) -> None:
    """Gives every slot of a row its index as position."""
    pages = pool.block_table[:, row, : int(pool.held[0, row])].to(pool.device)
    places = torch.arange(pages.shape[1] * pool.page_size, dtype=torch.int32, device=pool.device)
    pool.position[pages] = places.view(1, -1, 1, pool.page_size).expand(len(pages), -1, pool.kv_heads, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Milliseconds of one step: by the device's clock over many steps launched ahead, and how long the host took."""

    device_ms: float
    host_ms: float


def time_steps(core: WorkerCore, *, steps: int, warm_up: int = 8) -> Steps:
    """Steps of what runs, as the worker runs them: the next is prepared while one is under way."""
    for _ in range(warm_up):
        core.step()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    host = 0.0
    begin.record()
    for _ in range(steps):
        began = time.perf_counter()
        plan = core.scheduler.plan()
        launched = core.runner.launch(plan, Scored())
        core.runner.compress(plan)
        core.scheduler.launched(plan)
        host += time.perf_counter() - began
        core._under_way.append(launched)
        core._finish(1)
    end.record()
    torch.cuda.synchronize()
    return Steps(device_ms=begin.elapsed_time(end) / steps, host_ms=1000 * host / steps)
