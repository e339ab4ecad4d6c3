"""What holds for all tests: kernels run in Triton's interpreter where there is no GPU, and slow files begin first."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.interpreter import quicken

    quicken()

# Several processes that each compute on all cores get in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_FOLDER = Path(__file__).parent
# Their tests start servers or run benchmarks: each file takes half a minute and more.
_SLOW = ("e2e/", "load/", "test_", "server/engine/", "server/worker/", "d2o/kernels/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files that take long first: where several processes share the work, none is left with one at the end."""

    def place(item: pytest.Item) -> int:
        path = str(item.path.relative_to(_FOLDER))
        return next((place for place, start in enumerate(_SLOW) if path.startswith(start)), len(_SLOW))

    items.sort(key=place)
