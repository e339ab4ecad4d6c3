"""What the scripts' command lines and results have in common."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._machine import Machine
from d2o_server.settings import DEFAULT_MODEL

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark: model, dtype, threads, text and the results' folder."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", default=DEFAULT_MODEL, help="as d2o-serve takes it")
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of the model")
    made.add_argument(
        "--text", type=Path, help="UTF-8 text for the prompts; by default docstrings of installed packages"
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return made


def write_json(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes ``folder/name.json``: the machine's facts, then the result."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": Machine().as_json()} | result, indent=2) + "\n")
    return path


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints columns that line up; floats with two digits behind the point."""
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((first, *rest)), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
