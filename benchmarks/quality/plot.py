"""Draws what policies cost: loss on text and answers found against the ratio, and loss against the cache's bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK = "#202124"
_COLORS = {"d2o": "#2a6f97", "snapkv": "#e76f51", "h2o": "#8ab17d", "streaming": "#9aa0a6", "paper": "#b5838d"}
_ROUNDED = {"8-bit": "#6a4c93", "d2o-8-bit": "#1982c4"}
# Of one slot and KV head of SmolLM2 (64 numbers each of key and value): two bytes a number, or one and a scale of four
# bytes each; D2O has a score, a position and a bias beside them, H2O a score.
_HEAD_DIM = 64
_BYTES = {
    "d2o": 4 * _HEAD_DIM + 12,
    "snapkv": 4 * _HEAD_DIM,
    "h2o": 4 * _HEAD_DIM + 4,
    "streaming": 4 * _HEAD_DIM,
    "8-bit": 2 * _HEAD_DIM + 8,
    "d2o-8-bit": 2 * _HEAD_DIM + 8 + 12,
}
_TITLE = {"fontsize": 10, "fontweight": "bold", "color": _INK}

Row = dict[str, Any]


def plot_quality(folder: Path, name: str = "quality_full") -> Path:
    """Draws ``folder/quality.png`` from ``folder/name.json``."""
    result = json.loads((folder / f"{name}.json").read_text())
    rows = result["summary"]["all"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    text, asked = _of(rows, "text"), _of(rows, "multikey-inside")
    _lines(left, text, _ratio, _rise, _COLORS)
    left.set_title("Rise of loss on text, nats a token", **_TITLE)
    _lines(middle, asked, _ratio, lambda row: (row["hits"], row["hits_error"] or 0.0), _COLORS)
    for row in asked:
        if row["contender"] == "full":
            middle.axhline(row["hits"], color=_INK, linewidth=1, linestyle=":")
            middle.text(0.5, row["hits"], "full cache", fontsize=8, transform=middle.get_yaxis_transform())
    middle.set_title("Answers found, question in the prompt", **_TITLE)
    for axes in (left, middle):
        axes.set_xlabel("cache slots as a share of the prompt", fontsize=9)
        axes.set_xticks(sorted({_ratio(row) for row in text if "@" in row["contender"]}))
    full = next(row["slots"] for row in text if row["contender"] == "full")

    def share(row: Row) -> float:
        held: float = row["slots"] / full * _BYTES[_policy(row)] / (4 * _HEAD_DIM)
        return held

    colors = {policy: color for policy, color in (_COLORS | _ROUNDED).items() if policy in _BYTES}
    _lines(right, text, share, _rise, colors)
    right.set_xlabel("bytes, as a share of the full cache in bfloat16", fontsize=9)
    right.set_title("Rise of loss on text against bytes", **_TITLE)
    left.legend(fontsize=8, frameon=False)
    right.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{result['model']}, {result['dtype']}; bars: standard errors", fontsize=9, color=_INK)
    path = folder / "quality.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _of(rows: list[Row], task: str) -> list[Row]:
    return [row for row in rows if row["task"] == task]


def _lines(
    axes: Axes,
    rows: list[Row],
    place: Callable[[Row], float],
    height: Callable[[Row], tuple[float, float]],
    colors: Mapping[str, str],
) -> None:
    """One line a policy, over what it was measured at."""
    for policy, color in colors.items():
        own = sorted({(place(row), *height(row)) for row in rows if _policy(row) == policy})
        if own:
            places, heights, errors = zip(*own, strict=True)
            axes.errorbar(places, heights, errors, color=color, marker="o", markersize=3, capsize=2, label=policy)
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)


def _rise(row: Row) -> tuple[float, float]:
    return max(row["rise"], 0.0), row["rise_error"] or 0.0


def _ratio(row: Row) -> float:
    return float(row["contender"].partition("@")[2])


def _policy(row: Row) -> str:
    return str(row["contender"].partition("@")[0])
