"""Which type a worker computes in where its operator leaves that to it."""

from __future__ import annotations

from pathlib import Path

import torch

BY_NAME = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
AUTO = "auto"
# What Linux calls arithmetic in bfloat16 on x86 and on Arm.
_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_AMPERE = (8, 0)


def choose_dtype(name: str, device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """The type that ``name`` means on ``device``.

    ``auto`` is bfloat16 where the hardware computes in it. A CPU without it would take about four times as long as in
    float32, and gets that; a GPU older than Ampere gets float16.
    """
    if name != AUTO:
        return BY_NAME[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= _AMPERE else torch.float16
    return torch.bfloat16 if _CPU_FLAGS & _cpu_flags(cpuinfo) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As operators write it."""
    return str(dtype).removeprefix("torch.")


def _cpu_flags(cpuinfo: Path) -> set[str]:
    """What the processors say that they can; nothing where the file is not there or has no such line."""
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(flags.split())
    return set()
