"""What does compression cost in quality: loss on real text, and facts found again, at equal memory for all policies?

Every case runs through the worker's own runner and caches, and its figures are appended to a file at once: a run that
was cut goes on where it was. The summary has means over cases of what a policy costs more than the full cache, with
standard errors, for all cases, for the half that chooses a default and for the half that confirms it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _cli
from benchmarks._prompts import tokenizer
from benchmarks.quality import contenders as policies
from benchmarks.quality import retrieval
from benchmarks.quality.cases import Case, agreement_cases, long_cases, own_cases, read_cases, text_cases, write_cases
from benchmarks.quality.probe import Contender, Probe
from benchmarks.quality.summary import Row, by, own_row, row, summary, table
from benchmarks.quality.texts import CHOOSING, CONFIRMING
from d2o_server.models.source import resolve

TASKS = ("text", "agreement", "long", "own", *retrieval.TASKS)
_HALVES = {"choosing": (CHOOSING,), "confirming": (CONFIRMING,), "both": (CHOOSING, CONFIRMING)}
_DEFAULT_TASKS = ("text", "multikey-inside", "multikey-after")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for task in options.tasks:
        if task not in TASKS:
            raise SystemExit(f"tasks: got {task!r}, allowed are {', '.join(TASKS)}")
    forms = policies.forms(options.contenders, options.set)
    entered, absolute = policies.at_ratios(forms, options.ratios), policies.at_budgets(forms, options.budgets)
    cases = [case for case in _cases(options) if case.half in _HALVES[options.half]]
    if options.write_cases:
        write_cases(options.write_cases, cases)
        return 0
    others = _lines(options.peers) if options.peers else []
    if others:
        keys = {other["case"] for other in others}
        cases = [case for case in cases if case.key in keys]
        keys = {case.key for case in cases}
        others = [other for other in others if other["case"] in keys]
    if not cases:
        raise SystemExit(
            f"cases: got none of {', '.join(options.tasks)} in {options.half} of the halves, needed is one"
        )
    rows = _run_all(options, cases, entered, absolute) + others
    halves = {f"{name} half": [each for each in rows if each["half"] in _HALVES[name]] for name in list(_HALVES)[:2]}
    asked = [each for each in rows if each["task"] in retrieval.TASKS]
    texts = [each for each in rows if each["task"] not in retrieval.TASKS]
    document = {
        "model": resolve(options.model).name,
        "dtype": options.dtype,
        **_sizes(cases),
        "ratios": options.ratios,
        "cases": {task: sum(case.task == task for case in cases) for task in sorted({case.task for case in cases})},
        "summary": {"all": summary(rows)} | {name: summary(part) for name, part in halves.items() if part},
        "by_kind": by(texts, "kind"),
        "by_depth": by(asked, "depth"),
        "by_prompt_tokens": by(asked, "prompt_tokens"),
    }
    print(table(summary(rows)))
    _cli.write_json(options.out, options.name, document)
    return 0


def _parser() -> argparse.ArgumentParser:
    made = _cli.parser(str(__doc__))
    made.set_defaults(dtype="float32")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="on cuda the worker's kernels run")
    made.add_argument("--write-cases", type=Path, metavar="FILE", help="write the cases there, and run nothing")
    made.add_argument("--cases", type=Path, metavar="FILE", help="run those cases instead of making some")
    made.add_argument("--peers", type=Path, metavar="FILE", help="rows of another project; only its cases are run")
    made.add_argument("--tasks", nargs="+", default=_DEFAULT_TASKS, help=", ".join(TASKS))
    made.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.4, 0.2, 0.1], help="of the prompt")
    made.add_argument("--budgets", type=int, nargs="+", default=[512], help="in slots, for the tasks long and own")
    made.add_argument("--contenders", nargs="+", default=policies.DEFAULT, help=", ".join(policies.NAMES))
    made.add_argument(
        "--set", nargs="+", default=(), metavar="LABEL:POLICY:FIELD=VALUE,...", help="more contenders, of any D2OConfig"
    )
    made.add_argument("--half", choices=_HALVES, default="both", help="of each kind's text")
    made.add_argument("--texts", type=int, default=10, help="of each kind, for text, agreement, long and own")
    made.add_argument("--prompt-tokens", type=int, default=3072, help="of text before what is predicted")
    made.add_argument("--follow-tokens", type=int, default=256, help="of text that are predicted")
    made.add_argument("--agreement-tokens", type=int, default=512, help="that the full cache says after a text")
    made.add_argument("--long-tokens", type=int, nargs=2, default=[512, 4096], help="of a short prompt and after it")
    made.add_argument("--samples", type=int, default=4, help="of a contender's own words after a prompt")
    made.add_argument("--questions", type=int, default=10, help="of each kind of text and retrieval task")
    made.add_argument("--question-tokens", type=int, nargs="+", default=[2048], help="of texts with facts in them")
    made.add_argument("--text-folder", type=Path, help="each file of it is one more kind of text")
    made.add_argument("--batch", type=int, default=12, help="sequences that run at once")
    made.add_argument("--name", default="quality", help="of the files that are written")
    return made


def _cases(options: Any) -> Iterator[Case]:
    if options.cases:
        yield from (case for case in read_cases(options.cases) if case.task in options.tasks)
        return
    made = tokenizer(options.model)
    text: dict[str, Any] = {"per_kind": options.texts, "folder": options.text_folder}
    prompt, follow = options.prompt_tokens, options.follow_tokens
    for tokens in options.question_tokens if options.questions else ():
        yield from retrieval.retrieval_cases(
            made, options.tasks, per_kind=options.questions, prompt=tokens, folder=options.text_folder
        )
    if not options.texts:
        return
    if "text" in options.tasks:
        yield from text_cases(made, prompt=prompt, follow=follow, **text)
    if "agreement" in options.tasks:
        yield from agreement_cases(made, prompt=prompt, follow=options.agreement_tokens, **text)
    if "long" in options.tasks:
        short, after = options.long_tokens
        yield from long_cases(made, prompt=short, follow=after, **text)
    if "own" in options.tasks:
        short, after = options.long_tokens
        yield from own_cases(made, prompt=short, follow=after, samples=options.samples, **text)


def _sizes(cases: Sequence[Case]) -> dict[str, Any]:
    """In tokens: of the prompts of text, of what follows them, and of the texts that questions are about."""
    texts = [case for case in cases if case.task not in retrieval.TASKS]
    return {
        "prompt_tokens": max((case.size for case in texts), default=None),
        "follow_tokens": max((case.tokens - len(case.prompt) for case in texts), default=None),
        "question_tokens": sorted({case.size for case in cases if case.task in retrieval.TASKS}),
    }


def _run_all(
    options: Any, cases: Sequence[Case], entered: Sequence[Contender], absolute: Sequence[Contender]
) -> list[Row]:
    """The rows of all cases and contenders; those that the log has already are not run again."""
    log = options.out / f"{options.name}.log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    model = f"{resolve(options.model).name} {options.dtype}" + f" {options.device}" * (options.device != "cpu")
    known = _logged(log, model)
    probe: Probe | None = None
    tokens = max(case.tokens for case in cases)
    pairs = [(case, absolute if case.absolute else entered) for case in cases]
    for number, (case, everyone) in enumerate(pairs):
        missing = [each for each in everyone if (case.key, each.name) not in known]
        if not missing:
            continue
        if probe is None:
            probe = Probe(
                options.model,
                dtype=options.dtype,
                threads=options.threads,
                tokens=tokens,
                contenders=options.batch,
                device=options.device,
            )
        with log.open("a") as file:
            for made in _rows(probe, case, missing):
                made["model"] = model
                known[case.key, made["contender"]] = made
                file.write(json.dumps(made) + "\n")
        print(f"quality: {number + 1} of {len(cases)} cases, {case.name}", file=sys.stderr, flush=True)
    return [known[case.key, each.name] for case, everyone in pairs for each in everyone]


def _rows(probe: Probe, case: Case, contenders: Sequence[Contender]) -> list[Row]:
    """One case's figures for each contender."""
    names = [contender.name for contender in contenders]
    if case.own:
        words = probe.own_words(case.prompt, case.own, contenders, case.samples)
        return [own_row(case, name, said) for name, said in zip(names, words, strict=True)]
    continuation = probe.greedy(case.prompt, case.greedy) if case.greedy else case.continuation
    traces = probe.run(case.prompt, continuation, contenders)
    return [row(case, name, trace) for name, trace in zip(names, traces, strict=True)]


def _logged(log: Path, model: str) -> dict[tuple[str, str], Row]:
    rows = _lines(log) if log.exists() else []
    return {(row["case"], row["contender"]): row for row in rows if row["model"] == model}


def _lines(log: Path) -> list[Row]:
    return [json.loads(line) for line in log.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
