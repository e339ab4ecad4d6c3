"""Locust runs against a real server as ``make load`` and the benchmarks run it. It patches the interpreter that it is
imported into, so here too it has processes of its own.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks import overload, streams_1000
from tests.e2e.processes import TINY, ServerProcess, end, launch
from tests.load.run import locust, main

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--prompt-tokens", "4-16", "--output-tokens", "lognormal:16,0.5,40")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = (*TINY, "--num-pages", "2000", "--max-sequences", "4", "--max-waiting", "4")
    running = launch(flags, tmp_path_factory.mktemp("load") / "log")
    yield running
    end(running.process)


def counts(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Events and failures by kind and name."""
    with (folder / "load_stats.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(row["Type"], row["Name"]): (int(row["Request Count"]), int(row["Failure Count"])) for row in rows}


def test_a_closed_load_measures_all_manners_and_leaves_its_report(server: ServerProcess, tmp_path: Path) -> None:
    shares = ("--cancel-share", "0.2", "--too-long-share", "0.2", "--slow-share", "0.1", "--slow-pause", "0.01")
    given = (
        "--target",
        server.target,
        "--out",
        str(tmp_path),
        "--users",
        "4",
        "--run-time",
        "2s",
        "--stop-timeout",
        "3",
    )
    assert main([*given, *SHORT, *shares]) == 0
    found = counts(tmp_path)
    names = {("E2E", "slow reader"), ("CANCELLED", "cancelled by the client"), ("REFUSED", "INVALID_ARGUMENT")}
    assert names | {(kind, "stream") for kind in ("TTFT", "ITL", "E2E", "QUEUE")} | {("", "Aggregated")} == set(found)
    assert not any(failed for _, failed in found.values())
    assert found["QUEUE", "stream"] == found["E2E", "stream"]
    assert found["TTFT", "stream"][0] >= found["E2E", "stream"][0]
    assert "</html>" in (tmp_path / "report.html").read_text()


def test_an_open_load_goes_on_while_the_server_refuses(server: ServerProcess, tmp_path: Path) -> None:
    arrivals = ("--mode", "open", "--rate", "20", "--users", "2", "--burst", "41/2", "--run-time", "3s")
    assert locust(server.target, tmp_path, *SHORT, *arrivals, "--stop-timeout", "5") == 0
    found = counts(tmp_path)
    (refused, failed), (ended, _) = found["REFUSED", "RESOURCE_EXHAUSTED"], found["E2E", "stream"]
    assert refused
    assert not failed
    # All arrive whatever became of those before: three seconds of them, and one burst.
    assert abs(refused + ended - 101) <= 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rate", "0"), "argument --rate: got '0', allowed is a positive number"),
        (("--burst", "5/1"), "--burst: got one in --mode closed, allowed is --mode open"),
        (("--output-tokens", "1000000"), "--output-tokens: got up to 1000064 tokens together, allowed are"),
    ],
)
def test_a_wrong_flag_ends_the_load_with_its_name(flags: tuple[str, ...], message: str, server: ServerProcess) -> None:
    command = [sys.executable, "-m", "locust", "-f", "tests/load/locustfile.py", "--headless", "-t", "1s"]
    done = subprocess.run(
        [*command, "--target", server.target, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert message in done.stderr


def test_the_overload_benchmark_refuses_rightly_at_a_small_scale(tmp_path: Path) -> None:
    short = (
        "--model",
        "random:tiny-llama",
        "--peak-users",
        "4",
        "--peak-seconds",
        "3",
        "--seconds",
        "3",
        "--output-tokens",
        "8-32",
    )
    bounds = ("--max-sequences", "4", "--max-waiting", "4", "--max-wait", "2")
    # Rates of a few seconds, and memory of a worker that still warms up, prove nothing: nobody asks here if they held.
    with suppress(SystemExit):
        overload.main([*short, *bounds, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "overload.json").read_text())
    assert result["held"]["refusals"]
    assert result["held"]["queue_time"]
    assert result["memory_growth_mib"]["front"] <= overload._FLAT_MEBIBYTES
    assert min(result["memory_peak_mib"].values()) > 0
    assert result["overload"]["refused"]["RESOURCE_EXHAUSTED"] > 0


def test_streams_beside_slow_sockets_all_end_rightly(tmp_path: Path) -> None:
    sizes = ("--streams", "40", "--slow", "10", "--tokens", "40", "--repeats", "1")
    with suppress(SystemExit):
        streams_1000.main([*sizes, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "streams_1000.json").read_text())
    alone, fast, slow = result["runs"]
    assert (alone["tokens"], fast["tokens"], slow["tokens"]) == (1600, 1200, 1200)
    assert fast["bytes_a_socket"] > slow["bytes_a_socket"] >= 1
    assert 0 < result["front_idle_mib"] <= result["front_peak_mib"]
