"""Rank 0 forks the other ranks of its worker before anything else, and neither it nor they go on alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import zmq

from d2o_server.settings import worker_settings
from d2o_server.worker.process import Place
from d2o_server.worker.rank_processes import ranks_of


def run(program: str) -> tuple[int, str, float]:
    """A program's status, what it said after its first line, and how many seconds it ran on from there."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        said = process.stdout.read()
    return process.returncode, said, time.monotonic() - began


def test_each_rank_has_its_place() -> None:
    status, said, _ = run(
        "import os\n"
        "from d2o_server.worker.process import fork_ranks\n"
        "print(flush=True)\n"
        "place = fork_ranks('ipc:///a', 7, 3)\n"
        "for other in place.others: os.waitpid(other, 0)\n"
        "os.write(1, f'{os.getpid()} {place}\\n'.encode())\n"
    )
    assert status == 0
    found = dict(line.split(" ", 1) for line in said.splitlines())
    leader = next(reversed(found))
    first, second = sorted((process for process in found if process != leader), key=found.__getitem__)
    assert found == {
        first: f"Place(address='ipc:///a-rank1', parent={leader}, rank=1, others=())",
        second: f"Place(address='ipc:///a-rank2', parent={leader}, rank=2, others=())",
        leader: f"Place(address='ipc:///a', parent=7, rank=0, others=({first}, {second}))",
    }


def leader_of(rank: str, *, then: str, patience: int = 2) -> str:
    """A program of rank 0, whose other rank does ``rank`` once the first line is out."""
    return (
        "import logging, os, time\n"
        "from d2o_server.worker import rank_processes\n"
        "from d2o_server.worker.rank_processes import _Other\n"
        f"rank_processes._SECONDS_TO_STOP = {patience}\n"
        "logging.basicConfig()\n"
        "print(flush=True)\n"
        "process = os.fork()\n"
        "if not process:\n"
        f"    {rank}\n"
        "other = _Other(1, process)\n"
        f"{then}\n"
    )


@pytest.mark.parametrize("status", [0, 3])
def test_a_worker_ends_with_a_rank_that_ends(status: int) -> None:
    """With one that says that all is well it waits a moment: it may be about to end itself. Else it does not wait."""
    patience = 60 if status else 2
    ended, said, seconds = run(leader_of(f"os._exit({status})", then="time.sleep(30)", patience=patience))
    assert (ended, said) == (
        1,
        f"ERROR:d2o_server.worker.rank_processes:rank 1 ended with status {status}; so does its worker\n",
    )
    assert seconds > (0 if status else 1.9)


def test_a_rank_that_does_not_end_is_killed_and_the_worker_goes_on() -> None:
    then = "other.end(); time.sleep(0.5); print(os.path.exists(f'/proc/{process}'))"
    assert run(leader_of("time.sleep(60)", then=then))[:2] == (0, "False\n")


def test_other_ranks_than_the_settings_ask_for_are_refused() -> None:
    settings = worker_settings(model="random:tiny-llama", device="cpu", tensor_parallel=2)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        refused = ranks_of(socket, settings, Place("ipc:///a", os.getpid()))
        with pytest.raises(ValueError, match="tensor_parallel: got 2, and 0 other ranks run"), refused:
            pass
