"""``python -m d2o_server.keys new NAME``: makes an API key. It is shown once; the server's file holds its hash."""

from __future__ import annotations

import argparse
import sys

from d2o_server.engine.types import MAX_PRIORITY
from d2o_server.errors import SettingsError
from d2o_server.rpc.api_keys import new_key

_LIMITS = {
    "rate": "generations a second that it may start",
    "streams": "generations that it may run at once",
    "pages": "cache pages that its requests may reserve at once",
    "priority": f"highest priority that its requests may have, 0 to {MAX_PRIORITY}",
}


def main(arguments: list[str] | None = None) -> int:
    """Prints the key on standard error and its line on standard output; returns the process's exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        key, stored = new_key(parsed.name, **{name: getattr(parsed, name) for name in _LIMITS})
    except SettingsError as error:
        print(f"keys: {error}", file=sys.stderr)
        return 1
    print(f"The key, which is shown only now and which the client sends:\n  {key}", file=sys.stderr)
    print("Its line, for the file of --api-keys:", file=sys.stderr, flush=True)
    print(stored.line())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m d2o_server.keys", description=__doc__)
    new = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser("new", help="make a key")
    new.add_argument("name", metavar="NAME", help="whose key it is, as logs will show it")
    for name, text in _LIMITS.items():
        new.add_argument(f"--{name}", type=_whole, metavar="N", help=f"{text} (default: the server's)")
    return parser


def _whole(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a whole number in [0, 999999999]")


if __name__ == "__main__":
    sys.exit(main())
