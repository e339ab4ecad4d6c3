"""Cores that may be used: those of the process, or fewer where a control group limits its time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2o_server.control_groups import folders, usable_cores
from tests.server.kernel_files import Kernel


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A machine with 16 cores, all of which the process may run on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return Kernel(tmp_path)


def cores(kernel: Kernel) -> int:
    return usable_cores(kernel.proc, kernel.groups)


def test_without_a_limit_they_are_those_that_the_process_may_run_on(kernel: Kernel) -> None:
    assert cores(kernel) == 16
    kernel.member("0::/", "3:cpu:/")
    kernel.group("", cpu__max="max 100000")
    kernel.group("cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert cores(kernel) == 16
    (kernel.proc / "self/cgroup").unlink()
    assert cores(kernel) == 16


@pytest.mark.parametrize(("quota", "allowed"), [(400_000, 4), (150_000, 2), (20_000, 1), (6_400_000, 16)])
def test_a_containers_limit_counts_and_a_part_of_a_core_is_one(kernel: Kernel, quota: int, allowed: int) -> None:
    kernel.member("0::/")
    kernel.group("", cpu__max=f"{quota} 100000")
    assert cores(kernel) == allowed


def test_the_tightest_of_the_groups_around_it_counts(kernel: Kernel) -> None:
    kernel.member("0::/pods/pod1/server")
    kernel.group("pods/pod1/server", cpu__max="max 100000")
    kernel.group("pods/pod1", cpu__max="300000 100000")
    kernel.group("pods", cpu__max="800000 100000")
    assert cores(kernel) == 3


def test_version_1_has_files_of_other_names_and_a_path_that_is_the_hosts(kernel: Kernel) -> None:
    kernel.member("9:name=systemd:/x", "4:cpu,cpuacct:/kubepods/pod7/abc", "0::/x")
    kernel.group("cpu", cpu__cfs_quota_us=250_000, cpu__cfs_period_us=50_000)
    assert cores(kernel) == 5
    assert list(folders("cpu", kernel.proc, kernel.groups)) == [(kernel.groups / "cpu", 1), (kernel.groups, 2)]


def test_a_server_that_is_bound_to_a_core_has_one_thread() -> None:
    program = (
        "from d2o_server.settings import from_arguments, worker_settings\n"
        "print(worker_settings().threads, from_arguments([], {}).worker.threads)"
    )
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\n{program}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1 1\n"
