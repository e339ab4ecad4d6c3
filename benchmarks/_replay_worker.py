"""A worker process without a model: it admits whatever comes and brings one token a running request and step.

It speaks to the front as the real one does, so that the front alone can be measured. ``REPLAY_STEP_SECONDS`` is how
long a step takes, 0 for as fast as it can be said; steps begin when ``REPLAY_STREAMS`` requests run.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import zmq

from d2o_server.engine.messages import (
    Admitted,
    Ended,
    NewToken,
    PoolState,
    Ready,
    Shutdown,
    StepReport,
    Submit,
    ToWorker,
    decode_settings,
    decode_to_worker,
    encode,
)
from d2o_server.engine.shape import ModelShape
from d2o_server.engine.types import CacheFacts, FinishReason, LayerCache

_LAYERS = 32
_PAGES = 1_000_000
_PRINTABLE = tuple(range(32, 127))
_FACTS = CacheFacts(
    layers=(LayerCache(budget=0, kept=1, merged=0.0, dropped=0.0),) * _LAYERS,
    ratio_reached=1.0,
    peak_pages=_LAYERS,
    compression_seconds=0.0,
)
_SHAPE = ModelShape(
    architecture="Replay",
    layers=_LAYERS,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary_size=512,
    max_positions=131072,
    windows=(None,) * _LAYERS,
    end_of_text_ids=(),
)


@dataclass(slots=True)
class _Stream:
    id: str
    left: int


class ReplayWorker:
    """What runs, and the reports that its steps make."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._running: dict[str, _Stream] = {}
        self._admitted: list[Admitted] = []
        self._stepping = False
        self._steps = 0

    @property
    def stepping(self) -> bool:
        """Whether enough requests run, or did when steps began and some still do."""
        self._stepping = bool(self._running) and (self._stepping or len(self._running) >= self._streams)
        return self._stepping

    def pool(self) -> PoolState:
        reserved = len(self._running) * _LAYERS
        return PoolState(total=_PAGES, used=reserved, reserved=reserved, running=len(self._running), waiting=0)

    def handle(self, message: ToWorker) -> None:
        if isinstance(message, Submit):
            self._running[message.id] = _Stream(message.id, message.max_new_tokens)
            self._admitted.append(Admitted(id=message.id, reserved_pages=_LAYERS, budget=0, config=message.config))
        elif not isinstance(message, Shutdown):
            self._running.pop(message.id, None)

    def admissions(self) -> StepReport:
        admitted, self._admitted = tuple(self._admitted), []
        return StepReport(pool=self.pool(), admitted=admitted)

    def step(self) -> StepReport:
        self._steps += 1
        token = _PRINTABLE[self._steps % len(_PRINTABLE)]
        tokens = tuple(NewToken(stream.id, token) for stream in self._running.values())
        for stream in self._running.values():
            stream.left -= 1
        over = [stream.id for stream in self._running.values() if not stream.left]
        for done in over:
            del self._running[done]
        ended = tuple(Ended(id=done, reason=FinishReason.LENGTH, facts=_FACTS) for done in over)
        return StepReport(pool=self.pool(), tokens=tokens, ended=ended)


def _serve(socket: zmq.Socket[bytes]) -> None:
    decode_settings(socket.recv())
    worker, pause = ReplayWorker(int(os.environ["REPLAY_STREAMS"])), float(os.environ["REPLAY_STEP_SECONDS"])
    socket.send(
        encode(
            Ready(
                shape=_SHAPE,
                page_size=64,
                page_bytes=1,
                pool=worker.pool(),
                max_model_len=_SHAPE.max_positions,
                dtype="bfloat16",
            )
        )
    )
    due = time.monotonic()
    while True:
        while socket.poll(0 if worker.stepping else None):
            message = decode_to_worker(socket.recv())
            if isinstance(message, Shutdown):
                return
            worker.handle(message)
            if not socket.poll(0):
                socket.send(encode(worker.admissions()))
        due = max(due + pause, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        socket.send(encode(worker.step()))


def main() -> None:
    """Entry point of the process: ``python -m benchmarks._replay_worker ADDRESS PARENT``."""
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(sys.argv[1])
    _serve(socket)
    socket.close()
    context.term()


if __name__ == "__main__":
    main()
