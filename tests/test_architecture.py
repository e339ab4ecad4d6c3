"""Who may import whom. The table is the design; every import statement of the packages is walked against it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = {"d2o": ROOT, "d2o_server": ROOT / "server", "d2o_client": ROOT / "client"}
ANYTHING = "*"


@dataclass(frozen=True)
class Row:
    """What a package's modules may import beside the standard library and what of the latter they must not."""

    may: tuple[str, ...]
    never: tuple[str, ...] = ()


_SHARED = ("d2o.config", "d2o_server.errors", "d2o_server.settings")
_ENGINE = ("d2o_server.engine", *_SHARED, "msgspec", "zmq")
_TEXT = (
    *("d2o_server.chat", "d2o_server.detokenizer", "d2o_server.tokenizer", "d2o_server.models"),
    *("d2o_server.engine.types", *_SHARED, "transformers", "tokenizers", "jinja2"),
)
_CHECKPOINTS = ("transformers", "tokenizers", "safetensors", "gguf", "accelerate", "huggingface_hub")
_WORKER = (
    *("d2o_server.worker", "d2o_server.engine", "d2o_server.telemetry.logs", "d2o_server.control_groups", *_SHARED),
    *("d2o", "torch", "numpy", "msgspec", "zmq"),
)
_RPC = (
    *("d2o_server.rpc", "d2o_server.engine.interface", "d2o_server.engine.types", "d2o_server.telemetry", *_SHARED),
    *("d2o_inference", "grpc", "grpc_health", "grpc_reflection", "google.protobuf", "asyncio_throttle"),
)
_TELEMETRY = ("d2o_server.telemetry", "d2o_server.engine.types", "d2o_server.engine.observer", *_SHARED)

# A module falls under the longest name that it starts with.
TABLE = {
    "d2o": Row(("d2o", "torch"), never=("asyncio",)),
    "d2o.config": Row(()),
    "d2o.kernels": Row(("d2o", "torch", "triton"), never=("asyncio",)),
    "d2o_client": Row(("d2o_client", "d2o_inference", "grpc", "google.protobuf")),
    "d2o_client._cli": Row(("d2o_client",)),
    "d2o_server": Row(()),
    "d2o_server.__main__": Row(("d2o_server.app", "d2o_server.rpc.event_loop", *_SHARED)),
    "d2o_server.app": Row((ANYTHING,)),
    "d2o_server.garbage": Row(("d2o_server.engine.interface",)),
    "d2o_server.healthcheck": Row(("grpc", "grpc_health", *_SHARED)),
    "d2o_server.keys": Row(("d2o_server.rpc.api_keys", "d2o_server.engine.types", *_SHARED)),
    "d2o_server.settings": Row(
        (
            *(*_SHARED, "d2o_server.control_groups"),
            *("d2o_server.engine.messages", "d2o_server.engine.supervision", "d2o_server.engine.types"),
        )
    ),
    "d2o_server.telemetry": Row((*_TELEMETRY, "prometheus_client", "grpc")),
    "d2o_server.telemetry.tracing": Row((*_TELEMETRY, "opentelemetry", "grpc")),
    "d2o_server.chat": Row(_TEXT),
    "d2o_server.detokenizer": Row(_TEXT),
    "d2o_server.tokenizer": Row(_TEXT),
    "d2o_server.models": Row(
        ("d2o_server.models", "d2o_server.engine.shape", *_SHARED, *_CHECKPOINTS, "torch", "numpy")
    ),
    "d2o_server.engine": Row(_ENGINE),
    "d2o_server.engine.engine": Row((*_ENGINE, "d2o_server.tokenizer")),
    "d2o_server.worker": Row(_WORKER, never=("asyncio",)),
    "d2o_server.worker.build": Row((*_WORKER, "d2o_server.models"), never=("asyncio",)),
    "d2o_server.worker.loader": Row((*_WORKER, "d2o_server.models", *_CHECKPOINTS), never=("asyncio",)),
    "d2o_server.worker.hf_attention": Row((*_WORKER, "transformers"), never=("asyncio",)),
    "d2o_server.rpc": Row(_RPC),
}


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def row_of(module: str) -> Row:
    return TABLE[max((key for key in TABLE if within(module, key)), key=len)]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that ``source`` imports, at any depth; relative imports keep their dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"__import__", "importlib.import_module"}:
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield node.lineno, name
                case _:
                    yield node.lineno, "(a name computed at run time)"


def violations(module: str, source: str) -> list[str]:
    """Every import of ``module`` that its row of the table does not allow, as ``module:line imports name``."""
    row = row_of(module)
    found = []
    for line, name in imports(source):
        standard = name.split(".")[0] in sys.stdlib_module_names
        allowed = not any(within(name, never) for never in row.never) if standard else _may(row, name)
        if not allowed:
            found.append(f"{module}:{line} imports {name}")
    return found


