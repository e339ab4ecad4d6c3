"""Powers of two for :mod:`d2o.kernels.column_sums_kernels`: some by the GPU's exponential unit, some by a polynomial.

That unit gives 16 results a clock and processor, the others 128 multiplications: a kernel that does little else is
faster when some of its exponentials are multiplied out. For x of at most 0, and u = 1 + x / 64 saturated to [0, 1]:
adding ``MAGIC`` rounds u to a 64th and leaves the rounded x in the lowest bits, which are added to the exponent of
the rest's power. The cubic is the one of least relative error, 7.5e-5; what lies below -64 gives 2^-64.
"""

from __future__ import annotations

import struct
from functools import cache

import triton
import triton.language as tl

PACK = 8
RANGE = 64
# Its unit in the last place is 1 / RANGE; its lowest nine bits are -RANGE.
MAGIC = 1.5 * 2**17 + 512 / RANGE - 1
CUBIC = (0.9999280735404955, 0.6932609854573362, 0.24261112219433054, 0.05517166907486375)


CONSTRAINTS: tl.constexpr = tl.constexpr(",".join(["=&f"] * PACK + ["f"] * (5 * PACK)))


@cache
def exp2_assembly(share: int) -> str:
    """PTX of ``PACK`` values 2^(a f + b), of which ``share`` come from the polynomial; "" if none does.

    Operands: results, a, f, b, f / 64, 1 + b / 64; ``PACK`` of each.
    """
    if not share:
        return ""
    lines = [_polynomial(i) if i * share % PACK < share else _unit(i) for i in range(PACK)]
    return "{ .reg .f32 u, t, p; .reg .b32 n, m;\n" + "\n".join(lines) + " }"


@triton.jit  # type: ignore[untyped-decorator]
def exp2_by(assembly: tl.constexpr, a: tl.tensor, f: tl.tensor, b: tl.tensor) -> tl.tensor:
    """2^(a f + b), where that is at most 1, by :func:`exp2_assembly`. The interpreter cannot run it."""
    return tl.inline_asm_elementwise(
        assembly, CONSTRAINTS, [a, f, b, f * 0.015625, b * 0.015625 + 1.0], dtype=tl.float32, is_pure=True, pack=8
    )


def _unit(i: int) -> str:
    a, f, b = (f"${i + PACK * n}" for n in (1, 2, 3))
    return f"fma.rn.f32 t, {a}, {f}, {b};\nex2.approx.ftz.f32 ${i}, t;"


def _polynomial(i: int) -> str:
    a, f, b = (f"${i + PACK * n}" for n in (1, 4, 5))
    c = [_immediate(value * RANGE**power) for power, value in enumerate(CUBIC)]
    return "\n".join(
        [
            f"fma.rn.sat.f32 u, {a}, {f}, {b};",
            f"add.rn.f32 t, u, {_immediate(MAGIC)};",
            "mov.b32 n, t;",
            f"sub.rn.f32 t, t, {_immediate(MAGIC)};",
            "sub.rn.f32 u, u, t;",
            f"fma.rn.f32 p, u, {c[3]}, {c[2]};",
            f"fma.rn.f32 p, p, u, {c[1]};",
            f"fma.rn.f32 p, p, u, {c[0]};",
            "mov.b32 m, p;",
            "shl.b32 n, n, 23;",
            "add.s32 n, n, m;",
            f"mov.b32 ${i}, n;",
        ]
    )


def _immediate(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()
