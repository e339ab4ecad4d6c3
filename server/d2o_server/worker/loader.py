"""From a resolved model to one that runs: weights on the device, checked, in evaluation mode."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from d2o_server.engine.shape import ModelShape
from d2o_server.errors import ModelUnsupported, StartupError
from d2o_server.models.describe import describe
from d2o_server.models.presets import Preset
from d2o_server.models.probe import check_attention_calls
from d2o_server.models.source import ModelSource
from d2o_server.models.support import check_supported
from d2o_server.worker.tensor_parallel import Part, split_model

# Any fixed number: random presets are the same model in every process and every run.
_RANDOM_SEED = 20240613


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device | str, attn_implementation: str
) -> PreTrainedModel:
    """Loads or draws the model.

    Args:
        source: what :func:`d2o_server.models.source.resolve` returned.
        dtype: of all weights.
        device: where the weights go; random weights are drawn there.
        attn_implementation: a name registered with transformers' ``AttentionInterface``.

    Raises:
        ModelUnsupported: the model cannot be served correctly; the message gives every reason.
        StartupError: its files cannot be read.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = load_config(source)
    model_class = model_class_of(config)
    if model_class.config_class is type(config.get_text_config(decoder=True)):
        # A multimodal checkpoint whose text model stands alone: only that is served.
        config = config.get_text_config(decoder=True)
    check_supported(config, model_class)
    if source.preset is not None:
        model = draw_model(source.preset, config, dtype=dtype, device=device, attn_implementation=attn_implementation)
    else:
        model = _read_model(source.folder_or_fail(), dtype, device, attn_implementation)
    model.requires_grad_(requires_grad=False)
    model.eval()  # type: ignore[no-untyped-call]
    check_attention_calls(model, describe(model.config))
    return model


def keep_part(model: PreTrainedModel, shape: ModelShape, part: Part, device: torch.device) -> ModelShape:
    """Leaves this rank's part of a loaded model, on ``device``; returns the shape of that. All ranks must call it.

    Raises:
        ModelUnsupported: the model's own plan does not split its heads.
        SettingsError: they cannot be divided into so many parts.
    """
    own = split_model(model, model.tp_plan, shape, part)
    model.to(device)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    check_attention_calls(model, own)
    return own


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that every step reads whole: all but an embedding that is not the output's too."""
    embedding: torch.nn.Module = model.get_input_embeddings()
    head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    kept = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    looked_up = {id(parameter) for parameter in embedding.parameters()} - kept
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in looked_up)


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ModelUnsupported: transformers does not know the model type.
        StartupError: the configuration cannot be read.
    """
    if source.preset is not None:
        return AutoConfig.for_model(source.preset.model_type, **source.preset.config)
    folder = source.folder_or_fail()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (ValueError, KeyError) as error:
        raise ModelUnsupported(f"model: {folder} is of no type that transformers itself knows: {error}") from error
    except OSError as error:
        raise StartupError(f"model: {folder / 'config.json'} cannot be read: {error}") from error
    return config


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that models this configuration's text.

    Raises:
        ModelUnsupported: there is no causal language model of this type.
    """
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelUnsupported(
            f"model: type {config.model_type!r} is no causal language model of transformers {transformers.__version__}"
        ) from None
    return cast("type[PreTrainedModel]", found[0] if isinstance(found, tuple) else found)


def draw_model(
    preset: Preset,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str,
) -> PreTrainedModel:
    """A model with random weights, drawn on ``device`` in ``dtype`` from a fixed seed."""
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(_RANDOM_SEED)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=attn_implementation
        )
        if preset.sharp:
            _sharpen(model)
    return model


@torch.no_grad()
def _sharpen(model: PreTrainedModel) -> None:
    """Moves norms and biases off their neutral values and spreads the logits, so that no mistake hides in them."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    head: torch.nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.weight.mul_(8)


def _read_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str, attn_implementation: str
) -> PreTrainedModel:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map={"": torch.device(device)},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StartupError(f"model: the weights in {folder} cannot be loaded: {error}") from error
    model, facts = cast("tuple[PreTrainedModel, dict[str, Collection[str]]]", loaded)
    # transformers would go on with random numbers in their place.
    if missing := sorted(facts["missing_keys"]):
        shown = ", ".join(missing[:3])
        raise StartupError(f"model: the weights in {folder} lack {len(missing)} of the model's tensors: {shown}, ...")
    return model
