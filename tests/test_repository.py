"""The files around the code agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = {name: tomllib.loads((ROOT / name).read_text()) for name in ("pyproject.toml", "client/pyproject.toml")}


def locked() -> dict[str, Version]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    return {name: Version(version) for name, version in pinned.items()}


def declared() -> list[Requirement]:
    needed = []
    for project in PROJECTS.values():
        table = project["project"]
        needed += [*table["dependencies"], *table.get("optional-dependencies", {}).get("dev", [])]
        needed += project["build-system"]["requires"]
    return [Requirement(line) for line in needed]


def test_the_lock_pins_every_declared_dependency_within_its_range() -> None:
    pins = locked()
    wrong = [str(need) for need in declared() if need.name not in pins or pins[need.name] not in need.specifier]
    assert not wrong, f"run `make lock`: requirements.lock does not satisfy {wrong}"


def test_the_lock_names_no_build_of_one_platform() -> None:
    pins = locked()
    assert not [name for name, version in pins.items() if version.local]
    assert not [name for name in pins if name.startswith("nvidia-")]


def test_the_client_needs_grpc_and_protobuf_and_nothing_else() -> None:
    needs = {Requirement(line).name for line in PROJECTS["client/pyproject.toml"]["project"]["dependencies"]}
    assert needs == {"grpcio", "protobuf"}


def test_both_distributions_carry_the_same_version() -> None:
    assert len({project["project"]["version"] for project in PROJECTS.values()}) == 1


def test_kustomization_lists_every_manifest_of_the_base() -> None:
    base = ROOT / "k8s" / "base"
    listed = re.findall(r"^  - (\S+\.yaml)$", (base / "kustomization.yaml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in base.glob("*.yaml") if path.name != "kustomization.yaml")


def test_every_decision_record_is_numbered_once_and_without_gaps() -> None:
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
