"""Draws what policies cost against the ratio: loss on text, and answers to questions in the prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK = "#202124"
_COLORS = {"d2o": "#2a6f97", "snapkv": "#e76f51", "h2o": "#8ab17d", "streaming": "#9aa0a6", "paper": "#b5838d"}


def plot_quality(folder: Path, name: str = "quality") -> Path:
    """Draws ``folder/name.png`` from ``folder/name.json``."""
    result = json.loads((folder / f"{name}.json").read_text())
    rows = result["summary"]["all"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _lines(left, _of(rows, "text"), lambda row: (row["rise"], row["rise_error"] or 0.0))
    left.legend(fontsize=8, frameon=False)
    left.set_title("Rise of loss on text, nats a token", fontsize=11, fontweight="bold", color=_INK)
    asked = _of(rows, "multikey-inside")
    _lines(right, asked, lambda row: (row["hits"], row["hits_error"] or 0.0))
    for row in asked:
        if row["contender"] == "full":
            right.axhline(row["hits"], color=_INK, linewidth=1, linestyle=":")
            right.text(0.02, row["hits"], "full cache", fontsize=8, va="bottom", transform=right.get_yaxis_transform())
    right.set_title("Answers found, question in the prompt", fontsize=11, fontweight="bold", color=_INK)
    figure.suptitle(f"{result['model']}, {result['dtype']}; bars: standard errors", fontsize=9, color=_INK)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _of(rows: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["task"] == task]


def _lines(axes: Axes, rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], tuple[float, float]]) -> None:
    """One line a policy, over the ratios that it was measured at."""
    for policy, color in _COLORS.items():
        own = sorted((float(row["contender"].partition("@")[2]), *value(row)) for row in rows if _policy(row) == policy)
        if own:
            ratios, heights, errors = zip(*own, strict=True)
            axes.errorbar(ratios, heights, errors, color=color, marker="o", markersize=3, capsize=2, label=policy)
    axes.set_xlabel("cache slots as a share of the prompt", fontsize=9)
    axes.set_xticks(sorted({float(row["contender"].partition("@")[2]) for row in rows if "@" in row["contender"]}))
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)


def _policy(row: dict[str, Any]) -> str:
    return str(row["contender"].partition("@")[0])
