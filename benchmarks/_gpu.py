"""What a GPU figure was measured on, the ceilings it is held against, and how GPU times are taken."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks._machine import Machine

Times = dict[str, float]
"""Milliseconds by name."""

RESULTS = Path(__file__).resolve().parent / "results"
_WARM_SECONDS, _SECONDS = 1.5, 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """The device and the software on it."""

    name: str
    processors: int
    memory_gib: float
    capability: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str

    @classmethod
    def read(cls) -> GpuFacts:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(
            name=properties.name,
            processors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            capability=f"{properties.major}.{properties.minor}",
            driver=_driver(),
            cuda=torch.version.cuda,
            torch=torch.__version__,
            triton=triton.__version__,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device reaches on the plainest work: TB/s (10^12 bytes) and TFLOP/s."""

    copy_tb_s: float
    read_tb_s: float
    matrix_bf16_tflop_s: float

    @classmethod
    def measure(cls, *, gib: float = 4.0, size: int = 8192) -> Ceilings:
        """Bandwidth over ``gib`` GiB (copies count bytes read and written) and a bfloat16 product of ``size`` cubed."""
        copy, read = _bandwidths(int(gib * 2**28))
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        matrix = 2 * size**3 / time_gpu(partial(torch.matmul, a, b)) / 1e9
        return cls(copy_tb_s=copy, read_tb_s=read, matrix_bf16_tflop_s=matrix)


def time_gpu(run: Callable[[], object], *, repeats: int = 20, warmup: int = 5) -> float:
    """Median milliseconds of one call, between CUDA events around it. For work of a tenth of a millisecond or more."""
    for _ in range(warmup):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return float(median(begin.elapsed_time(end) for begin, end in marks))


def time_graph(runs: Sequence[Callable[[], object]], *, repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of one of ``runs``, captured one after another in a CUDA graph: no launch from the host."""
    return time_gpu(captured(runs), repeats=repeats, warmup=warmup) / len(runs)


def captured(runs: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """What replays ``runs``, one after another, as one CUDA graph."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    replay: Callable[[], None] = graph.replay
    return replay


def time_in_turn(runs: Mapping[str, Callable[[], object]], *, rounds: int = 3, seconds: float = 0.15) -> list[Times]:
    """Milliseconds of one call of each, once a round: calls for ``seconds``, then the mean of as many more.

    At the limit of its power a GPU is the slower the longer it works, and a call takes longer behind a hungry one.
    What is compared must therefore have run by itself for a while, and in the same round.
    """
    counts = {name: max(4, int(1000 * seconds / time_gpu(run, repeats=3, warmup=2))) for name, run in runs.items()}
    return [{name: mean_ms(run, counts[name]) for name, run in runs.items()} for _ in range(rounds)]


def mean_ms(run: Callable[[], object], count: int) -> float:
    """Milliseconds of one of ``count`` calls behind each other, after as many that are not timed.

    What the host takes to launch one hides behind those before, which it does not where each is timed by itself.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(count):
        run()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end) / count)


def sustained_ms(run: Callable[[], object], seconds: float) -> float:
    """Mean milliseconds of one of as many runs as take ``seconds``; the host is never more than a few runs ahead."""
    began, marks = time.perf_counter(), []
    while time.perf_counter() - began < seconds:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        run()
        marks.append(mark)
        if len(marks) > 4:
            marks[-4].synchronize()
    torch.cuda.synchronize()
    return fmean(begin.elapsed_time(end) for begin, end in pairwise(marks))


def sustained_matrix_rate(size: int = 8192) -> float:
    """TFLOP/s of a bfloat16 product of ``size`` cubed that has gone on for seconds, as power allows."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = partial(torch.matmul, a, b)
    sustained_ms(product, _WARM_SECONDS)
    return 2 * size**3 / sustained_ms(product, _SECONDS) / 1e9


def write_result(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes ``folder/name.json``: the machine's and the GPU's facts, then the result."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = Machine(packages={"torch": torch.__version__, "triton": triton.__version__}).as_json()
    path = folder / f"{name}.json"
    facts = {"benchmark": name, "machine": machine, "gpu": asdict(GpuFacts.read())}
    path.write_text(json.dumps(facts | result, indent=2) + "\n")
    return path


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _bandwidths(words: int) -> tuple[float, float]:
    """TB/s of a copy and of the faster of two reductions, over ``words`` float32."""
    source = torch.rand(words, device="cuda")
    target = torch.empty_like(source)
    sums = torch.empty(16 * GpuFacts.read().processors, device="cuda")
    copy = 8 * words / time_gpu(partial(target.copy_, source)) / 1e9
    fastest = min(time_gpu(partial(torch.sum, source)), time_gpu(partial(_read, source, sums)))
    return copy, 4 * words / fastest / 1e9


def _read(source: torch.Tensor, sums: torch.Tensor) -> None:
    _read_kernel[(sums.numel(),)](source, sums, source.numel(), sums.numel(), 4096, num_warps=8)


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(
    source: tl.tensor, sums: tl.tensor, words: tl.tensor, programs: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Each program sums every ``programs``-th block of ``source``."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, words, programs * BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(source + index, mask=index < words, other=0.0)
    tl.store(sums + program, tl.sum(total, 0))


def main() -> None:
    """Prints this GPU's rates as a line of JSON, for scripts whose server takes all of its memory."""
    print(json.dumps(asdict(Ceilings.measure()) | {"matrix_sustained_bf16_tflop_s": sustained_matrix_rate()}))


if __name__ == "__main__":
    main()
