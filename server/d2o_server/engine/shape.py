"""What the engine must know of a model to count pages and bound requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A causal language model as numbers.

    ``windows`` has one entry a layer: None where the layer attends to everything, or the window W where a query at
    position p sees the keys at positions p - W + 1 to p. ``softcap`` bounds attention's logits; None: nothing does.
    """

    architecture: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    max_positions: int
    windows: tuple[int | None, ...]
    end_of_text_ids: tuple[int, ...]
    softcap: float | None = None

    def bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of K and V that one token takes over all layers, with elements of ``element_bytes``."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes
