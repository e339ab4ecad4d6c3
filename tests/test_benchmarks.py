"""The benchmarks run whole at a tiny scale, and what they derive from a run is right."""

from __future__ import annotations

import json
import re
import time
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    attention_cpu,
    baseline_cpu,
    concurrency,
    concurrency_gpu,
    data_parallel,
    dtype_cpu,
    equal_pool,
    first_token,
    neighbour_cpu,
    plot,
    reserve_gpu,
    short_prompts_gpu,
    step_limits_gpu,
    throughput,
)
from benchmarks._floor import Work
from benchmarks._gpu import Ceilings
from benchmarks._load import Load, Outcome
from benchmarks._machine import Machine
from benchmarks._pool import cache_shape, most_at_once, pool_pages
from benchmarks._prompts import make_prompts
from benchmarks._server import Reply, check_complete, child_environment
from benchmarks._serving import Window
from d2o_client import CacheFacts, Compression, Finished, FinishReason, Started, Usage
from d2o_server.engine.scheduler import StepPlan
from d2o_server.settings import worker_settings
from d2o_server.worker.build import build_worker
from d2o_server.worker.runner import Launched, Scored
from tests.server.worker.kernel_harness import KernelHarness

ON_CPU = ("--server-flags", "--device cpu", "--client-processes", "2")
TINY = ("--model", "random:tiny-llama", "--dtype", "float32", "--threads", "1")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(f"On day {day} the ship was {day * 7} miles from home." for day in range(400)))
    return path


def reply(*times: float, queued: float, first: float, tokens: int = 3, starts: int = 1) -> Reply:
    """A stream whose request waited ``queued`` seconds and got its first token after ``first``."""
    usage = Usage(
        prompt_tokens=4,
        completion_tokens=tokens,
        queue_seconds=queued,
        first_token_seconds=first,
        total_seconds=times[-1],
    )
    cache = CacheFacts(layers=(), ratio_reached=1.0, peak_pages=1, compression_seconds=0.0)
    started = Started(
        generation_id="a", prompt_tokens=4, reserved_pages=3, compression=Compression(), budget_per_layer=0, seed=0
    )
    finished = Finished(reason=FinishReason.LENGTH, usage=usage, cache=cache)
    return Reply(token_ids=tuple(range(tokens)), times=times, starts=starts, started=started, finished=finished)


