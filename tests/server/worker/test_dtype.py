"""The type that auto means, by what a processor says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2o_server.worker.dtype import choose_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\nbugs\t: x\n", torch.bfloat16),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", torch.bfloat16),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", torch.bfloat16),
        ("processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: fpu avx2 avx512f\n", torch.float32),
        ("hart\t: 0\n", torch.float32),
        (None, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_a_cpu_computes_in_it(cpuinfo: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    assert choose_dtype("auto", CPU, file) == dtype


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_type_that_was_asked_for_is_that_type(name: str, tmp_path: Path) -> None:
    assert choose_dtype(name, CPU, tmp_path / "none") == getattr(torch, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu_of_today_is_bfloat16() -> None:
    assert choose_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
