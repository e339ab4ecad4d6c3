"""What the package promises to export, and what importing it does not do."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

import d2o_client


def test_all_is_every_public_name_of_the_package() -> None:
    defined = {
        name for name, value in vars(d2o_client).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(d2o_client.__all__) == defined
    assert len(d2o_client.__all__) == len(set(d2o_client.__all__))


@pytest.mark.parametrize("name", d2o_client.__all__)
def test_every_public_class_is_documented_with_its_public_methods(name: str) -> None:
    value = getattr(d2o_client, name)
    if not inspect.isclass(value):
        return
    assert value.__doc__
    for method, function in inspect.getmembers(value, inspect.isfunction):
        if not method.startswith("_") and function.__module__.startswith("d2o_client"):
            assert function.__doc__, f"{name}.{method}"


def test_both_clients_offer_the_same_calls_with_the_same_arguments() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(function).parameters)
            for name, function in methods
            if not name.startswith("_") or name == "__init__"
        }

    assert surface(d2o_client.Client) == surface(d2o_client.AsyncClient)


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files(d2o_client).joinpath("py.typed").is_file()


def test_importing_reads_no_environment_and_loads_nothing_beyond_grpc_and_protobuf() -> None:
    code = """
import os, sys
import grpc.aio, google.protobuf  # grpc itself loads its tools where they are installed
before = set(sys.modules)
class Watched(dict):
    def __getitem__(self, name):
        assert not name.startswith(b"D2O_"), name
        return super().__getitem__(name)
os.environ._data = Watched(os.environ._data)
import d2o_client, d2o_client._cli
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(loaded - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"d2o_client", "d2o_inference", "google"}


def test_requirements_are_grpcio_and_protobuf_alone() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "client" / "pyproject.toml").read_text())["project"]
    assert {re.split(r"\W", requirement)[0] for requirement in project["dependencies"]} == {"grpcio", "protobuf"}
    assert "optional-dependencies" not in project
