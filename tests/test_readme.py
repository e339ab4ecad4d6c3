"""What the README shows works: its snippets and commands run against a real server, its tables match the code."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2o_server.settings import _parser, from_arguments
from tests.e2e.processes import TINY, ServerProcess, end, launch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHOWN_TARGET = "127.0.0.1:50051"

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SETTING = re.compile(r"^\| `(--[a-z0-9-]+)` \| `(\w+)` \| (`[^`]*`|the cores it may use) \| (.+) \|$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://)([^)#]*)(#[^)]*)?\)")


def blocks(language: str) -> list[str]:
    return [text for name, text in _BLOCK.findall(README) if name == language]


def commands(program: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if shlex.split(line)[0] == program]


def flags() -> dict[str, argparse.Action]:
    return {action.option_strings[0]: action for action in _parser({})._actions if action.dest != "help"}


def shown(default: object) -> str:
    match default:
        case None:
            return "`-`"
        case bool():
            return f"`{str(default).lower()}`"
        case _:
            return f"`{default}`"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = launch((*TINY, "--num-pages", "2000"), tmp_path_factory.mktemp("readme") / "log")
    yield running
    end(running.process)


@pytest.mark.parametrize("snippet", blocks("python"))
def test_a_python_snippet_runs(snippet: str, server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert SHOWN_TARGET in snippet
    code = compile(snippet.replace(SHOWN_TARGET, server.target), "README.md", "exec")
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", [*commands(".venv/bin/d2o"), *commands(".venv/bin/buf")])
def test_a_client_command_runs(command: str, server: ServerProcess) -> None:
    tools = f"{shlex.quote(str(Path(sys.executable).parent))}/"
    done = subprocess.run(
        ["bash", "-c", command.replace(SHOWN_TARGET, server.target).replace(".venv/bin/", tools, 1)],
        cwd=ROOT,
        env=os.environ | {"D2O_TARGET": server.target},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # A conversation that nobody takes part in says nothing.
    assert done.stdout.strip() or " chat" in command


def test_the_settings_table_has_every_flag_with_its_variable_and_default() -> None:
    table = {flag: (variable, default) for flag, variable, default, _ in _SETTING.findall(README)}
    expected = {
        flag: (
            "D2O_SERVE_" + flag.removeprefix("--").upper().replace("-", "_"),
            "the cores it may use" if flag == "--threads" else shown(action.default),
        )
        for flag, action in flags().items()
    }
    assert table == expected


def test_a_variable_of_the_table_sets_what_its_flag_sets() -> None:
    settings = from_arguments([], {"D2O_SERVE_PORT": "50052", "D2O_SERVE_REFLECTION": "true", "D2O_SERVE_RATIO": "0.2"})
    assert settings == from_arguments(["--port", "50052", "--reflection", "--ratio", "0.2"], {})
    assert settings != from_arguments([], {})


def test_every_make_target_that_is_named_exists_and_none_is_left_out() -> None:
    named = set(re.findall(r"`make (\w+)", README)) | {shlex.split(line)[1] for line in commands("make")}
    exist = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named | {"help"} == exist


@pytest.mark.parametrize("command", [line for line in commands("make") if "ARGS=" in line])
def test_the_flags_of_a_make_command_are_understood(command: str) -> None:
    _, target, variable = shlex.split(command)
    assert target == "serve"
    from_arguments(shlex.split(variable.removeprefix("ARGS=")), {})


def test_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for path, anchor in _LINK.findall(README):
        if path:
            assert (ROOT / path).exists(), path
        else:
            assert anchor.removeprefix("#") in anchors, anchor


def test_the_image_s_build_gets_the_files_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in (project["readme"], *project["license-files"])} <= set(let_in)
