"""A transformers configuration as a :class:`ModelShape`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from d2o_server.engine.shape import ModelShape


def describe(config: PreTrainedConfig, end_of_text_ids: Iterable[int] = ()) -> ModelShape:
    """The numbers that the engine plans with.

    ``end_of_text_ids`` are added to the configuration's own (a generation configuration often names more). A model
    with LongRoPE is described with its original context: beyond it transformers rotates a whole batch by other
    frequencies as soon as one sequence in it is long, which cached keys and neighbours would not survive.
    """
    text = config.get_text_config(decoder=True)
    query_heads = text.num_attention_heads
    architectures = getattr(config, "architectures", None) or [type(config).__name__.removesuffix("Config")]
    return ModelShape(
        architecture=architectures[0],
        layers=text.num_hidden_layers,
        query_heads=query_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or query_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // query_heads,
        vocabulary_size=text.vocab_size,
        max_positions=_max_positions(text),
        windows=_windows(text),
        end_of_text_ids=_merged(text.eos_token_id, end_of_text_ids),
        softcap=getattr(text, "attn_logit_softcapping", None),
    )


def _max_positions(text: PreTrainedConfig) -> int:
    most = int(text.max_position_embeddings)
    for rope in _rope_parameters(text):
        if rope.get("rope_type") == "longrope":
            fallback: int = getattr(text, "original_max_position_embeddings", most)
            most = min(most, rope.get("original_max_position_embeddings", fallback))
    return most


def _rope_parameters(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """One entry, or one for each kind of layer (Gemma 3)."""
    given = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]


def _windows(text: PreTrainedConfig) -> tuple[int | None, ...]:
    window: int | None = getattr(text, "sliding_window", None)
    kinds: list[str] | None = getattr(text, "layer_types", None)
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    switched_off: bool = getattr(text, "use_sliding_window", True) is False
    layers: int = text.num_hidden_layers
    return (None if switched_off else window,) * layers


def _merged(own: int | list[int] | None, more: Iterable[int]) -> tuple[int, ...]:
    first = own if isinstance(own, list) else [] if own is None else [own]
    return tuple(dict.fromkeys([*first, *more]))
