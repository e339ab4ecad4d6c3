"""What the commands print: answers and JSON on standard output; summaries, hints and errors on standard error."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from d2o_client._errors import (
    D2OError,
    DeadlineExceededError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    is_too_large,
)
from d2o_client._sync import Stream
from d2o_client._types import CacheFacts, Finished, Started

_UNREACHABLE = ("failed to connect", "connection refused", "dns resolution", "name resolution", "socket closed")


def print_json(document: dict[str, Any]) -> None:
    """One document as one line."""
    print(json.dumps(document), flush=True)


def print_note(text: str) -> None:
    """A line beside the output."""
    print(text, file=sys.stderr, flush=True)


def print_answer(stream: Stream, *, as_json: bool, stats: bool | None) -> None:
    """Reads a stream to its end and prints it as it comes; then the summary, by default where it is not JSON."""
    watch = _Stopwatch()
    printer = _JsonPrinter() if as_json else _TextPrinter()
    try:
        for chunk in stream:
            watch.mark_first_token()
            if stream.started is not None:
                printer.started(stream.started)
            printer.chunk(chunk.text, asdict(chunk))
    finally:
        printer.end()
    started, finished = stream.started, stream.finished
    if started is None or finished is None:
        return
    printer.started(started)
    printer.finished(finished)
    if stats if stats is not None else not as_json:
        print_note(timing_line(started, finished, watch.first_token, watch.elapsed()))
        print_note(cache_line(started, finished.cache))


class _Stopwatch:
    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.first_token: float | None = None

    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def mark_first_token(self) -> None:
        if self.first_token is None:
            self.first_token = self.elapsed()


class _TextPrinter:
    """Text as it comes; on a terminal without control characters, which could be escape sequences."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._line_open = False

    def started(self, started: Started) -> None:
        """Shown in the summary."""

    def chunk(self, text: str, document: dict[str, Any]) -> None:
        shown = "".join(filter(_is_plain, text)) if self._terminal else text
        if shown:
            sys.stdout.write(shown)
            sys.stdout.flush()
            self._line_open = not shown.endswith("\n")

    def end(self) -> None:
        if self._line_open:
            print(flush=True)

    def finished(self, finished: Finished) -> None:
        """Shown in the summary."""


class _JsonPrinter:
    """One event a line, as the wire has them: started, chunk, finished."""

    def __init__(self) -> None:
        self._announced = False

    def started(self, started: Started) -> None:
        if not self._announced:
            self._announced = True
            print_json({"event": "started"} | asdict(started))

    def chunk(self, text: str, document: dict[str, Any]) -> None:
        print_json({"event": "chunk"} | document)

    def end(self) -> None:
        """Every line is complete."""

    def finished(self, finished: Finished) -> None:
        print_json({"event": "finished"} | asdict(finished))


def _is_plain(character: str) -> bool:
    return character in "\n\t" or not (character < " " or "\x7f" <= character < "\xa0")


def timing_line(started: Started, finished: Finished, first_token: float | None, total: float) -> str:
    """Tokens and their pace as seen from here: tokens a second count from the first token on."""
    tokens = finished.usage.completion_tokens
    line = f"{tokens} tokens after a prompt of {started.prompt_tokens}, {finished.reason}"
    if first_token is None:
        return f"{line}; {total:.2f} s"
    decode = total - first_token
    pace = f"{(tokens - 1) / decode:.1f} tokens/s, " if tokens > 1 and decode > 0 else ""
    return f"{line}; {pace}first token after {first_token:.2f} s, {total:.2f} s in all"


def cache_line(started: Started, cache: CacheFacts) -> str:
    """What compression did, in slots: averages over layers, per KV head."""
    pages = f"{cache.peak_pages} of {started.reserved_pages} reserved pages"
    count = len(cache.layers) or 1
    kept, merged, dropped = (
        sum(getattr(layer, name) for layer in cache.layers) / count for name in ("kept", "merged", "dropped")
    )
    policy = f"{started.compression.policy or 'unknown policy'}{' by auto' if started.auto else ''}"
    budgets = [layer.budget for layer in cache.layers if layer.budget]
    if started.budget_per_layer == 0:
        return f"cache: {policy}, full, {kept:.0f} slots a layer; {pages}"
    if not budgets:
        return f"cache: {policy}, not needed below {started.budget_per_layer} slots a layer, {kept:.0f} used; {pages}"
    return (
        f"cache: {policy}, budget {started.budget_per_layer} slots a layer ({min(budgets)} to {max(budgets)}); "
        f"kept {kept:.0f}, merged {merged:.0f}, dropped {dropped:.0f}; ratio {cache.ratio_reached:.2f}; {pages}"
    )


def report_error(error: D2OError, arguments: argparse.Namespace) -> None:
    """The error and what to do about it; with --json also as a document on standard output."""
    if arguments.json:
        print_json(
            {
                "event": "error",
                "code": error.code.name,
                "message": str(error),
                "retry_after": error.retry_after,
                "attempts": error.attempts,
            }
        )
    print_note(f"d2o: error: {error}")
    hint = _hint(error, arguments)
    if hint:
        print_note(f"d2o: {hint}")


def _hint(error: D2OError, arguments: argparse.Namespace) -> str:
    match error:
        case UnavailableError() if any(sign in error.details.lower() for sign in _UNREACHABLE):
            return (
                f"cannot connect to {arguments.target}: is the server running? `make serve` starts one; --target or "
                "D2O_TARGET names another; --tls-ca is needed where it uses TLS"
            )
        case UnavailableError():
            return "the server went away or takes no requests now; try again in a moment, `d2o load` shows its state"
        case ResourceExhaustedError(retry_after=float(seconds)):
            return f"the server is busy; try again in {seconds:g} s, `d2o load` shows its state"
        case ResourceExhaustedError() if is_too_large(error):
            return "shorten the prompt, or ask for fewer tokens"
        case ResourceExhaustedError():
            return "the server is out of room for this request; try later, or with a shorter prompt or fewer tokens"
        case DeadlineExceededError():
            return f"nothing more came within {arguments.timeout:g} s; give more with --timeout"
        case UnauthenticatedError() | PermissionDeniedError():
            return "the API key is read from the environment variable D2O_API_KEY"
        case UnimplementedError():
            return f"the server at {arguments.target} is older than this client, or not a d2o-serve"
    return ""
