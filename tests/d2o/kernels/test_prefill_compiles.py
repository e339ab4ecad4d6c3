"""The prefill kernels compile for a Hopper GPU, without one: the interpreter accepts what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from d2o.kernels import store
from d2o.kernels.column_sums_exp2 import exp2_assembly
from d2o.kernels.column_sums_kernels import column_sums_kernel

TYPES = dict.fromkeys("q k v pool_k pool_v out_k out_v".split(), "*bf16")
TYPES |= dict.fromkeys("lse out score bias".split(), "*fp32") | {"factor": "fp32", "cap": "fp32", "table": "*i64"}
TYPES |= dict.fromkeys("position block_table rows slots positions".split(), "*i32")
SUMS = {"PACKED": False, "HEADS": 1, "GROUP": 4, "D": 128, "BLOCK_D": 128, "BLOCK_K": 256, "BLOCK_Q": 64}
SUMS |= {"SAMPLE": 64, "EXTRA": 0, "SOFTCAP": False, "WINDOW": 0, "PRECISION": "tf32"}
SUMS |= {"EXP2": exp2_assembly(1), "STAGES": 2, "DESCRIBED": True}
SHORT = SUMS | {"PACKED": True, "BLOCK_K": 64, "EXP2": "", "DESCRIBED": False}
PAGES = {"PAGE": 32, "D": 96, "BLOCK_D": 128}
WORK = [
    (column_sums_kernel, SUMS, 8, 128, 114),
    (column_sums_kernel, SUMS | {"EXTRA": 1, "DESCRIBED": False}, 8, 128, 114),
    (column_sums_kernel, SHORT, 4, None, 76),
    (column_sums_kernel, SHORT | {"HEADS": 4, "EXTRA": 1, "SOFTCAP": True, "WINDOW": 9}, 4, None, 76),
    (store._store_kernel, PAGES | {"BLOCK_T": 32, "CLEAR": True}, 4, None, 57),
    (store._gather_kernel, PAGES, 4, None, 57),
]
for kernel, constants, warps, registers, kilobytes in WORK:
    names = kernel.arg_names
    tile = {"described_q": "tensordesc<bf16[1,64,128]>" if constants.get("DESCRIBED") else "*bf16"}
    signature = {n: "constexpr" if n in constants else (TYPES | tile).get(n, "i32") for n in names}
    aligned = [i for i, n in enumerate(names) if TYPES.get(n) == "*bf16"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    values = {(names.index(n),): value for n, value in constants.items()}
    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
    made = triton.compile(
        ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", 90, 32), options=options
    )
    assert made.metadata.shared <= kilobytes * 1024, (kernel, made.metadata.shared)
    if "BLOCK_K" in constants:
        assert "wgmma" in made.asm["ptx"]
        assert "ex2.approx.ftz" in made.asm["ptx"]
        assert ("cp.async.bulk.tensor" in made.asm["ptx"]) == constants["DESCRIBED"]
    else:
        assert "ld.global.v4" in made.asm["ptx"]
        assert "st.global.v4" in made.asm["ptx"]
"""

TURNS = """
import subprocess
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from d2o.kernels.column_sums import TURNS
from d2o.kernels.column_sums_turns import SWIZZLED, turns_kernel as kernel

TYPES = {"q": "*bf16", "k": "*bf16", "lse": "*fp32", "out": "*fp32", "factor": "fp32"}
TYPES |= {"described_q": f"tensordesc<bf16[1,64,128],{SWIZZLED!r}>"}
FIXED = {"HEADS_A_KEY": 4, "D": 128, "BLOCK_K": TURNS.keys // 3, "BLOCK_Q": TURNS.queries, "SAMPLE": 64}
FIXED |= {"STAGES": TURNS.stages, "REGISTERS": TURNS.registers}
for extra in (0, 1):
    constants = FIXED | {"EXTRA": extra}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if TYPES.get(n) == "*bf16"}
    values = {(names.index(n),): value for n, value in constants.items()}
    made = triton.compile(
        GluonASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": TURNS.warps},
    )
    assert made.metadata.shared <= 227 * 1024, made.metadata.shared
    assert f"setmaxnreg.inc.sync.aligned.u32 \t{TURNS.registers}" in made.asm["ptx"]
    with open("kernel.ptx", "w") as file:
        file.write(made.asm["ptx"])
    assembler = [triton.knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in said, "products wait for one another: " + said
    spilt = int(said.split(" bytes spill stores")[0].split()[-1])
    assert spilt <= 32, said
"""


def compile_apart(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Without the interpreter, which this process has chosen for all its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("code", [pytest.param(COMPILE, id="triton"), pytest.param(TURNS, id="gluon")])
def test_the_kernels_compile_for_a_hopper_gpu(code: str, tmp_path: Path) -> None:
    done = compile_apart(code, tmp_path)
    assert done.returncode == 0, done.stderr
