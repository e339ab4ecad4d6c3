"""The least that a load can take on a GPU: its bytes and operations, one after another, at the rates of that GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from benchmarks._server import child_environment
from d2o.config import D2OConfig
from d2o_server.engine.memory import CacheShape, reserve
from d2o_server.models.describe import describe
from d2o_server.models.source import resolve
from d2o_server.worker.loader import load_config, model_class_of

_TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a GPU reaches on the plainest work: bandwidths in TB/s, bfloat16 products of 8,192 cubed in TFLOP/s.

    ``matrix_bf16_tflop_s`` is that of a few products after a pause, the other one's of seconds of nothing else, in
    which power caps the clock.
    """

    copy_tb_s: float
    read_tb_s: float
    matrix_bf16_tflop_s: float
    matrix_sustained_bf16_tflop_s: float

    @classmethod
    def measure_apart(cls, server_flags: str = "") -> Rates | None:
        """Measures in a process of its own, which leaves the GPU as it was; None for a server without a GPU.

        Raises:
            RuntimeError: the measurement failed.
        """
        on_cpu = re.search(r"--device[= ]cpu\b", server_flags)
        if on_cpu or shutil.which("nvidia-smi") is None:
            return None
        command = [sys.executable, "-m", "benchmarks._gpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment({}))
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise RuntimeError(f"the GPU's rates cannot be measured: {reason or done.returncode}")
        return cls(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a model has to do for a token, read off its shape.

    ``parameters`` are those that a token is multiplied by in the blocks, ``head_parameters`` those of the output;
    ``pair_operations`` what one query and one key cost in a layer; ``slot_bytes`` K and V of one slot in a layer.
    """

    windows: tuple[int | None, ...]
    parameters: int
    head_parameters: int
    pair_operations: int
    slot_bytes: int
    element_bytes: int

    @classmethod
    def of(cls, model: str, dtype: torch.dtype) -> Work:
        """Of a model as the server names it. Nothing of its weights is read."""
        config = load_config(resolve(model))
        shape = describe(config)
        blocks, head = _parameters(config)
        return cls(
            windows=shape.windows,
            parameters=blocks,
            head_parameters=head,
            pair_operations=4 * shape.query_heads * shape.head_dim,
            slot_bytes=shape.bytes_per_token(dtype.itemsize) // shape.layers,
            element_bytes=dtype.itemsize,
        )


def _parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """Elements of the blocks' matrices, and of the output's."""
    with torch.device("meta"):
        model = model_class_of(config)(config)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return sum(module.weight.numel() for module in linear), head.weight.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Seconds: products and attention of the prompts; products of all steps, and keys and values that they read."""

    prompt_products: float
    prompt_attention: float
    step_products: float
    step_cache: float

    @property
    def total(self) -> float:
        return self.prompt_products + self.prompt_attention + self.step_products + self.step_cache

    def as_json(self) -> dict[str, float]:
        return asdict(self) | {"total": self.total}


def floor_of(
    work: Work, rates: Rates, *, requests: int, prompt_tokens: int, new_tokens: int, compression: dict[str, Any]
) -> Floor:
    """The floor of equal requests that all decode together, with ``compression`` as the client names it.

    Every prompt token is multiplied by every parameter, and attends to those before it, at the sustained matrix rate. A
    step reads its weights or multiplies by them, whichever takes longer, and reads each sequence's slots: a compressing
    layer's average budget once the sequence has as many. Scores, evictions, norms and all else count as nothing.
    """
    operations = _TERA * rates.matrix_sustained_bf16_tflop_s
    read = _TERA * rates.read_tb_s
    steps = new_tokens - 1
    weights = work.parameters + work.head_parameters
    step = max(weights * work.element_bytes / read, 2 * weights * requests / operations)
    cache = CacheShape(windows=work.windows, page_size=1)
    budget = reserve(cache, D2OConfig.of(**compression), prompt_tokens, new_tokens).budget
    slots = sum(_slots_read(window or budget or None, prompt_tokens, steps) for window in work.windows)
    pairs = sum(_pairs(window, prompt_tokens) for window in work.windows)
    return Floor(
        prompt_products=requests * 2 * (work.parameters * prompt_tokens + work.head_parameters) / operations,
        prompt_attention=requests * work.pair_operations * pairs / operations,
        step_products=steps * step,
        step_cache=requests * slots * work.slot_bytes / read,
    )


def _slots_read(most: int | None, prompt_tokens: int, steps: int) -> int:
    """Slots that all steps of a sequence read in a layer that holds at most so many."""
    lengths = range(prompt_tokens + 1, prompt_tokens + steps + 1)
    return sum(lengths) if most is None else sum(min(most, length) for length in lengths)


def _pairs(window: int | None, tokens: int) -> int:
    """Queries and the keys that they see in a prompt."""
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
