"""Processes that are forked from a template: what they start with, how they end, and what happens without it."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from d2o_server.engine import worker_process
from d2o_server.engine.worker_process import WorkerProcess
from d2o_server.worker import process

TELLING = "tests.server.engine.telling_worker"


@pytest.fixture
def own_template(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One of the test's own, which is gone with it: what others use is not to be killed."""
    monkeypatch.setattr(worker_process._Template, "_current", None)
    monkeypatch.setattr(worker_process._Template, "_abandoned", [])
    yield
    worker_process._Template.end_all()


class Started:
    """A process of the module above, and what it says of itself."""

    def __init__(self, path: Path, **environment: str) -> None:
        self.path = path
        self.process = WorkerProcess(TELLING, str(path), {"D2O_TEST_WORD": path.name, **environment})
        self.ended = asyncio.create_task(self.process.wait())

    async def says(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            while not self.path.exists():
                await asyncio.sleep(0.01)
        said: dict[str, Any] = json.loads(self.path.read_text())
        return said

    async def status(self) -> int:
        async with asyncio.timeout(60):
            return await self.ended


@pytest.fixture
async def first(tmp_path: Path) -> AsyncIterator[Started]:
    started = Started(tmp_path / "first")
    yield started
    started.process.kill()
    await started.status()


def template() -> psutil.Process:
    return psutil.Process(worker_process._Template.current()._process.pid)


def environment(process: psutil.Process) -> dict[str, str]:
    """What a process was started with; for a moment after it has been started the kernel shows nothing."""
    deadline = time.monotonic() + 10
    while not (found := process.environ()) and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


@pytest.mark.parametrize(
    ("operators", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_soon_sleep_unless_the_operator_says_otherwise(
    operators: dict[str, str], spins: str | None, own_template: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in operators.items():
        monkeypatch.setenv(name, value)
    # What its library reads when it is loaded, which is before any fork.
    assert environment(template()).get("GOMP_SPINCOUNT") == spins


def test_the_collector_rests_while_a_process_imports_and_leaves_alone_what_came() -> None:
    try:
        with process.importing():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("reader", ["there", "gone", "none"])
def test_a_process_ends_in_good_order_whoever_reads_what_it_says(reader: str) -> None:
    program = "import sys; sys.stdin.read(); from d2o_server.worker.process import end; print('said'); end()"
    command = [sys.executable, "-c", program]
    if reader == "none":
        command = ["/bin/sh", "-c", 'exec "$0" "$@" >&-', *command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as ending:
        if reader == "gone" and ending.stdout is not None:
            ending.stdout.close()
            ending.stdout = None
        said, complaint = ending.communicate()
    assert (ending.returncode, complaint) == (0, b"")
    assert said == (b"said\n" if reader == "there" else b"" if reader == "none" else None)


async def test_it_starts_with_what_it_was_given_and_everything_imported(first: Started) -> None:
    said = await first.says()
    assert said == {
        "pid": first.process.pid,
        "parent": template().pid,
        "group": first.process.pid,
        "arguments": [str(first.path), str(template().pid), "1"],
        "directory": str(Path.cwd()),
        "word": "first",
        "imported": True,
        "collects": True,
        "frozen": True,
    }
    assert first.process.status is None
    assert "D2O_TEST_WORD" not in os.environ


async def test_one_template_serves_all_and_each_ends_for_itself(first: Started, tmp_path: Path) -> None:
    second, third = Started(tmp_path / "second", D2O_TEST_STATUS="3"), Started(tmp_path / "third")
    said = [await started.says() for started in (first, second, third)]
    assert len({one["pid"] for one in said}) == 3
    assert len({one["parent"] for one in said}) == 1
    assert await second.status() == 3
    third.process.kill()
    assert await third.status() == -signal.SIGKILL
    assert (third.process.pid, third.process.status) == (None, -signal.SIGKILL)
    assert first.process.pid == said[0]["pid"]
    assert psutil.Process(said[0]["pid"]).is_running()


async def test_one_that_is_stopped_is_killed_with_what_it_has_started(first: Started) -> None:
    process = psutil.Process((await first.says())["pid"])
    process.suspend()
    first.process.kill()
    assert await first.status() == -signal.SIGKILL
    assert not process.is_running()


@pytest.mark.usefixtures("own_template")
async def test_one_that_is_killed_before_it_exists_never_does(tmp_path: Path) -> None:
    started = Started(tmp_path / "never")
    await asyncio.sleep(0.1)
    gone = template()
    started.process.kill()
    assert await started.status() == -signal.SIGKILL
    assert not gone.is_running()
    again = Started(tmp_path / "again", D2O_TEST_STATUS="0")
    assert await again.status() == 0
    assert not started.path.exists()


@pytest.mark.usefixtures("own_template")
async def test_a_template_that_hangs_is_left_to_what_it_has_forked(first: Started, tmp_path: Path) -> None:
    said = await first.says()
    hanging = template()
    hanging.suspend()
    try:
        stuck = Started(tmp_path / "stuck")
        await asyncio.sleep(0.1)
        stuck.process.kill()
        assert await stuck.status() == -signal.SIGKILL
        other = Started(tmp_path / "other", D2O_TEST_STATUS="0")
        assert (await other.says())["parent"] not in (hanging.pid, os.getpid())
        assert await other.status() == 0
        assert psutil.Process(said["pid"]).is_running()
    finally:
        hanging.resume()
    first.process.kill()
    assert await first.status() == -signal.SIGKILL
    assert not stuck.path.exists()


@pytest.mark.usefixtures("own_template")
async def test_processes_do_not_outlive_their_template_and_the_next_has_another(first: Started, tmp_path: Path) -> None:
    process = psutil.Process((await first.says())["pid"])
    template().kill()
    assert await first.status() == -signal.SIGKILL
    process.wait(5)
    second = Started(tmp_path / "second", D2O_TEST_STATUS="0")
    assert await second.status() == 0


@pytest.mark.usefixtures("own_template")
async def test_a_template_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "transformers.py"
    broken.write_text("raise SystemExit(5)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    assert await Started(tmp_path / "never").status() == 5


def test_a_fork_that_could_not_use_a_gpu_becomes_a_fresh_process(tmp_path: Path) -> None:
    script = (
        "import sys, torch, transformers\n"
        "from d2o_server.worker.template import Order, _become\n"
        "torch.cuda._is_in_bad_fork = lambda: True\n"
        f"variables = {dict(os.environ) | {'D2O_TEST_WORD': 'fresh', 'D2O_TEST_STATUS': '0'}!r}\n"
        f"order = Order(module={TELLING!r}, address={str(tmp_path / 'told')!r}, directory='.', environment=variables)\n"
        "_become(order, 7)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    said = json.loads((tmp_path / "told").read_text())
    assert (said["imported"], said["arguments"][1], said["word"]) == (False, "7", "fresh")


@pytest.mark.usefixtures("own_template")
async def test_a_worker_whose_end_and_connection_s_end_come_together_takes_nothing_along(tmp_path: Path) -> None:
    made = worker_process._Template.current()

    def order(name: str) -> bytes:
        variables = dict(os.environ) | {"D2O_TEST_WORD": name}
        told = {"module": TELLING, "address": str(tmp_path / name), "directory": ".", "environment": variables}
        return json.dumps(told).encode() + b"\n"

    with made.connect() as first, made.connect() as second:
        for connection in (first, second):
            connection.settimeout(60)
        first.sendall(order("first"))
        process = int(first.recv(64))
        # The template waits for the second order, so that both ends lie there when it looks again.
        await asyncio.sleep(0.2)
        os.kill(process, signal.SIGKILL)
        await asyncio.sleep(0.2)
        first.close()
        second.sendall(order("second"))
        other = psutil.Process(int(second.recv(64)))
        assert other.pid != process
        third = Started(tmp_path / "third", D2O_TEST_STATUS="0")
        assert await third.status() == 0
    other.wait(5)
    assert worker_process._Template.current() is made
