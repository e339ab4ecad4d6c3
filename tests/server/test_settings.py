"""Flags and variables become settings, or one message that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o.config import D2OConfig, Policy
from d2o_server.__main__ import main
from d2o_server.engine.types import AutoCompression
from d2o_server.errors import SettingsError
from d2o_server.settings import Settings, TelemetrySettings, from_arguments


def read(*arguments: str, **variables: str) -> Settings:
    return from_arguments(arguments, {f"D2O_SERVE_{name}": value for name, value in variables.items()})


def test_the_defaults_serve_the_default_model_on_the_loopback_address() -> None:
    settings = read()
    assert (settings.worker.model, settings.worker.dtype, settings.worker.device) == (
        "smollm2-135m-instruct",
        "auto",
        "auto",
    )
    assert (settings.worker.prefill_tokens, settings.worker.gpu_memory_utilization) == (None, 0.95)
    assert (settings.worker.graphs, settings.worker.compile, settings.worker.compile_cache) == (True, True, None)
    assert (settings.listen.host, settings.listen.port) == ("127.0.0.1", 50051)
    compression = settings.compression
    assert isinstance(compression, D2OConfig)
    assert (compression.policy, compression.ratio, compression.min_budget) == (Policy.D2O, 0.4, 1024)


def test_flags_are_read() -> None:
    settings = read("--compression", "snapkv", "--budget-tokens", "512", "--num-pages", "99", "--reflection")
    assert settings.compression == D2OConfig.of(Policy.SNAPKV, budget_tokens=512)
    assert settings.worker.num_pages == 99
    assert settings.listen.reflection


def test_auto_compresses_with_the_flags_of_d2o() -> None:
    settings = read("--compression", "auto", "--ratio", "0.2", AUTO_FULL_TOKENS="512")
    assert settings.compression == AutoCompression(D2OConfig(ratio=0.2))
    assert settings.auto_full_tokens == 512
    with pytest.raises(SettingsError, match=r"^auto_full_tokens: got -1, allowed is"):
        read("--auto-full-tokens", "-1")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_device_is_passed_on_as_it_is_spelled(device: str) -> None:
    (worker,) = read("--device", device).workers
    assert (worker.device, worker.index) == (device, 0)


def test_gpu_flags_are_read() -> None:
    settings = read("--no-graphs", "--gpu-memory-utilization", "0.8", COMPILE="false", COMPILE_CACHE="/kept")
    worker = settings.worker
    assert (worker.graphs, worker.compile, worker.compile_cache) == (False, False, "/kept")
    assert worker.gpu_memory_utilization == 0.8


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_workers_differ_in_their_number_and_share_threads_and_memory(device: str) -> None:
    workers = read(f"--device={device}", "--data-parallel=3", "--threads=8", "--memory-fraction=0.6").workers
    assert [worker.index for worker in workers] == [0, 1, 2]
    assert {(worker.device, worker.threads, round(worker.memory_fraction, 9)) for worker in workers} == {
        (device, 2, 0.2)
    }


def test_each_rank_of_each_worker_has_its_gpu_and_its_share() -> None:
    workers = read("--data-parallel=2", "--tensor-parallel=2", "--threads=8", "--memory-fraction=0.8").workers
    ranks = [worker.rank(number) for worker in workers for number in range(2)]
    assert [rank.index for rank in ranks] == [0, 1, 2, 3]
    assert {(rank.threads, rank.memory_fraction) for rank in ranks} == {(2, 0.2)}


def test_every_worker_has_a_thread() -> None:
    assert [worker.threads for worker in read("--data-parallel=4", "--threads=2").workers] == [1] * 4


def test_variables_stand_in_for_flags_and_flags_win() -> None:
    settings = read("--port", "1", PORT="2", NUM_PAGES="7", CHECK_INTEGRITY="true", TLS_KEY="k.pem", LOG_LEVEL="debug")
    assert settings.listen.port == 1
    assert settings.worker.num_pages == 7
    assert settings.worker.check_integrity
    assert settings.listen.tls_key == Path("k.pem")
    assert settings.log_level == "DEBUG"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--page-size 33", "page_size: got 33, allowed is a power of two up to 256"),
        ("--page-size 0", "page_size: got 0, allowed is at least 1"),
        ("--threads 0", "threads: got 0, allowed is at least 1"),
        ("--num-pages 0", "num_pages: got 0, allowed is at least 1"),
        ("--max-model-len 0", "max_model_len: got 0, allowed is at least 2"),
        ("--max-model-len 1", "max_model_len: got 1, allowed is at least 2"),
        ("--max-sequences 0", "max_sequences: got 0, allowed is at least 1"),
        ("--prefill-tokens -1", "prefill_tokens: got -1, allowed is at least 1"),
        ("--device gpu", "device: got 'gpu', allowed is auto, cpu, cuda or cuda:N"),
        ("--device cuda:", "device: got 'cuda:', allowed is auto, cpu, cuda or cuda:N"),
        ("--device cuda:1x", "device: got 'cuda:1x', allowed is auto, cpu, cuda or cuda:N"),
        ("--tensor-parallel 0", "tensor_parallel: got 0, allowed is at least 1"),
        ("--tensor-parallel 2 --device cuda:1", "device: got 'cuda:1' for tensor_parallel 2, allowed is auto, cpu or"),
        ("--data-parallel 0", "data_parallel: got 0, allowed is at least 1"),
        ("--data-parallel 2 --device cuda:1", "device: got 'cuda:1' for 2 workers, allowed is auto, cpu or cuda;"),
        ("--gpu-memory-utilization 0", "gpu_memory_utilization: got 0.0, allowed is (0, 1]"),
        ("--gpu-memory-utilization nan", "gpu_memory_utilization: got nan, allowed is (0, 1]"),
        ("--memory-fraction nan", "memory_fraction: got nan, allowed is (0, 1]"),
        ("--memory-fraction 1.5", "memory_fraction: got 1.5, allowed is (0, 1]"),
        ("--max-waiting 0", "max_waiting: got 0, allowed is at least 1"),
        ("--max-waiting-tokens 0", "max_waiting_tokens: got 0, allowed is at least 1"),
        ("--max-new-tokens 0", "default_max_new_tokens: got 0, allowed is at least 1"),
        ("--drain-window -1", "drain_window: got -1.0, allowed is at least 0"),
        ("--drain-grace nan", "drain_grace: got nan, allowed is at least 0"),
        ("--drain-window inf", "drain_window: got inf, allowed is at least 0 and at most 86400 seconds"),
        ("--drain-window 1e300", "drain_window: got 1e+300, allowed is at least 0 and at most 86400 seconds"),
        ("--drain-grace inf", "drain_grace: got inf, allowed is at least 0 and at most 86400 seconds"),
        ("--drain-grace 1e300", "drain_grace: got 1e+300, allowed is at least 0 and at most 86400 seconds"),
        ("--port 7 --metrics-port 7", "port, metrics_port: got 7 for both, allowed are two different ports"),
        ("--port 9400", "port, metrics_port: got 9400 for both, allowed are two different ports"),
        ("--rate-limit -1", "rate_limit: got -1, allowed is at least 0"),
        ("--log-level loud", "log_level: got 'LOUD', allowed is DEBUG, INFO, WARNING, ERROR"),
        ("--ratio 0", "compression.ratio: got 0.0, allowed is a number in (0, 1]"),
        ("--score-queries some", "compression.score_queries: got 'some', allowed is 'all', 'last:W'"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_what_is_allowed(flags: str, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read(*flags.split())
    assert str(refused.value).startswith(message)


def test_ports_that_are_chosen_later_or_not_at_all_are_no_two_alike() -> None:
    settings = read("--port", "0", "--metrics-port", "0")
    assert (settings.listen.port, settings.telemetry.metrics_port) == (0, 0)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("COMPRESSION", "none, d2o, h2o"), ("DTYPE", "auto, bfloat16, float16, float32"), ("REFLECTION", "true or false")],
)
def test_a_variable_is_held_to_its_flag_s_choices(name: str, allowed: str) -> None:
    with pytest.raises(SettingsError, match=f"^D2O_SERVE_{name}: got 'nonsense', allowed is {allowed}"):
        read(**{name: "nonsense"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 70000", "d2o-serve: port: got 70000, allowed is [0, 65535] (0 takes any free port)\n"),
        (
            "--max-client-pages 5",
            "d2o-serve: max_client_pages: got 5, allowed is 0 without api_keys or tls_client_ca: ",
        ),
        ("--max-connection-age-grace 5", "d2o-serve: max_connection_age_grace: got 5.0, allowed is none without max_"),
        ("--tls-certificate a.pem", "d2o-serve: tls_key: got nothing, allowed is a PEM file"),
        ("--host 203.0.113.1", "d2o-serve: host, port: got 203.0.113.1:50051, allowed is an address of this machine"),
        ("--model random:nonsense --port 0", "d2o-serve: model: got random:nonsense, allowed presets are tiny-llama"),
        ("--model / --port 0", "d2o-serve: model: / has no config.json, a Hugging Face model folder is needed\n"),
    ],
)
def test_what_cannot_be_served_ends_with_status_1_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert main(flags.split()) == 1
    written = capsys.readouterr()
    assert written.err.startswith(message)
    assert (written.err.count("\n"), written.out) == (1, "")


def test_telemetry_flags_are_read() -> None:
    assert read().telemetry == TelemetrySettings(metrics_port=9400)
    telemetry = read("--metrics-port", "0", "--trace", "console", "--no-access-log", LOG_FORMAT="json").telemetry
    assert telemetry == TelemetrySettings(metrics_port=0, trace="console", log_format="json", access_log=False)
    assert read("--log-prompts").telemetry.log_prompts


def test_the_metrics_port_has_a_second_name_that_the_first_overrides() -> None:
    assert from_arguments([], {"D2O_METRICS_PORT": "9"}).telemetry.metrics_port == 9
    assert from_arguments([], {"D2O_METRICS_PORT": "9", "D2O_SERVE_METRICS_PORT": "8"}).telemetry.metrics_port == 8


@pytest.mark.parametrize("target", ["http://localhost:4317", "https://[::1]:4317", "http://otel.example/", "console"])
def test_a_trace_target_is_an_endpoint_or_the_console(target: str) -> None:
    assert read("--trace", target).telemetry.trace == target


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--metrics-port", "65536"), r"metrics_port: got 65536, allowed is \[0, 65535\] \(0 is off\)"),
        (("--trace", "localhost:4317"), "trace: got 'localhost:4317', allowed is console or an OTLP endpoint"),
        (("--trace", "http://a:4317/v1/traces"), "trace: got "),
        (("--trace", ""), "trace: got ''"),
    ],
)
def test_telemetry_out_of_bounds_is_named(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read(*flags)
