"""The worker against a second, slow reading of ALGORITHM.md: one sequence, dense lists, a full softmax."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from d2o import budget
from d2o.compressor import Slots, compress
from d2o.config import D2OConfig, LayerBudgets, Policy
from tests.d2o import oracle
from tests.server.worker.conftest import NONE, PAGE, generate, load, random_prompts, served_model

NAME = "reference"
NEW = 60


@dataclass
class Layer:
    """One layer's slots, [kv_heads, slots, ...], and the column sums of its prompt."""

    k: Tensor
    v: Tensor
    score: Tensor
    position: Tensor
    bias: Tensor
    threshold: Tensor
    received: Tensor
    window: Tensor
    keep: int = 0

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @classmethod
    def empty(cls, kv_heads: int, dim: int) -> Layer:
        vectors, numbers = torch.zeros(kv_heads, 0, dim), torch.zeros(kv_heads, 0)
        unset = torch.full((kv_heads,), torch.nan)
        return cls(vectors, vectors, numbers, numbers.int(), numbers, unset, numbers, numbers)

    def add(self, k: Tensor, v: Tensor, first: int) -> None:
        """New tokens [kv_heads, n, dim] at positions from ``first`` on."""
        new = torch.zeros(k.shape[:2])
        at = torch.arange(first, first + k.shape[1]).int().expand(k.shape[:2])
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.score, self.bias = torch.cat([self.score, new], 1), torch.cat([self.bias, new], 1)
        self.position = torch.cat([self.position, at], 1)

    def evict(self, config: D2OConfig, seen: int, window: Tensor | None = None) -> None:
        """Down to ``keep`` slots, by the method that is tested elsewhere."""
        result = compress(
            Slots(self.k[None], self.v[None], self.score[None], self.position[None], self.bias[None],
                  torch.tensor([self.slots])),
            keep=torch.tensor([self.keep]),
            seen=torch.tensor([seen]),
            config=config,
            threshold=self.threshold[None],
            window=None if window is None else window[None],
        )  # fmt: skip
        left = result.slots
        self.k, self.v, self.score, self.position, self.bias = (
            x[0] for x in (left.k, left.v, left.score, left.position, left.bias)
        )
        self.threshold = result.threshold[0]


