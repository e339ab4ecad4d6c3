"""Prompts of real text, different for every request, that a fresh clone can make without fetching anything."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from d2o_server.models.source import resolve
from d2o_server.tokenizer import Tokenizer

# Their docstrings are long English prose, and the server cannot be installed without them.
_PACKAGES = ("transformers", "torch")
_SHORTEST_DOCSTRING = 400
_PIECE_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Consecutive windows of one text, each of the same number of tokens. ``source`` says what text."""

    token_ids: tuple[tuple[int, ...], ...]
    source: str
    sha256: str


def make_prompts(model: str, *, count: int, tokens: int, text: Path | None = None) -> PromptSet:
    """``count`` prompts of ``tokens`` tokens of ``text``, or of the docstrings of installed packages.

    Raises:
        ValueError: the text is too short.
    """
    encode = tokenizer(model).encode
    ids: list[int] = []
    digest = hashlib.sha256()
    for piece in _pieces(docstrings() if text is None else iter([text.read_text(encoding="utf-8")])):
        digest.update(piece.encode())
        ids += encode(piece)
        if len(ids) >= count * tokens:
            windows = tuple(tuple(ids[i * tokens : (i + 1) * tokens]) for i in range(count))
            return PromptSet(windows, _source(text), digest.hexdigest())
    raise ValueError(f"text: got {len(ids)} tokens, needed are {count} prompts of {tokens} tokens")


def special_ids(model: str) -> tuple[int, ...]:
    """The ids of the model's special tokens, which no text contains."""
    return tuple(sorted(tokenizer(model).special_ids))


def tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model that d2o-serve takes."""
    source = resolve(model)
    if source.preset is not None:
        return Tokenizer.built_in(source.preset.vocabulary_size)
    return Tokenizer.from_folder(source.folder_or_fail())


def _source(text: Path | None) -> str:
    if text is not None:
        return f"file {text.name}"
    return "docstrings of " + " and ".join(f"{name} {version(name)}" for name in _PACKAGES)


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """The texts, joined by empty lines and cut into pieces that tokenize in well under a second."""
    held = ""
    for text in texts:
        held += text + "\n\n"
        while len(held) >= _PIECE_CHARACTERS:
            yield held[:_PIECE_CHARACTERS]
            held = held[_PIECE_CHARACTERS:]
    if held:
        yield held


def docstrings() -> Iterator[str]:
    """Every long docstring of the packages once, in order of package, file and line."""
    seen = set()
    for package in _PACKAGES:
        spec = find_spec(package)
        folders = spec.submodule_search_locations if spec is not None else None
        for folder in folders or ():
            for path in sorted(Path(folder).rglob("*.py")):
                for docstring in _docstrings_of(path.read_text(encoding="utf-8")):
                    if docstring not in seen:
                        seen.add(docstring)
                        yield docstring


def _docstrings_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= _SHORTEST_DOCSTRING:
                yield docstring
