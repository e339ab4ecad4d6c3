"""What an operator can set: frozen dataclasses, built once from flags and environment, validated here."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2o.config import ConfigError, D2OConfig, Policy, ScoreQueries
from d2o_server.engine.messages import WorkerSettings
from d2o_server.errors import SettingsError

DEFAULT_MODEL = "smollm2-135m-instruct"
_ENVIRONMENT_PREFIX = "D2O_SERVE_"
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """Bounds on what waits. ``drain_window`` and ``drain_grace`` are seconds."""

    max_waiting: int = 256
    max_waiting_tokens: int = 1_000_000
    default_max_new_tokens: int = 256
    max_logprobs: int = 20
    drain_window: float = 2.0
    drain_grace: float = 60.0

    def __post_init__(self) -> None:
        for name, low in (("max_waiting", 1), ("max_waiting_tokens", 1), ("default_max_new_tokens", 1)):
            _at_least(name, getattr(self, name), low)
        for name in ("max_logprobs", "drain_window", "drain_grace"):
            _at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """Where the server listens; see ``rpc.server.RpcSettings``. ``rate_limit``: requests a second and peer, 0: any."""

    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = True
    rate_limit: int = 0
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        _at_least("rate_limit", self.rate_limit, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything, composed. ``worker`` is what all ``data_parallel`` workers have in common: see ``workers``."""

    worker: WorkerSettings
    data_parallel: int = 1
    compression: D2OConfig = field(default_factory=D2OConfig)
    limits: LimitSettings = field(default_factory=LimitSettings)
    listen: ListenSettings = field(default_factory=ListenSettings)
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if self.log_level not in _LOG_LEVELS:
            raise SettingsError(f"log_level: got {self.log_level!r}, allowed is {', '.join(_LOG_LEVELS)}")
        _at_least("data_parallel", self.data_parallel, 1)
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
        "dtype": "bfloat16",
        "device": "auto",
        "index": 0,
        "tensor_parallel": 1,
        "threads": os.cpu_count() or 1,
        "page_size": 32,
        "num_pages": None,
        "memory_fraction": 0.5,
        "gpu_memory_utilization": 0.9,
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
    for name in ("num_pages", "max_model_len", "prefill_tokens"):
        if getattr(settings, name) is not None:
            _at_least(name, getattr(settings, name), 1)
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
    if settings.dtype not in ("bfloat16", "float16", "float32"):
        raise SettingsError(f"dtype: got {settings.dtype!r}, allowed is bfloat16, float16 or float32")
    return settings


def _at_least(name: str, given: float, low: float) -> None:
    if not given >= low:
        raise SettingsError(f"{name}: got {given}, allowed is at least {low}")


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
        limits=LimitSettings(
            max_waiting=parsed.max_waiting,
            max_waiting_tokens=parsed.max_waiting_tokens,
            default_max_new_tokens=parsed.max_new_tokens,
            drain_window=parsed.drain_window,
            drain_grace=parsed.drain_grace,
        ),
        listen=ListenSettings(
            host=parsed.host,
            port=parsed.port,
            reflection=parsed.reflection,
            rate_limit=parsed.rate_limit,
            tls_certificate=parsed.tls_certificate,
            tls_key=parsed.tls_key,
            tls_client_ca=parsed.tls_client_ca,
        ),
        log_level=parsed.log_level.upper(),
    )


def _compression(parsed: argparse.Namespace) -> D2OConfig:
    try:
        return D2OConfig.of(
            parsed.compression,
            ratio=parsed.ratio,
            min_budget=parsed.min_budget,
            budget_tokens=parsed.budget_tokens,
            score_queries=ScoreQueries.parse(parsed.score_queries),
        )
    except ConfigError as error:
        raise SettingsError(str(error)) from None


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
    known = {action.dest: action for action in parser._actions if action.dest != "help"}
    for name, action in known.items():
        given = environment.get(_ENVIRONMENT_PREFIX + name.upper())
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
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of model and cache"
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
    device.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of all workers")
    device.add_argument("--memory-fraction", type=float, default=0.5, help="CPU: share of free memory for page pools")
    device.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="GPU: share of its memory for model and page pool"
    )
    switch = argparse.BooleanOptionalAction
    device.add_argument("--graphs", action=switch, default=True, help="GPU: capture decode steps in CUDA graphs")
    device.add_argument("--compile", action=switch, default=True, help="GPU: compile the model with torch.compile")
    device.add_argument(
        "--compile-cache", type=Path, help="GPU: folder of compiled code; default: ~/.cache/d2o-serve/compile"
    )


def _compression_flags(parser: argparse.ArgumentParser) -> None:
    compression = parser.add_argument_group("compression (defaults of requests)")
    compression.add_argument("--compression", default="d2o", choices=[policy.value for policy in Policy], help="policy")
    compression.add_argument("--ratio", type=float, default=0.4, help="average budget as a share of the prompt")
    compression.add_argument("--min-budget", type=int, default=1024, help="lower bound of that budget, in tokens")
    compression.add_argument("--budget-tokens", type=int, help="absolute budget; replaces ratio and min-budget")
    compression.add_argument("--score-queries", default="all", help="all, last:W or stride:n")


def _serving_flags(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_argument_group("serving")
    serving.add_argument("--host", default="127.0.0.1", help="address to bind")
    serving.add_argument("--port", type=int, default=50051, help="0 takes any free port")
    serving.add_argument(
        "--reflection", action=argparse.BooleanOptionalAction, default=True, help="serve grpc.reflection"
    )
    serving.add_argument("--rate-limit", type=int, default=0, help="generations a second that one peer may start")
    serving.add_argument("--tls-certificate", type=Path, help="PEM certificate chain; switches TLS on")
    serving.add_argument("--tls-key", type=Path, help="PEM private key")
    serving.add_argument("--tls-client-ca", type=Path, help="PEM authorities that clients must come from")
    serving.add_argument("--max-new-tokens", type=int, default=256, help="default of a request's output")
    serving.add_argument("--max-waiting", type=int, default=256, help="most requests that wait for pages")
    serving.add_argument("--max-waiting-tokens", type=int, default=1_000_000, help="most prompt tokens that wait")
    serving.add_argument("--drain-window", type=float, default=2.0, help="seconds NOT_SERVING before calls are refused")
    serving.add_argument("--drain-grace", type=float, default=60.0, help="seconds that running streams get to finish")
    serving.add_argument("--log-level", default="INFO", help="DEBUG, INFO, WARNING or ERROR")