@dataclass
class Reference:
    """One sequence. ``seen`` tokens were fed before the current step."""

    config: D2OConfig
    prompt: list[int]
    total_tokens: int
    layers: dict[int, Layer] = field(default_factory=dict)
    windowed: set[int] = field(default_factory=set)
    seen: int = 0
    compressed: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    def attend(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Queries [heads, n, dim] over everything held and the new keys; returns [n, heads, dim]."""
        layer = self.layers.setdefault(index, Layer.empty(k.shape[0], k.shape[2]))
        if window is not None:
            self.windowed.add(index)
        layer.add(k, v, self.seen)
        group = q.shape[0] // k.shape[0]
        logits = q @ layer.k.repeat_interleave(group, 0).transpose(1, 2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits + layer.bias.repeat_interleave(group, 0)[:, None]
        at = torch.arange(self.seen, self.seen + q.shape[1])
        age = at[None, :, None] - layer.position.repeat_interleave(group, 0)[:, None]
        hidden = age < 0
        if window is not None:
            hidden = hidden | (age >= window)
        probabilities = logits.masked_fill(hidden, -math.inf).softmax(-1)
        if self.seen == 0:
            self._note_prompt(layer, probabilities)
        else:
            layer.score = layer.score + probabilities.sum(1).unflatten(0, (-1, group)).sum(1)
        return (probabilities @ layer.v.repeat_interleave(group, 0)).transpose(0, 1)

    def _note_prompt(self, layer: Layer, probabilities: Tensor) -> None:
        """Column sums (section 1): by query head, and those of the last queries by KV head."""
        tokens = probabilities.shape[1]
        queries = self.config.score_queries
        weights = torch.ones(tokens)
        if queries.kind == "last":
            weights[: max(0, tokens - queries.count)] = 0
        elif queries.kind in ("stride", "sample"):
            stride = queries.count if queries.kind == "stride" else max(1, tokens // queries.count)
            block = torch.arange(tokens) // 64
            weights = torch.where(block % stride == 0, float(stride), (block == block[-1]).float())
        layer.received = (probabilities * weights[:, None]).sum(1)
        if queries.kind == "last":
            saw = tokens - torch.arange(tokens)
            layer.received = layer.received * saw / saw.clamp(max=queries.count)
        kv_heads = layer.k.shape[0]
        layer.score = layer.received.unflatten(0, (kv_heads, -1)).sum(1)
        window = probabilities[:, max(0, tokens - self.config.window_queries) :].sum(1)
        layer.window = window.unflatten(0, (kv_heads, -1)).sum(1)

    def after_step(self, tokens: int) -> None:
        """Sections 2 to 5: what is evicted once ``tokens`` more have been fed."""
        self.seen += tokens
        average = self.config.average_budget(self.prompt_tokens)
        if not self.config.enabled or average >= self.total_tokens:
            return
        full = [self.layers[i] for i in sorted(self.layers) if i not in self.windowed]
        slack = self.config.evict_interval or PAGE
        if not self.compressed:
            at_once = self.seen == self.prompt_tokens > average
            late = self.config.evicts_in_decode and self.prompt_tokens <= average and self.seen >= average + slack
            if at_once or late:
                self._allot(full, average, from_prompt=at_once)
                self.compressed = True
                for layer in full:
                    layer.evict(self.config, self.seen, self._window(layer, average) if at_once else None)
        elif self.config.evicts_in_decode:
            for layer in full:
                if layer.slots >= layer.keep + slack:
                    layer.evict(self.config, self.seen)

    def _window(self, layer: Layer, average: int) -> Tensor:
        """What the last queries saw, and where the prompt's end recurs the attention that is expected."""
        expected = oracle.expected_slots(self.prompt, int(self.config.recurrence_share * average))
        group = layer.received.shape[0] // layer.k.shape[0]
        window = layer.window.clone()
        window[:, expected] += 4 * min(self.config.window_queries, self.seen) * group / self.seen
        return window

    def _allot(self, layers: list[Layer], average: int, *, from_prompt: bool) -> None:
        if self.config.layer_budgets is LayerBudgets.UNIFORM:
            densities = torch.zeros(len(layers))
        else:
            sums = [layer.received if from_prompt else layer.score for layer in layers]
            densities = torch.stack([budget.density(each, self.config) for each in sums])
        whole_pages = self.config.evict_interval is None and average >= 8 * PAGE
        budgets = budget.allocate(
            densities,
            average=average,
            floor=max(self.config.sinks + 1, round(self.config.layer_floor * self.prompt_tokens)),
            cap=self.total_tokens,
            config=self.config,
            multiple=PAGE if whole_pages else 1,
        )
        for layer, keep in zip(layers, budgets, strict=True):
            layer.keep = keep


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    reference: Reference,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    index = int(module.layer_idx)  # type: ignore[arg-type]
    return reference.attend(index, query[0], key[0], value[0], scaling, sliding_window, softcap)[None], None


@functools.cache
def reference_model(name: str) -> PreTrainedModel:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model = load(name, "eager")
    model.set_attn_implementation(NAME)
    return model


@torch.inference_mode()
def reference_tokens(name: str, prompt: list[int], config: D2OConfig, new: int) -> tuple[list[int], Reference]:
    """Greedy tokens, one step at a time."""
    model = reference_model(name)
    reference = Reference(config, prompt, len(prompt) + new)
    tokens: list[int] = []
    fed = prompt
    while True:
        at = torch.arange(reference.seen, reference.seen + len(fed))[None]
        out = model(torch.tensor([fed]), position_ids=at, use_cache=False, reference=reference)
        tokens.append(int(out.logits[0, -1].argmax()))
        reference.after_step(len(fed))
        if len(tokens) == new:
            return tokens, reference
        fed = tokens[-1:]


CONFIGS = {
    "none": NONE,
    "paper": D2OConfig.paper(min_budget=1, ratio=0.3),
    "paper-by-page": D2OConfig.paper(min_budget=1, ratio=0.3, evict_interval=None),
    "paper-by-5": D2OConfig.paper(min_budget=1, ratio=0.3, evict_interval=5),
    "authors": D2OConfig.authors(min_budget=1, ratio=0.3),
    "authors-by-page": D2OConfig.authors(min_budget=1, ratio=0.3, evict_interval=None),
    "default": D2OConfig(min_budget=1, ratio=0.3),
    "default-every-step": D2OConfig(min_budget=1, ratio=0.3, evict_interval=1),
    "default-whole-pages": D2OConfig(budget_tokens=130),
    "default-late": D2OConfig(budget_tokens=60),
    "coverage": D2OConfig(min_budget=1, ratio=0.3, layer_budgets=LayerBudgets.COVERAGE),
    "h2o": D2OConfig.of(Policy.H2O, min_budget=1, ratio=0.3),
    "h2o-every-step": D2OConfig.of(Policy.H2O, min_budget=1, ratio=0.3, evict_interval=1),
    "streaming": D2OConfig.of(Policy.STREAMING, min_budget=1, ratio=0.3),
    "snapkv": D2OConfig.of(Policy.SNAPKV, min_budget=40, ratio=0.3),
    "last-50": D2OConfig(min_budget=1, ratio=0.3, score_queries="last:50"),  # type: ignore[arg-type]
    "stride-2": D2OConfig(min_budget=1, ratio=0.3, score_queries="stride:2"),  # type: ignore[arg-type]
    "sample-40": D2OConfig(min_budget=1, ratio=0.3, score_queries="sample:40"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_worker_agrees_with_the_reference_token_for_token(name: str) -> None:
    config = CONFIGS[name]
    prompts = random_prompts((30, 90, 200), seed=9)
    # One that says again what it has said before.
    prompts.append(prompts[2][:160] + prompts[2][30:60])
    answers = generate(prompts, config, new=NEW)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, reference = reference_tokens("tiny-llama", prompt, config, NEW)
        assert answer.tokens == tokens
        assert answer.facts is not None
        assert [layer.kept for layer in answer.facts.layers] == [layer.slots for layer in reference.layers.values()]
        assert [layer.budget for layer in answer.facts.layers] == [layer.keep for layer in reference.layers.values()]


@pytest.mark.parametrize("model", ["tiny-gemma3", "tiny-gemma2", "tiny-qwen3"])
@pytest.mark.parametrize("name", ["paper", "default", "default-late", "snapkv"])
def test_so_it_does_where_layers_have_windows_and_logits_a_cap(model: str, name: str) -> None:
    config = CONFIGS[name]
    prompts = random_prompts((60, 150), seed=9)
    answers = generate(prompts, config, model=served_model(model), new=40)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, _ = reference_tokens(model, prompt, config, 40)
        assert answer.tokens == tokens
