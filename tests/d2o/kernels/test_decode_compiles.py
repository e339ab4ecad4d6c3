"""Decode attention's kernels compile for the GPUs they are written for, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

# Compiles for compute capabilities 9.0 and 8.0, without a device: the interpreter accepts what the compiler refuses.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from d2o.kernels.decode_kernels import attend_kernel
from d2o.kernels.pending import settle_kernel

TILE = "tensordesc<bf16[32,128]>"
MODEL = dict.fromkeys("q k_new v_new k v out late_query".split(), "*bf16")
REAL = dict.fromkeys("score bias partial peak total late_level late_rule".split(), "*fp32")
WHOLE = "position positions table rows lengths share first owner arrivals places tables used late_count clock".split()
TYPES = MODEL | REAL | dict.fromkeys(WHOLE, "*i32") | {"scale": "fp32", "softcap": "fp32"}
TYPES |= {"described_k": TILE, "described_v": TILE}
SHAPE = {"KV_HEADS": 8, "GROUP": 3, "PAGE": 32, "DIM": 96, "DIM_PAD": 128, "BLOCK": 32}
SHAPE |= {"ROWS": 8, "LANES": 4, "DEPTH": 4, "LATE_ROWS": 16, "PART": 2048, "DESCRIBED": True}
RULE = {"SOFTCAP": True, "BIAS": True, "RESET": True, "SPLITS": 8}

def build(kernel, options, constants, types=TYPES, capability=90):
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

for seen in ({"SCORE": True, "WINDOW": False}, {"SCORE": False, "WINDOW": True}):
    made = build(attend_kernel, {"num_warps": 2, "num_stages": 3}, SHAPE | RULE | seen)
    assert made.metadata.shared < 45 * 1024, "five programs no longer fit a processor"
build(settle_kernel, {"num_warps": 2, "num_stages": 3}, SHAPE)

# An Ampere GPU has no engine that copies tiles: there threads fetch them ahead.
plain = TYPES | {"described_k": "*bf16", "described_v": "*bf16"}
rest = {"SCORE": True, "WINDOW": False, "DESCRIBED": False}
for kernel in (attend_kernel, settle_kernel):
    made = build(kernel, {"num_warps": 2, "num_stages": 3}, SHAPE | RULE | rest, plain, 80)
    assert "cp.async" in made.asm["ptx"], "keys are waited for"
"""


def test_they_compile_for_hopper_and_ampere_gpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
