"""A counter that a process shares with the one that watches it: it stands still when the process does."""

from __future__ import annotations

import mmap
import struct
import threading
import time
from pathlib import Path

_COUNT = struct.Struct("<Q")
_SECONDS_BETWEEN_BEATS = 0.25


def pulse_file(address: str) -> Path:
    """Where the process that is reached at ``address`` (``ipc://PATH``) has its counter."""
    return Path(address.removeprefix("ipc://") + ".pulse")


def is_stopped(process_id: int | None) -> bool:
    """Whether a signal has stopped a process, as the kernel knows it of one that does not beat yet, too."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"


class Pulse:
    """A counter in a file that both processes map: reading it costs nothing, and nobody has to answer."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(_COUNT.pack(0))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _COUNT.size)

    @property
    def count(self) -> int:
        return int(_COUNT.unpack_from(self._map)[0])

    def beat(self) -> None:
        _COUNT.pack_into(self._map, 0, self.count + 1)

    def close(self) -> None:
        self._map.close()


def keep_beating(path: Path) -> None:
    """Has a thread of its own beat for as long as the process runs, whatever its other threads are doing."""
    pulse = Pulse(path)

    def beat() -> None:
        while True:
            pulse.beat()
            time.sleep(_SECONDS_BETWEEN_BEATS)

    threading.Thread(target=beat, name="pulse", daemon=True).start()
