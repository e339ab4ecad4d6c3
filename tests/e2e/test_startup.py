"""A server that cannot start: status 1, one message that says what to do, and no traceback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import PATIENCE, TINY, ServerProcess, end, spawn


def refusal(tmp_path: Path, *flags: str, status: int = 1) -> list[str]:
    """The lines that a server which ends with ``status`` wrote."""
    log = tmp_path / "log"
    process = spawn(flags, log)
    try:
        assert process.wait(PATIENCE) == status
        assert process.stdout is not None
        assert process.stdout.read() == ""
    finally:
        end(process)
    written = log.read_text()
    assert "Traceback" not in written
    return written.splitlines()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nonsense"], "model: got 'nonsense', allowed are smollm2-135m-instruct"),
        (["--page-size", "33"], "page_size: got 33, allowed is a power of two up to 256"),
    ],
    ids=["model", "page-size"],
)
def test_a_setting_that_cannot_be_used_is_named_at_once(tmp_path: Path, flags: list[str], message: str) -> None:
    (line,) = refusal(tmp_path, *flags)
    assert line.startswith(f"d2o-serve: {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-pages", "2"], "num_pages: got 2, allowed is at least 3, which hold 6 tokens in each of the 3 layers"),
        (["--device", "cuda:99"], "device: got 'cuda:99', "),
    ],
    ids=["num-pages", "device"],
)
def test_what_only_the_worker_can_find_is_named_too(tmp_path: Path, flags: list[str], message: str) -> None:
    assert refusal(tmp_path, *TINY, *flags)[-1].startswith(f"d2o-serve: {message}")


def test_flags_that_cannot_be_read_are_a_usage_error(tmp_path: Path) -> None:
    assert refusal(tmp_path, "--pages", "3", status=2)[-1] == "d2o-serve: error: unrecognized arguments: --pages 3"


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        yield str(occupied.getsockname()[1])


def test_a_port_that_is_taken_is_named_before_the_model_is_loaded(tmp_path: Path, taken_port: str) -> None:
    (line,) = refusal(tmp_path, *TINY, "--port", taken_port)
    assert line.startswith(f"d2o-serve: host, port: got 127.0.0.1:{taken_port}, allowed is an address of this machine")


def test_a_port_of_another_server_is_taken(tmp_path: Path, server: ServerProcess) -> None:
    (line,) = refusal(tmp_path, *TINY, "--port", server.target.rpartition(":")[2])
    assert line.startswith(f"d2o-serve: host, port: got {server.target}, allowed is")
