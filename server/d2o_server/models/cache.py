"""Folders that are built once, by one process, and are either complete or absent."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2o_server.errors import StartupError


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/d2o-serve/models``, or the same below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "d2o-serve" / "models"


def fingerprint(file: Path) -> str:
    """A short name for this content at this path: it changes when the file is replaced."""
    facts = file.stat()
    return hashlib.sha256(f"{file}:{facts.st_size}:{facts.st_mtime_ns}".encode()).hexdigest()[:12]


def build_once(folder: Path, build: Callable[[Path], None], report: Callable[[str], None]) -> Path:
    """Returns ``folder``, after filling it with ``build`` if it is not there yet.

    ``build`` gets an empty folder beside the final one, which is renamed when it returns and removed when it raises.
    A second process waits for the first one's result.

    Raises:
        StartupError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock"), report):
            if not folder.is_dir():
                _build(folder, build)
    except OSError as error:
        raise StartupError(
            f"model: the cache folder {folder.parent} cannot be used: {error}; set XDG_CACHE_HOME to one that can"
        ) from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        build(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def _locked(file: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Holds an advisory lock, which the kernel releases even if the process is killed."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that is preparing {file.stem}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
