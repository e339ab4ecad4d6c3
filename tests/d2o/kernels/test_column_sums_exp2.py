"""Powers of two by multiplication, from the very instructions that the GPU runs."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from d2o.kernels.column_sums_exp2 import PACK, exp2_assembly

SHARES = range(1, PACK + 1)


def rounded(exact: Tensor) -> Tensor:
    """To float32, back in float64, as an instruction leaves it."""
    return exact.float().double()


def bits(x: Tensor) -> Tensor:
    return x.float().view(torch.int32) if x.is_floating_point() else x


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "fma.rn.f32": lambda a, b, c: rounded(a * b + c),
    "fma.rn.sat.f32": lambda a, b, c: rounded((a * b + c).nan_to_num(0, neginf=0).clamp(0, 1)),
    "add.rn.f32": lambda a, b: rounded(a + b),
    "sub.rn.f32": lambda a, b: rounded(a - b),
    "ex2.approx.ftz.f32": lambda a: rounded(torch.exp2(a)),
    "mov.b32": lambda a: bits(a) if a.is_floating_point() else a.view(torch.float32).double(),
    "shl.b32": lambda a, b: a << b,
    "add.s32": lambda a, b: a + b,
}


def run(assembly: str, a: Tensor, f: float, b: float) -> list[Tensor]:
    """The ``PACK`` results for each of ``a`` in float64, by what the instructions mean."""
    f, b = (float(torch.tensor(x, dtype=torch.float32)) for x in (f, b))
    values = dict(zip((1, 2, 3, 4, 5), (a, *map(torch.tensor, (f, b, f / 64, b / 64 + 1))), strict=True))
    values = {number: rounded(value.double()) for number, value in values.items()}
    registers = {f"${i + PACK * n}": value for n, value in values.items() for i in range(PACK)}

    def read(name: str) -> Tensor:
        if name.startswith("0f"):
            return torch.tensor(struct.unpack(">f", bytes.fromhex(name[2:]))[0], dtype=torch.float64)
        return registers[name] if name in registers else torch.tensor(int(name), dtype=torch.int32)

    for line in assembly.split("\n")[1:]:
        for operation, to, rest in re.findall(r"([a-z][\w.]+) ([$\w]+), ([^;]+);", line):
            registers[to] = OPERATIONS[operation](*map(read, rest.split(", ")))
    return [registers[f"${i}"] for i in range(PACK)]


@pytest.mark.parametrize("share", SHARES)
def test_the_share_is_what_was_asked_for(share: int) -> None:
    assembly = exp2_assembly(share)
    assert assembly.count("ex2.approx.ftz.f32") == PACK - share
    assert assembly.count("fma.rn.sat.f32") == share


def test_no_share_needs_no_assembly() -> None:
    assert not exp2_assembly(0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("factor", "bias"), [(1.0, 0.0), (0.127517, -23.7), (0.0901, -1500.3)])
def test_probabilities_are_right_to_a_ten_thousandth(share: int, factor: float, bias: float) -> None:
    x = torch.linspace(-63, 0, 100_001, dtype=torch.float64)
    logits = ((x - bias) / factor).float().double()
    exact = torch.exp2(logits * float(torch.tensor(factor)) + float(torch.tensor(bias)))
    error = 1.0e-4 if bias > -100 else 2.5e-4  # a bias in the thousands is itself only right to 6e-5
    for found in run(exp2_assembly(share), logits, factor, bias):
        assert float((found / exact - 1).abs().max()) < error


def test_errors_average_out() -> None:
    x = torch.linspace(-40, 0, 100_001, dtype=torch.float64)
    exact = torch.exp2(x.float().double())
    assert all(abs(float((found / exact - 1).mean())) < 1e-5 for found in run(exp2_assembly(PACK), x, 1.0, 0.0))


def test_what_is_negligible_stays_so_and_rounding_above_one_is_cut() -> None:
    tiny = torch.tensor([-64.0, -65.0, -126.5, -1e4, -1e30, -torch.inf, torch.nan], dtype=torch.float64)
    above = torch.tensor([1e-6, 1e-3], dtype=torch.float64)
    for found in run(exp2_assembly(PACK), tiny, 1.0, 0.0):
        assert float(found.min()) >= 0
        assert float(found.max()) <= 2**-63
    for found in run(exp2_assembly(PACK), above, 1.0, 0.0):
        torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-4, atol=0)
