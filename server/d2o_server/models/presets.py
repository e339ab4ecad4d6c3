"""Models with random weights, by name: small ones of many architectures for tests, real shapes for benchmarks.

A preset is data only (a transformers model type and its configuration), so that a process that merely needs the
vocabulary's size imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2o_server.errors import StartupError

# The built-in tokenizer: ids 0 to 255 are bytes, then these.
END_OF_DOCUMENT_ID = 256
START_OF_TURN_ID = 257
END_OF_TURN_ID = 258
SPECIAL_TOKENS = {
    "<|endoftext|>": END_OF_DOCUMENT_ID,
    "<|im_start|>": START_OF_TURN_ID,
    "<|im_end|>": END_OF_TURN_ID,
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A random model. ``sharp`` draws all its weights, norms and biases included, so that logits lie far apart."""

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    sharp: bool = False

    @property
    def vocabulary_size(self) -> int:
        return int(self.config["vocab_size"])


_TOKENS = {"bos_token_id": END_OF_DOCUMENT_ID, "eos_token_id": END_OF_TURN_ID, "pad_token_id": END_OF_DOCUMENT_ID}
_TINY = _TOKENS | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _tiny(model_type: str, **config: Any) -> Preset:
    return Preset(model_type, {name: value for name, value in (_TINY | config).items() if value is not ...}, sharp=True)


def _shape(
    model_type: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: tuple[int, int, int], **config: Any
) -> Preset:
    """A real model's shape; ``heads`` is query heads, KV heads, head dimension."""
    query_heads, kv_heads, head_dim = heads
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": False,
    }
    return Preset(model_type, _TOKENS | shape | config)


_GEMMA3_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]

PRESETS: Mapping[str, Preset] = {
    "tiny-llama": _tiny("llama"),
    # A window that is configured but switched off must not be applied.
    "tiny-qwen2": _tiny("qwen2", head_dim=..., use_sliding_window=False, sliding_window=64),
    "tiny-qwen3": _tiny("qwen3", head_dim=32),
    "tiny-mistral": _tiny("mistral", sliding_window=64),
    # query_pre_attn_scalar differs from head_dim: a server that ignores the model's scale is found out.
    "tiny-gemma3": _tiny(
        "gemma3_text",
        num_hidden_layers=4,
        layer_types=_GEMMA3_LAYERS,
        sliding_window=64,
        query_pre_attn_scalar=40,
    ),
    "tiny-phi3": _tiny("phi3", head_dim=...),
    "tiny-gpt-neox": _tiny("gpt_neox", head_dim=..., num_key_value_heads=...),
    "tiny-olmo2": _tiny("olmo2", head_dim=...),
    "tiny-mixtral": _tiny("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "tiny-qwen3-moe": _tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "smollm2-135m": _shape(
        "llama",
        49152,
        576,
        1536,
        30,
        (9, 3, 64),
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": _shape(
        "llama",
        128256,
        2048,
        8192,
        16,
        (32, 8, 64),
        max_position_embeddings=131072,
        rope_parameters=_LLAMA3_ROPE | {"factor": 32.0},
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _shape(
        "llama",
        128256,
        4096,
        14336,
        32,
        (32, 8, 128),
        max_position_embeddings=131072,
        rope_parameters=_LLAMA3_ROPE | {"factor": 8.0},
    ),
    "mistral-7b": _shape(
        "mistral",
        32768,
        4096,
        14336,
        32,
        (32, 8, 128),
        max_position_embeddings=32768,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen3-8b": _shape(
        "qwen3",
        151936,
        4096,
        12288,
        36,
        (32, 8, 128),
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}


def preset_named(name: str) -> Preset:
    """The preset of this name.

    Raises:
        StartupError: there is none; the message lists those that exist.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise StartupError(f"model: got random:{name}, allowed presets are {', '.join(PRESETS)}") from None
