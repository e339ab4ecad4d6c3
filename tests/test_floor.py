"""What benchmarks hold a load against: the least that its bytes and operations take."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks._floor import Rates, Work, floor_of
from d2o_server.models.describe import describe
from d2o_server.models.source import resolve
from d2o_server.worker.loader import load_config
from tests.server.worker.conftest import served_model


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gemma3"])
def test_a_floor_counts_every_byte_and_operation_once(model: str) -> None:
    """Against a count, token by token, in which windows and budgets bind."""
    work = Work.of(f"random:{model}", torch.bfloat16)
    shape = describe(load_config(resolve(f"random:{model}")))
    # 2 MB/s and 3 GFLOP/s; the other two do not count.
    rates = Rates(copy_tb_s=9e-6, read_tb_s=2e-6, matrix_bf16_tflop_s=9e-3, matrix_sustained_bf16_tflop_s=3e-3)
    requests, prompt, new, budget = 3, 300, 20, 256
    for compression, most in (({"policy": "none"}, 1 << 30), ({"policy": "d2o", "budget_tokens": budget}, budget)):
        floor = floor_of(work, rates, requests=requests, prompt_tokens=prompt, new_tokens=new, compression=compression)
        pairs = slots = 0
        for window in shape.windows:
            pairs += sum(min(position + 1, window or position + 1) for position in range(prompt))
            slots += sum(min(prompt + step, window or most) for step in range(1, new))
        assert floor.prompt_attention == pytest.approx(
            requests * pairs * 2 * 2 * shape.query_heads * shape.head_dim / 3e9
        )
        assert floor.step_cache == pytest.approx(requests * slots * 2 * 2 * shape.kv_heads * shape.head_dim / 2e6)
        read = work.parameters * prompt + work.head_parameters
        assert floor.prompt_products == pytest.approx(requests * 2 * read / 3e9)
        weights = work.parameters + work.head_parameters
        assert floor.step_products == pytest.approx((new - 1) * max(2 * weights / 2e6, 2 * weights * requests / 3e9))
        assert floor.total == pytest.approx(sum(asdict(floor).values()))
    weights = sum(
        tensor.numel()
        for name, tensor in served_model(model).state_dict().items()
        if name.endswith("proj.weight") and "layers" in name
    )
    assert work.parameters == weights
    assert work.head_parameters == shape.vocabulary_size * load_config(resolve(f"random:{model}")).hidden_size


def test_rates_are_measured_for_servers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"copy_tb_s": 4.2, "read_tb_s": 4.5, "matrix_bf16_tflop_s": 798.0, "matrix_sustained_bf16_tflop_s": 677.0}

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[1:] == ["-m", "benchmarks._gpu"]
        return SimpleNamespace(returncode=0, stdout=f"a line that a library prints\n{json.dumps(given)}\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert Rates.measure_apart() is None
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")
    assert Rates.measure_apart("--device cpu --page-size 16") is None
    assert Rates.measure_apart("--device=cpu") is None
    assert Rates.measure_apart("--device cuda:1") == Rates(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be measured here")
def test_a_gpu_that_cannot_be_measured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")
    with pytest.raises(RuntimeError, match=r"the GPU's rates cannot be measured: .*(CUDA|NVIDIA)"):
        Rates.measure_apart()
