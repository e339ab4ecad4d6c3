"""What the overlays render to is what kubectl makes of them, and valid for the Kubernetes that they ask for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.k8s.kustomize import MERGE_KEYS, Manifest, UnsupportedError, item_key, render

# The oldest that has what the manifests use without a switch, one between, and the newest whose schemas are at hand.
VERSIONS = ("1.30", "1.33", kubernetes_validate.latest_version())
# Kinds of operators; their schemas are not Kubernetes' own.
CUSTOM = {"ScaledObject", "ServiceMonitor"}


def canonical(value: Any, field: str = "") -> Any:
    """Lists whose order means nothing sorted, and a generated name without its hash."""
    if isinstance(value, dict):
        return {key: canonical(item, key) for key, item in value.items()}
    if isinstance(value, list):
        items = [canonical(item) for item in value]
        keyed = field in MERGE_KEYS and all(set(MERGE_KEYS[field]) & set(item) for item in items)
        return sorted(items, key=lambda item: str(item_key(field, item))) if keyed else items
    return re.sub(r"^(d2o-serve)-[a-z0-9]{10}$", r"\1", value) if field == "name" else value


def by_name(objects: list[Manifest]) -> dict[tuple[str, str], Any]:
    return {(each["kind"], each["metadata"]["name"]): each for each in map(canonical, objects)}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_renders_the_same(overlay: Path, manifests: list[Manifest]) -> None:
    rendered = subprocess.run(["kubectl", "kustomize", str(overlay)], check=True, capture_output=True, text=True)
    assert rendered.stderr == ""
    assert by_name(list(yaml.safe_load_all(rendered.stdout))) == by_name(manifests)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_and_has_no_unknown_field(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_does_not_exist_is_found(manifests: list[Manifest]) -> None:
    (deployment,) = [each for each in manifests if each["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_names_are_unique(manifests: list[Manifest]) -> None:
    assert len(by_name(manifests)) == len(manifests)


def test_the_reader_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: staging-\nresources: []\n")
    with pytest.raises(UnsupportedError, match="namePrefix"):
        render(tmp_path)
