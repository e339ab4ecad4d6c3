"""What a figure was measured on: processor, memory, versions and commit; nothing that names a host or a folder."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "grpcio", "d2o-serve")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine and the software of a measurement. ``cores`` are those that this process may run on."""

    cpu: str = field(default_factory=lambda: _cpu_model())
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    gpus: tuple[str, ...] = field(default_factory=lambda: _gpus())
    memory_gib: float = field(default_factory=lambda: _memory_gib())
    system: str = field(default_factory=lambda: f"{platform.system()} {platform.machine()}")
    python: str = field(default_factory=platform.python_version)
    packages: dict[str, str] = field(default_factory=lambda: {name: _version(name) for name in _PACKAGES})
    commit: str = field(default_factory=lambda: _commit())
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _gpus() -> tuple[str, ...]:
    """Each GPU's name; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _memory_gib() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _commit() -> str:
    """The commit that runs, marked where tracked source files differ from it; ``unknown`` outside a checkout.

    ``BENCHMARK_COMMIT`` names it where the code was copied to a machine without its history.
    """
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "d2o", "server", "client", "benchmarks/*.py"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with local changes" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
