"""Real texts of several kinds that a fresh clone has: what its interpreter and its installed packages carry."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks._prompts import docstrings

# Windows are chosen from so many times the text that they need.
_SPREAD = 2


def kinds(folder: Path | None = None) -> dict[str, Iterator[str]]:
    """Texts by kind, read as they are asked for; each file of ``folder`` is one more kind, named after it.

    ``reference``: the Python language reference. ``docstrings``: those of torch and transformers. ``python``: the
    standard library's modules. ``c++``: torch's headers.
    """
    found = {"reference": _reference(), "docstrings": docstrings(), "python": _python(), "c++": _headers()}
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.is_file():
            found[path.stem] = iter([path.read_text(encoding="utf-8")])
    return found


def windows(
    texts: Iterator[str], encode: Callable[[str], list[int]], *, tokens: int, count: int
) -> list[tuple[int, ...]]:
    """``count`` token windows, spread evenly over the texts' beginning.

    Raises:
        ValueError: the texts are too short.
    """
    ids: list[int] = []
    for text in texts:
        ids += encode(text + "\n\n")
        if len(ids) >= _SPREAD * count * tokens:
            break
    most = len(ids) // tokens
    if most < count:
        raise ValueError(f"texts: got {len(ids)} tokens, needed are {count} windows of {tokens} tokens")
    return [tuple(ids[i * tokens : (i + 1) * tokens]) for i in (most * n // count for n in range(count))]


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _python() -> Iterator[str]:
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), "*.py", deep=False)


def _headers() -> Iterator[str]:
    yield from _files(Path(str(torch.__file__)).parent / "include" / "c10", "*.h", deep=True)


def _files(folder: Path, pattern: str, *, deep: bool) -> Iterator[str]:
    for path in sorted(folder.rglob(pattern) if deep else folder.glob(pattern)):
        yield path.read_text(encoding="utf-8", errors="replace")
