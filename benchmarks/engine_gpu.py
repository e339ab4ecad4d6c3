"""How near the engine comes to the GPU's own limits: decode steps, time to first token, compression and eviction.

A worker in this process, without gRPC, or one that is split over GPUs (``--tensor-parallel``): floors are then those
of one rank. Decode steps run on caches that stand as if their prompts had been read; the time to the first token is
that of a real prompt. Writes ``engine_gpu.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2o.config import D2OConfig, Policy, ScoreQueries

if TYPE_CHECKING:
    from d2o_server.engine.messages import StepReport
    from d2o_server.engine.types import CacheFacts
    from d2o_server.worker.core import WorkerCore
    from d2o_server.worker.ranks import Ranks

NONE = D2OConfig(policy=Policy.NONE)
_TIGHT = D2OConfig(budget_tokens=1024)
SHAPES = ((128, 6592), (64, 512), (256, 1024))
_STEPS, _WARM_UP = 64, 8
_STREAM_TOKENS = 256
_PROFILED = 16
_BATCHES = (1, 4, 16, 32, 64, 128, 192, 256)
# Names of kernels by what they do; the rest is normalisation, rotation, activation and sampling.
_KINDS = {
    "attention": ("attend_kernel", "_plan_kernel", "cudnn", "flash", "fmha", "_merge_kernel"),
    "scores": ("column_sums", "turns_kernel", "settle_kernel"),
    "exchange": ("nccl", "all_reduce"),
    "matrices": ("nvjet", "gemm", "cublas", "splitK", "cutlass"),
    "eviction": (
        *("cut_kernel", "keys_kernel", "split_kernel", "direct_kernel", "stage_kernel", "staged_kernel"),
        *("judge_kernel", "fold_kernel", "fold_few_kernel", "move_kernel", "segments_kernel", "sort", "Sort"),
    ),
}
_NEVER = 1 << 40


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("engine_gpu: torch sees no GPU here; nothing was measured")
        return
    from benchmarks import _engine, _gpu

    options.out.mkdir(parents=True, exist_ok=True)
    result = _engine.on_ranks(options.tensor_parallel, partial(_measure, options))
    print(_gpu.write_result(options.out, options.name, result))


def _measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """All that the options ask for; every rank of a worker measures the same."""
    from benchmarks import _engine, _gpu
    from d2o_server.settings import worker_settings
    from d2o_server.worker import peer_memory

    if options.nccl:
        peer_memory.share_memory = _refuse_to_share
    began = time.perf_counter()
    torch.cuda.set_device(ranks.number)
    ceilings = _gpu.Ceilings.measure()
    settings = worker_settings(
        model=options.model,
        max_sequences=options.max_sequences,
        max_model_len=options.max_model_len,
        num_pages=options.num_pages,
        graphs=options.graphs,
        compile=options.compile,
        tensor_parallel=ranks.count,
    )
    worker = _engine.start(settings, ranks)
    result: dict[str, Any] = {
        "ceilings": asdict(ceilings),
        "model": options.model,
        "tensor_parallel": ranks.count,
        "pool_pages": worker.core.pool_state().total,
        "start_seconds": time.perf_counter() - began,
        "decode": [],
    }
    for batch, slots in SHAPES:
        result["decode"].append(_decode(worker, batch, slots, ceilings.read_tb_s))
    if options.prompt:
        sampled = D2OConfig(ratio=0.2, min_budget=1024)
        exact = replace(sampled, score_queries=ScoreQueries.parse("all"))
        result["first_token"] = [_first_token(worker, options.prompt, config) for config in (NONE, sampled, exact)]
    if options.streams:
        result["streams"] = [_streams(worker, options.streams, config) for config in (NONE, _TIGHT)]
    if options.concurrency:
        result["concurrency"] = [_concurrency(worker, slots) for slots in (4096, 1024)]
    if options.profile:
        tables = options.out if ranks.number == 0 else None
        result["parts_ms"] = [_parts(worker, batch, slots, tables) for batch, slots in SHAPES]
        if options.prompt:
            result["prompt_parts_ms"] = _prompt_parts(worker, options.prompt, tables)
    return result


def _refuse_to_share(group: object, device: object) -> None:
    raise RuntimeError("this run asks for NCCL")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--model", default="random:llama-3.1-8b")
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=40960)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that the model is split over")
    parser.add_argument("--nccl", action="store_true", help="add up by NCCL what GPUs could by reading one another")
    parser.add_argument("--num-pages", type=int, help="default: what the GPU's memory affords")
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of the prompt that is read; 0 for none")
    parser.add_argument("--streams", type=int, default=200, help="real requests that decode together; 0 for none")
    parser.add_argument("--graphs", action=switch, default=True)
    parser.add_argument("--compile", action=switch, default=True)
    parser.add_argument("--concurrency", action=switch, default=True, help="decode rates of batches of many sizes")
    parser.add_argument("--profile", action=switch, default=True, help="what a decode step is made of")
    parser.add_argument("--name", default="engine_gpu", help="of the file; the plot is of engine_gpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    return parser


def _decode(worker: Any, batch: int, slots: int, read_tb_s: float) -> dict[str, Any]:
    """One shape's step, without scores, with scores, and with evictions as they fall due."""
    from benchmarks import _engine

    core, shape = worker.core, worker.shape
    slot_bytes = 2 * shape.head_dim * 2
    kv = batch * slots * shape.layers * core.runner.caches.pool.kv_heads
    floor = (worker.weight_bytes + kv * slot_bytes) / read_tb_s / 1e9
    row: dict[str, Any] = {"sequences": batch, "slots": slots, "floor_ms": floor}
    # On average over the sequences and the timed steps each run holds ``slots`` a sequence: with evictions from half of
    # the slack below to half of it above, without them one more at every step.
    half = core.shape.slack(D2OConfig(), slots) // 2
    kept = D2OConfig(budget_tokens=slots - half)
    grown = _WARM_UP + _STEPS // 2
    for name, config, begin in (
        ("d2o", kept, slots + half),
        ("scored", kept, slots + half - grown),
        ("none", NONE, slots - grown),
    ):
        with _engine.occupied(core, sequences=batch, slots=begin, config=config, steps=3 * _STEPS):
            if name == "scored":
                core.runner.caches.limit.fill_(_NEVER)
            took = _engine.time_steps(core, steps=_STEPS, warm_up=_WARM_UP)
        row[f"{name}_ms"], row[f"{name}_host_ms"] = took.device_ms, took.host_ms
        row[f"{name}_share_of_floor"] = floor / took.device_ms
    row["eviction_share"] = 1 - row["scored_ms"] / row["d2o_ms"]
    print({key: round(value, 3) for key, value in row.items()}, flush=True)
    return row


def _first_token(worker: Any, tokens: int, config: D2OConfig) -> dict[str, Any]:
    """Seconds from the request to its first token and its second, in the second of two runs, and of compression."""
    core = worker.core
    generator = torch.Generator().manual_seed(3)
    row: dict[str, Any] = {"policy": config.policy.value, "prompt_tokens": tokens}
    if config.policy is not Policy.NONE:
        row["score_queries"] = str(config.score_queries)
    for turn in range(2):
        prompt = tuple(torch.randint(0, worker.shape.vocabulary_size, (tokens,), generator=generator).tolist())
        seconds, facts = _alone(core, f"prompt-{turn}", prompt, config)
        row["compression_seconds"], row["kept"] = facts.compression_seconds, facts.layers[0].kept
        row["seconds"], row["second_token_seconds"] = seconds[:2]
    row["tokens_per_second"] = tokens / row["seconds"]
    print(row, flush=True)
    return row


def _alone(core: WorkerCore, name: str, prompt: tuple[int, ...], config: D2OConfig) -> tuple[list[float], CacheFacts]:
    """Seconds from a request to each of its four tokens, and what became of its cache."""
    from benchmarks import _engine

    reports: list[tuple[float, StepReport]] = []

    def note(report: StepReport) -> None:
        reports.append((time.perf_counter() - began, report))

    torch.cuda.synchronize()
    began = time.perf_counter()
    _engine.submit(core, name, prompt, config, 4)
    while core:
        note(core.step(note))
    (ended,) = (ended for _, report in reports for ended in report.ended)
    return [at for at, report in reports for _ in report.tokens], ended.facts


