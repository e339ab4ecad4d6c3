"""How much of the GPU's read bandwidth does paged decode attention reach, with scores and without?

Llama-3.1-8B's attention (32 query heads, 8 KV heads, head 128, bfloat16), pages scattered over the pool. The kernel
is first compared with its torch twin. Times are medians of CUDA graph replays over several layers, so that nothing
is still in the cache, with scores means of as many steps as queries come together before they are scored; bytes are
those that must move: keys, values, with biases the bias, with scores the score read and written in one of those steps.
What settling before each eviction adds is timed by itself. Writes ``decode_attention_gpu.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from benchmarks._decode import Batch, Heads, Shape, check, check_replays
from benchmarks._gpu import RESULTS, Ceilings, write_result

_LAYER_BYTES = 2e9
SETTLED_EVERY = 32
"""Steps between evictions, each of which settles what is pending: a page's worth."""


SHAPES = (
    Shape("64 x 6592", (6592,) * 64, target=0.92),
    Shape("64 x 6592, page 64", (6592,) * 64, page_size=64),
    Shape("256 x 2048", (2048,) * 256, target=0.90),
    Shape("8 x 32768", (32768,) * 8, target=0.85),
    Shape("32 x 512 and 32 x 32768", (512,) * 32 + (32768,) * 32),
    Shape("128 x 6592", (6592,) * 128),
    Shape("200 x 1024", (1024,) * 200),
    Shape("512 x 1024", (1024,) * 512),
    Shape("64 x 512", (512,) * 64),
    Shape("1 x 32768", (32768,)),
)
TARGETS = tuple(shape for shape in SHAPES if shape.target)
MODES: dict[str, dict[str, bool]] = {
    "plain": {"score": False, "bias": False},
    "scores": {"score": True, "bias": False},
    "scores, biases": {"score": True, "bias": True},
}
# Changes to DecodeConfig; ``page_size`` changes the pool.
SWEEP: tuple[dict[str, int], ...] = (
    {},
    {"warps": 1},
    {"warps": 4},
    {"stages": 4},
    {"stages": 5},
    {"page_size": 64},
    {"page_size": 64, "stages": 4},
)
# Batches for which it is tried how many slots are best left in one piece.
WHOLES = (512, 768, 1024, 1536, 2048, 4096)
WHOLE_BATCHES = (8, 16, 32, 48, 64, 96, 128, 200, 256)
WHOLE_SLOTS = (300, 536, 800, 1048, 1600, 2100, 3200)
_MOST_SLOTS = 500_000
CHECKS: tuple[tuple[Heads, dict[str, Any]], ...] = (
    (Heads(), {}),
    (Heads(group=3, head_dim=64, dtype=torch.float16), {"softcap": 20.0}),
    (Heads(group=8, head_dim=96, dtype=torch.float32), {}),
    (Heads(group=3, head_dim=64, dtype=torch.float16), {"window": 900, "softcap": 20.0}),
    (Heads(group=1, head_dim=256), {"softcap": 30.0}),
)


