"""Decode attention's kernel compiles for the GPU it is written for, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

# Compiles for compute capability 9.0, which needs no device: the interpreter accepts what the compiler refuses.
COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from d2o.kernels.decode_kernels import attend_kernel

TILE = "tensordesc<bf16[32,128]>"
MODEL = dict.fromkeys("q k_new v_new k v out".split(), "*bf16") | {"described_k": TILE, "described_v": TILE}
REAL = dict.fromkeys("score bias partial peak total stash_peak".split(), "*fp32")
WHOLE = dict.fromkeys("position positions table rows lengths share first owner widest turns arrivals".split(), "*i32")
TYPES = MODEL | REAL | WHOLE | {"stash": "*fp16", "scale": "fp32", "softcap": "fp32"}
SHAPE = {"KV_HEADS": 8, "GROUP": 3, "PAGE": 32, "DIM": 96, "DIM_PAD": 128, "BLOCK": 32, "ROWS": 8, "LANES": 4}
RULE = {"WINDOW": True, "SOFTCAP": True, "BIAS": True, "RESET": True}
LAUNCH = {"TILES": 16, "SPLITS": 8, "STASH": True}

def build(kernel, options, constants):
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

for together in (False, True):
    constants = SHAPE | RULE | LAUNCH | {"TOGETHER": together}
    made = build(attend_kernel, {"num_warps": 2, "num_stages": 4}, constants)
    assert made.metadata.shared < 113 * 1024, "two programs no longer fit a processor"
    wide = re.findall("ld.global[^;]*v4|st.global[^;]*v4", made.asm["ptx"])
    assert len(wide) >= 6, "threads no longer move neighbouring slots at once"
"""


def test_it_compiles_for_a_hopper_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
