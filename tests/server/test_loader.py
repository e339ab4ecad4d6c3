"""What is loaded is described as it is, and what cannot be served correctly is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from d2o_server.engine.shape import ModelShape
from d2o_server.errors import ModelUnsupported, StartupError
from d2o_server.models.describe import describe
from d2o_server.models.presets import PRESETS, Preset
from d2o_server.models.probe import check_attention_calls
from d2o_server.models.source import ModelSource, resolve
from d2o_server.models.support import check_supported
from d2o_server.worker.loader import draw_model, load_model, model_class_of

_TINY_PRESETS = [name for name in PRESETS if name.startswith("tiny-")]
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _source(model_type: str, **config: Any) -> ModelSource:
    return ModelSource(model_type, preset=Preset(model_type, _SMALL | config))


def _load(source: ModelSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(source, dtype=dtype, device="cpu", attn_implementation="eager")


def _saved(folder: Path, **config: Any) -> ModelSource:
    _load(_source("llama", **config)).save_pretrained(folder)
    return resolve(str(folder))


@pytest.fixture(params=_TINY_PRESETS)
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_tiny_preset_loads_ready_to_serve(preset: str) -> None:
    model = _load(resolve(f"random:{preset}"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "eager"
    shape = describe(model.config)
    assert shape.max_positions >= 2048
    assert shape.vocabulary_size == PRESETS[preset].vocabulary_size == 512


def test_tiny_presets_give_every_token_a_clear_successor(preset: str) -> None:
    """No near ties: a greedy test that fails has met a real difference, not another order of sums."""
    model = _load(resolve(f"random:{preset}"))
    tokens = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(3))
    logits = model(tokens).logits[0]
    model.set_attn_implementation("sdpa")
    rounding = (model(tokens).logits[0] - logits).abs().max()
    best, second = logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 4 * rounding
    assert logits.argmax(-1).unique().numel() > 20


def test_a_preset_is_the_same_model_every_time_and_leaves_the_callers_random_state() -> None:
    state = torch.random.get_rng_state()
    first = _load(resolve("random:tiny-llama")).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    second = _load(resolve("random:tiny-llama")).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    source = _saved(tmp_path)
    expected = _load(source).state_dict()
    loaded = _load(source, torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("preset", "windows"),
    [
        ("tiny-llama", (None, None, None)),
        ("tiny-qwen2", (None, None, None)),
        ("tiny-mistral", (64, 64, 64)),
        ("tiny-mixtral", (None, None, None)),
        ("tiny-gemma3", (64, 64, None, 64)),
    ],
)
def test_windows_are_those_that_the_layers_attend_with(preset: str, windows: tuple[int | None, ...]) -> None:
    config = PRESETS[preset]
    assert describe(AutoConfig.for_model(config.model_type, **config.config)).windows == windows


def test_gemma_3_attends_fully_in_every_sixth_layer() -> None:
    config = AutoConfig.for_model("gemma3_text", **_SMALL | {"num_hidden_layers": 12, "sliding_window": 32})
    assert describe(config).windows == ((32,) * 5 + (None,)) * 2


def test_a_shape_has_every_number_that_the_engine_plans_with() -> None:
    preset = PRESETS["llama-3.1-8b"]
    shape = describe(AutoConfig.for_model(preset.model_type, **preset.config), end_of_text_ids=(258, 300))
    assert shape == ModelShape(
        architecture="Llama",
        layers=32,
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary_size=128256,
        max_positions=131072,
        windows=(None,) * 32,
        end_of_text_ids=(258, 300),
    )
    assert shape.bytes_per_token(element_bytes=2) == 131072


def test_a_longrope_model_is_held_to_its_original_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = AutoConfig.for_model(
        "phi3", **_SMALL, original_max_position_embeddings=64, rope_parameters=rope | {"factor": 2.0}
    )
    assert describe(config).max_positions == 64


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("gpt_oss", {}, "learned attention sinks"),
        ("mamba", {}, "does not support attention backends; it keeps recurrent state"),
        ("bamba", {"mamba_n_heads": 4, "mamba_d_head": 16}, "keeps recurrent state"),
        ("qwen3_next", {}, "linear_attention layers"),
        ("llama4_text", {}, "chunked_attention layers"),
        ("gemma3n_text", {"num_kv_shared_layers": 1}, "last 1 layers reuse"),
        ("deepseek_v3", {}, "multi-head latent attention"),
        ("bloom", {}, "does not support attention backends"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantized"),
    ],
)
def test_a_model_that_would_come_out_wrong_is_refused_before_it_is_built(
    model_type: str, config: dict[str, Any], reason: str
) -> None:
    configuration = AutoConfig.for_model(model_type, **_SMALL | config)
    with pytest.raises(ModelUnsupported, match=reason):
        check_supported(configuration, model_class_of(configuration))


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("bert", {}, "its attention is not causal"),
        ("diffllama", {"num_key_value_heads": 2}, r"call attention as \[0, 0, 1, 1\]"),
        ("doge", {}, "it brings an attention mask of its own"),
    ],
)
def test_a_model_whose_attention_calls_would_be_misread_is_refused_at_load(
    model_type: str, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelUnsupported, match=reason):
        _load(_source(model_type, **config))


def test_an_encoder_decoder_is_refused() -> None:
    configuration = AutoConfig.for_model("t5")
    with pytest.raises(ModelUnsupported, match="'t5' is no causal language model"):
        model_class_of(configuration)
    with pytest.raises(ModelUnsupported, match="encoder-decoder"):
        check_supported(configuration, transformers.T5ForConditionalGeneration)


def test_soft_capped_attention_is_served() -> None:
    model = _load(_source("gemma2", attn_logit_softcapping=30.0, query_pre_attn_scalar=24, sliding_window=32))
    assert describe(model.config).windows == (32, None)
    assert describe(model.config).softcap == 30.0


def test_a_described_window_that_a_layer_does_not_keep_is_refused() -> None:
    source = _source("mistral", sliding_window=32)
    assert source.preset is not None
    config = AutoConfig.for_model("mistral", **source.preset.config)
    model = draw_model(source.preset, config, dtype=torch.float32, device="cpu", attn_implementation="eager")
    shape = describe(AutoConfig.for_model("mistral", **_SMALL | {"sliding_window": 48}))
    with pytest.raises(ModelUnsupported, match="layer 0 attends with window 32, its configuration says 48"):
        check_attention_calls(model, shape)
    assert model.config._attn_implementation == "eager"


def test_an_argument_to_attention_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = transformers.models.llama.modeling_llama.LlamaAttention.forward

    def biased(self: Any, *given: Any, **named: Any) -> Any:
        return plain(self, *given, **named, position_bias=torch.ones(1))

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", biased)
    with pytest.raises(ModelUnsupported, match="passes position_bias to attention"):
        _load(_source("llama"))


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none-such", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(ModelUnsupported, match="of no type that transformers itself knows"):
        _load(ModelSource("none-such", folder=tmp_path))


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    source = _saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(StartupError, match=str(tmp_path)):
        _load(source)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    source = _saved(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(StartupError, match=r"layers\.2\."):
        _load(source)
