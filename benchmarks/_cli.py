"""What the scripts' command lines and results have in common."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks._machine import Machine
from d2o_server.control_groups import usable_cores
from d2o_server.settings import DEFAULT_MODEL

RESULTS = Path(__file__).resolve().parent / "results"
_GPU_MODEL = "random:llama-3.1-8b"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark: model, dtype, threads, text and the results' folder."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--model", default=DEFAULT_MODEL, help="as d2o-serve takes it")
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    made.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads of the model")
    made.add_argument(
        "--text", type=Path, help="UTF-8 text for the prompts; by default docstrings of installed packages"
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return made


def serving_parser(description: str, name: str) -> argparse.ArgumentParser:
    """The same with a model for a GPU, and the flags of those that run loads on a server from client processes."""
    made = parser(description)
    made.set_defaults(model=_GPU_MODEL)
    made.add_argument("--server-flags", default="", help="more flags of d2o-serve, in one argument")
    made.add_argument("--client-processes", type=int, default=4, help="that the requests are sent from")
    made.add_argument("--seed", type=int, default=0, help="of the prompts")
    made.add_argument("--name", default=name, help="of the file that is written")
    return made


def lacks_gpu(options: argparse.Namespace) -> bool:
    """Whether the model needs a GPU and there is none; says so."""
    if options.model != _GPU_MODEL or shutil.which("nvidia-smi") is not None:
        return False
    print(f"{options.name}: {_GPU_MODEL} needs a GPU, and there is none here; --model takes a smaller one")
    return True


def cells(given: Sequence[str], allowed: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Reads ``workload:policy`` pairs, in order.

    Raises:
        SystemExit: a cell names what there is not.
    """
    found = [(name, policy) for name, _, policy in (cell.partition(":") for cell in given)]
    for cell in found:
        if cell not in allowed:
            every = ", ".join(":".join(pair) for pair in allowed)
            raise SystemExit(f"cells: got {':'.join(cell)}, allowed are {every}")
    return found


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
