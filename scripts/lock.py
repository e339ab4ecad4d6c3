"""Resolves both distributions and their development tools afresh and prints requirements.lock.

Run by ``make lock``. Written for every platform that the project runs on: a version's local part (``+cpu``) is
dropped, and what torch brings for the GPU of one platform (CUDA libraries) is left to torch itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = (ROOT / "pyproject.toml", ROOT / "client" / "pyproject.toml")
# A torch release that every platform has wheels for, and the Triton that its GPU wheels ask for. Raise them here
# together, then run `make lock`.
HELD = ("torch==2.13.0", "triton==3.7.1")
BROUGHT_BY_TORCH = ("nvidia-", "cuda-")


def requirements(project: Path) -> list[str]:
    """Everything that ``project`` (a pyproject.toml) asks for: to build, to run and to develop."""
    table = tomllib.loads(project.read_text())
    development = table["project"].get("optional-dependencies", {}).get("dev", [])
    return [*table["build-system"]["requires"], *table["project"]["dependencies"], *development]


def resolve(wanted: list[str]) -> list[str]:
    """Asks pip which versions satisfy ``wanted`` together; returns ``name==version`` lines, sorted."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = json.loads(subprocess.run([*command, *wanted], check=True, stdout=subprocess.PIPE).stdout)
    pinned = {}
    for package in report["install"]:
        name = package["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
        if not name.startswith(BROUGHT_BY_TORCH):
            pinned[name] = package["metadata"]["version"].partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(pinned.items())]


def main() -> None:
    """Prints the lock on standard output."""
    wanted = sorted({*HELD, *(line for project in PROJECTS for line in requirements(project))})
    print("# Exact versions of everything that is installed. Written by `make lock`: change pyproject.toml, not this.")
    print("\n".join(resolve(wanted)))


if __name__ == "__main__":
    main()
