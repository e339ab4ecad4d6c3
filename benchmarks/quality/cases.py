"""What is asked of a cache: the next tokens of real text, and facts hidden in it (after RULER, arXiv 2404.06654)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import texts

Encode = Callable[[str], list[int]]
_KEYS = ("harbour", "meadow", "lantern", "orchard", "granite", "compass", "violin", "saddle", "teapot", "glacier")
_DEPTHS = (0.1, 0.35, 0.6, 0.85)
_DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt, what follows it, and from which token of that on it counts. ``half`` chooses (0) or confirms (1)."""

    name: str
    task: str
    kind: str
    half: int
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    counts_from: int = 0

    @property
    def key(self) -> str:
        """What its figures are logged under: they count for these very tokens alone."""
        digest = hashlib.sha256(repr((self.prompt, self.continuation)).encode()).hexdigest()
        return f"{self.name}-{digest[:12]}"


def text_cases(encode: Encode, *, per_kind: int, prompt: int, follow: int, folder: Path | None) -> Iterator[Case]:
    """Loss on the ``follow`` tokens after prompts of real text."""
    for kind, found in texts.kinds(folder).items():
        for number, ids in enumerate(texts.windows(found, encode, tokens=prompt + follow, count=per_kind)):
            yield Case(
                name=f"text-{kind}-{prompt}-{number}",
                task="text",
                kind=kind,
                half=number % 2,
                prompt=ids[:prompt],
                continuation=ids[prompt:],
            )


def retrieval_cases(encode: Encode, *, per_kind: int, prompt: int, folder: Path | None) -> Iterator[Case]:
    """Four facts at four depths of real text and a question for one: inside the prompt, or after it."""
    number = 0
    for kind, found in texts.kinds(folder).items():
        for ids in texts.windows(found, encode, tokens=prompt, count=per_kind):
            draw = random.Random(number)
            keys = draw.sample(_KEYS, len(_DEPTHS))
            codes = ["".join(draw.choices("0123456789", k=_DIGITS)) for _ in keys]
            asked = draw.randrange(len(keys))
            question = encode(f"\n\nQuestion: What is the secret code of the {keys[asked]}?"
                              f"\nAnswer: The secret code of the {keys[asked]} is")  # fmt: skip
            facts = [encode(f"\n\nThe secret code of the {k} is {c}.\n\n") for k, c in zip(keys, codes, strict=True)]
            answer = tuple(encode(f" {codes[asked]}"))
            room = prompt - sum(map(len, facts)) - len(question)
            story = tuple(_hidden(ids[:room], facts))
            for placed in ("inside", "after"):
                inside = placed == "inside"
                yield Case(
                    name=f"multikey-{placed}-{prompt}-{number}",
                    task=f"multikey-{placed}",
                    kind=kind,
                    half=number % 2,
                    prompt=story + tuple(question) if inside else story,
                    continuation=answer if inside else tuple(question) + answer,
                    counts_from=0 if inside else len(question),
                )
            number += 1


def _hidden(story: tuple[int, ...], facts: list[list[int]]) -> Iterator[int]:
    """The story with each fact at its depth."""
    begin = 0
    for depth, fact in zip(_DEPTHS, facts, strict=True):
        end = int(depth * len(story))
        yield from story[begin:end]
        yield from fact
        begin = end
    yield from story[begin:]
