"""What is asked of a cache: the next tokens of real text, those that the full cache would say, or words of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.quality import texts
from d2o_server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt, what follows it, and from which token of that on it counts. ``half`` chooses (0) or confirms (1).

    Instead of a continuation, ``greedy`` tokens: what the full cache says; or ``own`` tokens: what each contender says
    itself, ``samples`` times. ``depth`` is where in the prompt the answer is, from 0 to 1. With ``absolute`` it is for
    contenders of an absolute budget. ``size`` is how many tokens its prompt was to have, which it has about.
    """

    name: str
    task: str
    kind: str
    half: int
    size: int
    prompt: tuple[int, ...]
    continuation: tuple[int, ...] = ()
    greedy: int = 0
    own: int = 0
    samples: int = 0
    counts_from: int = 0
    depth: float | None = None
    absolute: bool = False

    @property
    def key(self) -> str:
        """What its figures are logged under: they count for these very tokens alone."""
        counts = (n for n in (self.greedy, self.own, self.samples) if n)
        asked: tuple[object, ...] = (self.prompt, self.continuation, *counts)
        return f"{self.name}-{hashlib.sha256(repr(asked).encode()).hexdigest()[:12]}"

    @property
    def tokens(self) -> int:
        """Of prompt and continuation together."""
        return len(self.prompt) + max(len(self.continuation), self.greedy, self.own)


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """Keeps cases for a machine that has neither the texts nor a tokenizer, or for another project's benchmark."""
    path.write_bytes(msgspec.json.encode(cases))


def read_cases(path: Path) -> list[Case]:
    """What :func:`write_cases` has written.

    Raises:
        ValueError: it is something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Case])
    except msgspec.MsgspecError as error:
        raise ValueError(f"cases: {path} has none that --write-cases has written: {error}") from error


def text_cases(tokenizer: Tokenizer, *, per_kind: int, prompt: int, follow: int, folder: Path | None) -> Iterator[Case]:
    """Loss on the ``follow`` tokens after prompts of real text."""
    yield from _windows("text", tokenizer, per_kind=per_kind, prompt=prompt, follow=follow, folder=folder)


def long_cases(tokenizer: Tokenizer, *, per_kind: int, prompt: int, follow: int, folder: Path | None) -> Iterator[Case]:
    """Loss on a continuation much longer than its prompt, at an absolute budget: does it drift?"""
    yield from _windows(
        "long", tokenizer, per_kind=per_kind, prompt=prompt, follow=follow, folder=folder, absolute=True
    )


def agreement_cases(
    tokenizer: Tokenizer, *, per_kind: int, prompt: int, follow: int, folder: Path | None
) -> Iterator[Case]:
    """How long a cache says what the full cache says, and how far its distributions are from the full cache's."""
    for kind, found in texts.kinds(folder).items():
        for number, (half, ids) in enumerate(texts.of_model(found, tokenizer, tokens=prompt, count=per_kind)):
            name = f"agreement-{kind}-{prompt}-{number}"
            yield Case(name=name, task="agreement", kind=kind, half=half, size=prompt, prompt=ids, greedy=follow)


def own_cases(
    tokenizer: Tokenizer, *, per_kind: int, prompt: int, follow: int, samples: int, folder: Path | None
) -> Iterator[Case]:
    """What a cache says itself after a short prompt, at an absolute budget: does it begin to repeat itself?"""
    for kind, found in texts.kinds(folder).items():
        for number, (half, ids) in enumerate(texts.of_model(found, tokenizer, tokens=prompt, count=per_kind)):
            name = f"own-{kind}-{prompt}-{number}"
            yield Case(
                name=name,
                task="own",
                kind=kind,
                half=half,
                size=prompt,
                prompt=ids,
                own=follow,
                samples=samples,
                absolute=True,
            )


def _windows(
    task: str,
    tokenizer: Tokenizer,
    *,
    per_kind: int,
    prompt: int,
    follow: int,
    folder: Path | None,
    absolute: bool = False,
) -> Iterator[Case]:
    for kind, found in texts.kinds(folder).items():
        for number, (half, ids) in enumerate(texts.of_model(found, tokenizer, tokens=prompt + follow, count=per_kind)):
            yield Case(
                name=f"{task}-{kind}-{prompt}-{number}",
                task=task,
                kind=kind,
                half=half,
                size=prompt,
                prompt=ids[:prompt],
                continuation=ids[prompt:],
                absolute=absolute,
            )
