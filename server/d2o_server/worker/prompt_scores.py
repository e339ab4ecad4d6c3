"""The attention that a prompt's keys receive while it is prefilled, until the prompt is complete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.attention import ScoreTarget
from d2o.config import D2OConfig, Policy
from d2o.pages import PagePool
from d2o.scores import extrapolate


@dataclass(frozen=True, slots=True, eq=False)
class PromptScores:
    """``received`` [layers, heads, prompt]; ``window`` [layers, kv_heads, prompt] or None; both float32 sums."""

    config: D2OConfig
    received: Tensor
    window: Tensor | None

    @classmethod
    def stage(
        cls, config: D2OConfig, pool: PagePool, query_heads: int, prompt_tokens: int, *, compresses: bool
    ) -> PromptScores | None:
        """Room for a prompt's scores, or None where nobody will ask for them.

        ``compresses``: the complete prompt will be compressed; only then does its window score count.
        """
        if not config.enabled or config.policy is Policy.STREAMING or not (compresses or config.evicts_in_decode):
            return None
        received = torch.zeros(pool.layers, query_heads, prompt_tokens, device=pool.device)
        window = None
        if compresses and (config.window_quota or config.window_blend):
            window = torch.zeros(pool.layers, pool.kv_heads, prompt_tokens, device=pool.device)
        return cls(config, received, window)

    def target(self, layer: int) -> ScoreTarget:
        """Where the prefill of ``layer`` adds its column sums."""
        prompt, queries = self.received.shape[-1], self.config.score_queries
        return ScoreTarget(
            self.received[layer],
            None if self.window is None else self.window[layer],
            max(0, prompt - self.config.window_queries),
            prompt,
            stride=queries.stride(prompt),
            first_query=max(0, prompt - queries.count) if queries.kind == "last" else 0,
        )

    def clear(self) -> None:
        """Forgets everything, for a prompt that is read again."""
        self.received.zero_()
        if self.window is not None:
            self.window.zero_()

    def complete(self) -> Tensor:
        """``received`` of the whole prompt as an estimate over all of its queries."""
        prompt = self.received.shape[-1]
        positions = torch.arange(prompt, device=self.received.device)[None, None]
        # Not a number of the host's, which would have it wait for the device.
        seen = torch.full((1,), prompt, device=positions.device)
        return extrapolate(self.received, positions, seen, self.config)