def _may(row: Row, name: str) -> bool:
    return ANYTHING in row.may or any(within(name, prefix) for prefix in row.may)


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGE_FOLDERS.items():
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def loaded_by(statement: str) -> set[str]:
    """The top-level packages in a fresh interpreter's ``sys.modules`` after ``statement``."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return {name.split(".")[0] for name in finished.stdout.split()}


def test_every_import_is_allowed_by_the_table() -> None:
    found = [violation for module, path in modules() for violation in violations(module, path.read_text())]
    assert not found, "\n".join(["imports that the table does not allow:", *found])


@pytest.mark.parametrize("package", PACKAGE_FOLDERS)
def test_every_library_that_a_package_imports_is_declared(package: str) -> None:
    project = "client/pyproject.toml" if package == "d2o_client" else "pyproject.toml"
    table = tomllib.loads((ROOT / project).read_text())["project"]
    declared = [*table["dependencies"], *table.get("optional-dependencies", {}).get("gpu", [])]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    undeclared = [
        f"{module}:{line} imports {name}"
        for module, path in modules()
        if within(module, package)
        for line, name in imports(path.read_text())
        if not _is_ours_or_standard(name) and not names & _distributions_of(name)
    ]
    assert not undeclared, f"not among the dependencies of {project}: {undeclared}"


def _is_ours_or_standard(name: str) -> bool:
    top = name.split(".")[0]
    return top in sys.stdlib_module_names or top in {*PACKAGE_FOLDERS, "d2o_inference"}


@cache
def _distributions_of(name: str) -> set[str]:
    found = packages_distributions().get(name.split(".")[0], [])
    return {canonicalize_name(distribution) for distribution in found} or {name.split(".")[0]}


def test_the_walk_sees_every_package() -> None:
    seen = {module for module, _ in modules()}
    assert {"d2o.config", "d2o_server.engine.types", "d2o_server.rpc", "d2o_client"} <= seen


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("d2o.scores", "import transformers"),
        ("d2o.scores", "import asyncio"),
        ("d2o.scores", "import triton"),
        ("d2o.config", "import torch"),
        ("d2o_server.engine.scheduler", "def plan():\n    import torch.nn as nn"),
        ("d2o_server.engine.scheduler", "from d2o import pages"),
        ("d2o_server.engine.scheduler", "from d2o_server import worker"),
        ("d2o_server.engine.scheduler", "from d2o_server import tokenizer"),
        ("d2o_server.engine.scheduler", "from ..worker import runner"),
        ("d2o_server.engine.scheduler", "if TYPE_CHECKING:\n    from d2o_server.rpc.convert import request"),
        ("d2o_server.engine.scheduler", "import importlib\nimportlib.import_module('torch')"),
        ("d2o_server.engine.scheduler", "__import__(name)"),
        ("d2o_server.worker.runner", "import grpc"),
        ("d2o_server.worker.runner", "import transformers"),
        ("d2o_server.rpc.service", "from d2o_server.engine import engine"),
        ("d2o_server.rpc.service", "from d2o_server.worker import process"),
        ("d2o_server.rpc.convert", "from d2o.pages import PagePool"),
        ("d2o_client._async", "from d2o.config import D2OConfig"),
        ("d2o_client._cli", "import grpc"),
        ("d2o_server.newcomer", "import torch"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("d2o.kernels.decode", "import triton.language as tl"),
        ("d2o_server.engine.engine", "from d2o_server.tokenizer import Tokenizer"),
        ("d2o_server.engine.scheduler", "import heapq\nfrom d2o.config import D2OConfig"),
        ("d2o_server.worker.loader", "from transformers import AutoModelForCausalLM"),
        ("d2o_server.app", "import torch, grpc\nfrom d2o_server.worker import process"),
        ("d2o_client._cli", "import argparse\nfrom d2o_client import Client"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_importing_the_client_loads_neither_model_nor_server() -> None:
    loaded = loaded_by("import d2o_client")
    assert "grpc" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "d2o", "d2o_server"}


def test_importing_the_configuration_and_the_engine_loads_neither_torch_nor_grpc() -> None:
    # engine.engine is the one module that may reach the tokenizer, and so transformers.
    engine = [name for name, _ in modules() if within(name, "d2o_server.engine") and name != "d2o_server.engine.engine"]
    loaded = loaded_by("import " + ", ".join(["d2o.config", *engine]))
    assert {"d2o", "d2o_server"} <= loaded
    assert not loaded & {"torch", "transformers", "grpc"}
