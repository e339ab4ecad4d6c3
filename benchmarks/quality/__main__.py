"""What does compression cost in quality: loss on real text, and facts found again, at equal memory for all policies?

Every case runs through the worker's own runner and caches, and its figures are appended to a file at once: a run that
was cut goes on where it was. The summary has means over cases of what a policy costs more than the full cache, with
standard errors, for all cases and for the half that confirms.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import _cli
from benchmarks._prompts import tokenizer
from benchmarks.quality import contenders as policies
from benchmarks.quality.cases import Case, retrieval_cases, text_cases
from benchmarks.quality.probe import Contender, Probe, Trace

# Below this share of hits with the full cache a retrieval task says nothing about compression.
_LEAST_FULL_HITS = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    made = _cli.parser(str(__doc__))
    made.set_defaults(dtype="float32")
    made.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.4, 0.2, 0.1], help="of the prompt")
    made.add_argument("--contenders", nargs="+", default=policies.DEFAULT, help=", ".join(policies.NAMES))
    made.add_argument("--texts", type=int, default=10, help="of each kind")
    made.add_argument("--prompt-tokens", type=int, default=3072, help="of text before what is predicted")
    made.add_argument("--follow-tokens", type=int, default=256, help="of text that are predicted")
    made.add_argument("--questions", type=int, default=10, help="of each kind of text")
    made.add_argument("--question-tokens", type=int, default=2048, help="of a text with facts hidden in it")
    made.add_argument("--text-folder", type=Path, help="each file of it is one more kind of text")
    made.add_argument("--batch", type=int, default=12, help="sequences that run at once")
    made.add_argument("--name", default="quality", help="of the files that are written")
    options = made.parse_args(arguments)
    entered = policies.named(options.contenders, options.ratios)
    cases = list(_cases(options))
    rows = _run_all(options, cases, entered)
    document = {
        "model": options.model,
        "dtype": options.dtype,
        "prompt_tokens": options.prompt_tokens,
        "follow_tokens": options.follow_tokens,
        "question_tokens": options.question_tokens,
        "cases": {task: sum(case.task == task for case in cases) for task in sorted({case.task for case in cases})},
        "summary": {"all": summary(rows), "confirming half": summary([row for row in rows if row["half"] == 1])},
    }
    print(table(document["summary"]["all"]))
    _cli.write_json(options.out, options.name, document)
    return 0


def _cases(options: Any) -> Iterator[Case]:
    encode = tokenizer(options.model).encode
    folder = options.text_folder
    asked = retrieval_cases(encode, per_kind=options.questions, prompt=options.question_tokens, folder=folder)
    told = text_cases(
        encode, per_kind=options.texts, prompt=options.prompt_tokens, follow=options.follow_tokens, folder=folder
    )
    return chain(asked if options.questions else (), told if options.texts else ())


def _run_all(options: Any, cases: Sequence[Case], entered: Sequence[Contender]) -> list[dict[str, Any]]:
    """The rows of all cases and contenders; those that the log has already are not run again."""
    log = options.out / f"{options.name}.log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    known = _logged(log, f"{options.model} {options.dtype}")
    probe: Probe | None = None
    tokens = max(len(case.prompt) + len(case.continuation) for case in cases)
    for number, case in enumerate(cases):
        missing = [each for each in entered if (case.key, each.name) not in known]
        if not missing:
            continue
        if probe is None:
            probe = Probe(
                options.model, dtype=options.dtype, threads=options.threads, tokens=tokens, contenders=options.batch
            )
        traces = probe.run(case.prompt, case.continuation, missing)
        with log.open("a") as file:
            for contender, trace in zip(missing, traces, strict=True):
                row = _row(case, contender.name, trace) | {"model": f"{options.model} {options.dtype}"}
                known[case.key, contender.name] = row
                file.write(json.dumps(row) + "\n")
        print(f"quality: {number + 1} of {len(cases)} cases, {case.name}", file=sys.stderr, flush=True)
    return [known[case.key, each.name] for case in cases for each in entered]


def _logged(log: Path, model: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {(row["case"], row["contender"]): row for row in rows if row["model"] == model}


def _row(case: Case, contender: str, trace: Trace) -> dict[str, Any]:
    counted = slice(case.counts_from, None)
    return {
        "case": case.key,
        "task": case.task,
        "kind": case.kind,
        "half": case.half,
        "contender": contender,
        "loss": float(trace.loss[counted].mean()),
        "hit": bool(trace.hit[counted].all()),
        "divergence": float(trace.divergence[counted].mean()),
        "slots": trace.slots,
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task and contender: rise of loss over the full cache's and its standard error, hits, divergence.

    ``counts`` is false for a retrieval task that the full cache itself does not do well.
    """
    full = {row["case"]: row for row in rows if row["contender"] == "full"}
    made = []
    for task in sorted({row["task"] for row in rows}):
        of_task = [row for row in rows if row["task"] == task]
        reference = mean(row["hit"] for row in of_task if row["contender"] == "full")
        for name in dict.fromkeys(row["contender"] for row in of_task):
            own = [row for row in of_task if row["contender"] == name]
            rises = [row["loss"] - full[row["case"]]["loss"] for row in own]
            made.append(
                {
                    "task": task,
                    "contender": name,
                    "cases": len(own),
                    "loss": mean(row["loss"] for row in own),
                    "rise": mean(rises),
                    "rise_error": stdev(rises) / sqrt(len(rises)) if len(rises) > 1 else None,
                    "hits": mean(row["hit"] for row in own),
                    "divergence": mean(row["divergence"] for row in own),
                    "slots": mean(row["slots"] for row in own),
                    "counts": task == "text" or reference >= _LEAST_FULL_HITS,
                }
            )
    return made


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as lines of text."""
    lines = [f"{'task':18}{'policy':22}{'cases':>6}{'rise of loss':>14}{'+-':>8}{'hits':>7}{'KL':>8}{'slots':>8}"]
    for row in rows:
        error = "" if row["rise_error"] is None else f"{row['rise_error']:.3f}"
        lines.append(
            f"{row['task']:18}{row['contender']:22}{row['cases']:6}{row['rise']:14.3f}{error:>8}{row['hits']:7.2f}"
            f"{row['divergence']:8.3f}{row['slots']:8.0f}" + ("" if row["counts"] else "  full cache too weak")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
