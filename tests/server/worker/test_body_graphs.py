"""What is captured of steps that read prompts, with graphs that run torch's operators again: CUDA's need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2o.config import D2OConfig
from d2o_server.models.describe import describe
from d2o_server.models.presets import PRESETS
from d2o_server.worker.gpu import body_graphs
from d2o_server.worker.gpu.batch_sizes import BatchSize
from d2o_server.worker.gpu.body_graphs import body_sizes
from d2o_server.worker.gpu.model import Body, forward_of
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.runner import KernelRunner
from tests.server.worker.conftest import NONE, Harness, load, random_prompts, served_model
from tests.server.worker.kernel_harness import KernelHarness, answers, assert_alike

TOKENS = 5
SIZES = [BatchSize(16), BatchSize(40)]
POLICIES = {"none": NONE, "default": D2OConfig(min_budget=1, ratio=0.3, evict_interval=3)}


class Graph:
    """Runs the operators between its begin and its end again, over the same memory."""

    capturing: ClassVar[Graph | None] = None

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def capture_begin(self, pool: object) -> None:
        assert Graph.capturing is None
        assert pool == "memory"
        Graph.capturing = self

    def capture_end(self) -> None:
        assert Graph.capturing is self
        Graph.capturing = None

    def replay(self) -> None:
        for function, arguments, named, result in self.calls:
            again = function(*arguments, **named)
            for new, place in zip(tree_leaves(again), tree_leaves(result), strict=True):
                if isinstance(new, Tensor) and new.data_ptr() != place.data_ptr():
                    place.copy_(new)


class Tape(TorchDispatchMode):
    """Has the graph that is captured know of every operator but attention, which is none of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if Graph.capturing is not None and func.namespace != "d2o":
            Graph.capturing.calls.append((func, args, kwargs or {}, result))
        return result


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[KernelHarness], KernelRunner]]:
    """Captures the body of a harness's model."""
    quiet = SimpleNamespace(wait_stream=lambda _: None)
    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": lambda _: quiet,
        "current_stream": lambda: quiet,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(body_graphs, "multiplying_by", lambda _: nullcontext())

    def capture(harness: KernelHarness) -> KernelRunner:
        runner = harness.core.runner
        assert isinstance(runner, KernelRunner)
        with torch.inference_mode(), Tape():  # type: ignore[no-untyped-call]
            runner._bodies.capture(SIZES, "memory", lambda _: None)
        return runner

    yield capture
    assert Graph.capturing is None


@pytest.mark.parametrize(
    ("model", "policy"), [("tiny-llama", "none"), ("tiny-llama", "default"), ("tiny-gemma2", "none")]
)
def test_replayed_steps_give_the_tokens_of_plain_torch(
    captured: Callable[[KernelHarness], KernelRunner], monkeypatch: pytest.MonkeyPatch, model: str, policy: str
) -> None:
    """A prompt in chunks, two beside it, and what decodes meanwhile; the longest steps are launched as before."""
    prompts = random_prompts((70, 9, 12), seed=9)
    harness = KernelHarness(model, chunk=32)
    captured(harness)
    replay, replayed = body_graphs._Captured.replay, []

    def note(one: body_graphs._Captured, step: Any, tokens: int) -> Any:
        replayed.append((one.output.last_hidden_state.shape[1], tokens))
        return replay(one, step, tokens)

    monkeypatch.setattr(body_graphs._Captured, "replay", note)
    assert_alike(
        answers(harness, prompts, POLICIES[policy]), answers(Harness(served_model(model)), prompts, POLICIES[policy])
    )
    assert {size for size, _ in replayed} == {16, 40}
    assert all(size == (16 if tokens <= 16 else 40) for size, tokens in replayed)
    assert sum(tokens for _, tokens in replayed) >= sum(map(len, prompts))


def test_a_graph_ends_where_attention_begins(captured: Callable[[KernelHarness], KernelRunner]) -> None:
    harness = KernelHarness()
    bodies = captured(harness)._bodies
    layers = harness.pool.layers
    for size, one in bodies._captured.items():
        assert [attention.layer for attention in one.attentions] == list(range(layers))
        assert len(one.graphs) == layers + 1
        assert all(graph.calls for graph in one.graphs)  # type: ignore[attr-defined]
        assert {attention.out.shape[0] for attention in one.attentions} == {size}
    ids = torch.zeros(41, dtype=torch.int64)
    assert bodies.run(ids, ids, ids[:2], None) is None  # type: ignore[arg-type]


def test_a_step_that_fails_between_graphs_leaves_the_body_as_it_was(
    captured: Callable[[KernelHarness], KernelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = KernelHarness()
    captured(harness)
    attend = body_graphs._Attention.run

    def fail(attention: body_graphs._Attention, step: Any, tokens: int) -> None:
        if attention.layer and tokens == 9:
            raise ValueError("a defect")
        attend(attention, step, tokens)

    monkeypatch.setattr(body_graphs._Attention, "run", fail)
    failing, fine = random_prompts((9, 12), seed=2)
    harness.submit(failing, NONE, name="failing", new=4)
    assert harness.run()["failing"].failure is not None
    harness.submit(fine, NONE, name="fine", new=4)
    assert harness.run()["fine"].tokens == answers(Harness(served_model("tiny-llama")), [fine], NONE)[0].tokens[:4]
    assert harness.holds_nothing()


def test_a_model_without_a_body_of_its_own_is_not_captured() -> None:
    harness = KernelHarness()
    runner = harness.core.runner
    assert isinstance(runner, KernelRunner)
    assert isinstance(runner._forward.body, Body)
    runner._bodies._forward.body = None
    runner._bodies.capture(SIZES, None, lambda _: None)
    assert not runner._bodies._captured


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
def test_every_architecture_has_a_body_whose_hidden_states_are_all_that_its_head_takes(name: str) -> None:
    model = load(name, "d2o")
    forward = forward_of(model, describe(model.config).layers, compiled=False)
    assert forward.body is not None
    calls: list[int] = []

    def hidden_states_only(body: Callable[[], Any]) -> Any:
        output = body()
        calls.append(output.last_hidden_state.shape[1])
        return type(output)(last_hidden_state=output.last_hidden_state)

    operator, ids, keep = AttentionOperator(), torch.arange(TOKENS)[None], torch.tensor([0, TOKENS - 1])
    by_layer = SimpleNamespace(attend=lambda layer, q, *_: (q * (layer + 1)).transpose(0, 1).contiguous())
    with torch.inference_mode(), operator.running(by_layer):
        expected = forward(ids, ids, keep, operator.step)
        forward.body.around = hidden_states_only
        found = forward(ids, ids, keep, operator.step)
    assert calls == [TOKENS]
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (2, [2]),
        (128, [128]),
        (144, [128, 144]),
        (600, [128, 192, 256, 320, 384, 448, 512, 600]),
        (8704, list(body_graphs._SIZES)),
    ],
)
def test_sizes_end_with_the_largest_step_or_what_keeps_the_device_busy(most: int, sizes: list[int]) -> None:
    assert body_sizes(most) == sizes
