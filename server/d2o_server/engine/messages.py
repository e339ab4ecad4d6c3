"""What the front process and a worker say to each other. msgspec structs; every token travels once."""

from __future__ import annotations

from typing import Any

import msgspec

from d2o.config import D2OConfig
from d2o_server.engine.shape import ModelShape
from d2o_server.engine.types import AutoOutcome, CacheFacts, SamplingParams


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker needs to start.

    ``index`` is the worker's number: on ``auto`` and ``cuda`` it takes the GPU of that number, and the
    ``tensor_parallel`` ranks of a worker those from ``index * tensor_parallel`` on. ``prefill_tokens`` None,
    ``compile_cache`` None and ``dtype`` auto leave the choice to the worker. ``memory_fraction`` counts on a CPU only;
    ``gpu_memory_utilization``, ``graphs``, ``compile`` and ``compile_cache`` on a GPU only.
    """

    model: str
    dtype: str
    device: str
    index: int
    tensor_parallel: int
    threads: int
    page_size: int
    num_pages: int | None
    memory_fraction: float
    gpu_memory_utilization: float
    max_model_len: int | None
    max_sequences: int
    prefill_tokens: int | None
    graphs: bool
    compile: bool
    compile_cache: str | None
    check_integrity: bool

    def share(self, index: int, count: int) -> WorkerSettings:
        """What worker ``index`` of ``count`` on one machine starts with."""
        threads, memory = max(1, self.threads // count), self.memory_fraction / count
        return msgspec.structs.replace(self, index=index, threads=threads, memory_fraction=memory)

    def rank(self, number: int) -> WorkerSettings:
        """What rank ``number`` of this worker starts with; its ``index`` is that of its own GPU."""
        count = self.tensor_parallel
        return self if count == 1 else self.share(self.index * count + number, count)


AUTO_FULL_TOKENS = 2048
"""Up to so many tokens ``auto`` prefers the full cache: twice the default least budget (docs/adr/0011)."""


class AutoTerms(msgspec.Struct, frozen=True):
    """On what terms a request in ``auto`` may have the full cache: its length, and the pages left to its owner."""

    full_tokens: int
    most_pages: int | None = None


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A validated request; ``config`` is what was asked for, the worker finds the policy in force.

    With ``auto`` the worker may give it the full cache instead, when it admits it.

    ``output``: tokens that another worker reported before it died; what is reported begins with the one after them.
    ``resumed``: another worker had the request before, so that it goes before those which have not had their turn.
    These are admitted in the order of ``due``: see :mod:`d2o_server.engine.priority`.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    config: D2OConfig
    end_ids: tuple[int, ...]
    max_new_tokens: int
    auto: AutoTerms | None = None
    output: tuple[int, ...] = ()
    resumed: bool = False
    due: float = 0.0


class Cancel(msgspec.Struct, frozen=True, tag=True):
    id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The front found a stop string: end the sequence as finished."""

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Stop now; the front has drained already."""


ToWorker = Submit | Cancel | Stop | Shutdown


class PoolState(msgspec.Struct, frozen=True, kw_only=True):
    """Pages and requests of one worker."""

    total: int
    used: int
    reserved: int
    running: int
    waiting: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What the worker is doing while it starts."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The model is loaded and answered a first forward pass."""

    shape: ModelShape
    page_size: int
    page_bytes: int
    pool: PoolState
    max_model_len: int
    dtype: str
    device: str = "cpu"


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot start; ``error`` names the class in :mod:`d2o_server.errors`."""

    error: str
    message: str


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """``config`` is the policy in force, and ``auto`` how it came to be where that chose it."""

    id: str
    reserved_pages: int
    budget: int
    config: D2OConfig
    auto: AutoOutcome | None = None


class NewToken(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token of one sequence; ``top`` has (id, log probability) pairs."""

    id: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The sequence has left the worker and holds nothing any more. ``reason``: end_of_text, stop, length."""

    id: str
    reason: str
    facts: CacheFacts
    stop_token_id: int | None = None


class Failed(msgspec.Struct, frozen=True):
    """The sequence failed alone; ``error`` names the class in :mod:`d2o_server.errors`."""

    id: str
    error: str
    message: str


class CacheState(msgspec.Struct, frozen=True, kw_only=True):
    """What the caches of running sequences hold.

    ``tokens`` is what they have read and written. By layer: ``slots`` in use, and the mean of the ``budgets`` of the
    ``compressed`` ones among them (of a sliding-window layer its window; 0 where none was compressed).
    """

    tokens: int
    compressed: int
    slots: tuple[int, ...]
    budgets: tuple[float, ...]


class StepReport(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """All that one step changed, in one message; ``cache`` comes now and then, and when nothing runs any more."""

    pool: PoolState
    cache: CacheState | None = None
    admitted: tuple[Admitted, ...] = ()
    tokens: tuple[NewToken, ...] = ()
    ended: tuple[Ended, ...] = ()
    failed: tuple[Failed, ...] = ()
    cancelled: tuple[str, ...] = ()


FromWorker = Progress | Ready | Refused | StepReport

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromWorker)
_settings = msgspec.msgpack.Decoder(WorkerSettings)


def encode(message: ToWorker | FromWorker | WorkerSettings) -> bytes:
    return _encoder.encode(message)


def decode_to_worker(data: bytes) -> ToWorker:
    message: ToWorker = _to_worker.decode(data)
    return message


def decode_from_worker(data: bytes) -> FromWorker:
    message: FromWorker = _from_worker.decode(data)
    return message


def decode_settings(data: bytes) -> WorkerSettings:
    return _settings.decode(data)
