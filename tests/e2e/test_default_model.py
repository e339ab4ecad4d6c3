"""The default model, fetched and converted by the product itself, answers from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from d2o_client import AsyncClient
from d2o_server.worker.dtype import choose_dtype, dtype_name
from tests.e2e.conftest import Launch
from tests.e2e.processes import PATIENCE, ServerProcess

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def default_server(launch_for_module: Launch) -> ServerProcess:
    return launch_for_module("--device", "cpu", "--num-pages", "3000")


def d2o(server: ServerProcess, *arguments: str) -> str:
    """What the command line prints."""
    command = [sys.executable, "-m", "d2o_client._cli", *arguments, "--target", server.target]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=PATIENCE, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_capital_of_france(default_server: ServerProcess) -> None:
    assert "Paris" in d2o(default_server, "generate", QUESTION)


def test_the_default_is_the_small_model_in_the_processor_s_type_with_d2o(
    default_server: ServerProcess,
) -> None:
    info = json.loads(d2o(default_server, "info", "--json"))
    dtype = dtype_name(choose_dtype("auto", torch.device("cpu")))
    assert (info["model"], info["dtype"]) == ("smollm2-135m-instruct", dtype)
    assert info["default_compression"]["policy"] == "d2o"


async def test_characters_of_many_bytes_come_whole(default_server: ServerProcess) -> None:
    async with AsyncClient(default_server.target) as client:
        text = "\N{SNOWMAN}\N{PARTY POPPER}\u65e5\u672c\u8a9e "
        tokens = await client.tokenize(text * 3)
        copied = client.stream(tokens.ids * 4, max_new_tokens=40, ignore_end_of_text=True)
        chunks = [chunk.text async for chunk in copied]
    assert "" in chunks
    assert not any("\ufffd" in chunk for chunk in chunks[:-1])
    assert "\N{PARTY POPPER}" in "".join(chunks)
