"""What a decode step is made of when nothing stands between its parts, rested and at the limit of the GPU's power.

Attention alone, the matrix products alone and both in turn, layer by layer, each a CUDA graph of Llama-3.1-8B's shape:
after a pause, and after seconds of nothing else, with the power drawn and the clock meanwhile. Beside them what one
large product comes to when it goes on for as long. Writes ``step_limits_gpu.json``.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

SHAPES = ((256, 1024, "cublas"), (400, 1040, "cublaslt"), (64, 512, "cublaslt"))
"""Sequences, slots, and the library whose products are the quicker at so many."""

_LAYERS, _HIDDEN, _INNER, _VOCABULARY = 32, 4096, 14336, 128256
_PRODUCTS = ((_HIDDEN + 2048, _HIDDEN), (_HIDDEN, _HIDDEN), (2 * _INNER, _HIDDEN), (_HIDDEN, _INNER))
_WARM_SECONDS, _SECONDS = 1.5, 2.5
_PAUSES, _PAUSE_SECONDS = 8, 0.25
_READINGS = ("power.draw.instant", "clocks.current.sm", "clocks_event_reasons.sw_power_cap")


@dataclass(frozen=True, slots=True)
class Readings:
    """What nvidia-smi said meanwhile, in the mean."""

    watts: float
    sm_mhz: float
    capped: float


class Meter:
    """Samples the first GPU's power and clock every 50 ms."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Samples during the block. Raises ``OSError`` where there is no nvidia-smi."""
        query = f"--query-gpu={','.join(_READINGS)}"
        command = ["nvidia-smi", "-i", "0", query, "--format=csv,noheader,nounits", "-lms", "50"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield
        finally:
            process.terminate()
            self._lines = process.communicate()[0].splitlines()

    def mean(self) -> Readings:
        """Of the block's samples; the last may have been cut off.

        Raises:
            RuntimeError: there is no sample.
        """
        samples = [line.split(", ") for line in self._lines]
        samples = [each for each in samples if len(each) == len(_READINGS)][:-1]
        if not samples:
            raise RuntimeError(f"nvidia-smi gave no sample of {', '.join(_READINGS)}: {self._lines[:3]}")
        watts, clocks, reasons = zip(*samples, strict=True)
        return Readings(
            fmean(map(float, watts)), fmean(map(float, clocks)), fmean(reason == "Active" for reason in reasons)
        )


def power_limit() -> float:
    """Watts that the first GPU may draw."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=enforced.power.limit", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout)


def rested_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of one run after a pause."""
    times = []
    for _ in range(_PAUSES):
        torch.cuda.synchronize()
        time.sleep(_PAUSE_SECONDS)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(median(times))


def sustained(run: Callable[[], object]) -> tuple[float, Readings]:
    """Mean milliseconds of one run among many, once as many have run as take seconds, and the readings."""
    from benchmarks import _gpu

    meter = Meter()
    _gpu.sustained_ms(run, _WARM_SECONDS)
    with meter.running():
        mean = _gpu.sustained_ms(run, _SECONDS)
    return mean, meter.mean()


class Step:
    """Attention and products of one batch, over weights that are the same for all batches."""

    def __init__(self, weights: list[list[Tensor]], head: Tensor, sequences: int, slots: int) -> None:
        from benchmarks import _decode
        from d2o.kernels.decode import plan_decode

        heads = _decode.Heads()
        self._batch = _decode.Batch(_decode.Shape("step", (slots,) * sequences), heads, layers=_LAYERS)
        self._weights, self._head = weights, head
        self._inputs = {
            width: torch.randn(sequences, width, dtype=torch.bfloat16, device="cuda") for width in (_HIDDEN, _INNER)
        }
        self._workspace = self._batch.workspace()
        self._plan = plan_decode(self._batch.lengths, self._batch.grid())
        self._attend(0)
        self._plan = plan_decode(self._batch.lengths, self._batch.grid(self._workspace.at_once[False]))
        self.flops = 2 * sequences * (sum(w.numel() for layer in weights for w in layer) + head.numel())
        self.cache_bytes = sequences * slots * heads.slot_bytes * _LAYERS

    def _attend(self, layer: int) -> None:
        from d2o.kernels.decode import decode_attention

        rule = self._batch.rule(bias=False)
        decode_attention(*self._batch.inputs, self._plan, layer, workspace=self._workspace, pending=None, **rule)

    def _multiply(self, layer: int) -> None:
        for weight in self._weights[layer]:
            torch.nn.functional.linear(self._inputs[weight.shape[1]], weight)

    def graphs(self) -> dict[str, Callable[[], None]]:
        """One step's attention, its products, and both in turn."""
        from benchmarks import _gpu

        last = partial(torch.nn.functional.linear, self._inputs[_HIDDEN], self._head)
        attention = [partial(self._attend, layer) for layer in range(_LAYERS)]
        products = [partial(self._multiply, layer) for layer in range(_LAYERS)]
        both = [part for pair in zip(attention, products, strict=True) for part in pair]
        runs: dict[str, list[Callable[[], object]]] = {
            "attention": [*attention],
            "products": [*products, last],
            "both": [*both, last],
        }
        return {name: _gpu.captured(parts) for name, parts in runs.items()}


def _measure() -> dict[str, Any]:
    from benchmarks import _gpu
    from d2o_server.worker.gpu.batch_sizes import multiplying_by

    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    matrix, readings = sustained(partial(torch.matmul, a, b))
    found: dict[str, Any] = {
        "ceilings": asdict(_gpu.Ceilings.measure()),
        "power_limit_watts": power_limit(),
        "matrix_sustained": {"tflop_s": 2 * 8192**3 / matrix / 1e9, **asdict(readings)},
        "steps": [],
    }
    print(found, flush=True)
    weights = [[_weight(*shape) for shape in _PRODUCTS] for _ in range(_LAYERS)]
    head = _weight(_VOCABULARY, _HIDDEN)
    for sequences, slots, library in SHAPES:
        step = Step(weights, head, sequences, slots)
        row: dict[str, Any] = {"sequences": sequences, "slots": slots}
        with multiplying_by(library):
            graphs = step.graphs()
        for name, run in graphs.items():
            mean, readings = sustained(run)
            row[name] = {"rested_ms": rested_ms(run), "sustained_ms": mean, **asdict(readings)}
        row |= {
            "bytes_ms": step.cache_bytes / found["ceilings"]["read_tb_s"] / 1e9,
            "products_at_sustained_rate_ms": step.flops / found["matrix_sustained"]["tflop_s"] / 1e9,
        }
        print(row, flush=True)
        found["steps"].append(row)
        del step
        torch.cuda.empty_cache()
    return found


def _weight(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda").mul_(inputs**-0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("step_limits_gpu: torch sees no GPU here; nothing was measured")
        return
    from benchmarks import _gpu

    torch.manual_seed(0)
    print(_gpu.write_result(options.out, "step_limits_gpu", _measure()))


if __name__ == "__main__":
    main()