@pytest.fixture(scope="module")
def concurrency_result(story: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("concurrency")
    size = ("--requests", "6", "--prompt-tokens", "250", "--new-tokens", "40", "--pool-tokens", "640")
    budget = ("--ratios", "0.2", "--min-budget", "16", "--prefill-tokens", "256")
    concurrency.main([*TINY, *size, *budget, "--text", str(story), "--out", str(folder)])
    return json.loads((folder / "concurrency.json").read_text()), folder


def test_concurrency_runs_more_at_once_with_d2o_than_the_pool_holds_full_caches(
    concurrency_result: tuple[dict[str, Any], Path],
) -> None:
    result, _ = concurrency_result
    none, d2o = result["policies"]
    assert (none["label"], d2o["label"]) == ("none", "d2o 0.2")
    # 640 tokens hold two full caches of 290.
    assert none["at_once"] == 2
    assert none["mean_at_once_while_queued"] <= 2
    assert d2o["at_once"] > 2
    assert result["over_none"]["d2o 0.2"]["at_once"] == d2o["at_once"] / 2
    assert none["mean_ratio_reached"] == 1.0
    assert d2o["mean_ratio_reached"] < 0.4


def test_concurrency_leaves_no_page_and_stays_within_the_pool(
    concurrency_result: tuple[dict[str, Any], Path],
) -> None:
    result, _ = concurrency_result
    for policy in result["policies"]:
        assert (policy["pages_used_afterwards"], policy["pages_reserved_afterwards"]) == (0, 0)
        assert 0 < policy["peak_pages_in_use"] <= result["settings"]["pool_pages"]
        assert 0 < policy["peak_pages"] <= policy["reserved_pages_per_request"]


def test_concurrency_draws_its_plot(concurrency_result: tuple[dict[str, Any], Path]) -> None:
    _, folder = concurrency_result
    image = folder / "concurrency.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    image.unlink()
    plot.main(["--out", str(folder)])
    assert image.exists()


def test_in_float32_all_contenders_of_the_baseline_give_the_same_tokens(story: Path, tmp_path: Path) -> None:
    size = ("--requests", "3", "--prompt-tokens", "40", "--new-tokens", "6")
    rounds = ("--repeats", "1", "--cb-batch-tokens", "64")
    baseline_cpu.main([*TINY, *size, *rounds, "--text", str(story), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "baseline_cpu.json").read_text())
    assert list(result["contenders"])[-1] == "d2o-serve"
    assert len(result["comparison"]) == 2
    for row in result["comparison"].values():
        assert row["agreement"] == {"first_token": 1, "common_prefix_tokens": 6, "same_tokens": 1}
        assert row["ours_over_it"] > 0


def test_prompts_are_all_different_and_the_same_in_every_run() -> None:
    first, again = (make_prompts("random:tiny-llama", count=5, tokens=1000) for _ in range(2))
    assert first == again
    assert len(set(first.token_ids)) == 5
    assert {len(ids) for ids in first.token_ids} == {1000}
    assert first.source.startswith("docstrings of transformers ")


def test_a_text_that_is_too_short_is_refused(story: Path) -> None:
    with pytest.raises(ValueError, match=r"text: got \d+ tokens, needed are 900 prompts of 100 tokens"):
        make_prompts("random:tiny-llama", count=900, tokens=100, text=story)


def test_machine_facts_name_no_folder_and_the_commit() -> None:
    facts = json.dumps(Machine().as_json())
    assert str(Path.home()) not in facts
    assert str(Path(__file__).resolve().parent.parent) not in facts
    assert re.search(r'"commit": "([0-9a-f]{40}|unknown)', facts)


def test_a_server_that_is_measured_hears_nothing_of_what_its_shell_says_of_servers_and_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"D2O_SERVE_PAGE_SIZE": "8", "GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "active", "D2O_TEST_WORD": "kept"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    environment = child_environment({"GOMP_SPINCOUNT": "300000"})
    assert {name: environment.get(name) for name in said} == {
        "D2O_SERVE_PAGE_SIZE": None,
        "GOMP_SPINCOUNT": "300000",
        "OMP_WAIT_POLICY": None,
        "D2O_TEST_WORD": "kept",
    }


def test_decode_only_time_leaves_out_every_prefill() -> None:
    # Prefills from 0 to 2 and from 5 to 7; the run ends at 9.
    first = reply(2.0, 3.0, 4.0, 6.0, 8.0, queued=0.0, first=2.0)
    second = reply(7.0, 9.0, queued=5.0, first=7.0)
    tokens, seconds = concurrency.decode_only_tokens([first, second])
    assert (tokens, seconds) == (4, 5.0)


def test_tokens_that_arrive_together_are_one_arrival() -> None:
    assert reply(1.0, 1.0, 3.0, queued=0.0, first=1.0).gaps == [2.0]


@pytest.mark.parametrize("wrong", [{"tokens": 2}, {"starts": 2}])
def test_a_stream_that_was_cut_or_started_twice_fails_the_benchmark(wrong: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match="request 1: got"):
        check_complete([reply(1.0, queued=0.0, first=1.0), reply(1.0, queued=0.0, first=1.0, **wrong)], 3)


def test_attention_cpu_times_every_contender(tmp_path: Path) -> None:
    attention_cpu.main(
        [
            "--threads",
            "1",
            "--tokens",
            "96",
            "--sequences",
            "2",
            "--slots",
            "40",
            "--repeats",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert set(result["prefill_ms_a_layer"]["bfloat16"]) == {"flash_kernel", "tiles", "tiles_with_column_sums"}
    assert set(result["decode_ms_a_layer"]) == {"default_malloc", "raised_thresholds"}
    figures = [*result["prefill_ms_a_layer"].values(), *result["decode_ms_a_layer"].values()]
    assert all(value > 0 for part in figures for value in part.values())


def test_throughput_compares_every_workload_and_policy_with_vllm(tmp_path: Path) -> None:
    size = ("--workloads", "512+256", "--scale", "0.01", "--client-processes", "2", "--warm-up", "1")
    server = "--device cpu --prefill-tokens 512 --page-size 16"
    throughput.main([*TINY, *size, "--server-flags", server, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert (result["settings"]["page_size"], result["settings"]["scale"]) == (16, 0.01)
    (workload,) = result["workloads"]
    assert (workload["name"], workload["vllm"]) == ("512+256", 10069)
    none, d2o = workload["runs"]
    assert (none["policy"], d2o["policy"]) == ("none", "d2o")
    assert result["ceilings"] is None
    for run in (none, d2o):
        assert (run["floor_seconds"], run["of_floor"]) == (None, None)
        assert run["requests"] == run["at_once"] == 6
        assert run["output_tokens_per_second"] == pytest.approx(6 * 256 / run["seconds"])
        assert run["over_vllm"] == pytest.approx(run["output_tokens_per_second"] / 10069)
        assert run["total_tokens_per_second"] == pytest.approx(3 * run["output_tokens_per_second"])
        assert run["ttft_seconds"]["p50"] <= run["ttft_seconds"]["p99"] < run["seconds"]
        # Six sequences in three layers, 48 pages each.
        assert 0 < run["peak_pages_in_use"] <= 6 * 3 * 48
        assert run["front_busy"] > 0
    # A budget of at least 1,024 covers 768 tokens.
    assert d2o["mean_ratio_reached"] == 1.0


def test_two_workers_serve_twice_the_requests_of_one(tmp_path: Path) -> None:
    size = ("--cells", "512+256:none", "--scale", "0.006", "--out", str(tmp_path))
    data_parallel.main([*TINY, *size, "--server-flags", "--device cpu --prefill-tokens 512"])
    result = json.loads((tmp_path / "data_parallel.json").read_text())
    one, two = result["servers"]
    assert (one["workers"], two["workers"]) == (1, 2)
    assert two["settings"]["pool_bytes"] > 0
    (alone,), (both,) = one["runs"], two["runs"]
    assert (alone["requests"], both["requests"]) == (4, 8)
    assert both["at_once"] == 8
    ratio = both["output_tokens_per_second"] / alone["output_tokens_per_second"]
    assert result["over_one"] == {"512+256:none": pytest.approx(ratio)}


def test_one_worker_is_not_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        data_parallel.main([*TINY, "--workers", "1"])
    assert "argument --workers: got 1, must be at least 2" in capsys.readouterr().err


def load(requests: int, seed: int = 0) -> Load:
    return Load(
        target="",
        requests=requests,
        prompt_tokens=50,
        new_tokens=1,
        compression={},
        vocabulary_size=8,
        excluded=(0, 5),
        seed=seed,
    )


def test_random_prompts_do_not_depend_on_how_many_processes_send_them() -> None:
    parts = load(7).split(3)
    assert [part.requests for part in parts] == [3, 2, 2]
    assert [ids for part in parts for ids in part.prompts()] == load(7).prompts() != load(7, seed=1).prompts()
    assert len(load(2).split(5)) == 2


def test_random_prompts_leave_out_special_tokens() -> None:
    assert {token for ids in load(20).prompts() for token in ids} == {1, 2, 3, 4, 6, 7}


def outcome(*arrivals: float, counts: tuple[int, ...] = ()) -> Outcome:
    return Outcome(
        arrivals=array("d", arrivals),
        counts=array("i", counts or (1,) * len(arrivals)),
        queue_seconds=0.0,
        peak_pages=1,
        ratio_reached=1.0,
    )


def test_prompts_are_in_from_the_last_first_token_to_the_first_last_one() -> None:
    window = Window.of([outcome(1.0, 2.0, 3.0, 4.0, 5.0), outcome(2.5, 4.5, 6.5, counts=(1, 2, 1))])
    assert window is not None
    # From 2.5 to 5.0: tokens at 3, 4 and 5, and two at 4.5.
    assert (window.seconds, window.tokens) == (2.5, 5)
    assert window.output_tokens_per_second == pytest.approx(2.0)
    assert window.itl_seconds["p50"] == 1.0


def test_there_is_no_such_time_where_a_stream_ended_before_another_began() -> None:
    assert Window.of([outcome(1.0, 2.0), outcome(3.0, 4.0)]) is None


def test_a_pool_holds_the_last_prompt_in_full_beside_what_the_others_keep() -> None:
    shape = cache_shape("random:tiny-llama", 32)
    size = {"prompt_tokens": 1024, "new_tokens": 1024}
    pages = pool_pages(shape, 4 * 2048)
    assert most_at_once(shape, pages, **size, compression={"policy": "none"}) == 4
    assert most_at_once(shape, pages - 1, **size, compression={"policy": "none"}) == 3
    # 256 slots and a page of slack, rounded up over three layers: 29 pages a request, and 96 while it is read.
    tight = {"policy": "d2o", "budget_tokens": 256}
    assert most_at_once(shape, 96 + 5 * 29, **size, compression=tight) == 6
    assert most_at_once(shape, 96 + 5 * 29 - 1, **size, compression=tight) == 5
    assert most_at_once(shape, 95, **size, compression=tight) == 0


def test_equal_pool_fills_the_pool_and_compares_with_the_full_cache(tmp_path: Path) -> None:
    cells = ("1024+8192:none", "1024+8192:d2o", "512+256:tight")
    size = ("--shrink", "32", "--page-size", "4", "--pool-tokens", "60000")
    equal_pool.main([*TINY, *ON_CPU, *size, "--cells", *cells, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "equal_pool.json").read_text())
    assert result["settings"]["pool_full_cache_tokens"] == 60000 // 32 // 4 * 4 + 4 * (60000 // 32 % 4 > 0)
    grown, ample = result["workloads"]
    assert (grown["prompt_tokens"], grown["new_tokens"]) == (32, 256)
    none, d2o = grown["runs"]
    assert none["requests"] == none["at_once"] == int(grown["full_caches_in_pool"]) == 6
    assert d2o["requests"] > 6 * none["requests"]
    rates = [run["counted_tokens_per_second"] for run in (none, d2o)]
    assert rates == [run["output_tokens_per_second"] for run in (none, d2o)]
    assert grown["over_none"]["d2o"] == pytest.approx(rates[1] / rates[0])
    (tight,) = ample["runs"]
    assert (tight["requests"], ample["over_none"]) == (64, {})


def test_equal_pool_counts_what_its_workload_says() -> None:
    prompts_in = equal_pool.WORKLOADS["32768+512"]
    assert prompts_in.counted == "prompts in"
    assert {workload.counted for workload in equal_pool.WORKLOADS.values()} == {"prompts in", "whole run"}
    assert prompts_in.shrunk(8).policies["d2o"] == {"policy": "d2o", "ratio": 0.2, "min_budget": 128}


def test_a_cell_that_there_is_not_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"cells: got 1\+1:none, allowed are 32768\+512:none, "):
        equal_pool.main([*TINY, "--cells", "1+1:none"])


def test_streams_are_measured_and_drawn_under_both_policies(tmp_path: Path) -> None:
    size = ("--streams", "1", "4", "--prompt-tokens", "100", "--new-tokens", "240")
    concurrency_gpu.main([*TINY, *ON_CPU, *size, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "concurrency_gpu.json").read_text())
    assert [line["policy"] for line in result["policies"]] == ["none", "d2o"]
    for line in result["policies"]:
        assert [run["requests"] for run in line["runs"]] == [1, 4]
        for run in line["runs"]:
            assert run["prompts_in"]["output_tokens_per_second"] > 0
    assert (tmp_path / "concurrency_gpu.png").read_bytes().startswith(b"\x89PNG")


def test_types_on_a_cpu_are_compared_with_what_auto_chooses(tmp_path: Path) -> None:
    sizes = ("--requests", "2", "--prompt-tokens", "20", "--new-tokens", "5", "--repeats", "1", "--threads", "1")
    dtype_cpu.main(["--model", "random:tiny-llama", *sizes, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "dtype_cpu.json").read_text())
    assert result["auto"] in result["medians"]
    for name, ratio in result["bfloat16_over_float32"].items():
        assert ratio == result["medians"]["bfloat16"][name] / result["medians"]["float32"][name] > 0


def test_a_neighbours_cost_is_measured_by_how_long_threads_spin(tmp_path: Path) -> None:
    sizes = ("--requests", "1", "--prompt-tokens", "20", "--new-tokens", "5", "--repeats", "1", "--threads", "1")
    chosen = ("--settings", "libgomp")
    neighbour_cpu.main(["--model", "random:tiny-llama", *sizes, *chosen, "--out", str(tmp_path)])
    (line,) = json.loads((tmp_path / "neighbour_cpu.json").read_text())["runs"]
    assert line["environment"] == {"GOMP_SPINCOUNT": "300000"}
    (alone,), (beside,) = line["seconds_alone"], line["seconds_beside"]
    assert line["beside_over_alone"] == beside / alone > 0


def test_power_is_the_mean_of_whole_samples_while_a_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, said = tmp_path / "nvidia-smi", tmp_path / "said"
    lines = ("650.0, 1980, Not Active", "700.0, 1800, Active", "690.0, 17")
    tool.write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(map(repr, lines))}\ntouch {said}\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    meter = step_limits_gpu.Meter()
    with meter.running():
        while not said.exists():
            time.sleep(0.01)
    # The third was cut off, and of the whole ones the last may have been.
    assert meter.mean() == step_limits_gpu.Readings(watts=650.0, sm_mhz=1980.0, capped=0.0)
    tool.write_text("#!/bin/sh\n")
    with meter.running():
        pass
    with pytest.raises(RuntimeError, match="nvidia-smi gave no sample of power"):
        meter.mean()


def test_memory_is_counted_over_a_load_that_runs_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose counters stand at what they are given here."""
    peaks = {"max_memory_allocated": 70, "memory_allocated": 50, "max_memory_reserved": 95, "memory_reserved": 90}
    for name, count in (peaks | {"mem_get_info": (30, 100), "reset_peak_memory_stats": None}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, count=count: count)
    settings = worker_settings(model="random:tiny-llama", device="cpu", dtype="float32", threads=1, num_pages=4000)
    core = build_worker(settings, lambda _: None).core
    row = reserve_gpu._run(core, "uneven", reserve_gpu.loads_of(4)["uneven"])
    assert row.pop("seconds") > 0
    assert row == {
        "requests": 4,
        "failed": 0,
        "allocated_growth_bytes": 20,
        "reserved_growth_bytes": 5,
        "in_use_bytes": 70,
    }


def test_streams_are_seen_to_wait_for_a_prompt_that_is_read_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = worker_settings(model="random:tiny-llama", device="cpu", dtype="float32", threads=1, num_pages=4000)
    core = build_worker(settings, lambda _: None).core
    launch, slow = core.runner.launch, 0.2

    def read_slowly(plan: StepPlan, scored: Scored) -> Launched:
        if plan.prefill:
            time.sleep(slow)
        return launch(plan, scored)

    config = short_prompts_gpu.CONFIGS["d2o"]
    with short_prompts_gpu._decoding(core, 3, 20, config):
        assert core.pool_state().running == 3
        monkeypatch.setattr(core.runner, "launch", read_slowly)
        assert short_prompts_gpu._gap(core, steps=5) < 1000 * slow
        assert short_prompts_gpu._step_beside(core, 12, config) >= 1000 * slow
    assert not core
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert short_prompts_gpu._first(core, 12, config) >= 1000 * slow
    assert core.pool_state().used == 0


def test_a_step_takes_as_long_as_its_weights_or_its_products() -> None:
    gpu = Ceilings(copy_tb_s=4.0, read_tb_s=4.0, matrix_bf16_tflop_s=800.0)
    work = Work(
        windows=(None,), parameters=7 * 10**9, head_parameters=10**9, pair_operations=1, slot_bytes=1, element_bytes=2
    )
    assert short_prompts_gpu.floor_ms(work, gpu, 10) == pytest.approx(4.0)
    assert short_prompts_gpu.floor_ms(work, gpu, 800) == pytest.approx(14.0)


def test_what_is_timed_in_turn_has_graphs_and_then_none() -> None:
    core = KernelHarness().core
    bodies = short_prompts_gpu._bodies(core)
    bodies._sizes = [128]
    seen: list[list[int]] = []

    def measure() -> float:
        seen.append(bodies._sizes)
        return float(len(seen))

    found = short_prompts_gpu._in_turn(core, measure, repeats=3)
    assert seen == [[128], []] * (short_prompts_gpu._WARM_UP + 3)
    assert found == {"graphs_ms": 9.0, "launched_ms": 10.0}


def test_first_and_second_tokens_are_timed_with_and_without_compression(tmp_path: Path, story: Path) -> None:
    small = ("--prompt-tokens", "120", "--at-once", "2", "--repeats", "2", "--text", str(story))
    first_token.main([*TINY, *small, "--server-flags", "--device cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "first_token.json").read_text())
    assert [row["policy"] for row in result["policies"]] == ["none", "d2o"]
    for row in result["policies"]:
        assert len(row["rounds_first_seconds"]) == len(row["rounds_second_seconds"]) == 2
        pairs = zip(row["rounds_first_seconds"], row["rounds_second_seconds"], strict=True)
        # Both come in one message where the front is behind.
        assert all(0 < first <= second for first, second in pairs)
        assert row["first_seconds"] == sum(row["rounds_first_seconds"]) / 2
