"""Facts hidden in real text and a question for one of them, after RULER (arXiv 2404.06654).

A task is a way to make facts, a question and its answer: ``single`` (one fact), ``multikey`` (four, of which one is
asked for), ``multivalue`` (all three values of one key), ``tracking`` (a value by way of another name, with a second
such chain beside it) and ``turns`` (a conversation whose fifth question is about facts of the first). The question is
inside the prompt, so that the cache is compressed with it, or comes after.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import texts
from benchmarks.quality.cases import Case
from d2o_server.engine.types import ChatMessage
from d2o_server.tokenizer import Tokenizer

_KEYS = ("harbour", "meadow", "lantern", "orchard", "granite", "compass", "violin", "saddle", "teapot", "glacier")
_DEPTHS = (0.1, 0.35, 0.6, 0.85)
_DIGITS = 5
_REPLY = "Thank you, I have read it."
# What the chat template and the replies of a conversation take.
_TEMPLATE_TOKENS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """``facts`` in their order, each with its depth in the text, from 0 to 1; ``asked`` is the depth of the answer."""

    facts: tuple[tuple[float, str], ...]
    question: str
    lead: str
    answer: str
    asked: float


def _code(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789", k=_DIGITS))


def _multikey(draw: random.Random, depths: Sequence[float] = _DEPTHS) -> Puzzle:
    keys = draw.sample(_KEYS, len(depths))
    codes = [_code(draw) for _ in keys]
    asked = draw.randrange(len(keys))
    return Puzzle(
        facts=tuple(
            (depth, f"The secret code of the {key} is {code}.")
            for depth, key, code in zip(depths, keys, codes, strict=True)
        ),
        question=f"What is the secret code of the {keys[asked]}?",
        lead=f"The secret code of the {keys[asked]} is",
        answer=f" {codes[asked]}",
        asked=depths[asked],
    )


def _single(draw: random.Random) -> Puzzle:
    return _multikey(draw, (draw.choice(_DEPTHS),))


def _multivalue(draw: random.Random) -> Puzzle:
    key, *others = draw.sample(_KEYS, 3)
    codes = [_code(draw) for _ in range(3)]
    facts = [f"A secret code of the {key} is {code}." for code in codes]
    distractors = [f"A secret code of the {other} is {_code(draw)}." for other in others]
    depths = sorted(draw.sample([0.1, 0.3, 0.5, 0.7, 0.9], 5))
    order = [facts[0], distractors[0], facts[1], distractors[1], facts[2]]
    return Puzzle(
        facts=tuple(zip(depths, order, strict=True)),
        question=f"What are the three secret codes of the {key}, in the order of the text?",
        lead=f"The three secret codes of the {key} are",
        answer=f" {codes[0]}, {codes[1]}, {codes[2]}",
        asked=depths[0],
    )


def _tracking(draw: random.Random) -> Puzzle:
    names = draw.sample(_KEYS, 4)
    codes = [_code(draw), _code(draw)]
    told = [
        f"The secret code of the {names[0]} is {codes[0]}.",
        f"The secret code of the {names[1]} is {codes[1]}.",
        f"The secret code of the {names[2]} is the same as the secret code of the {names[0]}.",
        f"The secret code of the {names[3]} is the same as the secret code of the {names[1]}.",
    ]
    chain = draw.randrange(2)
    return Puzzle(
        facts=tuple(zip(_DEPTHS, told, strict=True)),
        question=f"Which number is the secret code of the {names[2 + chain]}?",
        lead=f"The secret code of the {names[2 + chain]} is the number",
        answer=f" {codes[chain]}",
        asked=_DEPTHS[chain],
    )


_PUZZLES: dict[str, Callable[[random.Random], Puzzle]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "tracking": _tracking,
}
PLACES = ("inside", "after")
TURNS = "turns"
TASKS = (*(f"{task}-{place}" for task in _PUZZLES for place in PLACES), TURNS)


def retrieval_cases(
    tokenizer: Tokenizer, tasks: Sequence[str], *, per_kind: int, prompt: int, folder: Path | None
) -> Iterator[Case]:
    """``per_kind`` prompts of ``prompt`` tokens of each kind of text and task of ``tasks`` (some of :data:`TASKS`)."""
    for kind, found in texts.kinds(folder).items():
        for number, (half, ids) in enumerate(texts.of_model(found, tokenizer, tokens=prompt, count=per_kind)):
            for task, puzzle in _PUZZLES.items():
                places = [place for place in PLACES if f"{task}-{place}" in tasks]
                if places:
                    made = puzzle(random.Random(f"{task} {kind} {prompt} {number}"))
                    yield from _in_text(tokenizer, made, task, places, ids, kind, number, half)
            if TURNS in tasks:
                yield _in_turns(tokenizer, ids, kind, number, half)


def _in_text(
    tokenizer: Tokenizer,
    puzzle: Puzzle,
    task: str,
    places: Sequence[str],
    ids: tuple[int, ...],
    kind: str,
    number: int,
    half: int,
) -> Iterator[Case]:
    encode = tokenizer.encode_part
    question = tuple(encode(f"\n\nQuestion: {puzzle.question}\nAnswer: {puzzle.lead}"))
    facts = [(depth, encode(f"\n\n{fact}\n\n")) for depth, fact in puzzle.facts]
    answer = tuple(encode(puzzle.answer))
    room = len(ids) - sum(len(fact) for _, fact in facts) - len(question)
    story = tuple(_hidden(ids[:room], facts))
    for place in places:
        inside = place == "inside"
        yield Case(
            name=f"{task}-{place}-{kind}-{len(ids)}-{number}",
            task=f"{task}-{place}",
            kind=kind,
            half=half,
            size=len(ids),
            depth=puzzle.asked,
            prompt=story + question if inside else story,
            continuation=answer if inside else question + answer,
            counts_from=0 if inside else len(question),
        )


def _in_turns(tokenizer: Tokenizer, ids: tuple[int, ...], kind: str, number: int, half: int) -> Case:
    """A conversation: facts, three times some text to read, and a question for a fact of the first turn."""
    puzzle = _multikey(random.Random(f"turns {kind} {len(ids)} {number}"))
    told = "Please remember: " + " ".join(fact for _, fact in puzzle.facts)
    room = len(ids) - len(tokenizer.encode_part(told + puzzle.question + puzzle.lead)) - _TEMPLATE_TOKENS
    parts = [tokenizer.decode(ids[room * part // 3 : room * (part + 1) // 3]) for part in range(3)]
    messages = [ChatMessage("user", told), ChatMessage("assistant", "I will remember it.")]
    for part in parts:
        messages += [ChatMessage("user", f"Read this:\n\n{part}"), ChatMessage("assistant", _REPLY)]
    messages.append(ChatMessage("user", puzzle.question))
    prompt = tokenizer.render_chat(messages) + tokenizer.encode_part(puzzle.lead)
    return Case(
        name=f"turns-{kind}-{len(ids)}-{number}",
        task=TURNS,
        kind=kind,
        half=half,
        size=len(ids),
        prompt=tuple(prompt),
        continuation=tuple(tokenizer.encode_part(puzzle.answer)),
    )


def _hidden(story: tuple[int, ...], facts: Sequence[tuple[float, list[int]]]) -> Iterator[int]:
    """The story with each fact at its depth."""
    begin = 0
    for depth, fact in facts:
        end = int(depth * len(story))
        yield from story[begin:end]
        yield from fact
        begin = end
    yield from story[begin:]
