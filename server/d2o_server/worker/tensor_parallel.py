"""A model split over ranks as its own plan says: each rank keeps a part of every split layer's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from d2o_server.engine.shape import ModelShape
from d2o_server.errors import ModelUnsupported, SettingsError

_COLWISE, _ROWWISE, _GATHERED = "colwise", "rowwise", "colwise_gather_output"
_OTHER_NAMES = {"colwise_rep": _GATHERED}
# What these do to a layer shows only in training or saves only memory: the layer stays whole on every rank.
_WHOLE = frozenset({"replicated_with_grad_allreduce", "replicate", "sequence_parallel", "embedding_rowwise"})
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Part:
    """Part ``number`` of ``count``; ``group`` names the process group of those who hold the others.

    ``sum_of_products``, where there is one, takes x, weight and group and does what :meth:`summed_product` says.
    """

    number: int
    count: int
    group: str
    sum_of_products: Callable[[Tensor, Tensor, str], Tensor] | None = None

    def of(self, weight: Tensor, dim: int) -> nn.Parameter:
        """A copy of this part of ``weight`` along ``dim``, so that the whole can be freed."""
        part = weight.detach().chunk(self.count, dim)[self.number]
        return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)

    def summed_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sum over all parts of ``x`` [..., in_features] times ``weight`` [out_features, in_features], on each."""
        if self.sum_of_products is not None:
            return self.sum_of_products(x, weight, self.group)
        product = nn.functional.linear(x, weight)
        return _waited(torch.ops._c10d_functional.all_reduce(product, "sum", self.group))

    def concatenate(self, x: Tensor) -> Tensor:
        """All parts' ``x`` [..., features], side by side: [..., count * features]."""
        rows = x.reshape(-1, x.shape[-1])
        gathered = _waited(torch.ops._c10d_functional.all_gather_into_tensor(rows, self.count, self.group))
        return gathered.view(self.count, *rows.shape).transpose(0, 1).reshape(*x.shape[:-1], -1)


def _waited(x: Tensor) -> Tensor:
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return waited


class RowwiseLinear(nn.Module):
    """A linear layer of whose inputs each rank has a part; all ranks get the whole output [..., out_features]."""

    def __init__(self, whole: nn.Linear, part: Part) -> None:
        super().__init__()
        self.part, self.weight, self.bias = part, part.of(whole.weight, 1), whole.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.part.summed_product(x, self.weight)
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):
    """A linear layer of whose outputs each rank computes a part; all ranks get the whole [..., out_features]."""

    def __init__(self, whole: nn.Linear, part: Part) -> None:
        super().__init__()
        self.part, self.weight = part, part.of(whole.weight, 0)
        self.bias = None if whole.bias is None else part.of(whole.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.part.concatenate(nn.functional.linear(x, self.weight, self.bias))


@torch.no_grad()
def split_model(model: nn.Module, plan: Mapping[str, str], shape: ModelShape, part: Part) -> ModelShape:
    """Leaves only ``part`` of the model's split layers; returns the shape that is left, with this rank's heads.

    Layers that are split by column stay plain ``nn.Linear``. An output layer that the number of parts does not divide
    stays whole.

    Args:
        model: the whole model.
        plan: transformers' ``tp_plan``: names with ``*`` for numbers, and how each is split.
        shape: the whole model's.
        part: this rank's.

    Raises:
        ModelUnsupported: the plan does not split the model's heads, or splits something other than linear layers.
        SettingsError: heads or layers cannot be divided into so many parts.
    """
    layers = _split_layers(model, plan, shape.architecture)
    _check_divisible(layers, shape, part.count)
    for name, (style, linear) in layers.items():
        if style == _COLWISE:
            _keep_rows(linear, part)
        elif style == _ROWWISE:
            model.set_submodule(name, RowwiseLinear(linear, part))
        elif linear.out_features % part.count == 0:
            model.set_submodule(name, GatheredLinear(linear, part))
    return replace(shape, query_heads=shape.query_heads // part.count, kv_heads=shape.kv_heads // part.count)


def _keep_rows(linear: nn.Linear, part: Part) -> None:
    linear.weight = part.of(linear.weight, 0)
    if linear.bias is not None:
        linear.bias = part.of(linear.bias, 0)
    linear.out_features //= part.count


def _split_layers(model: nn.Module, plan: Mapping[str, str], architecture: str) -> dict[str, tuple[str, nn.Linear]]:
    """How each layer that the plan splits is split."""
    modules = dict(model.named_modules())
    layers: dict[str, tuple[str, nn.Linear]] = {}
    reasons = set()
    for name in [*modules, *(name for name, _ in model.named_parameters())]:
        pattern = _NUMBER.sub(".*", name)
        given = plan.get(pattern)
        style, module = _OTHER_NAMES.get(given or "", given), modules.get(name)
        if style is None or style in _WHOLE or isinstance(module, nn.Embedding):
            continue
        inside = style == _GATHERED and pattern != name
        if style not in (_COLWISE, _ROWWISE, _GATHERED) or type(module) is not nn.Linear or inside:
            reasons.add(f"{pattern} as {given}")
        else:
            layers[name] = (style, module)
    if reasons or not layers:
        splits = f"splits {', '.join(sorted(reasons))}" if reasons else "splits nothing"
        raise ModelUnsupported(
            f"model: {architecture} cannot be served with tensor_parallel above 1: its plan {splits}; allowed are"
            " linear layers that are split by heads or columns (colwise, rowwise) and a gathered output layer"
        )
    return layers


def _check_divisible(layers: Mapping[str, tuple[str, nn.Linear]], shape: ModelShape, count: int) -> None:
    widths = [linear.in_features for style, linear in layers.values() if style == _ROWWISE]
    widths += [linear.out_features for style, linear in layers.values() if style == _COLWISE]
    common = math.gcd(shape.query_heads, shape.kv_heads, *widths)
    if common % count:
        allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise SettingsError(
            f"tensor_parallel: got {count}, allowed is what divides the {shape.query_heads} query heads,"
            f" {shape.kv_heads} KV heads and layer widths of {shape.architecture}: {allowed}"
        )
