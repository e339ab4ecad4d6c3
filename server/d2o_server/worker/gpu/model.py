"""The model as a GPU runs it: projections of one input side by side, compiled as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from d2o_server.worker.gpu.step import OperatorStep

Forward = Callable[[Tensor, Tensor, Tensor, OperatorStep], Tensor]

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedProjection(nn.Module):
    """One of several linear layers of the same input, whose weights stand in one matrix.

    Compiled, each of them is the whole product and a slice of it; the compiler sees that the products are one.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, begin: int, end: int) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.begin, self.end = begin, end

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return nn.functional.linear(x, self.weight, self.bias)[..., self.begin : self.end]
        part = slice(self.begin, self.end)
        return nn.functional.linear(x, self.weight[part], None if self.bias is None else self.bias[part])


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
    begin = 0
    for name, part in zip(names, parts, strict=True):
        setattr(module, name, SharedProjection(weight, bias, begin, begin + part.out_features))
        begin += part.out_features


def forward_of(model: nn.Module, *, compiled: bool) -> Forward:
    """The model as a function of input_ids [1, tokens], position_ids [1, tokens], rows to keep [n] and the step.

    It returns the logits [n, vocabulary] of the kept rows. One compiled form serves all numbers of tokens but one.
    """

    def forward(input_ids: Tensor, position_ids: Tensor, keep: Tensor, step: OperatorStep) -> Tensor:
        out = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=keep, step=step)
        logits: Tensor = out.logits[0]
        return logits

    if not compiled:
        return forward
    made: Forward = torch.compile(forward, fullgraph=True, dynamic=True)
    return made
