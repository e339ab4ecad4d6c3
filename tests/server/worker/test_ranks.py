"""What the ranks of a worker say to one another, between threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
import zmq

from d2o_server.engine.messages import NewToken, PoolState, StepReport
from d2o_server.errors import SettingsError, StartupError
from d2o_server.worker import peer_memory
from d2o_server.worker.ranks import Follower, Leader, Ranks, RanksDiffer

T = TypeVar("T")
POOL = PoolState(total=10, used=1, reserved=1, running=1, waiting=0)


@pytest.fixture
def ranks() -> Iterator[tuple[Ranks, Ranks, Ranks]]:
    with zmq.Context() as context:
        near, far = [], []
        for number in (1, 2):
            near.append(context.socket(zmq.PAIR))
            near[-1].bind(f"inproc://{number}")
            far.append(context.socket(zmq.PAIR))
            far[-1].connect(f"inproc://{number}")
        yield Leader(near, ""), Follower(far[0], 1, 3, ""), Follower(far[1], 2, 3, "")
        for socket in (*near, *far):
            socket.close(0)


def on_all(ranks: tuple[Ranks, ...], action: Callable[[Ranks], T]) -> list[T]:
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(action, ranks))


def test_all_ranks_hear_all(ranks: tuple[Ranks, ...]) -> None:
    words = on_all(ranks, lambda rank: rank.exchange(str(rank.number).encode()))
    assert words == [[b"0", b"1", b"2"]] * 3
    assert on_all(ranks, lambda rank: rank.least(7 - rank.number)) == [5, 5, 5]
    assert on_all(ranks, lambda rank: rank.mean([float(rank.number), 1.0])) == [[1.0, 1.0]] * 3


@pytest.mark.parametrize("failing", [{1}, {0, 2}, set()])
def test_where_one_gpu_cannot_share_its_memory_none_does(
    ranks: tuple[Ranks, ...], failing: set[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each thread's group is its own here, by which what is left of its memory is found."""

    def share(group: SimpleNamespace, _: torch.device) -> None:
        if group.number in failing:
            raise RuntimeError(f"GPU {group.number} has no way to the others")
        peer_memory._shared[group.group_name] = peer_memory._Shared(group, torch.empty(0))  # type: ignore[arg-type]

    monkeypatch.setattr(peer_memory, "_shared", {})
    monkeypatch.setattr(peer_memory, "share_memory", share)

    def sums(rank: Ranks) -> object:
        group = SimpleNamespace(number=rank.number, group_name=f"of {rank.number}")
        return rank._sum_of_products(group, torch.device("cuda"))  # type: ignore[arg-type]

    if failing:
        assert on_all(ranks, sums) == [None] * 3
        assert not peer_memory._shared
        assert f"NCCL adds up: GPU {min(failing)} has no way" in caplog.text
    else:
        assert on_all(ranks, sums) == [peer_memory.summed_product] * 3
        assert len(peer_memory._shared) == 3
        assert not caplog.text


def test_one_that_is_alone_agrees_with_itself() -> None:
    alone = Ranks()
    assert (alone.least(3), alone.mean([0.5]), alone.take(lambda: [b"x"])) == (3, [0.5], [b"x"])
    assert torch.equal(alone.all_heads(torch.ones(2, 3)), torch.ones(2, 3))
    with pytest.raises(SettingsError, match="one"), alone.together():
        raise SettingsError("one")


def test_what_one_rank_cannot_do_none_does(ranks: tuple[Ranks, ...]) -> None:
    def load(rank: Ranks) -> str:
        try:
            with rank.together():
                if rank.number == 1:
                    raise SettingsError("GPU 1 is not there")
        except StartupError as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    assert on_all(ranks, load) == ["SettingsError: GPU 1 is not there"] * 3


def report(token: int, used: int = 1) -> StepReport:
    pool = PoolState(total=10, used=used, reserved=1, running=1, waiting=0)
    return StepReport(pool=pool, tokens=(NewToken("a", token),))


def test_messages_reach_every_rank_in_order(ranks: tuple[Ranks, ...]) -> None:
    messages: list[bytes] = []

    def take(rank: Ranks) -> list[bytes]:
        return rank.take(lambda: messages)

    for messages in ([b"1", b"2"], [], [b"3"]):
        assert on_all(ranks, take) == [messages] * 3
        for rank in ranks:
            rank.note(report(5))


@pytest.mark.parametrize("other", [report(6), report(5, used=2)])
def test_a_rank_that_did_something_else_stops(ranks: tuple[Ranks, ...], other: StepReport) -> None:
    leader, follower, odd = ranks
    leader.note(report(5))
    follower.note(report(5))
    odd.note(other)
    leader.take(lambda: [b"1"])
    assert follower.take(list) == [b"1"]
    with pytest.raises(RanksDiffer, match=r"rank 2 has done .* and rank 0 "):
        odd.take(list)
