"""A model's blocks share their compiled code: made once for each kind of layer, it leaves only the tokens open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from d2o.attention import AttentionRule
from d2o_server.models.presets import PRESETS
from d2o_server.models.source import ModelSource
from d2o_server.worker import hf_attention
from d2o_server.worker.gpu.model import forward_of, join_projections
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.step import KernelStep
from d2o_server.worker.loader import load_model

LAYERS = 8
KINDS = {"tiny-llama": 1, "tiny-qwen2": 1, "tiny-gemma3": 2, "tiny-mixtral": 1, "tiny-gpt-neox": 1, "tiny-olmo2": 1}


class _LayerStep(KernelStep):
    """Attention that is a function of its layer's number, and nothing else that a step does."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, out: Tensor | None = None
    ) -> Tensor:
        return (q * (layer + 1)).transpose(0, 1).contiguous()


@pytest.fixture(autouse=True)
def fresh_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_a_kind_share_one_form_whatever_the_number_of_tokens(name: str) -> None:
    preset = PRESETS[name]
    config = dict(preset.config) | {"num_hidden_layers": LAYERS}
    if "layer_types" in config:
        config["layer_types"] = list(config["layer_types"]) * 2
    hf_attention.register()
    source = ModelSource(name, preset=replace(preset, config=config))
    model = load_model(source, dtype=torch.float32, device="cpu", attn_implementation=hf_attention.ATTENTION_NAME)
    join_projections(model)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    operator = AttentionOperator()
    plain = forward_of(model, LAYERS, compiled=False)
    with torch.inference_mode(), operator.running(_LayerStep(None, None, None, None)):  # type: ignore[arg-type]
        inputs = [_inputs(tokens) for tokens in (9, 5, 30, 2)]
        expected = [plain(*each, operator.step) for each in inputs]
        compiled = forward_of(model, LAYERS, compiled=True, backend=count)
        for each, wanted in zip(inputs, expected, strict=True):
            found = compiled(*each, operator.step)
            torch.testing.assert_close(found.logits, wanted.logits)
            assert torch.equal(found.best_ids, wanted.best_ids)
    # One more chooses the best tokens, and is tuned on the rows of a batch though a prompt asks for two.
    (choosing,) = (graph for graph in graphs if not any("attend" in str(node.target) for node in graph.graph.nodes))
    rows = next(node for node in choosing.graph.nodes if isinstance(node.meta.get("example_value"), Tensor))
    assert rows.meta["example_value"].shape[0].node.hint == 64
    assert len(graphs) == KINDS[name] + 1
    attends = [node for graph in graphs for node in graph.graph.nodes if "attend" in str(node.target)]
    assert len(attends) == KINDS[name]
    for node in attends:
        heads, tokens, head_dim = node.args[0].meta["example_value"].shape[1:]
        assert isinstance(tokens, torch.SymInt)
        assert (type(heads), type(head_dim)) == (int, int)


def _inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.arange(tokens)[None] * 7 % 500
    return ids, torch.arange(tokens)[None], torch.tensor([tokens - 1, 0])
