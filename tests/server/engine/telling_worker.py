"""A worker process that writes down what it was started with, and then ends or waits as it is told."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

from d2o_server.worker.process import call_it


def main() -> None:
    call_it("d2o-telling")
    told = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "arguments": sys.argv[1:],
        "directory": str(Path.cwd()),
        "word": os.environ["D2O_TEST_WORD"],
        "imported": "transformers" in sys.modules,
        "collects": gc.isenabled(),
        "frozen": gc.get_freeze_count() > 100_000,
    }
    path = Path(sys.argv[1])
    path.with_suffix(".new").write_text(json.dumps(told))
    path.with_suffix(".new").rename(path)
    if status := os.environ.get("D2O_TEST_STATUS"):
        raise SystemExit(int(status))
    time.sleep(600)


if __name__ == "__main__":
    main()
