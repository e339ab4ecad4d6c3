"""How soon do short prompts answer, and how long do streams wait for a step that reads one, with graphs and without?

A worker in this process. A prompt alone, and prompts that come one after another while others decode; the full cache
and D2O at ratio 0.2. Each is timed with steps that read prompts replaying their graphs and with all kernels launched
one by one, in turn. Writes ``short_prompts_gpu.json``: milliseconds to the first token of a prompt alone, and the
longest that streams wait for a token while one is read beside them; with ``floor_ms``, the time to read the model's
weights or to multiply a step's tokens by them, whichever is longer at the rates measured in the same run. A wait can be
shorter than its step's floor where the host, busy with launching the step, tells the tokens of the step before late.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2o.config import D2OConfig, Policy

if TYPE_CHECKING:
    from benchmarks._floor import Work
    from benchmarks._gpu import Ceilings
    from d2o_server.worker.core import WorkerCore

CONFIGS = {"none": D2OConfig(policy=Policy.NONE), "d2o": D2OConfig(ratio=0.2, min_budget=64)}
_WARM_UP = 3
_ENDLESS = 4000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="random:llama-3.1-8b")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128, 300, 512, 1024, 1500, 2048])
    parser.add_argument("--beside", type=int, nargs="+", default=[64, 300, 1024], help="prompts read beside others")
    parser.add_argument("--streams", type=int, default=64, help="sequences that decode meanwhile")
    parser.add_argument("--held", type=int, default=512, help="tokens of each of their prompts")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("short_prompts_gpu: torch sees no GPU here; nothing was measured")
        return
    from benchmarks import _engine, _gpu
    from benchmarks._floor import Work
    from d2o_server.settings import worker_settings

    ceilings = _gpu.Ceilings.measure()
    core = _engine.start(worker_settings(model=options.model, max_sequences=max(256, options.streams))).core
    work = Work.of(options.model, torch.bfloat16)
    alone = [
        {"policy": policy, "prompt_tokens": tokens, "floor_ms": floor_ms(work, ceilings, tokens)}
        | _in_turn(core, lambda c=config, n=tokens: _first(core, n, c), options.repeats)
        for policy, config in CONFIGS.items()
        for tokens in options.prompts
    ]
    beside = []
    for policy, config in CONFIGS.items():
        with _decoding(core, options.streams, options.held, config):
            beside.append({"policy": policy, "streams": options.streams, "prompt_tokens": 0, "ms": _gap(core)})
            for tokens in options.beside:
                row = _in_turn(core, lambda c=config, n=tokens: _step_beside(core, n, c), options.repeats)
                floor = floor_ms(work, ceilings, options.streams + tokens)
                shape = {"policy": policy, "streams": options.streams, "prompt_tokens": tokens, "floor_ms": floor}
                beside.append(shape | row)
    for row in (*alone, *beside):
        print(row)
    result = {
        "ceilings": asdict(ceilings),
        "model": options.model,
        "held": options.held,
        "sizes": _bodies(core)._sizes,
        "first_token": alone,
        "beside_decoding": beside,
    }
    print(_gpu.write_result(options.out, "short_prompts_gpu", result))


def floor_ms(work: Work, ceilings: Ceilings, tokens: int) -> float:
    """Of a step of so many tokens: the weights read, or the blocks' multiplied by its tokens. Attention is nothing."""
    reading = (work.parameters + work.head_parameters) * work.element_bytes / ceilings.read_tb_s
    return max(reading, 2 * work.parameters * tokens / ceilings.matrix_bf16_tflop_s) / 1e9


def _bodies(core: WorkerCore) -> Any:
    from d2o_server.worker.gpu.runner import KernelRunner

    assert isinstance(core.runner, KernelRunner)
    return core.runner._bodies


@contextmanager
def _without_graphs(core: WorkerCore) -> Iterator[None]:
    bodies = _bodies(core)
    sizes, bodies._sizes = bodies._sizes, []
    try:
        yield
    finally:
        bodies._sizes = sizes


def _in_turn(core: WorkerCore, measure: Any, repeats: int) -> dict[str, float]:
    """Medians in milliseconds with graphs and without."""
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(_WARM_UP + repeats):
        pair = [measure()]
        with _without_graphs(core):
            pair.append(measure())
        if turn >= _WARM_UP:
            ours.append(pair[0])
            theirs.append(pair[1])
    return {"graphs_ms": statistics.median(ours), "launched_ms": statistics.median(theirs)}


_draw = torch.Generator().manual_seed(11)


def _submit(core: WorkerCore, name: str, tokens: int, config: D2OConfig, new: int) -> None:
    from benchmarks import _engine

    prompt = torch.randint(0, core.runner.vocabulary_size, (tokens,), generator=_draw)
    _engine.submit(core, name, tuple(prompt.tolist()), config, new)


def _first(core: WorkerCore, tokens: int, config: D2OConfig) -> float:
    """Milliseconds from submitting a prompt to an idle worker to its first token."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    _submit(core, "alone", tokens, config, 1)
    seen: list[float] = []

    def note(report: Any) -> None:
        if report.tokens and not seen:
            seen.append(time.perf_counter() - began)

    while core:
        note(core.step(note))
    return 1000 * seen[0]


@contextmanager
def _decoding(core: WorkerCore, streams: int, held: int, config: D2OConfig) -> Iterator[None]:
    """Sequences that decode until the end of the block."""
    from d2o_server.engine.messages import Cancel

    for index in range(streams):
        _submit(core, f"stream {index}", held, config, _ENDLESS)
    for _ in range(streams):
        core.step()
    try:
        yield
    finally:
        for index in range(streams):
            core.handle(Cancel(f"stream {index}"))
        while core:
            core.step()


def _gap(core: WorkerCore, steps: int = 30) -> float:
    """Milliseconds of a step that reads nothing."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        core.step()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def _step_beside(core: WorkerCore, tokens: int, config: D2OConfig) -> float:
    """The longest wait of the streams for a token while a prompt is read and has its first tokens."""
    for _ in range(4):
        core.step()
    _submit(core, "beside", tokens, config, 2)
    longest, last = 0.0, time.perf_counter()

    def note(report: Any) -> None:
        nonlocal longest, last
        if any(token.id == "stream 0" for token in report.tokens):
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    while "beside" in core.scheduler.running or core.scheduler.waiting:
        note(core.step(note))
    for _ in range(2):
        note(core.step(note))
    return 1000 * longest


if __name__ == "__main__":
    main()
