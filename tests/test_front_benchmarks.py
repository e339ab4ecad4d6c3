"""The benchmarks of the front process and of a worker's restart run whole at a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import front, front_model, new_calls, observed, restart

ON_CPU = ("--server-flags", "--device cpu", "--client-processes", "2")
TINY = ("--model", "random:tiny-llama", "--dtype", "float32", "--threads", "1")


def test_front_measures_the_engine_alone_and_behind_grpc(tmp_path: Path) -> None:
    front.main(["--streams", "6", "--tokens", "20", "--step-seconds", "0.01", "0", "--out", str(tmp_path)])
    paces = json.loads((tmp_path / "front.json").read_text())["paces"]
    assert [(pace["path"], pace["step_seconds"]) for pace in paces] == [
        ("engine", 0.01),
        ("grpc", 0.01),
        ("engine", 0.0),
        ("grpc", 0.0),
    ]
    for pace in paces:
        assert pace["tokens"] == 6 * 20
        assert 6 <= pace["messages"] <= pace["tokens"]
        assert pace["cpu_us_per_token"] > 0
    assert all(pace["seconds"] > 18 * 0.01 for pace in paces[:2])


def test_new_calls_are_timed_beside_streams_that_outlast_them(tmp_path: Path) -> None:
    few = ("--rounds", "2", "--burst", "3", "--out", str(tmp_path))
    new_calls.main(["--streams", "0", "4", *few])
    waits = json.loads((tmp_path / "new_calls.json").read_text())["waits"]
    assert [wait["streams"] for wait in waits] == [0, 4]
    for wait in waits:
        assert all(0 < ms < 1000 for ms in (*wait["rounds_one_ms"], *wait["rounds_burst_ms"]))
        assert wait["one_ms"] == pytest.approx(sum(wait["rounds_one_ms"]) / 2)
    with pytest.raises(RuntimeError, match=r"^only \d of 4 streams still ran .*: raise --tokens$"):
        new_calls.main(["--streams", "4", "--tokens", "20", *few])


def test_front_model_compares_grpc_with_the_engine_of_the_same_worker(tmp_path: Path) -> None:
    size = ("--streams", "6", "--prompt-tokens", "8", "--new-tokens", "20")
    front_model.main([*TINY, *ON_CPU, *size, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "front_model.json").read_text())
    paces = result["paces"]
    assert [pace["path"] for pace in paces] == ["engine", "grpc", "grpc", "engine"]
    assert [pace["tokens"] for pace in paces] == [6 * 20] * 4
    first, second, third, fourth = (pace["tokens_per_second"] for pace in paces)
    assert result["grpc_over_engine"] == pytest.approx((second + third) / (first + fourth))


def test_observed_runs_with_everything_off_and_on(tmp_path: Path) -> None:
    observed.main(["--streams", "3", "--tokens", "5", "--repeats", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "observed.json").read_text())
    off, on = result["runs"]
    assert (off["observed"], off["spans"]) == (False, 0)
    # A call, its queue, prefill and decode.
    assert (on["observed"], on["spans"], on["tokens"]) == (True, 4 * 3, 15)
    assert result["observed_over_not"]["tokens_per_second"] == on["tokens_per_second"] / off["tokens_per_second"]


def test_restart_finds_the_stream_whole_and_the_server_back(tmp_path: Path) -> None:
    tiny = ("--model", "random:tiny-llama", "--dtype", "float32", "--threads", "1")
    restart.main([*tiny, "--repeats", "1", "--tokens", "600", "--settled", "0", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "restart.json").read_text())
    (kill,) = result["kills"]
    assert 0 < kill["serving_seconds"] < result["first_start_seconds"]
    assert kill["next_token_seconds"] > 0
    memory = result["memory_mib"]
    assert memory["worker_own"] < memory["worker_resident"]
