"""Decode attention's kernel compiles for the GPU it is written for, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

# Compiles for compute capability 9.0, which needs no device: the interpreter accepts what the compiler refuses.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from d2o.kernels.decode_kernels import attend_kernel

TILE = "tensordesc<bf16[32,128]>"
MODEL = dict.fromkeys("q k_new v_new k v out".split(), "*bf16") | {"described_k": TILE, "described_v": TILE}
REAL = dict.fromkeys("score bias partial peak total stash_peak".split(), "*fp32")
WHOLE = dict.fromkeys("position positions table rows lengths share first base owner arrivals".split(), "*i32")
TYPES = MODEL | REAL | WHOLE | {"stash": "*fp16", "scale": "fp32", "softcap": "fp32"}
SHAPE = {"KV_HEADS": 8, "GROUP": 3, "PAGE": 32, "DIM": 96, "DIM_PAD": 128, "BLOCK": 32, "ROWS": 8, "LANES": 4}
RULE = {"WINDOW": True, "SOFTCAP": True, "BIAS": True, "RESET": True, "SCORE": True}
LAUNCH = {"DESCRIPTORS": True, "TILES": 16, "SPLITS": 8, "SCORE_STAGES": 1}
POLICIES = {"STORE_POLICY": "evict_last", "LOAD_POLICY": "evict_first"}
CONSTANTS = SHAPE | RULE | LAUNCH | POLICIES
names = attend_kernel.arg_names
signature = {n: "constexpr" if n in CONSTANTS else TYPES.get(n, "i32") for n in names}
attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
values = {(names.index(n),): value for n, value in CONSTANTS.items()}
source = triton.compiler.ASTSource(attend_kernel, signature, values, attributes)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2, "num_stages": 3})
assert made.metadata.shared < 113 * 1024, "two programs no longer fit a processor"
"""


def test_it_compiles_for_a_hopper_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
