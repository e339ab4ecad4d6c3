"""Files as the kernel writes them of a machine and of the control groups around a process."""

from __future__ import annotations

from pathlib import Path

GIB = 1 << 30


class Kernel:
    """Files as the kernel writes them; 16 GiB are available of the machine's memory."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.groups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {16 * GIB // 1024} kB\nBuffers: 5 kB\n")
        (self.proc / "self/cgroup").write_text("")

    def member(self, *lines: str) -> None:
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    def group(self, path: str, **files: object) -> None:
        folder = self.groups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")
