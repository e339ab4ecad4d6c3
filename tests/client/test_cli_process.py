"""The command line as a process of its own: live output, signals, pipes and terminals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from d2o_inference.v1 import inference_service_pb2 as pb
from tests.client.scripted_service import FINISHED, HANG, HELLO, PATIENCE, STARTED, Abort, ScriptedServer, Wait, chunk


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A process inherits an ignored SIGINT; a handled one becomes its default."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def start(server: ScriptedServer, *flags: str, **options: Any) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "d2o_client._cli", *flags, "--target", server.target]
    return subprocess.Popen(command, text=True, env=environment, **(pipes | options))


def test_text_appears_as_it_comes(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("early\n", 1), Wait(1.5), chunk("late\n", 2), FINISHED)
    with start(server, "generate", "--raw", "Hi") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "early\n"
        assert not server.calls[0].answered
        assert process.communicate(timeout=PATIENCE)[0] == "late\n"
    assert process.returncode == 0


def test_ctrl_c_cancels_the_request_and_exits_with_130(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("begun\n", 1), HANG)
    with start(server, "generate", "--raw", "Hi") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert server.calls[0].cancelled.wait(PATIENCE)


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_program(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("begun\n", 1), HANG)
    server.script("StreamGenerateText", *HELLO)
    with start(server, "chat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("two\n/quit\n", timeout=PATIENCE)
    assert (process.returncode, out, "stopped" in err) == (0, "Hello world\n", True)
    second = server.calls[-1].request.prompt.chat.messages
    assert [m.content for m in second] == ["one", "begun\n", "two"]


def test_a_reader_that_goes_away_ends_it_quietly(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, *(chunk("line\n", index) for index in range(20_000)), FINISHED)
    with start(server, "generate", "--raw", "Hi") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE) == 141


def test_input_that_is_not_text_is_a_usage_error(server: ScriptedServer) -> None:
    with start(server, "generate", "-", encoding="latin-1") as process:
        _, err = process.communicate("\xff\xfe", timeout=PATIENCE)
    assert process.returncode == 2
    assert "standard input is not utf-8 text" in err


def test_a_terminal_is_shown_no_escape_sequences(server: ScriptedServer) -> None:
    server.script("StreamGenerateText", STARTED, chunk("a\x1b[2J\x9bb\tc\n", 1), FINISHED)
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "d2o_client._cli",
        "generate",
        "--raw",
        "--no-stats",
        "Hi",
        "--target",
        server.target,
    ]
    subprocess.run(command, stdout=slave, env=environment, timeout=PATIENCE, check=True)
    os.close(slave)
    assert os.read(master, 1000) == b"a[2Jb\tc\r\n"
    os.close(master)


def test_top_draws_in_place_and_gives_the_terminal_back(server: ScriptedServer) -> None:
    controller, terminal = pty.openpty()
    with start(server, "top", "--interval", "0.05", stdout=terminal) as process:
        os.close(terminal)
        seen = b""
        while seen.count(b"\x1b[H") < 3:
            seen += os.read(controller, 65536)
        process.send_signal(signal.SIGINT)
        while b"\x1b[?1049l" not in seen:
            seen += os.read(controller, 65536)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    os.close(controller)
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l")
    assert b"requests  3 running, 1 waiting" in seen


def test_top_outlives_a_server_that_is_away_for_a_while(server: ScriptedServer) -> None:
    controller, terminal = pty.openpty()
    server.script("GetLoad", pb.GetLoadResponse(pages_total=1, running=5))
    for _ in range(3):
        server.script("GetLoad", Abort(grpc.StatusCode.UNAVAILABLE, "draining"))
    with start(server, "top", "--interval", "0.05", stdout=terminal) as process:
        os.close(terminal)
        seen = b""
        while not (b"5 running" in seen and b"draining" in seen and b"3 running" in seen):
            seen += os.read(controller, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
    os.close(controller)
