"""Writes the tables of docs/quality.md from the results' JSON, between marks that name the file, and draws the plot."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._cli import RESULTS
from benchmarks.quality.plot import plot_quality

PAGE = RESULTS.parents[1] / "docs" / "quality.md"
_MARKS = re.compile(r"(<!-- table: (\w+)(?:, ([\w ]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_TASKS = {
    "text": "loss on text",
    "long": "loss on a long continuation",
    "agreement": "after the full cache's own words",
    "own": "surprise at its own words",
    "single-inside": "one fact, question inside",
    "single-after": "one fact, question after",
    "multikey-inside": "question inside",
    "multikey-after": "question after",
    "multivalue-inside": "three values, question inside",
    "multivalue-after": "three values, question after",
    "tracking-inside": "by another name, question inside",
    "tracking-after": "by another name, question after",
    "turns": "five turns",
}

# Instead of a part of the cases: what each loses more than the default, case by case, and not more than the full cache.
_PAIRED = "over the default"
_EXTRAS = {
    "hits": "hits",
    "prefix": "same tokens",
    "divergence": "KL",
    "rise_by_part": "its eighths",
    "repeated": "said before",
    "repeated_by_part": "its eighths",
}
_FORMATS = {
    "hits": ".2f",
    "prefix": ".0f",
    "divergence": ".3f",
    "rise_by_part": ".2f",
    "repeated": ".3f",
    "repeated_by_part": ".2f",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="that has the marks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args(arguments)
    options.page.write_text(filled(options.page.read_text(), options.results))
    if (options.results / "quality_full.json").exists():
        print(f"written: {plot_quality(options.results).name}")
    return 0


def filled(page: str, results: Path) -> str:
    """The page with every marked table made again."""

    def table(found: re.Match[str]) -> str:
        result = json.loads((results / f"{found[2]}.json").read_text())
        paired = found[3] == _PAIRED
        return found[1] + _table(result, "all" if paired else found[3] or "all", paired) + found[4]

    return _MARKS.sub(table, page)


def _table(result: dict[str, Any], part: str, paired: bool) -> str:
    """One row a contender: its rise of loss with its standard error in each task, hits where there are answers."""
    rows = {(row["task"], row["contender"]): row for row in result["summary"][part]}
    given = [task for task in _TASKS if any(row[0] == task for row in rows)]
    tasks = [task for task in given if rows[task, "full"].get("counts", True)]
    weak = [f"{task} ({rows[task, 'full']['hits']:.2f})" for task in given if task not in tasks]
    head = ["policy@ratio", "slots a layer"]
    extras = {task: [key for key in _EXTRAS if _shows(key, rows[task, "full"])] for task in tasks}
    for task in tasks:
        head += [_TASKS[task], *(_EXTRAS[key] for key in extras[task])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(contender for _, contender in rows if (tasks[0], contender) in rows):
        line = [name, f"{rows[tasks[0], name]['slots']:.0f}"]
        for task in tasks:
            row = rows[task, name]
            line.append(_loss(row, paired))
            line += [_shown(row[key], _FORMATS[key]) for key in extras[task]]
        lines.append("| " + " | ".join(line) + " |")
    cases = ", ".join(f"{rows[task, 'full']['cases']} of {task}" for task in tasks)
    machine = result["machine"]
    sizes = []
    if result["prompt_tokens"]:
        followed = "its own words" if tasks == ["own"] else "text that are predicted"
        sizes.append(f"of {result['prompt_tokens']} tokens before {result['follow_tokens']} of {followed}")
    if result["question_tokens"]:
        sizes.append(f"of {_numbers(result['question_tokens'])} with a question")
    prompts = f"prompts {', and '.join(sizes)}"
    commit = machine["commit"] if " " in machine["commit"] else machine["commit"][:12]
    run = f"commit {commit}, {machine['date'][:10]}"
    on = f" on {machine['gpus'][0]}" if machine["gpus"] else ""
    left_out = f" Left out, because the full cache itself finds too few answers: {', '.join(weak)}." if weak else ""
    lines.append(f"\n{result['model']}, {result['dtype']}{on}; cases: {cases}; {prompts}; {run}.{left_out}\n")
    return "\n".join(lines)


def _loss(row: dict[str, Any], paired: bool) -> str:
    if row["contender"] == "full":
        return f"{row['loss']:.3f} (loss itself)"
    if paired and "over_d2o" in row:
        return f"{row['over_d2o']:+.3f} ± {row['over_d2o_error'] or 0.0:.3f}"
    return f"{row['rise']:.3f} ± {row['rise_error'] or 0.0:.3f}" + " (over the full cache)" * paired


def _shows(key: str, row: dict[str, Any]) -> bool:
    """Whether a table has a column for it; the divergence is told where the words are the full cache's."""
    return key in row and (key != "divergence" or row["task"] == "agreement")


def _shown(value: float | list[float], how: str) -> str:
    return " ".join(f"{part:{how}}" for part in value) if isinstance(value, list) else f"{value:{how}}"


def _numbers(given: int | list[int]) -> str:
    return str(given) if isinstance(given, int) else " and ".join(map(str, given))


if __name__ == "__main__":
    sys.exit(main())
