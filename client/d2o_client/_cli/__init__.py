"""The command line ``d2o``: generate, chat, info, load and top against a running d2o-serve.

Exit codes: 0 done; 1 the server or the request failed; 2 the command line is wrong; 130 interrupted; 141 the reader
of the output went away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from d2o_client._cli._arguments import build_parser
from d2o_client._cli._commands import RUN
from d2o_client._cli._output import report_error
from d2o_client._errors import D2OError, InvalidArgumentError

__all__ = ["main"]

INTERRUPTED = 130
READER_GONE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; argparse itself exits with 2 on a wrong command line."""
    _set_text_errors()
    arguments = build_parser(os.environ).parse_args(argv)
    try:
        code = RUN[arguments.command](arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except D2OError as error:
        report_error(error, arguments)
        return 2 if isinstance(error, InvalidArgumentError) and error.attempts == 0 else 1
    return code


def _set_text_errors() -> None:
    """Lets a terminal of any encoding take any text, and standard input only what is text."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)
