"""The golden vectors, and a plain cache to replay their traces with."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from d2o.compressor import Compressed, Slots, compress
from d2o.config import D2OConfig

FOLDER = Path(__file__).parent / "golden"


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@cache
def settings() -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = json.loads((FOLDER / "golden.json").read_text())
    return {name: values for group in groups.values() for name, values in group.items()}


class Replay:
    """One layer of one sequence, attended plainly and compressed by :func:`d2o.compressor.compress`."""

    def __init__(self, name: str, config: D2OConfig) -> None:
        self.config = config
        self.q, self.k, self.v = (tensors()[f"{name}.{part}"] for part in "qkv")
        self.kv_heads = self.k.shape[0]
        self.seen = settings()[name]["prompt"]
        self.slots = Slots(
            k=self.k[None, :, : self.seen],
            v=self.v[None, :, : self.seen],
            score=self.grouped(tensors()[f"{name}.prefill_score"])[None],
            position=torch.arange(self.seen, dtype=torch.int32).expand(1, self.kv_heads, -1),
            bias=torch.zeros(1, self.kv_heads, self.seen),
            used=torch.tensor([self.seen]),
        )
        self.threshold = torch.full((1, self.kv_heads), math.nan)

    def grouped(self, by_query_head: Tensor) -> Tensor:
        return by_query_head.view(self.kv_heads, -1, by_query_head.shape[-1]).sum(1)

    def decode(self) -> Tensor:
        """Appends the next token, attends and scores: the attention output ``[query heads, head_dim]``."""
        at, old = self.seen, self.slots
        k = torch.cat([old.k, self.k[None, :, at : at + 1]], 2)
        v = torch.cat([old.v, self.v[None, :, at : at + 1]], 2)
        bias = pad(old.bias, (0, 1))
        query = self.q[:, at].view(self.kv_heads, -1, k.shape[-1])
        logits = query @ k[0].transpose(-1, -2) / math.sqrt(k.shape[-1]) + bias[0, :, None]
        probabilities = logits.softmax(-1)
        self.slots = Slots(
            k=k,
            v=v,
            score=pad(old.score, (0, 1)) + probabilities.sum(1),
            position=pad(old.position, (0, 1), value=at),
            bias=bias,
            used=old.used + 1,
        )
        self.seen += 1
        return (probabilities @ v[0]).flatten(0, 1)

    def evict(self, keep: int) -> Compressed:
        result = compress(
            self.slots,
            keep=torch.tensor([keep]),
            seen=torch.tensor([self.seen]),
            config=self.config,
            threshold=self.threshold,
        )
        self.slots, self.threshold = result.slots, result.threshold
        return result


def assert_state(slots: Slots, prefix: str, step: int | str, sinks: int) -> None:
    """Compares keys, values and scores; the references save sinks by an infinite score, ours keep their own."""
    for name in ("k", "v"):
        assert_parity(getattr(slots, name)[0], tensors()[f"{prefix}.{name}.{step}"])
    golden_score = tensors()[f"{prefix}.score.{step}"]
    assert golden_score[:, :sinks].isinf().all()
    assert slots.score[0, :, :sinks].isfinite().all()
    assert_parity(slots.score[0, :, sinks:], golden_score[:, sinks:])


def assert_parity(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-5, atol=1e-6)
