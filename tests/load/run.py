"""``make load``: Locust without its web page, against a server of its own, with a report in ``load-report/``.

Flags are Locust's and those of ``locustfile.py``; with ``--target`` a server that runs already is loaded instead, and
``--server-flags`` are more flags of the one that is started.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._server import running_server

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "load-report"
SERVER = ("--model", "random:tiny-llama", "--device", "cpu", "--dtype", "float32", "--threads", "1")
# A flag that is given again wins.
DEFAULTS = ("--users", "16", "--spawn-rate", "100", "--run-time", "60s", "--stop-timeout", "10", "--only-summary")
MISBEHAVING = ("--cancel-share", "0.05", "--slow-share", "0.05", "--too-long-share", "0.05")


def locust(target: str, folder: Path, *flags: str) -> int:
    """Runs Locust headless against ``target``; its report and its CSVs go to ``folder``. Its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "locust", "--locustfile", "tests/load/locustfile.py", "--headless"]
    output = ("--html", str(folder / "report.html"), "--csv", str(folder / "load"), "--csv-full-history")
    # gRPC's own threads must not talk into a terminal that has tables in it.
    environment = os.environ | {"GRPC_VERBOSITY": "ERROR"}
    command += [*output, *DEFAULTS, *flags, "--target", target]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts what is needed and runs the load; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--target")
    parser.add_argument("--server-flags", default="")
    parser.add_argument("--out", type=Path, default=REPORT)
    parsed, flags = parser.parse_known_args(arguments)
    folder = parsed.out.resolve()
    if parsed.target is not None:
        status = locust(parsed.target, folder, *MISBEHAVING, *flags)
    else:
        with running_server(*SERVER, *shlex.split(parsed.server_flags)) as target:
            status = locust(target, folder, *MISBEHAVING, *flags)
    print(f"load: {'passed' if status == 0 else f'FAILED with status {status}'}; report in {parsed.out.name}/")
    return status


if __name__ == "__main__":
    sys.exit(main())
