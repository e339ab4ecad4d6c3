"""Renders kustomizations without kubectl: what the manifests here use of kustomize and nothing more.

Anything else in a kustomization is an error, so that nothing is passed over in silence; ``test_rendering.py`` holds the
outcome against kubectl's own wherever there is one. Generated names carry no hash here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

# Lists that a patch merges item by item, and what tells their items apart; it replaces all others whole.
MERGE_KEYS = {
    "containers": ("name",),
    "env": ("name",),
    "ports": ("containerPort", "port"),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
_KNOWN = {
    *("apiVersion", "kind", "resources", "components"),
    *("configMapGenerator", "patches", "images", "replacements"),
}


class UnsupportedError(Exception):
    """A kustomization asks for something that this reader does not do."""


def render(folder: Path) -> list[Manifest]:
    """The objects of a folder's kustomization."""
    return _apply(folder, [])


def _apply(folder: Path, objects: list[Manifest]) -> list[Manifest]:
    directives = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(directives) - _KNOWN:
        raise UnsupportedError(f"{folder}: {sorted(unknown)}")
    for resource in directives.get("resources", ()):
        path = folder / resource
        objects += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for generator in directives.get("configMapGenerator", ()):
        _generate(objects, **generator)
    for component in directives.get("components", ()):
        objects = _apply(folder / component, objects)
    for patch in directives.get("patches", ()):
        _patch(objects, folder, **patch)
    for image in directives.get("images", ()):
        _retag(objects, **image)
    for replacement in directives.get("replacements", ()):
        _replace(objects, **replacement)
    return objects


def find(objects: Iterable[Manifest], kind: str, name: str) -> Manifest:
    """The one object of that kind and name."""
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def _generate(objects: list[Manifest], name: str, literals: list[str], behavior: str = "create") -> None:
    data = dict(literal.split("=", 1) for literal in literals)
    if behavior == "merge":
        find(objects, "ConfigMap", name)["data"].update(data)
    elif behavior == "create":
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
    else:
        raise UnsupportedError(f"configMapGenerator.behavior {behavior}")


def _patch(objects: list[Manifest], folder: Path, path: str) -> None:
    patch = yaml.safe_load((folder / path).read_text())
    target = find(objects, patch["kind"], patch["metadata"]["name"])
    objects[objects.index(target)] = merged(target, patch)


def merged(original: Any, patch: Any, field: str = "") -> Any:
    """``original`` with a strategic merge patch applied: null deletes, mappings and keyed lists are merged."""
    if isinstance(original, dict) and isinstance(patch, dict):
        result = copy.deepcopy(original)
        for key, value in patch.items():
            if value is None:
                result.pop(key, None)
            else:
                result[key] = merged(result.get(key), value, key)
        return result
    if isinstance(original, list) and isinstance(patch, list) and field in MERGE_KEYS:
        items = {item_key(field, item): copy.deepcopy(item) for item in original}
        for item in patch:
            items[item_key(field, item)] = merged(items.get(item_key(field, item)), item)
        return list(items.values())
    return merged({}, patch) if isinstance(patch, dict) else copy.deepcopy(patch)


def item_key(field: str, item: Manifest) -> Any:
    """What tells ``item`` from the others of its list."""
    return next(item[key] for key in MERGE_KEYS[field] if key in item)


def _retag(objects: list[Manifest], name: str, newTag: str) -> None:
    for container in find(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]:
        if container["image"].partition(":")[0] == name:
            container["image"] = f"{name}:{newTag}"


def _replace(objects: list[Manifest], source: dict[str, str], targets: list[dict[str, Any]]) -> None:
    value = _at(find(objects, source["kind"], source["name"]), source["fieldPath"].split("."))
    for target in targets:
        chosen = find(objects, **target["select"])
        for path in target["fieldPaths"]:
            *parents, last = path.split(".")
            holder = _at(chosen, parents)
            # A scalar keeps its type: a number stays one.
            holder[last] = type(holder[last])(value)


def _at(value: Any, path: Iterable[str]) -> Any:
    for key in path:
        value = value[key]
    return value
