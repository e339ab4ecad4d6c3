"""Watches what a loaded model hands to its attention function, so that nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from d2o_server.engine.shape import ModelShape
from d2o_server.errors import ModelUnsupported

_NAME = "d2o_probe"
_MATHEMATICAL = {"scaling", "sliding_window", "softcap"}
_HARMLESS = {
    "dropout",
    "is_causal",
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
}


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the attention function."""

    layer: int | None
    query: torch.Size
    key: torch.Size
    value: torch.Size
    masked: bool
    causal: bool
    arguments: dict[str, Any]


def check_attention_calls(model: PreTrainedModel, shape: ModelShape) -> None:
    """Runs one token through the model and compares every attention call with what the cache will assume.

    Raises:
        ModelUnsupported: a layer attends never, twice, with other heads, with a mask of its own, with another window
            than described, or with an argument that this server does not know.
    """
    calls: list[_Call] = []
    with _watched(model, calls), torch.inference_mode():
        one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        try:
            model(input_ids=one, position_ids=one, use_cache=False, logits_to_keep=1)
        except Exception as error:  # the model's own code, whatever it raises
            raise ModelUnsupported(f"model: {type(model).__name__} cannot run one token: {error!r}") from error
    reasons = [*_layer_reasons(calls, shape)]
    for call in calls:
        reasons += [reason for reason in _call_reasons(call, shape) if reason not in reasons]
    if reasons:
        raise ModelUnsupported(f"model: {type(model).__name__} cannot be served: {'; '.join(reasons)}")


@contextmanager
def _watched(model: PreTrainedModel, calls: list[_Call]) -> Iterator[None]:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        causal = bool(getattr(module, "is_causal", True)) and arguments.get("is_causal") is not False
        calls.append(_Call(layer, query.shape, key.shape, value.shape, attention_mask is not None, causal, arguments))
        output = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return output.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)


def _layer_reasons(calls: list[_Call], shape: ModelShape) -> Iterator[str]:
    layers = [call.layer for call in calls]
    if layers != list(range(shape.layers)):
        yield f"its {shape.layers} layers call attention as {layers}, each layer must call it once and in order"


def _call_reasons(call: _Call, shape: ModelShape) -> Iterator[str]:
    expected = (
        torch.Size((1, shape.query_heads, 1, shape.head_dim)),
        torch.Size((1, shape.kv_heads, 1, shape.head_dim)),
        torch.Size((1, shape.kv_heads, 1, shape.head_dim)),
    )
    if (call.query, call.key, call.value) != expected:
        given = ", ".join(str(tuple(size)) for size in (call.query, call.key, call.value))
        yield f"its query, key and value are {given}, expected {', '.join(str(tuple(size)) for size in expected)}"
    if call.masked:
        yield "it brings an attention mask of its own"
    if not call.causal:
        yield "its attention is not causal"
    given_names = {name for name, value in call.arguments.items() if value is not None}
    if unknown := given_names - _MATHEMATICAL - _HARMLESS:
        yield f"it passes {', '.join(sorted(unknown))} to attention, which is not honoured"
    window = call.arguments.get("sliding_window")
    if call.layer is not None and call.layer < shape.layers and window != shape.windows[call.layer]:
        yield f"layer {call.layer} attends with window {window}, its configuration says {shape.windows[call.layer]}"
