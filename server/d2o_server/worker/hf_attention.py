"""The one attention function that every served model runs: it writes keys and values into pages and attends there.

Registered with transformers under the name ``d2o``; the step's plan travels through the model's keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from d2o.attention import AttentionRule, DecodeSegments, ScoreTarget, decode_attention, prefill_attention
from d2o.pages import PagePool

ATTENTION_NAME = "d2o"
LAYER_NUMBER = "d2o_layer_number"
"""Attribute of an attention module: its layer's number as a tensor, where compiled code must not be bound to it."""

# Keyword arguments that models pass along and that do not change the mathematics of the attention.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "is_causal",
        "num_items_in_batch",
        "logits_to_keep",
        "past_key_values",
        "past_key_value",
        "deterministic",
    }
)


class AttentionStep(Protocol):
    """One step as attention sees it."""

    def attend(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Takes in the layer's new keys and values, attends, and returns [tokens, heads, head_dim].

        ``layer`` is its number, as an int or as a tensor (see ``LAYER_NUMBER``). ``query`` is [1, heads, tokens,
        head_dim], ``key`` and ``value`` [1, kv_heads, tokens, head_dim]; ``scale``, ``window`` and ``softcap`` are
        those of :class:`d2o.attention.AttentionRule`.
        """
        ...


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A prompt's next tokens, which stand at ``tokens`` of the flattened batch.

    ``pages`` is [layers, pages]: the prompt's staging pages, all full but the last. ``scores`` has one target a layer,
    or None where the layer's scores are not wanted.
    """

    tokens: slice
    start: int
    pages: Tensor
    scores: tuple[ScoreTarget | None, ...]


@dataclass(frozen=True, slots=True)
class StepContext:
    """A step in plain torch: ``decode`` tokens first, then the prefill chunks.

    ``slot_rows`` is [layers, tokens, kv_heads]: the flat slot index that each new key and value is written to.
    ``scored`` has the layers that have added their decode scores: a step that runs again must not add them twice.
    """

    pool: PagePool
    slot_rows: Tensor
    decode_tokens: int
    segments: DecodeSegments | None
    prefills: tuple[PrefillChunk, ...]
    bias: bool
    score: bool
    scored: set[int]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See :class:`AttentionStep`."""
        rule = AttentionRule(scale, window, softcap)
        self._write(layer, key[0], value[0])
        out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        if self.segments is not None:
            q = query[0, :, : self.decode_tokens].transpose(0, 1)
            score = self.score and layer not in self.scored
            out[: self.decode_tokens] = decode_attention(
                q, self.pool, self.segments, layer, rule=rule, bias=self.bias, score=score
            )
            self.scored.add(layer)
        for chunk in self.prefills:
            k, v = _context(self.pool, chunk, layer, key[0], value[0])
            out[chunk.tokens] = prefill_attention(
                query[0, :, chunk.tokens], k, v, start=chunk.start, rule=rule, scores=chunk.scores[layer]
            )
        return out

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        rows = self.slot_rows[layer].flatten()
        for store, new in ((self.pool.k, key), (self.pool.v, value)):
            store.view(-1, store.shape[-1]).index_copy_(0, rows, new.transpose(0, 1).reshape(rows.numel(), -1))


def register() -> None:
    """Makes ``attn_implementation="d2o"`` known to transformers.

    It has no mask function on purpose: pages know what each query may see, and a mask over the flattened batch would be
    wrong. Where there is none transformers asks for no mask; where there is one, even one that makes none, it first has
    the host wait for the device to tell whether the positions are of several sequences.
    """
    AttentionInterface.register(ATTENTION_NAME, attention)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: AttentionStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a flattened batch: query [1, heads, tokens, head_dim], key and value [1, kv_heads, ...].

    Returns:
        ([1, tokens, heads, head_dim], None).

    Raises:
        ValueError: no step context, a mask, dropout or a keyword argument that would change the result.
    """
    _refuse_unknown(attention_mask, dropout, kwargs)
    if step is None:
        raise ValueError("d2o attention was called without its step context")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, LAYER_NUMBER) if hasattr(module, LAYER_NUMBER) else module.layer_idx
    return step.attend(layer, query, key, value, scale, sliding_window, softcap)[None], None


def _refuse_unknown(mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if mask is not None or dropout:
        raise ValueError("d2o attention takes no attention mask and no dropout")
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if unknown:
        raise ValueError(
            f"the model's attention passes {', '.join(sorted(unknown))}, which d2o attention does not know"
        )


def _context(pool: PagePool, chunk: PrefillChunk, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The prompt's keys and values so far, [kv_heads, slots, head_dim] each, in order of position."""
    if chunk.start == 0:
        return key[:, chunk.tokens], value[:, chunk.tokens]
    rows = pool.page_rows(chunk.pages[layer][None]).flatten()

    def gathered(store: Tensor) -> Tensor:
        pages = store.view(-1, pool.page_size * pool.head_dim).index_select(0, rows)
        return pages.view(pool.kv_heads, -1, pool.head_dim)

    return gathered(pool.k), gathered(pool.v)