def _streams(worker: Any, count: int, config: D2OConfig) -> dict[str, Any]:
    """Requests of 1,024 + 256 tokens from prompt to end: what the engine alone gives, and how even its steps are."""
    from benchmarks import _engine

    generator = torch.Generator().manual_seed(5)
    shape = (count, 1024)
    prompts = torch.randint(0, worker.shape.vocabulary_size, shape, generator=generator).tolist()
    for index, prompt in enumerate(prompts):
        _engine.submit(worker.core, f"stream-{index}", tuple(prompt), config, _STREAM_TOKENS)
    torch.cuda.synchronize()
    began = time.perf_counter()
    said: list[tuple[float, StepReport]] = []

    def note(report: StepReport) -> None:
        said.append((time.perf_counter(), report))

    while worker.core:
        note(worker.core.step(note))
    tokens = sum(len(report.tokens) for _, report in said)
    full = [(now, len(report.tokens) == count) for now, report in said if report.tokens]
    # Between reports in which all have decoded no prompt was read.
    steps = [1000 * (now - before) for (before, all_before), (now, every) in pairwise(full) if all_before and every]
    percentiles = torch.tensor(steps or [0.0]).quantile(torch.tensor([0.5, 0.95, 0.99, 1.0])).tolist()
    row = {
        "policy": config.policy.value,
        "streams": count,
        "output_tokens_per_second": tokens / (said[-1][0] - began),
        "step_ms": dict(zip(("p50", "p95", "p99", "max"), percentiles, strict=True)),
    }
    print(row, flush=True)
    return row


def _concurrency(worker: Any, slots: int) -> dict[str, Any]:
    """Tokens a second of batches whose sequences hold ``slots`` slots a layer, without scores."""
    from benchmarks import _engine

    rates: dict[str, float] = {}
    for batch in _BATCHES:
        room = worker.core.pool_state().total // (worker.shape.layers * worker.core.shape.pages(slots + 64))
        if batch > min(room, worker.core.scheduler.max_sequences):
            break
        with _engine.occupied(worker.core, sequences=batch, slots=slots, config=NONE, steps=64):
            took = _engine.time_steps(worker.core, steps=24)
        rates[str(batch)] = 1000 * batch / took.device_ms
    print(slots, {batch: round(rate) for batch, rate in rates.items()}, flush=True)
    return {"slots": slots, "tokens_per_second": rates}


def _parts(worker: Any, batch: int, slots: int, out: Path | None) -> dict[str, Any]:
    """Milliseconds of a decode step by kind of kernel, evictions included, and in which no kernel ran."""
    from benchmarks import _engine

    config = D2OConfig(budget_tokens=slots - worker.core.shape.slack(D2OConfig(), slots))
    with _engine.occupied(worker.core, sequences=batch, slots=slots, config=config, steps=100):
        _engine.time_steps(worker.core, steps=8)
        with _profiler() as profile:
            steps = _engine.time_steps(worker.core, steps=_PROFILED, warm_up=0)
    parts = _by_kind(profile, _PROFILED, out and out / f"engine_gpu_{batch}x{slots}.txt")
    row = {"sequences": batch, "slots": slots, **parts, "idle": steps.device_ms - sum(parts.values())}
    print(row, flush=True)
    return row


def _prompt_parts(worker: Any, tokens: int, out: Path | None) -> dict[str, Any]:
    """The same of a prompt that is read and compressed."""
    from benchmarks import _engine

    prompt = tuple(index * 7919 % worker.shape.vocabulary_size for index in range(tokens))
    torch.cuda.synchronize()
    began = time.perf_counter()
    with _profiler() as profile:
        _engine.submit(worker.core, "profiled", prompt, D2OConfig(ratio=0.2, min_budget=1024), 1)
        while worker.core:
            worker.core.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    parts = _by_kind(profile, 1, out and out / "engine_gpu_prompt.txt")
    row = {"prompt_tokens": tokens, **parts, "idle": 1000 * seconds - sum(parts.values())}
    print(row, flush=True)
    return row


def _profiler() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def _by_kind(profile: torch.profiler.profile, runs: int, table: Path | None) -> dict[str, float]:
    """Milliseconds a run by kind of kernel; the kernels themselves go into a file, if one is named."""
    parts = dict.fromkeys((*_KINDS, "other"), 0.0)
    averages = profile.key_averages()
    for event in averages:
        kind = next((kind for kind, words in _KINDS.items() if any(word in event.key for word in words)), "other")
        parts[kind] += event.self_device_time_total / 1000 / runs
    if table is not None:
        table.write_text(averages.table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=80))
    return parts


if __name__ == "__main__":
    main()
