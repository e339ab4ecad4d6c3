"""How much memory a process may still take: what the machine has left, and what its control groups let it have."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """Where a version of control groups says what: the limit, what is used, and what of it could be dropped at once."""

    limit: str
    used: str
    droppable: str


_VERSION_1 = _Files(limit="memory.limit_in_bytes", used="memory.usage_in_bytes", droppable="total_inactive_file")
_VERSION_2 = _Files(limit="memory.max", used="memory.current", droppable="inactive_file")


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that can be had without swapping and without being killed for it, the page cache included.

    That is the least of what Linux calls available and, in each control group around this process that has a limit (a
    container's, a pod's), the limit less what is used, of which files that nobody has read lately do not count.

    Args:
        proc, groups: where the kernel's files are.
    """
    return max(0, min([_of_machine(proc), *(_left(folder, files) for folder, files in _around(proc, groups))]))


def _of_machine(proc: Path) -> int:
    (line,) = (line for line in _lines(proc / "meminfo") if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _around(proc: Path, groups: Path) -> Iterator[tuple[Path, _Files]]:
    """Folders of the groups that this process is in and that have a limit, of either version.

    In a container the path is often the host's and not there to see, but then the root is the container's own group.
    """
    memberships: list[str] = []
    with suppress(OSError):
        memberships = _lines(proc / "self/cgroup")
    for membership in memberships:
        number, controllers, path = membership.split(":", 2)
        if number == "0":
            root, files = groups, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = groups / "memory", _VERSION_1
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root) and (folder / files.limit).exists():
                yield folder, files


def _left(folder: Path, files: _Files) -> int:
    limit = (folder / files.limit).read_text().strip()
    if limit == "max":
        return sys.maxsize
    stat = (line.split() for line in _lines(folder / "memory.stat"))
    droppable = sum(int(value) for name, value in stat if name == files.droppable)
    return int(limit) - int((folder / files.used).read_text()) + droppable


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines()
