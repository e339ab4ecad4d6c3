"""What the control groups around this process (a container's, a pod's) let it have."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where the kernel's files are."""


def folders(controller: str, proc: Path = PROC, groups: Path = GROUPS) -> Iterator[tuple[Path, int]]:
    """Folders of the groups of a ``controller`` that this process is in, from its own outwards, and their version.

    In a container the path is often the host's and not there to see, but then the root is the container's own group.
    """
    memberships: list[str] = []
    with suppress(OSError):
        memberships = (proc / "self/cgroup").read_text().splitlines()
    for membership in memberships:
        number, controllers, path = membership.split(":", 2)
        if number == "0":
            root, version = groups, 2
        elif controller in controllers.split(","):
            root, version = groups / controller, 1
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and folder.is_dir():
                yield folder, version


def usable_cores(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """How many cores this process can keep busy: those it may run on, or less where a group's time is limited.

    More threads than that wait for one another while the kernel holds them back. A part of a core counts as one.
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder, version in folders("cpu", proc, groups):
        with suppress(OSError, ValueError):
            cores = min(cores, _limit(folder, version))
    return max(1, math.ceil(cores))


def _limit(folder: Path, version: int) -> float:
    """A group's cores.

    Raises:
        OSError, ValueError: it has no limit.
    """
    if version == 2:
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    cores = int(quota) / int(period)
    if cores <= 0:
        raise ValueError(f"{folder}: no limit")
    return cores
