"""Draws the plots from the JSON of the benchmarks: ``python -m benchmarks.plot``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._cli import RESULTS

_GREY, _BLUE, _INK = "#9aa0a6", "#2a6f97", "#202124"


def plot_concurrency(folder: Path, name: str = "concurrency") -> Path:
    """Draws ``folder/name.png`` from ``folder/name.json``: sequences at once and tokens a second."""
    result = json.loads((folder / f"{name}.json").read_text())
    policies, settings = result["policies"], result["settings"]
    labels = [policy["label"] for policy in policies]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, labels, [policy["at_once"] for policy in policies], "Sequences at once", "{:.0f}")
    rates = [policy["output_tokens_per_second"] for policy in policies]
    _bars(right, labels, rates, "Output tokens/s, whole run", "{:.1f}")
    figure.suptitle(_title(settings, result["machine"]), fontsize=9, color=_INK)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _title(settings: dict[str, Any], machine: dict[str, Any]) -> str:
    return (
        f"{settings['requests']} prompts of {settings['prompt_tokens']:,} tokens, {settings['new_tokens']} new tokens "
        f"each, one pool of {settings['pool_full_cache_tokens']:,} full-cache tokens\n"
        f"{settings['model']}, {settings['dtype']}, {settings['threads']} threads, {machine['cpu']}"
    )


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float], title: str, digits: str) -> None:
    """One bar a policy, the full cache in grey; each with its value and how many times the first it is."""
    bars = axes.bar(labels, values, width=0.62, color=[_GREY] + [_BLUE] * (len(labels) - 1))
    texts = [digits.format(values[0])]
    texts += [f"{digits.format(value)}\n({value / values[0]:.1f}x)" for value in values[1:]]
    axes.bar_label(bars, texts, padding=2, fontsize=9, color=_INK)
    axes.set_title(title, fontsize=11, fontweight="bold", color=_INK)
    axes.set_ylim(0, max(values) * 1.22)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    folder = parser.parse_args(arguments).out
    if not (folder / "concurrency.json").exists():
        parser.error("there is no concurrency.json to draw: run python -m benchmarks.concurrency first")
    print(f"written: {plot_concurrency(folder).name}")


if __name__ == "__main__":
    main()
