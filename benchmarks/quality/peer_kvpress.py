"""The same cases through kvpress's presses, in a virtual environment of its own, since it wants an older transformers.

    python3.11 -m venv kvpress
    kvpress/bin/pip install kvpress==0.5.5 torch==2.13.0 msgspec
    export PYTHONPATH=.:server
    kvpress/bin/python -m benchmarks.quality.peer_kvpress --model FOLDER --cases cases.json --out peers.jsonl

``cases.json`` is of ``--write-cases``, and ``python -m benchmarks.quality --cases cases.json --peers peers.jsonl`` sets
the figures beside ours. A press compresses the prompt only; what follows is added to it, read in one forced pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cases import Case, read_cases
from benchmarks.quality.summary import Row, row
from benchmarks.quality.texts import CHOOSING, CONFIRMING
from benchmarks.quality.trace import Trace

try:
    import kvpress  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging as hub_logging
except ImportError as error:
    raise SystemExit(f"peer_kvpress: {error}; {__doc__}") from error

# From the share of the prompt that is evicted.
PRESSES: dict[str, Callable[[float], Any]] = {
    "kvpress-snapkv": lambda share: kvpress.SnapKVPress(compression_ratio=share),
    "kvpress-observed": lambda share: kvpress.ObservedAttentionPress(compression_ratio=share),
    "kvpress-expected": lambda share: kvpress.ExpectedAttentionPress(compression_ratio=share),
    "kvpress-streaming": lambda share: kvpress.StreamingLLMPress(compression_ratio=share),
    "kvpress-merging": lambda share: kvpress.MergingPress(press=kvpress.SnapKVPress(compression_ratio=share)),
}
_NEEDS_WEIGHTS = {"kvpress-observed"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    chosen = list(_chosen(options))
    known = {(each["case"], each["contender"]) for each in _rows(options.out)}
    peer = f"kvpress {version('kvpress')}, transformers {version('transformers')}, float32, {options.device}"
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.eval().to(options.device)
    for number, case in enumerate(chosen):
        names = [f"{name}@{ratio:g}" for ratio in options.ratios for name in PRESSES]
        missing = [name for name in names if (case.key, name) not in known]
        if not missing:
            continue
        full, _ = _logits(model, case, None)
        with options.out.open("a") as file:
            for name in missing:
                press, _, ratio = name.partition("@")
                model.set_attn_implementation("eager" if press in _NEEDS_WEIGHTS else "sdpa")
                found, kept = _logits(model, case, PRESSES[press](1 - float(ratio)))
                made = row(case, name, _trace(case, found, full, kept)) | {"model": peer}
                file.write(json.dumps(made) + "\n")
                model.set_attn_implementation("sdpa")
        print(f"peer_kvpress: {number + 1} of {len(chosen)} cases, {case.name}", file=sys.stderr, flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a folder in Hugging Face's layout")
    made.add_argument("--cases", type=Path, required=True, help="what --write-cases has written")
    made.add_argument(
        "--out", type=Path, required=True, help="rows are added to it; those that it has are not run again"
    )
    made.add_argument("--tasks", nargs="+", default=["text", "multikey-inside"])
    made.add_argument("--ratios", type=float, nargs="+", default=[0.2])
    made.add_argument("--device", default="cpu", help="as torch names it")
    made.add_argument("--half", choices=("choosing", "confirming"), default="confirming")
    made.add_argument("--per-kind", type=int, default=2, help="cases of each task and kind")
    return made


def _chosen(options: argparse.Namespace) -> Iterator[Case]:
    """The first cases of each task and kind."""
    half = CHOOSING if options.half == "choosing" else CONFIRMING
    taken: Counter[tuple[str, str]] = Counter()
    for case in read_cases(options.cases):
        if case.task in options.tasks and case.half == half and taken[case.task, case.kind] < options.per_kind:
            taken[case.task, case.kind] += 1
            yield case


@torch.inference_mode()
def _logits(model: Any, case: Case, press: Any) -> tuple[Tensor, float]:
    """Logits [tokens, vocabulary] of the continuation, and the slots that a layer holds at its end."""
    prompt = torch.tensor([case.prompt], device=model.device)
    known = torch.tensor([case.continuation[:-1]], dtype=torch.int64, device=model.device)
    cache = DynamicCache()
    if press is None:
        first = model(prompt, past_key_values=cache, logits_to_keep=1).logits[0]
    else:
        with press(model):
            first = model(prompt, past_key_values=cache, logits_to_keep=1).logits[0]
    if not known.numel():
        return first.cpu(), _held(cache)
    places = torch.arange(prompt.shape[1], prompt.shape[1] + known.shape[1], device=model.device)[None]
    rest = model(known, past_key_values=cache, position_ids=places).logits[0]
    return torch.cat([first, rest]).float().cpu(), _held(cache)


def _held(cache: Any) -> float:
    lengths: list[int] = [layer.keys.shape[2] for layer in cache.layers]
    return sum(lengths) / len(lengths)


def _trace(case: Case, found: Tensor, full: Tensor, slots: float) -> Trace:
    known = torch.tensor(case.continuation)
    ours, theirs = torch.log_softmax(found, -1), torch.log_softmax(full, -1)
    return Trace(
        loss=-ours.gather(-1, known[:, None])[:, 0],
        hit=ours.argmax(-1) == known,
        divergence=(theirs.exp() * (theirs - ours)).sum(-1),
        slots=slots,
    )


def _rows(log: Path) -> list[Row]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


if __name__ == "__main__":
    sys.exit(main())
