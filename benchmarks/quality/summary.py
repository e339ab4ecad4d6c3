"""Rows of single cases to means over them: what a policy costs more than the full cache, with standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cases import Case
from benchmarks.quality.trace import OwnWords, Trace

# Tasks without an answer that is right or wrong.
_WITHOUT_HITS = ("text", "agreement", "long", "own")
# Below this share of hits with the full cache a retrieval task says nothing about compression.
_LEAST_FULL_HITS = 0.3
_DIGITS = 4
# A long continuation is looked at in so many parts.
PARTS = 8
# Said before: so many tokens in a row, anywhere in what the contender has said so far.
REPEATED = 8

Row = dict[str, Any]


def _about(case: Case, contender: str) -> Row:
    return {
        "case": case.key,
        "task": case.task,
        "kind": case.kind,
        "half": case.half,
        "prompt_tokens": case.size,
        "depth": case.depth,
        "contender": contender,
    }


def row(case: Case, contender: str, trace: Trace) -> Row:
    """The figures of one contender in one case, as they are logged."""
    loss, hit, divergence = (values[case.counts_from :] for values in (trace.loss, trace.hit, trace.divergence))
    made = _about(case, contender) | {
        "loss": float(loss.mean()),
        "hit": bool(hit.all()),
        "divergence": float(divergence.mean()),
        "slots": trace.slots,
    }
    if case.greedy:
        made["prefix"] = len(hit) if bool(hit.all()) else int(hit.int().argmin())
    if case.task == "long":
        made["loss_by_part"] = [float(part.mean()) for part in loss.tensor_split(PARTS)]
    return made


def own_row(case: Case, contender: str, samples: Sequence[OwnWords]) -> Row:
    """The figures of what one contender said itself, means over its samples.

    ``repeated`` is the share of tokens that end a run of :data:`REPEATED` which it has said before.
    """
    before = [said_before(words.tokens) for words in samples]
    return _about(case, contender) | {
        "loss": mean(float(words.loss.mean()) for words in samples),
        "hit": False,
        "repeated": mean(float(each.float().mean()) for each in before),
        "repeated_by_part": _mean_of_parts([each.float().tensor_split(PARTS) for each in before]),
        "slots": mean(words.slots for words in samples),
    }


def said_before(tokens: Sequence[int]) -> Tensor:
    """Which tokens end a run of :data:`REPEATED` that also stands somewhere before: [tokens] bool."""
    known: set[tuple[int, ...]] = set()
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for end in range(REPEATED, len(tokens) + 1):
        run = tuple(tokens[end - REPEATED : end])
        found[end - 1] = run in known
        known.add(run)
    return found


def _mean_of_parts(samples: Sequence[Sequence[Tensor]]) -> list[float]:
    return [mean(float(part.mean()) for part in parts) for parts in zip(*samples, strict=True)]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row a task and contender: rise of loss over the full cache's and its standard error, hits, divergence.

    ``over_d2o`` is how much more is lost than by the default at the same budget, case by case.
    ``counts`` is false for a retrieval task that the full cache itself does not do well; ``prefix`` is how many greedy
    tokens are the full cache's before the first that is not.
    """
    full = {row["case"]: row for row in rows if row["contender"] == "full"}
    made = []
    for task in sorted({row["task"] for row in rows}):
        of_task = [row for row in rows if row["task"] == task]
        reference = mean(row["hit"] for row in of_task if row["contender"] == "full")
        for name in dict.fromkeys(row["contender"] for row in of_task):
            own = [row for row in of_task if row["contender"] == name]
            rise, error = _mean_and_error(row["loss"] - full[row["case"]]["loss"] for row in own)
            counts = task in _WITHOUT_HITS or reference >= _LEAST_FULL_HITS
            entry = {"task": task, "contender": name, "cases": len(own), "loss": _mean(row["loss"] for row in own)}
            entry |= {"rise": rise, "rise_error": error}
            default = {row["case"]: row for row in of_task if row["contender"] == f"d2o@{name.partition('@')[2]}"}
            if default and name not in ("full", next(iter(default.values()))["contender"]):
                over = (row["loss"] - default[row["case"]]["loss"] for row in own)
                entry["over_d2o"], entry["over_d2o_error"] = _mean_and_error(over)
            if task not in _WITHOUT_HITS:
                entry["hits"], entry["hits_error"] = _mean_and_error(float(row["hit"]) for row in own)
            if "prefix" in own[0]:
                entry["prefix"], entry["prefix_error"] = _mean_and_error(row["prefix"] for row in own)
            if "loss_by_part" in own[0]:
                entry["rise_by_part"] = _rise_by_part(own, full)
            if "repeated" in own[0]:
                entry["repeated"], entry["repeated_error"] = _mean_and_error(row["repeated"] for row in own)
                parts = zip(*(row["repeated_by_part"] for row in own), strict=True)
                entry["repeated_by_part"] = [_mean(part) for part in parts]
            if "divergence" in own[0]:
                entry["divergence"] = _mean(row["divergence"] for row in own)
            made.append(entry | {"slots": _mean(row["slots"] for row in own), "counts": counts})
    return made


def by(rows: Sequence[Row], what: str) -> list[Row]:
    """Rise of loss and hits for each value of a field, such as depth, apart; rows without it are left out."""
    shown = ("task", "contender", "cases", "rise", "rise_error", "hits")
    values = sorted({row[what] for row in rows if row.get(what) is not None})
    parts = ((value, summary([row for row in rows if row.get(what) == value])) for value in values)
    every = ((value, each) for value, part in parts for each in part if each["counts"])
    return [{what: value} | {key: each[key] for key in shown if key in each} for value, each in every]


def table(rows: Sequence[Row]) -> str:
    """The summary as lines of text."""
    columns: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
        ("cases", 6, lambda row: f"{row['cases']}"),
        ("rise of loss", 14, lambda row: f"{row['rise']:.3f}"),
        ("+-", 8, lambda row: "" if row["rise_error"] is None else f"{row['rise_error']:.3f}"),
        ("hits", 7, lambda row: f"{row['hits']:.2f}" if "hits" in row else ""),
        ("prefix", 8, lambda row: f"{row['prefix']:.0f}" if "prefix" in row else ""),
        ("KL", 8, lambda row: f"{row['divergence']:.3f}" if "divergence" in row else ""),
        ("again", 8, lambda row: f"{row['repeated']:.3f}" if "repeated" in row else ""),
        ("slots", 8, lambda row: f"{row['slots']:.0f}"),
    )
    lines = [f"{'task':18}{'policy':22}" + "".join(f"{name:>{width}}" for name, width, _ in columns)]
    for row in rows:
        cells = "".join(f"{cell(row):>{width}}" for _, width, cell in columns)
        weak = "" if row["counts"] else "  full cache too weak"
        lines.append(f"{row['task']:18}{row['contender']:22}{cells}{weak}")
    return "\n".join(lines)


def _rise_by_part(own: Sequence[Row], full: dict[str, Row]) -> list[float]:
    pairs = [zip(row["loss_by_part"], full[row["case"]]["loss_by_part"], strict=True) for row in own]
    rises = ([lost - reference for lost, reference in pair] for pair in pairs)
    return [_mean(part) for part in zip(*rises, strict=True)]


def _mean_and_error(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None for a single value."""
    known = list(values)
    return _mean(known), round(stdev(known) / sqrt(len(known)), _DIGITS) if len(known) > 1 else None


def _mean(values: Iterable[float]) -> float:
    return round(mean(values), _DIGITS)
