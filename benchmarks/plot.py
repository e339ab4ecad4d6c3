"""Draws the plots from the JSON of the benchmarks: ``python -m benchmarks.plot``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._cli import RESULTS

_GREY, _BLUE, _INK = "#9aa0a6", "#2a6f97", "#202124"
_PARTS = (_BLUE, "#468faf", "#89c2d9", "#e9c46a", "#c5c9ce", "#f1f3f4", "#9aa5b1")


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


def plot_engine(folder: Path, name: str = "engine_gpu") -> Path:
    """Draws ``folder/name.png`` from ``folder/name.json``: decode rates by concurrency, and what a step is made of."""
    result = json.loads((folder / f"{name}.json").read_text())
    if missing := [part for part in ("concurrency", "parts_ms") if part not in result]:
        raise SystemExit(f"{name}.json: got no {' and no '.join(missing)}, the plot needs both; run engine_gpu in full")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for line, color in zip(result["concurrency"], (_GREY, _BLUE), strict=False):
        rates = {int(batch): rate for batch, rate in line["tokens_per_second"].items()}
        left.plot(list(rates), list(rates.values()), marker="o", markersize=3, color=color)
        end = max(rates)
        left.annotate(
            f"{line['slots']:,} slots a layer", (end, rates[end]), (-4, 6), textcoords="offset points", ha="right"
        )
    left.set_title("Output tokens/s by sequences at once", fontsize=11, fontweight="bold", color=_INK)
    left.set_ylim(0)
    left.spines[["top", "right"]].set_visible(False)
    _stacked(right, result["parts_ms"])
    figure.suptitle(f"{result['model']} on {result['gpu']['name']}, decode steps only", fontsize=9, color=_INK)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def plot_streams(folder: Path, name: str = "concurrency_gpu") -> Path:
    """Draws ``folder/name.png`` from ``folder/name.json``: rates and waiting times by streams at once."""
    result = json.loads((folder / f"{name}.json").read_text())
    settings = result["settings"]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    rates, gaps, waits = figure.subplots(1, 3)
    for line, color in zip(result["policies"], (_GREY, _BLUE), strict=False):
        runs, policy = line["runs"], line["policy"]
        _by_streams(rates, runs, f"{policy}, prompts in", color, _rate_with_prompts_in)
        _by_streams(rates, runs, f"{policy}, whole run", color, lambda run: run["output_tokens_per_second"], "--")
        _by_streams(gaps, runs, f"{policy}, p50", color, lambda run: 1000 * run["itl_seconds"]["p50"])
        _by_streams(gaps, runs, f"{policy}, p95", color, lambda run: 1000 * run["itl_seconds"]["p95"], "--")
        _by_streams(waits, runs, f"{policy}, p50", color, lambda run: run["ttft_seconds"]["p50"])
    for axes, title in ((rates, "Output tokens/s"), (gaps, "Inter-token latency, ms"), (waits, "First token, s")):
        axes.set_title(title, fontsize=11, fontweight="bold", color=_INK)
        axes.set_xlabel("streams at once", fontsize=9)
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    machine = result["machine"]
    figure.suptitle(
        f"{settings['model']}, {settings['prompt_tokens']:,} + {settings['new_tokens']:,} tokens, all submitted at once"
        f" over gRPC, {', '.join(machine['gpus']) or machine['cpu']}",
        fontsize=9,
        color=_INK,
    )
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _rate_with_prompts_in(run: dict[str, Any]) -> float | None:
    window = run["prompts_in"]
    return None if window is None else float(window["output_tokens_per_second"])


def _by_streams(
    axes: Axes,
    runs: Sequence[dict[str, Any]],
    label: str,
    color: str,
    value: Callable[[dict[str, Any]], float | None],
    style: str = "-",
) -> None:
    """One line; runs without that value are left out."""
    points = [(run["requests"], y) for run in runs if (y := value(run)) is not None]
    axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=color, label=label)


def _stacked(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """One bar a shape: the share of each kind of kernel, and of the time in which none ran."""
    labels = [f"{row['sequences']} x {row['slots']:,}" for row in rows]
    kinds = [kind for kind in rows[0] if kind not in ("sequences", "slots") and any(row[kind] for row in rows)]
    totals = [sum(row[kind] for kind in kinds) for row in rows]
    begun = [0.0] * len(rows)
    for kind, color in zip(kinds, _PARTS, strict=False):
        shares = [100 * row[kind] / total for row, total in zip(rows, totals, strict=True)]
        if any(share >= 0.5 for share in shares):
            axes.barh(labels, shares, left=begun, color=color, label=kind, height=0.6)
        begun = [before + share for before, share in zip(begun, shares, strict=True)]
    axes.set_title("A decode step by part, %", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))


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


_PLOTS = {"concurrency": plot_concurrency, "concurrency_gpu": plot_streams, "engine_gpu": plot_engine}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    folder = parser.parse_args(arguments).out
    drawn = [draw(folder).name for name, draw in _PLOTS.items() if (folder / f"{name}.json").exists()]
    if not drawn:
        parser.error(f"there is no {' or '.join(f'{name}.json' for name in _PLOTS)} to draw: run the benchmarks first")
    print(f"written: {', '.join(drawn)}")


if __name__ == "__main__":
    main()
