"""What does exact attention scoring cost on a CPU, and what do page faults cost a decode step?

One layer of SmolLM2-135M's shape: prefill through torch's flash kernel and through ours, without and with column sums;
decode over pages in a process with glibc's own malloc thresholds and in one with the worker's. Writes
``attention_cpu.json``; times are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import _cli
from d2o.attention import AttentionRule, DecodeSegments, ScoreTarget, decode_attention, prefill_attention
from d2o.pages import PagePool
from d2o_server.control_groups import usable_cores

_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 9, 3, 64, 32
_RULE = AttentionRule(_HEAD_DIM**-0.5)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# As engine/worker_process.py starts a worker.
_RAISED = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483648"}


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of ``run`` after one run that does not count."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return median(times)


def prefill(dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds a layer for one whole prompt."""
    q = torch.randn(_HEADS, tokens, _HEAD_DIM).to(dtype)
    k, v = (torch.randn(_KV_HEADS, tokens, _HEAD_DIM).to(dtype) for _ in range(2))
    wide_k, wide_v = (x.repeat_interleave(_HEADS // _KV_HEADS, 0)[None] for x in (k, v))

    def ours(*, scores: bool) -> None:
        received, window = torch.zeros(_HEADS, tokens), torch.zeros(_KV_HEADS, tokens)
        target = ScoreTarget(received, window, max(0, tokens - 32), tokens) if scores else None
        prefill_attention(q, k, v, start=0, rule=_RULE, scores=target)

    def flash() -> None:
        torch.nn.functional.scaled_dot_product_attention(q[None], wide_k, wide_v, is_causal=True)

    return {
        "flash_kernel": milliseconds(flash, repeats),
        "tiles": milliseconds(lambda: ours(scores=False), repeats),
        "tiles_with_column_sums": milliseconds(lambda: ours(scores=True), repeats),
    }


def decode(dtype: torch.dtype, sequences: int, slots: int, repeats: int) -> dict[str, float]:
    """Milliseconds a layer; the layers of a pool in turn, so that no step finds its keys in the cache."""
    layers = 6
    pages = layers * sequences * -(-slots // _PAGE)
    pool = PagePool(
        layers=layers,
        kv_heads=_KV_HEADS,
        head_dim=_HEAD_DIM,
        page_size=_PAGE,
        num_pages=pages,
        rows=sequences,
        max_slots=slots,
        dtype=dtype,
    )
    pool.k.normal_()
    pool.v.normal_()
    rows = torch.tensor([pool.open_row() for _ in range(sequences)])
    counts = torch.full((sequences,), slots)
    pool.grow(rows, counts)
    pool.used[:, rows] += counts
    segments = DecodeSegments.plan(pool, rows, counts - 1, None)
    q = torch.randn(sequences, _HEADS, _HEAD_DIM).to(dtype)

    def step(*, score: bool) -> None:
        for layer in range(layers):
            decode_attention(q, pool, segments, layer, rule=_RULE, bias=score, score=score)

    return {
        "plain": milliseconds(lambda: step(score=False), repeats) / layers,
        "with_scores_and_bias": milliseconds(lambda: step(score=True), repeats) / layers,
    }


def decode_elsewhere(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """The decode measurement in a process of its own, whose malloc reads ``environment``."""
    inherited = {name: value for name, value in os.environ.items() if name not in _RAISED}
    command = [sys.executable, "-m", "benchmarks.attention_cpu", "--only-decode", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=inherited | environment)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes JSON and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--tokens", type=int, default=4000, help="of the prompt")
    parser.add_argument("--sequences", type=int, default=16, help="that decode")
    parser.add_argument("--slots", type=int, default=1064, help="of each of them")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=_cli.RESULTS, help="folder of the results")
    parser.add_argument("--only-decode", action="store_true", help="print the decode figures as JSON, write nothing")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    if parsed.only_decode:
        print(json.dumps(decode(torch.bfloat16, parsed.sequences, parsed.slots, parsed.repeats)))
        return
    names = ("threads", "sequences", "slots", "repeats")
    flags = [part for name in names for part in (f"--{name}", str(getattr(parsed, name)))]
    result = {
        "settings": {name: getattr(parsed, name) for name in (*names, "tokens")},
        "prefill_ms_a_layer": {name: prefill(dtype, parsed.tokens, parsed.repeats) for name, dtype in _DTYPES.items()},
        "decode_ms_a_layer": {
            "default_malloc": decode_elsewhere(flags, {}),
            "raised_thresholds": decode_elsewhere(flags, _RAISED),
        },
    }
    path = _cli.write_json(parsed.out, "attention_cpu", result)
    for part in ("prefill_ms_a_layer", "decode_ms_a_layer"):
        for case, figures in result[part].items():
            print(part, case, {name: round(value, 2) for name, value in figures.items()})
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
