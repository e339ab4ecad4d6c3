"""The model as a GPU runs it: projections of one input side by side, blocks compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2o_server.worker.distribution import greedy, pad_vocabulary
from d2o_server.worker.gpu.operator import OperatorStep
from d2o_server.worker.hf_attention import LAYER_NUMBER

Compiler = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., Any]]

# One launch rotates queries and keys: 0.7 % of a decode step (H200, 8 layers of Llama-3.1-8B's, 64 to 256 sequences).
_INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {"combo_kernels": True}
# Rows of logits that the search for the best tokens is tuned on.
_TYPICAL_ROWS = 64
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class JoinedProjection:
    """Linear layers of one input whose weights stand in one matrix: one product serves all of them.

    The first layer that is asked computes it and the others take their parts; ``_input`` tells whether they were
    asked about the same input. After the last one nothing is held.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, sizes: Sequence[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, list(sizes)
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        """Layer ``index`` of ``x`` [..., in_features]."""
        if self._input is not x:
            self._parts = nn.functional.linear(x, self.weight, self.bias).split(self.sizes, -1)
            self._input = x
        part = self._parts[index]
        if index == len(self.sizes) - 1:
            self._input, self._parts = None, ()
        return part


class SharedProjection(nn.Module):
    """One layer of a :class:`JoinedProjection`."""

    def __init__(self, joined: JoinedProjection, index: int) -> None:
        super().__init__()
        self.weight, self.bias = joined.weight, joined.bias
        self.joined, self.index = joined, index

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.part(x, self.index)


@torch.no_grad()
def join_projections(model: nn.Module) -> None:
    """Puts the weights of each module's query, key and value projections into one matrix, and of gate and up."""
    for module in list(model.modules()):
        for names in _SIBLINGS:
            parts = [getattr(module, name, None) for name in names]
            linear = [part for part in parts if type(part) is nn.Linear]
            if len(linear) == len(names) and _alike(linear):
                _join(module, names, linear)


def _alike(parts: Sequence[nn.Linear]) -> bool:
    first = parts[0]
    return all(
        part.in_features == first.in_features
        and part.weight.dtype == first.weight.dtype
        and (part.bias is None) == (first.bias is None)
        for part in parts
    )


def _join(module: nn.Module, names: Sequence[str], parts: Sequence[nn.Linear]) -> None:
    weight = nn.Parameter(torch.cat([part.weight.data for part in parts]), requires_grad=False)
    biases = [part.bias.data for part in parts if part.bias is not None]
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    joined = JoinedProjection(weight, bias, [part.out_features for part in parts])
    for index, name in enumerate(names):
        setattr(module, name, SharedProjection(joined, index))


@dataclass(frozen=True, slots=True)
class Logits:
    """What a forward pass leaves: logits [rows, vocabulary], the best token of each row and its logit."""

    logits: Tensor
    best_ids: Tensor
    best: Tensor

    def first(self, rows: int) -> Logits:
        return Logits(self.logits[:rows], self.best_ids[:rows], self.best[:rows])


class Body:
    """A causal model without its last projection: where what runs in its place can be put.

    Attributes:
        around: called instead, with the call that it stands for; returns what that would. None: nothing is.
    """

    def __init__(self, base: nn.Module) -> None:
        self._run: Callable[..., Any] = base.forward
        self.around: Callable[[Callable[[], Any]], Any] | None = None
        base.forward = self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        call = partial(self._run, *arguments, **named)
        return call() if self.around is None else self.around(call)


class ModelForward:
    """The model as a function of input_ids [1, tokens], position_ids [1, tokens], rows to keep [n] and the step.

    Attributes:
        body: of models that have one apart from their last projection.
    """

    def __init__(self, model: nn.Module, choose: Callable[[Tensor], tuple[Tensor, Tensor]], *, tuned: bool) -> None:
        base = getattr(model, "base_model", model)
        self._model, self._choose, self._tuned = model, choose, tuned
        self.body = None if base is model else Body(base)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, keep: Tensor, step: OperatorStep) -> Logits:
        out = self._model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=keep, step=step
        )
        logits: Tensor = out.logits[0]
        if not self._tuned:
            # Code is tuned on what it first meets: on a prompt's two rows it once became 14 times slower for 256.
            self._choose(logits[:1].repeat(_TYPICAL_ROWS, 1))
            self._tuned = True
        return Logits(logits, *self._choose(logits))


def forward_of(model: nn.Module, layers: int, *, compiled: bool, backend: str | Compiler = "inductor") -> ModelForward:
    """The model to run, compiled or not.

    Compiled (by torch's ``backend``), its ``layers`` blocks share one form, or one for each kind of layer, which serves
    all numbers of tokens but 1: so a start takes seconds, and loses only what could be fused across blocks.
    """
    _number_layers(model)
    if not compiled:
        return ModelForward(model, _best, tuned=True)
    options = _INDUCTOR if backend == "inductor" else None
    for block in _blocks(model, layers):
        block.compile(fullgraph=True, dynamic=True, backend=backend, options=options)
    choose = torch.compile(_best, fullgraph=True, dynamic=True, backend=backend, options=options)
    return ModelForward(model, choose, tuned=False)


def _number_layers(model: nn.Module) -> None:
    """Gives attention modules their layer's number as a tensor of the host too.

    Compiled code takes it as an input. The number itself is a constant of each block's code, and would make as many
    codes as there are blocks; leaving all numbers of modules open would leave head_dim open as well.
    """
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int):
            module.register_buffer(LAYER_NUMBER, torch.tensor(number), persistent=False)


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    return greedy(pad_vocabulary(logits))


def _blocks(model: nn.Module, layers: int) -> nn.ModuleList:
    """The list of the model's blocks."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(found for found in lists if len(found) == layers)
