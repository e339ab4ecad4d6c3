"""Whether a model can be served correctly from paged, compressed caches with a flattened batch; if not, why."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from d2o_server.errors import ModelUnsupported

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NEEDED_PARAMETERS = ("input_ids", "position_ids", "logits_to_keep")


def check_supported(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Refuses, before any weight is read, what is known to come out wrong.

    Raises:
        ModelUnsupported: names the model class and every reason.
    """
    reasons = [*config_reasons(config), *class_reasons(model_class)]
    if not reasons:
        reasons = list(_parameter_reasons(config, model_class))
    if reasons:
        raise ModelUnsupported(f"model: {model_class.__name__} cannot be served: {'; '.join(reasons)}")


def config_reasons(config: PreTrainedConfig) -> Iterator[str]:
    """What in the configuration alone rules the model out."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        yield "it is an encoder-decoder or has cross-attention, only decoders are served"
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantized, only plain safetensors are served"
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_heterogeneous", False):
        yield "its layers differ in shape, all layers must be alike"
        return
    if foreign := set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES:
        yield f"it has {', '.join(sorted(foreign))} layers, only full and sliding attention have a paged cache"
    if getattr(text, "num_kv_shared_layers", None):
        yield f"its last {text.num_kv_shared_layers} layers reuse other layers' keys and values"
    if getattr(text, "alibi", False) or getattr(text, "position_bias", False):
        yield "it adds a position bias to attention logits, positions must be in the keys (RoPE) or the embeddings"
    if getattr(text, "kv_lora_rank", None):
        yield "it has multi-head latent attention, keys and values must have one head dimension"
    if getattr(text, "use_bidirectional_attention", False):
        yield "its attention is bidirectional"


def class_reasons(model_class: type[PreTrainedModel]) -> Iterator[str]:
    """What in the model's code rules it out."""
    if not getattr(model_class, "_supports_attention_backend", False):
        yield "its class does not support attention backends"
    if getattr(model_class, "_is_stateful", False):
        yield "it keeps recurrent state beside attention (Mamba, linear attention)"
    parameters = inspect.signature(model_class.forward).parameters
    missing = [name for name in _NEEDED_PARAMETERS if name not in parameters]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        missing.append("**kwargs")
    if missing:
        yield f"its forward does not take {', '.join(missing)}"


def _parameter_reasons(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Iterator[str]:
    """What the parameters' names give away, from a model without storage."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    if any("sink" in name.rpartition(".")[2] for name, _ in model.named_parameters()):
        yield "it has learned attention sinks, which take part in every softmax outside the cache"
