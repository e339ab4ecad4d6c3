"""A compiled kernel is found again by its constants, its options and its first tensor alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2o.kernels.launch import Launcher, Options, eighths, programs_at_once


class FakeKernel:
    """Compiles to a function that notes what it is launched with."""

    arg_names = ("x", "count", "SIZE", "EXACT")

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_run(*arguments: Any, **options: Any) -> dict[tuple[int, int, int], Any]:
            self.compiled.append(options)
            return FakeCompiled(self)

        return compile_and_run


class FakeCompiled(dict[tuple[int, int, int], Any]):
    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel

    def __missing__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.kernel.launched.append((grid, *arguments))


def test_only_the_first_launch_of_a_form_compiles() -> None:
    kernel = FakeKernel()
    launch = Launcher(kernel)
    x = torch.zeros(1)
    launch((1, 1, 1), (x, 5), (16, True), Options(4))
    assert kernel.compiled == [{"SIZE": 16, "EXACT": True, "num_warps": 4, "num_stages": 3}]
    launch((2, 1, 1), (x, 6), (16, True), Options(4))
    assert kernel.launched == [((2, 1, 1), x, 6, 16, True)]
    for dtype, constants, options in (
        (torch.float32, (32, True), Options(4)),
        (torch.float32, (16, True), Options(8)),
        (torch.float32, (16, True), Options(4, registers=64)),
        (torch.bfloat16, (16, True), Options(4)),
    ):
        launch((1, 1, 1), (x.to(dtype), 5), constants, options)
    assert len(kernel.compiled) == 5
    assert kernel.compiled[3]["maxnreg"] == 64


def test_strides_are_told_in_eighths() -> None:
    by_token = torch.zeros(5, 2, 24).transpose(0, 1)
    assert eighths(by_token, torch.zeros(2, 5, 24)) == (3, 6, 15, 3)
    with pytest.raises(ValueError, match="head_dim must be one"):
        eighths(torch.zeros(2, 5, 20))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (224, 39_456, 2, 4),  # decode attention with scores: its registers, two warps to a quarter of the processor
        (127, 35_344, 2, 6),  # and without: its shared memory
        (32, 0, 2, 32),  # threads
        (40, 0, 3, 16),  # registers by the quarter: 12 warps each
        (255, 0, 16, 1),  # never none, as it did run
        (16, 231_424, 4, 1),
    ],
)
def test_programs_at_once_are_what_registers_memory_and_threads_allow(
    registers: int, shared: int, warps: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper = SimpleNamespace(
        warp_size=32,
        regs_per_multiprocessor=65_536,
        shared_memory_per_multiprocessor=233_472,
        max_threads_per_multi_processor=2048,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: hopper)
    kernel = SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(shared=shared))
    assert programs_at_once(kernel, warps, torch.device("cuda")) == programs
