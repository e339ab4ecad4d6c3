"""The processes of one tensor-parallel worker: rank 0 speaks to the front, the others do the same steps beside it.

All ranks run the same scheduler over the same messages; their models exchange tensors inside a step. What rank 0 takes
from the front it passes on before it acts on it, with a digest of its last report: ranks whose steps differ stop.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import torch
import torch.distributed as dist
import zmq
from torch import Tensor

from d2o_server import errors
from d2o_server.engine.messages import StepReport
from d2o_server.worker.tensor_parallel import Part

_log = logging.getLogger(__name__)
_RAISED = {kind.__name__: kind for kind in (errors.StartupError, errors.ModelUnsupported, errors.SettingsError)}


class RanksDiffer(Exception):
    """A rank's step did something else than rank 0's: nothing can be relied on any more."""


class Ranks:
    """One process's place among the ranks of its worker. This one is alone; see :class:`Leader` and :class:`Follower`.

    Attributes:
        number: of this rank, from 0.
        count: of all ranks.
        meeting: the file by which they find one another.
    """

    number = 0
    count = 1
    meeting = ""

    def exchange(self, word: bytes) -> list[bytes]:
        """What each rank said, by number; every rank must call it."""
        return [word]

    def take(self, receive: Callable[[], list[bytes]]) -> list[bytes]:
        """The messages that all ranks handle next: those that rank 0 receives."""
        return receive()

    def note(self, report: StepReport) -> None:
        """Remembers what a step did, for the others to compare."""

    def least(self, value: int) -> int:
        """The smallest value of any rank."""
        return min(msgspec.msgpack.decode(word, type=int) for word in self.exchange(msgspec.msgpack.encode(value)))

    def mean(self, values: list[float]) -> list[float]:
        """The mean over ranks, element by element."""
        words = self.exchange(msgspec.msgpack.encode(values))
        lists = [msgspec.msgpack.decode(word, type=list[float]) for word in words]
        return [sum(column) / self.count for column in zip(*lists, strict=True)]

    def all_heads(self, values: Tensor) -> Tensor:
        """The values [layers, heads of all ranks] of which this rank has [layers, its heads]."""
        if self.count == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, -1)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Ends a block that talks to no other rank on all of them alike: what one raises, all raise.

        Raises:
            StartupError: of the first rank that failed.
        """
        failure = ("", "")
        try:
            yield
        except errors.StartupError as error:
            failure = (type(error).__name__, str(error))
        for word in self.exchange(msgspec.msgpack.encode(failure)):
            kind, message = msgspec.msgpack.decode(word, type=tuple[str, str])
            if kind:
                raise _RAISED.get(kind, errors.StartupError)(message)

    def connect(self, device: torch.device) -> Part:
        """Joins the group in which tensors are exchanged."""
        # All ranks are processes of one machine, whose name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{self.meeting}",
            rank=self.number,
            world_size=self.count,
            device_id=device if device.type == "cuda" else None,
        )
        group = dist.distributed_c10d._get_default_group()
        return Part(self.number, self.count, group.group_name, self._sum_of_products(group, device))

    def _sum_of_products(
        self, group: dist.ProcessGroup, device: torch.device
    ) -> Callable[[Tensor, Tensor, str], Tensor] | None:
        """What sums quickest over GPUs that can all read one another's memory."""
        if device.type != "cuda":
            return None
        from d2o_server.worker import peer_memory

        failure = ""
        try:
            peer_memory.share_memory(group, device)
        except RuntimeError as error:
            failure = str(error)
        failures = [msgspec.msgpack.decode(word, type=str) for word in self.exchange(msgspec.msgpack.encode(failure))]
        if any(failures):
            peer_memory.give_up(group)
            _log.warning("GPUs cannot read one another's memory, so NCCL adds up: %s", next(filter(None, failures)))
            return None
        return peer_memory.summed_product


def digest(report: StepReport) -> bytes:
    """What two ranks' reports of the same step have in common."""
    return msgspec.msgpack.encode(
        (
            report.pool,
            [admitted.id for admitted in report.admitted],
            [token.token for token in report.tokens],
            [ended.id for ended in report.ended],
            [failed.id for failed in report.failed],
            report.cancelled,
        )
    )


def _shown(said: bytes) -> object:
    return msgspec.msgpack.decode(said) if said else "nothing"


class Follower(Ranks):
    """A rank that does what rank 0 does."""

    def __init__(self, socket: zmq.Socket[bytes], number: int, count: int, meeting: str) -> None:
        self.number, self.count, self.meeting, self._socket = number, count, meeting, socket
        self._digest = b""

    def exchange(self, word: bytes) -> list[bytes]:
        self._socket.send(word)
        return self._socket.recv_multipart()

    def take(self, receive: Callable[[], list[bytes]]) -> list[bytes]:
        theirs, *messages = self._socket.recv_multipart()
        if theirs != self._digest:
            raise RanksDiffer(f"rank {self.number} has done {_shown(self._digest)} and rank 0 {_shown(theirs)}")
        return messages

    def note(self, report: StepReport) -> None:
        self._digest = digest(report)


class Leader(Ranks):
    """Rank 0: ``sockets`` lead to the others, in order."""

    def __init__(self, sockets: list[zmq.Socket[bytes]], meeting: str) -> None:
        self.count, self.meeting, self._sockets = 1 + len(sockets), meeting, sockets
        self._digest = b""

    def exchange(self, word: bytes) -> list[bytes]:
        words = [word, *(socket.recv() for socket in self._sockets)]
        self._send(words)
        return words

    def take(self, receive: Callable[[], list[bytes]]) -> list[bytes]:
        messages = receive()
        self._send([self._digest, *messages])
        return messages

    def note(self, report: StepReport) -> None:
        self._digest = digest(report)

    def _send(self, frames: list[bytes]) -> None:
        for socket in self._sockets:
            socket.send_multipart(frames)
