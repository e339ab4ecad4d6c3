"""The eviction kernels compile for a Hopper GPU, without one: the interpreter accepts what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from d2o.kernels import fold_kernels, judge, nearest_kernels, select_kernels

TYPES = dict.fromkeys("k v staged".split(), "*bf16") | {"merge_weight": "fp32", "bias_limit": "fp32"}
TYPES |= dict.fromkeys("score bias pooled similarity".split(), "*fp32")
TYPES |= dict.fromkeys("threshold fates".split(), "*fp32") | dict.fromkeys("old_weight beta".split(), "fp32")
TYPES |= dict.fromkeys("keys cut order".split(), "*i64") | {"passes": "*u8", "places": "*i32"}
COUNTS = "tables used keep seen recent_from wanted position kept evicted fallback nearest target begin count"
TYPES |= dict.fromkeys(COUNTS.split(), "*i32")
POOL = {"HEADS": 8, "PAGE": 32}
CACHE = POOL | {"DIM": 96, "BLOCK_D": 128}
KEYS = POOL | {"SHARED": 1, "SUM": False, "BLEND": 0.5, "STAGE": 2, "BLOCK": 1024}
SEARCH = CACHE | {"INTO_SINKS": False}
FOLD = CACHE | {"PAPER": False, "CONSERVE": True, "KEYS": True, "BIAS": True, "MEMBERS": 8}
JUDGE = {"HEADS": 8, "HEADS_PAD": 8, "EVICTED": 64, "RULE": 1, "LAYER": False}
WORK = [
    (select_kernels.keys_kernel, KEYS, 4, 3),
    (select_kernels.cut_kernel, {"CHOICES": 8, "BLOCK": 2048}, 8, 3),
    (select_kernels.split_kernel, {"HELD": False, "BLOCK": 2048}, 8, 3),
    (select_kernels.split_kernel, {"HELD": True, "BLOCK": 8192}, 8, 3),
    (nearest_kernels.stage_kernel, SEARCH | {"BLOCK": 32}, 4, 3),
    (nearest_kernels.staged_kernel, SEARCH | {"EVICTED": 128, "SLOTS": 128}, 8, 2),
    (nearest_kernels.direct_kernel, SEARCH | {"EVICTED": 32, "SLOTS": 64}, 4, 3),
    (nearest_kernels.direct_kernel, SEARCH | {"EVICTED": 64, "SLOTS": 128}, 8, 3),
    (fold_kernels.segments_kernel, {"BLOCK": 2048}, 8, 3),
    (fold_kernels.fold_kernel, FOLD, 1, 3),
    (fold_kernels.fold_few_kernel, FOLD | {"EVICTED": 32}, 1, 3),
    (judge.judge_kernel, JUDGE, 4, 3),
    (judge.judge_kernel, JUDGE | {"RULE": 2, "LAYER": True}, 4, 3),
    (fold_kernels.move_kernel, CACHE | {"MOVES": 32}, 4, 3),
]
for kernel, constants, warps, stages in WORK:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared < 113 * 1024, "two programs no longer fit a processor"
"""


def test_the_kernels_compile_for_a_hopper_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
