"""Real texts of several kinds that a fresh clone has: what its interpreter and its installed packages carry."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks._prompts import docstrings
from d2o_server.tokenizer import Tokenizer

CHOOSING, CONFIRMING = 0, 1
"""Halves of a kind's text: a default is chosen on the one and confirmed on the other."""

# Of each half so many tokens are used at most; texts that have fewer are cut in the middle.
_HALF_TOKENS = 60_000


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
    texts: Iterator[str], encode: Callable[[str], list[int]], *, tokens: int, count: int, prefix: Sequence[int] = ()
) -> list[tuple[int, tuple[int, ...]]]:
    """``count`` token windows, each with its half, spread evenly over both halves of the texts' beginning.

    Where a text is cut depends on nothing but the text: no window of one half shares a token with any of the other,
    whatever their sizes. Each begins with ``prefix``, which is part of its ``tokens``; ``encode`` adds none.

    Raises:
        ValueError: the texts are too short.
    """
    ids: list[int] = []
    for text in texts:
        ids += encode(text + "\n\n")
        if len(ids) >= 2 * _HALF_TOKENS:
            break
    middle = min(len(ids) // 2, _HALF_TOKENS)
    wanted = {CHOOSING: (ids[:middle], count - count // 2), CONFIRMING: (ids[middle : 2 * middle], count // 2)}
    made, inner = [], tokens - len(prefix)
    for half, (part, number) in wanted.items():
        if number * inner > len(part):
            raise ValueError(f"texts: got {len(part)} tokens a half, needed are {number} windows of {inner} tokens")
        starts = ((len(part) - inner) * n // max(1, number - 1) for n in range(number))
        made += [(half, (*prefix, *part[start : start + inner])) for start in starts]
    return made


def of_model(
    texts: Iterator[str], tokenizer: Tokenizer, *, tokens: int, count: int
) -> list[tuple[int, tuple[int, ...]]]:
    """:func:`windows` as a model wants to read them: each a text of its own, with what goes before one."""
    return windows(texts, tokenizer.encode_part, tokens=tokens, count=count, prefix=tokenizer.prefix)


def _reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    # Several names share one text.
    yield from dict.fromkeys(topics[name] for name in sorted(topics))


def _python() -> Iterator[str]:
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), "*.py", deep=False)


def _headers() -> Iterator[str]:
    yield from _files(Path(str(torch.__file__)).parent / "include" / "c10", "*.h", deep=True)


def _files(folder: Path, pattern: str, *, deep: bool) -> Iterator[str]:
    for path in sorted(folder.rglob(pattern) if deep else folder.glob(pattern)):
        yield path.read_text(encoding="utf-8", errors="replace")
