"""Memory that may be taken: the machine's, or less where a control group says so, in files like the kernel's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from d2o_server.worker.host_memory import available_bytes
from tests.server.kernel_files import GIB, Kernel


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def available(kernel: Kernel) -> int:
    return available_bytes(kernel.proc, kernel.groups)


def test_without_groups_it_is_the_machines(kernel: Kernel) -> None:
    assert available(kernel) == 16 * GIB
    (kernel.proc / "self/cgroup").unlink()
    assert available(kernel) == 16 * GIB


def test_a_containers_limit_counts_and_files_that_can_be_dropped_do_not(kernel: Kernel) -> None:
    kernel.member("0::/")
    stat = f"anon 5\ninactive_file {GIB}\nactive_file 7"
    kernel.group("", memory__max=8 * GIB, memory__current=3 * GIB, memory__stat=stat)
    assert available(kernel) == 6 * GIB


def test_the_tightest_of_the_groups_around_it_counts(kernel: Kernel) -> None:
    kernel.member("0::/pods/pod1/server")
    empty = {"memory__stat": "inactive_file 0"}
    kernel.group("pods/pod1/server", memory__max="max", memory__current=GIB, **empty)
    kernel.group("pods/pod1", memory__max=4 * GIB, memory__current=GIB, **empty)
    kernel.group("pods", memory__max=32 * GIB, memory__current=30 * GIB, **empty)
    assert available(kernel) == 2 * GIB


def test_version_1_has_files_of_other_names_and_a_path_that_is_the_hosts(kernel: Kernel) -> None:
    kernel.member("9:name=systemd:/x", "4:cpu,memory:/kubepods/pod7/abc", "0::/x")
    kernel.group(
        "memory",
        memory__limit_in_bytes=5 * GIB,
        memory__usage_in_bytes=2 * GIB,
        memory__stat=f"inactive_file 3\ntotal_inactive_file {GIB}",
    )
    assert available(kernel) == 4 * GIB


def test_no_limit_of_version_1_is_a_huge_one(kernel: Kernel) -> None:
    kernel.member("4:memory:/")
    kernel.group("memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB, memory__stat="cache 0")
    assert available(kernel) == 16 * GIB


def test_what_is_used_up_is_nothing_and_not_less(kernel: Kernel) -> None:
    kernel.member("0::/")
    kernel.group("", memory__max=GIB, memory__current=2 * GIB, memory__stat="inactive_file 0")
    assert available(kernel) == 0


def test_this_machine_has_some() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total
