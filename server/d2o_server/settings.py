"""What an operator can set: frozen dataclasses, built once from flags and environment, validated here."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2o.config import ConfigError, D2OConfig, Policy, ScoreQueries
from d2o_server.control_groups import usable_cores
from d2o_server.engine.messages import AUTO_FULL_TOKENS, WorkerSettings
from d2o_server.engine.supervision import Supervision
from d2o_server.engine.types import AutoCompression, Compression
from d2o_server.errors import SettingsError

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_DRAIN_GRACE = 60.0
# Of a termination grace: seconds for what the platform runs before its signal, and for the server's own end.
TERMINATION_RESERVE = 15.0
# A stop that takes longer was never meant.
_LONGEST_DRAIN = 86_400.0
DEFAULT_METRICS_PORT = 9400
TRACE_CONSOLE = "console"
AUTO = "auto"
_ENVIRONMENT_PREFIX = "D2O_SERVE_"
# Understood as well, where the one with the prefix is not set.
_OTHER_NAMES = {"metrics_port": "D2O_METRICS_PORT"}
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_LOG_FORMATS = ("text", "json")
_TRACE_ENDPOINT = re.compile(r"https?://[^/\s:]+(:[0-9]+)?/?|https?://\[[0-9a-fA-F:]+\](:[0-9]+)?/?")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """Bounds on what waits. ``max_wait``, ``drain_window`` and ``drain_grace`` are seconds."""

    max_waiting: int = 256
    max_waiting_tokens: int = 1_000_000
    max_wait: float = 600.0
    default_max_new_tokens: int = 256
    max_logprobs: int = 20
    drain_window: float = 2.0
    drain_grace: float = DEFAULT_DRAIN_GRACE

    def __post_init__(self) -> None:
        for name, low in (("max_waiting", 1), ("max_waiting_tokens", 1), ("default_max_new_tokens", 1)):
            _at_least(name, getattr(self, name), low)
        _at_least("max_logprobs", self.max_logprobs, 0)
        for name in ("drain_window", "drain_grace"):
            _within_a_day(name, getattr(self, name))
        if not 0 < self.max_wait < math.inf:
            raise SettingsError(f"max_wait: got {self.max_wait}, allowed is a positive number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """Where the server listens, and to whom; see ``rpc.server.RpcSettings``. A limit of 0 is any number."""

    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = False
    api_keys: Path | None = None
    rate_limit: int = 0
    max_client_streams: int = 0
    max_client_pages: int = 0
    max_connections: int = 1000
    max_connection_age: float = 0.0
    max_connection_age_grace: float | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        for name in ("rate_limit", "max_client_streams", "max_client_pages", "max_connections"):
            _at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """What the server says of itself. ``metrics_port`` 0: no metrics; ``trace``: an OTLP endpoint or ``console``."""

    metrics_port: int = 0
    trace: str | None = None
    log_format: str = "text"
    log_prompts: bool = False
    access_log: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.metrics_port <= 65535:
            raise SettingsError(f"metrics_port: got {self.metrics_port}, allowed is [0, 65535] (0 is off)")
        if self.log_format not in _LOG_FORMATS:
            raise SettingsError(f"log_format: got {self.log_format!r}, allowed is {' or '.join(_LOG_FORMATS)}")
        if self.trace is not None and self.trace != TRACE_CONSOLE and not _TRACE_ENDPOINT.fullmatch(self.trace):
            raise SettingsError(
                f"trace: got {self.trace!r}, allowed is {TRACE_CONSOLE} or an OTLP endpoint over gRPC such as"
                " http://localhost:4317"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything, composed. ``worker`` is what all ``data_parallel`` workers have in common: see ``workers``."""

    worker: WorkerSettings
    data_parallel: int = 1
    compression: Compression = field(default_factory=D2OConfig)
    auto_full_tokens: int = AUTO_FULL_TOKENS
    limits: LimitSettings = field(default_factory=LimitSettings)
    listen: ListenSettings = field(default_factory=ListenSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    supervision: Supervision = field(default_factory=Supervision)
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if self.log_level not in _LOG_LEVELS:
            raise SettingsError(f"log_level: got {self.log_level!r}, allowed is {', '.join(_LOG_LEVELS)}")
        if self.listen.port and self.listen.port == self.telemetry.metrics_port:
            raise SettingsError(
                f"port, metrics_port: got {self.listen.port} for both, allowed are two different ports; port 0 takes"
                " any free one, and metrics_port 0 is no metrics"
            )
        _at_least("data_parallel", self.data_parallel, 1)
        _at_least("auto_full_tokens", self.auto_full_tokens, 0)
        if self.data_parallel > 1 and self.worker.device.startswith("cuda:"):
            raise SettingsError(
                f"device: got {self.worker.device!r} for {self.data_parallel} workers, allowed is auto, cpu or cuda;"
                " on cuda each worker takes the GPU of its own number"
            )

    @property
    def workers(self) -> tuple[WorkerSettings, ...]:
        """Each worker's own settings; threads and, on a CPU, memory are shared out among them."""
        return tuple(self.worker.share(index, self.data_parallel) for index in range(self.data_parallel))


def worker_settings(**changes: object) -> WorkerSettings:
    """Worker settings with defaults filled in.

    Raises:
        SettingsError: a value is out of bounds.
    """
    values: dict[str, object] = {
        "model": DEFAULT_MODEL,
        "dtype": "auto",
        "device": "auto",
        "index": 0,
        "tensor_parallel": 1,
        "threads": usable_cores(),
        "page_size": 32,
        "num_pages": None,
        "memory_fraction": 0.5,
        "gpu_memory_utilization": 0.95,
        "max_model_len": None,
        "max_sequences": 256,
        "prefill_tokens": None,
        "graphs": True,
        "compile": True,
        "compile_cache": None,
        "check_integrity": False,
    }
    settings = WorkerSettings(**(values | changes))  # type: ignore[arg-type]
    if not _DEVICE.fullmatch(settings.device):
        raise SettingsError(f"device: got {settings.device!r}, allowed is auto, cpu, cuda or cuda:N")
    for name in ("tensor_parallel", "threads", "page_size", "max_sequences"):
        _at_least(name, getattr(settings, name), 1)
    # The shortest request is one token of prompt and one of output.
    for name, low in (("num_pages", 1), ("max_model_len", 2), ("prefill_tokens", 1)):
        if getattr(settings, name) is not None:
            _at_least(name, getattr(settings, name), low)
    if settings.tensor_parallel > 1 and settings.device.startswith("cuda:"):
        raise SettingsError(
            f"device: got {settings.device!r} for tensor_parallel {settings.tensor_parallel}, allowed is auto, cpu or"
            " cuda; on cuda each rank takes a GPU of its own"
        )
    if settings.page_size & (settings.page_size - 1) or settings.page_size > 256:
        raise SettingsError(f"page_size: got {settings.page_size}, allowed is a power of two up to 256")
    for name in ("memory_fraction", "gpu_memory_utilization"):
        if not 0 < getattr(settings, name) <= 1:
            raise SettingsError(f"{name}: got {getattr(settings, name)}, allowed is (0, 1]")
    if settings.dtype not in _DTYPES:
        raise SettingsError(f"dtype: got {settings.dtype!r}, allowed is auto, bfloat16, float16 or float32")
    return settings


def _at_least(name: str, given: float, low: float) -> None:
    if not given >= low:
        raise SettingsError(f"{name}: got {given}, allowed is at least {low}")


def _within_a_day(name: str, given: float) -> None:
    if not 0 <= given <= _LONGEST_DRAIN:
        raise SettingsError(f"{name}: got {given}, allowed is at least 0 and at most {_LONGEST_DRAIN:g} seconds")


def from_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Reads flags, and for flags that are not given ``D2O_SERVE_`` and the flag's name in capitals.

    Raises:
        SettingsError: a value is out of bounds. SystemExit: the flags cannot be parsed, or ask for help.
    """
    parsed = _parser(environment).parse_args(arguments)
    worker = worker_settings(
        model=parsed.model,
        dtype=parsed.dtype,
        device=parsed.device,
        tensor_parallel=parsed.tensor_parallel,
        threads=parsed.threads,
        page_size=parsed.page_size,
        num_pages=parsed.num_pages,
        memory_fraction=parsed.memory_fraction,
        gpu_memory_utilization=parsed.gpu_memory_utilization,
        max_model_len=parsed.max_model_len,
        max_sequences=parsed.max_sequences,
        prefill_tokens=parsed.prefill_tokens,
        graphs=parsed.graphs,
        compile=parsed.compile,
        compile_cache=None if parsed.compile_cache is None else str(parsed.compile_cache),
        check_integrity=parsed.check_integrity,
    )
    return Settings(
        worker=worker,
        data_parallel=parsed.data_parallel,
        compression=_compression(parsed),
        auto_full_tokens=parsed.auto_full_tokens,
        limits=LimitSettings(
            max_waiting=parsed.max_waiting,
            max_waiting_tokens=parsed.max_waiting_tokens,
            max_wait=parsed.max_wait,
            default_max_new_tokens=parsed.max_new_tokens,
            drain_window=parsed.drain_window,
            drain_grace=_drain_grace(parsed.drain_grace, parsed.drain_window, parsed.termination_grace),
        ),
        listen=ListenSettings(
            host=parsed.host,
            port=parsed.port,
            reflection=parsed.reflection,
            api_keys=parsed.api_keys,
            rate_limit=parsed.rate_limit,
            max_client_streams=parsed.max_client_streams,
            max_client_pages=parsed.max_client_pages,
            max_connections=parsed.max_connections,
            max_connection_age=parsed.max_connection_age,
            max_connection_age_grace=parsed.max_connection_age_grace,
            tls_certificate=parsed.tls_certificate,
            tls_key=parsed.tls_key,
            tls_client_ca=parsed.tls_client_ca,
        ),
        telemetry=TelemetrySettings(
            metrics_port=parsed.metrics_port,
            trace=parsed.trace,
            log_format=parsed.log_format,
            log_prompts=parsed.log_prompts,
            access_log=parsed.access_log,
        ),
        supervision=Supervision(worker_timeout=parsed.worker_timeout, worker_restarts=parsed.worker_restarts),
        log_level=parsed.log_level.upper(),
    )


def _drain_grace(given: float | None, window: float, termination: float | None) -> float:
    """Seconds for running streams, out of the whole time that the platform gives where that is known."""
    if termination is None:
        return DEFAULT_DRAIN_GRACE if given is None else given
    if given is not None:
        raise SettingsError(
            f"drain_grace: got {given} beside termination_grace {termination}, allowed is one of them: the latter"
            " already says how long streams may run"
        )
    _within_a_day("drain_window", window)
    least = window + TERMINATION_RESERVE
    if not least < termination <= _LONGEST_DRAIN:
        raise SettingsError(
            f"termination_grace: got {termination}, allowed is more than {least:g}: drain_window {window:g} and"
            f" {TERMINATION_RESERVE:g} for a hook before the signal and for the end itself; and at most"
            f" {_LONGEST_DRAIN:g}"
        )
    return termination - least


def _compression(parsed: argparse.Namespace) -> Compression:
    auto = parsed.compression == AUTO
    try:
        config = D2OConfig.of(
            Policy.D2O if auto else parsed.compression,
            ratio=parsed.ratio,
            min_budget=parsed.min_budget,
            budget_tokens=parsed.budget_tokens,
            **({} if parsed.score_queries is None else {"score_queries": ScoreQueries.parse(parsed.score_queries)}),
        )
    except ConfigError as error:
        raise SettingsError(str(error)) from None
    return AutoCompression(config) if auto else config


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2o-serve",
        description="Streams text from a language model over gRPC, from KV caches that D2O compresses.",
        epilog=f"Every flag can also be set as {_ENVIRONMENT_PREFIX}NAME, with dashes as underscores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _model_flags(parser)
    _device_flags(parser)
    _compression_flags(parser)
    _serving_flags(parser)
    _telemetry_flags(parser)
    known = {action.dest: action for action in parser._actions if action.dest != "help"}
    for name, action in known.items():
        given = environment.get(_ENVIRONMENT_PREFIX + name.upper(), environment.get(_OTHER_NAMES.get(name, "")))
        if given is not None:
            action.default = _environment_value(action, given)
    return parser


def _environment_value(action: argparse.Action, given: str) -> object:
    if isinstance(action, argparse.BooleanOptionalAction):
        if given.lower() not in ("0", "1", "true", "false"):
            raise SettingsError(f"{_ENVIRONMENT_PREFIX}{action.dest.upper()}: got {given!r}, allowed is true or false")
        return given.lower() in ("1", "true")
    # argparse checks the choices of flags only.
    if action.choices is not None and given not in action.choices:
        allowed = ", ".join(action.choices)
        raise SettingsError(f"{_ENVIRONMENT_PREFIX}{action.dest.upper()}: got {given!r}, allowed is {allowed}")
    return given


def _model_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and cache")
    model.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="a preset, a Hugging Face folder, a GGUF file, a hub id, or random:PRESET",
    )
    model.add_argument(
        "--dtype", default="auto", choices=_DTYPES, help="of model and cache; auto: bfloat16 where that is quick"
    )
    model.add_argument("--page-size", type=int, default=32, help="slots a cache page")
    model.add_argument("--num-pages", type=int, help="pages in a worker's pool; default: what its memory affords")
    model.add_argument("--max-model-len", type=int, help="most tokens of prompt and output; default: the model's")
    model.add_argument("--max-sequences", type=int, default=256, help="most sequences that run at once")
    model.add_argument(
        "--prefill-tokens", type=int, help="most prompt tokens in one step; default: 512 on a CPU, 8192 on a GPU"
    )
    model.add_argument(
        "--check-integrity", action=argparse.BooleanOptionalAction, default=False, help="verify the pool at every step"
    )


def _device_flags(parser: argparse.ArgumentParser) -> None:
    device = parser.add_argument_group("devices and workers")
    device.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto takes GPUs where there are")
    device.add_argument("--data-parallel", type=int, default=1, help="workers, each with the whole model; one a GPU")
    device.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that each worker's model is split over; one a GPU"
    )
    device.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads of all workers")
    device.add_argument(
        "--worker-timeout",
        type=float,
        help="seconds without a sign of life or, under load, a step, after which a worker is killed; default: 60 on a"
        " GPU, 300 on a CPU",
    )
    device.add_argument(
        "--worker-restarts",
        type=int,
        default=Supervision().worker_restarts,
        help="starts in a row that may come to nothing before a worker is given up",
    )
    device.add_argument("--memory-fraction", type=float, default=0.5, help="CPU: share of free memory for page pools")
    device.add_argument(
        "--gpu-memory-utilization", type=float, default=0.95, help="GPU: share of its memory for model and page pool"
    )
    switch = argparse.BooleanOptionalAction
    device.add_argument("--graphs", action=switch, default=True, help="GPU: capture steps in CUDA graphs")
    device.add_argument("--compile", action=switch, default=True, help="GPU: compile the model with torch.compile")
    device.add_argument(
        "--compile-cache", type=Path, help="GPU: folder of compiled code; default: ~/.cache/d2o-serve/compile"
    )


def _compression_flags(parser: argparse.ArgumentParser) -> None:
    compression = parser.add_argument_group("compression (defaults of requests)")
    policies = [*(policy.value for policy in Policy), AUTO]
    compression.add_argument("--compression", default="d2o", choices=policies, help="policy")
    compression.add_argument(
        "--auto-full-tokens",
        type=int,
        default=AUTO_FULL_TOKENS,
        help="with auto, requests of more tokens are always compressed",
    )
    compression.add_argument("--ratio", type=float, default=0.4, help="average budget as a share of the prompt")
    compression.add_argument("--min-budget", type=int, default=1024, help="lower bound of that budget, in tokens")
    compression.add_argument("--budget-tokens", type=int, help="absolute budget; replaces ratio and min-budget")
    compression.add_argument(
        "--score-queries", help="all, last:W, stride:n or sample:Q; without it sample:4096 for d2o, all for the others"
    )


def _serving_flags(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_argument_group("serving")
    serving.add_argument("--host", default="127.0.0.1", help="address to bind")
    serving.add_argument("--port", type=int, default=50051, help="0 takes any free port")
    serving.add_argument(
        "--reflection", action=argparse.BooleanOptionalAction, default=False, help="serve grpc.reflection"
    )
    _caller_flags(serving)
    serving.add_argument(
        "--max-connection-age",
        type=float,
        default=0.0,
        help="seconds until connections are told to reconnect; 0: never",
    )
    serving.add_argument(
        "--max-connection-age-grace", type=float, help="seconds that its calls then get; default: as long as they take"
    )
    serving.add_argument("--tls-certificate", type=Path, help="PEM certificate chain; switches TLS on")
    serving.add_argument("--tls-key", type=Path, help="PEM private key")
    serving.add_argument("--tls-client-ca", type=Path, help="PEM authorities that clients must come from")
    serving.add_argument("--max-new-tokens", type=int, default=256, help="default of a request's output")
    serving.add_argument("--max-waiting", type=int, default=256, help="most requests that wait for pages")
    serving.add_argument("--max-waiting-tokens", type=int, default=1_000_000, help="most prompt tokens that wait")
    serving.add_argument("--max-wait", type=float, default=600.0, help="most seconds that a request waits for pages")
    serving.add_argument("--drain-window", type=float, default=2.0, help="seconds NOT_SERVING before calls are refused")
    serving.add_argument(
        "--drain-grace",
        type=float,
        help=f"seconds that running streams get to finish; default: {DEFAULT_DRAIN_GRACE:g}, or by termination-grace",
    )
    serving.add_argument(
        "--termination-grace", type=float, help="seconds from a platform's decision to stop this process to its kill"
    )


def _caller_flags(serving: argparse._ArgumentGroup) -> None:
    serving.add_argument("--api-keys", type=Path, help="file of hashed keys, of which every call must carry one")
    serving.add_argument("--rate-limit", type=int, default=0, help="generations a second of one caller; 0: any number")
    serving.add_argument(
        "--max-client-streams", type=int, default=0, help="generations at once of one key or certificate; 0: any number"
    )
    serving.add_argument(
        "--max-client-pages",
        type=int,
        default=0,
        help="pages reserved at once by one key or certificate; 0: any number",
    )
    serving.add_argument("--max-connections", type=int, default=1000, help="connections at once; 0: any number")


def _telemetry_flags(parser: argparse.ArgumentParser) -> None:
    telemetry = parser.add_argument_group("metrics, traces and logs")
    telemetry.add_argument(
        "--metrics-port", type=int, default=DEFAULT_METRICS_PORT, help="Prometheus metrics on the same host; 0: none"
    )
    telemetry.add_argument("--trace", metavar="TARGET", help="OTLP endpoint such as http://localhost:4317, or console")
    telemetry.add_argument("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR")
    telemetry.add_argument("--log-format", default="text", choices=_LOG_FORMATS, help="of lines on standard error")
    telemetry.add_argument(
        "--access-log", action=argparse.BooleanOptionalAction, default=True, help="log one line a call"
    )
    telemetry.add_argument(
        "--log-prompts", action=argparse.BooleanOptionalAction, default=False, help="log every prompt as it came"
    )
