"""The overlays, rendered as a cluster would get them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.k8s.kustomize import Manifest, render

ROOT = Path(__file__).resolve().parent.parent.parent
K8S = ROOT / "k8s"
OVERLAYS = ("base", "overlays/cpu-demo", "overlays/gpu", "own")


@pytest.fixture(scope="session")
def own_overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the overlay that the documentation shows."""
    folder = tmp_path_factory.mktemp("own")
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.DOTALL)
    here = os.path.relpath(ROOT, folder.resolve())
    (folder / "kustomization.yaml").write_text(example.replace("../d2o-serve/", f"{here}/"))
    return folder


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, own_overlay: Path) -> Path:
    """Each overlay's folder."""
    return own_overlay if request.param == "own" else K8S / request.param


@pytest.fixture
def manifests(overlay: Path) -> list[Manifest]:
    """Each overlay's objects."""
    return render(overlay)