def _layers(shape: Shape, size: float = _LAYER_BYTES) -> int:
    """Layers whose caches together are far larger than the L2 cache."""
    return min(32, max(2, -int(-size // (sum(shape.lengths) * Heads().slot_bytes))))


def time_shapes(ceilings: Ceilings, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """One row a shape and mode."""
    rows = []
    for shape in shapes:
        batch = Batch(shape, Heads(), layers=_layers(shape))
        plan_us, settle, plain = 1e3 * batch.time_plan(), batch.time_settle(), 0.0
        for name, mode in MODES.items():
            milliseconds = batch.time(mode)
            bandwidth = batch.necessary_bytes(mode) / milliseconds / 1e9
            row = {"shape": shape.name, "mode": name, "ms": milliseconds, "tb_s": bandwidth}
            row |= {"share_of_read": bandwidth / ceilings.read_tb_s, "plan_us": plan_us}
            plain = plain or milliseconds
            row["scores_add"] = milliseconds / plain - 1 if mode["score"] else None
            row["settled_add"] = (milliseconds + settle / SETTLED_EVERY) / plain - 1 if mode["score"] else None
            rows.append(row | {"settle_ms": settle, "target": shape.target if mode["score"] else None})
            wanted = f"  target {shape.target}" if shape.target and mode["score"] else ""
            print(
                f"{shape.name:26}{name:16}{milliseconds:8.4f} ms{bandwidth:7.3f} TB/s"
                f"{row['share_of_read']:7.1%} of read{wanted}  plan {plan_us:.1f} us  settle {settle:.4f} ms"
                + (f"  scores add {row['scores_add']:.1%}, settled {row['settled_add']:.1%}" if mode["score"] else ""),
                flush=True,
            )
        del batch
        torch.cuda.empty_cache()
    return rows


def sweep(ceilings: Ceilings) -> list[dict[str, Any]]:
    """Ways to launch: share of the read bandwidth at the shapes with a target, plain / with scores and biases."""
    rows = []
    shapes = [replace(shape, page_size=page) for page in (32, 64) for shape in TARGETS]
    batches = [Batch(shape, Heads(), layers=_layers(shape)) for shape in shapes]
    for changes in SWEEP:
        page = int(changes.get("page_size", 32))
        config = {name: value for name, value in changes.items() if name != "page_size"}
        row: dict[str, Any] = {"changes": changes}
        rows.append(row)
        try:
            check(Heads(), page, config)
            check_replays(config, rounds=1)
            for batch in batches:
                if batch.shape.page_size == page:
                    row[batch.shape.name] = _shares(batch, config, ceilings)
        except (OutOfResources, AssertionError, RuntimeError) as error:
            row["error"] = str(error).partition("\n")[0]
        text = ("/".join(f"{value:.1%}" for value in row.get(shape.name, ())) for shape in TARGETS)
        print("  ".join(text), row.get("error", ""), changes, flush=True)
    return rows


def _shares(batch: Batch, config: dict[str, Any], ceilings: Ceilings) -> list[float]:
    """Shares of the read bandwidth, plain and with scores and biases."""
    modes = (MODES["plain"], MODES["scores, biases"])
    times = [batch.time(mode, batch.config(**config)) for mode in modes]
    return [
        batch.necessary_bytes(mode) / time / 1e9 / ceilings.read_tb_s for mode, time in zip(modes, times, strict=True)
    ]


def time_wholes() -> list[dict[str, Any]]:
    """Microseconds of a layer, plain and with scores and biases, for each of ``WHOLES``: slots that are not split."""
    rows = []
    for batch, slots in product(WHOLE_BATCHES, WHOLE_SLOTS):
        if batch * slots > _MOST_SLOTS:
            continue
        shape = Shape(f"{batch} x {slots}", (slots,) * batch)
        made = Batch(shape, Heads(), layers=_layers(shape, _LAYER_BYTES / 2))
        row: dict[str, Any] = {"shape": shape.name}
        for name in ("plain", "scores, biases"):
            row[name] = [round(1e3 * made.time(MODES[name], worth=worth), 1) for worth in WHOLES]
        rows.append(row)
        print(row, flush=True)
        del made
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--no-sweep", action="store_true", help="time the default configuration only")
    parser.add_argument("--quick", action="store_true", help="time only the shapes that have a target")
    parser.add_argument("--wholes", action="store_true", help="time only how many slots are best left in one piece")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("decode_attention_gpu: no CUDA device, nothing measured")
        return
    if given.wholes:
        print(write_result(given.out, "decode_attention_gpu_wholes", {"wholes": WHOLES, "microseconds": time_wholes()}))
        return
    checks = []
    for heads, rule in CHECKS:
        facts = {"heads": str(heads), "rule": rule} | check(heads, **rule)
        checks.append(facts)
        print(facts, flush=True)
    replays = check_replays({})
    print("replays", replays, flush=True)
    ceilings = Ceilings.measure()
    print(ceilings, flush=True)
    result: dict[str, Any] = {
        "checks": checks,
        "replays": replays,
        "ceilings": asdict(ceilings),
        "rows": time_shapes(ceilings, TARGETS if given.quick else SHAPES),
    }
    path = write_result(given.out, "decode_attention_gpu", result)
    if not given.no_sweep:
        path = write_result(given.out, "decode_attention_gpu", result | {"sweep": sweep(ceilings)})
    print(path)


if __name__ == "__main__":
    main()
