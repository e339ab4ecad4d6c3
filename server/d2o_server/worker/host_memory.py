"""How much memory a process may still take: what the machine has left, and what its control groups let it have."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from d2o_server.control_groups import GROUPS, PROC, folders


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """Where a version of control groups says what: the limit, what is used, and what of it could be dropped at once."""

    limit: str
    used: str
    droppable: str


_FILES = {
    1: _Files(limit="memory.limit_in_bytes", used="memory.usage_in_bytes", droppable="total_inactive_file"),
    2: _Files(limit="memory.max", used="memory.current", droppable="inactive_file"),
}


def available_bytes(proc: Path = PROC, groups: Path = GROUPS) -> int:
    """Memory that can be had without swapping and without being killed for it, the page cache included.

    That is the least of what Linux calls available and, in each control group around this process that has a limit (a
    container's, a pod's), the limit less what is used, of which files that nobody has read lately do not count.

    Args:
        proc, groups: where the kernel's files are.
    """
    found = ((folder, _FILES[version]) for folder, version in folders("memory", proc, groups))
    left = (_left(folder, files) for folder, files in found if (folder / files.limit).exists())
    return max(0, min([_of_machine(proc), *left]))


def _of_machine(proc: Path) -> int:
    (line,) = (line for line in _lines(proc / "meminfo") if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _left(folder: Path, files: _Files) -> int:
    limit = (folder / files.limit).read_text().strip()
    if limit == "max":
        return sys.maxsize
    stat = (line.split() for line in _lines(folder / "memory.stat"))
    droppable = sum(int(value) for name, value in stat if name == files.droppable)
    return int(limit) - int((folder / files.used).read_text()) + droppable


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines()
