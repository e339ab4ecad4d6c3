"""What this project is compared with, in a process of its own: a task as JSON on stdin, its outcome on stdout.

``python -m benchmarks._peers`` is started by ``benchmarks.baseline_cpu``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from d2o_server.models.source import resolve
from d2o_server.worker.loader import load_model

_CB_PAGE_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Greedy generation of ``new_tokens`` tokens after every prompt, once after ``warm_up`` ran.

    ``method`` is ``generate_batch`` (transformers' continuous batching) or ``generate`` (one padded batch);
    ``batch_tokens`` bounds the tokens of one step of the former.
    """

    method: str
    model: str
    dtype: str
    threads: int
    prompts: list[list[int]]
    warm_up: list[list[int]]
    new_tokens: int
    warm_up_tokens: int
    batch_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``seconds`` from the call to the last token; ``outputs`` has each prompt's new tokens."""

    seconds: float
    outputs: list[list[int]]


def run(task: Task) -> Outcome:
    """Loads the model, warms up and runs the task."""
    torch.set_num_threads(task.threads)
    dtype: torch.dtype = getattr(torch, task.dtype)
    model = load_model(resolve(task.model), dtype=dtype, device="cpu", attn_implementation="sdpa")
    # Settings that a call leaves out, the end-of-text ids too, are taken from here.
    settings = {"max_new_tokens": task.new_tokens, "do_sample": False, "pad_token_id": 0}
    model.generation_config = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    if task.method == "generate":
        _generate(model, task.warm_up, task.warm_up_tokens)
        return _generate(model, task.prompts, task.new_tokens)
    blocks = _blocks(task)
    _generate_batch(model, task.warm_up, task.warm_up_tokens, task, blocks)
    return _generate_batch(model, task.prompts, task.new_tokens, task, blocks)


def _generate(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> Outcome:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    began = time.perf_counter()
    out = cast(Any, model).generate(ids, attention_mask=mask, max_new_tokens=new_tokens, use_cache=True)
    seconds = time.perf_counter() - began
    return Outcome(seconds=seconds, outputs=out[:, longest:].tolist())


def _blocks(task: Task) -> int:
    """Room for all requests at once and for the share that its scheduler keeps free (15 %)."""
    tokens = [len(prompt) + task.new_tokens for prompt in (*task.prompts, *task.warm_up)]
    return int(1.25 * sum(-(-count // _CB_PAGE_TOKENS) for count in tokens)) + 2


def _generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, task: Task, blocks: int
) -> Outcome:
    config = ContinuousBatchingConfig(
        page_size=_CB_PAGE_TOKENS,
        num_blocks=blocks,
        max_batch_tokens=task.batch_tokens,
        max_requests_per_batch=len(task.prompts),
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    began = time.perf_counter()
    results = cast(Any, model).generate_batch(
        prompts,
        continuous_batching_config=config,
        max_new_tokens=new_tokens,
        record_timestamps=True,
        persistent_manager=True,
    )
    outputs = [list(result.generated_tokens) for result in results.values()]
    last = max(result.timestamps[-1] for result in results.values())
    return Outcome(seconds=last - began, outputs=outputs)


def main() -> None:
    task = Task(**json.load(sys.stdin))
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    # The libraries' own messages must not mix with the outcome.
    with contextlib.redirect_stdout(sys.stderr):
        outcome = run(task)
    json.dump(asdict(outcome), sys.stdout)


if __name__ == "__main__":
    main()
