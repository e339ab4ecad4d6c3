"""The command ``top``: load, pages, requests and layers of a running server, drawn again and again in place."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

from d2o_client._cli._arguments import MOST_STREAMS, connect
from d2o_client._cli._output import print_json
from d2o_client._errors import DeadlineExceededError, UnavailableError
from d2o_client._sync import Client
from d2o_client._types import LayerLoad, Load, ModelInfo, StreamLoad, StreamState

_OPEN_SCREEN, _CLOSE_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_WIDEST_BAR = 40
_STREAMS_WITHOUT_SCREEN = 20
_STREAM_HEAD = f"{'GENERATION':<17}{'STATE':<9}{'W':>2}{'PROMPT':>8}{'NEW':>7}{'MOST':>7}{'PAGES':>7}{'BUDGET':>8}"
_STREAM_HEAD += f"  {'POLICY':<10}{'AGE':>8}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of the server, and when it came."""

    load: Load
    at: float


def run_top(arguments: argparse.Namespace) -> int:
    """Shows frame after frame until Ctrl-C; one with --once. Where output is no terminal frames follow each other."""
    live = sys.stdout.isatty() and not arguments.once and not arguments.json
    with connect(arguments) as client:
        info = client.model_info()
        with _screen() if live else nullcontext():
            try:
                _watch(client, info, arguments, live=live)
            except KeyboardInterrupt:
                if arguments.once:
                    raise
    return 0


def _watch(client: Client, info: ModelInfo, arguments: argparse.Namespace, *, live: bool) -> None:
    before: Sample | None = None
    while True:
        columns, lines = shutil.get_terminal_size() if live else (shutil.get_terminal_size().columns, 0)
        wanted = arguments.streams
        if wanted is None:
            wanted = min(lines, MOST_STREAMS) if live else _STREAMS_WITHOUT_SCREEN
        try:
            now = Sample(client.load(max_streams=wanted, with_layers=True), time.monotonic())
        except (UnavailableError, DeadlineExceededError) as error:
            # A server that is being restarted comes back; whoever watches it wants to see that.
            if before is None or not live:
                raise
            _draw([f"{info.model} at {arguments.target}: {' '.join(str(error).split())}"], columns, lines)
        else:
            if arguments.json:
                print_json(asdict(now.load))
            elif live:
                _draw(frame(info, now, before, arguments.target, columns), columns, lines)
            else:
                print("\n".join(frame(info, now, before, arguments.target, columns)), flush=True)
                if not arguments.once:
                    print()
            before = now
        if arguments.once:
            return
        time.sleep(arguments.interval)


@contextmanager
def _screen() -> Iterator[None]:
    """The terminal's second screen, without a cursor; what was there before comes back."""
    sys.stdout.write(_OPEN_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(_CLOSE_SCREEN)
        sys.stdout.flush()


def _draw(rows: Sequence[str], columns: int, lines: int) -> None:
    # A row that fills the last column would lose its end to the clearing of the line.
    fitting = [row[: columns - 1] for row in rows[:lines]]
    sys.stdout.write(_HOME + "\n".join(row + _CLEAR_LINE for row in fitting) + _CLEAR_BELOW)
    sys.stdout.flush()


def frame(info: ModelInfo, now: Sample, before: Sample | None, target: str, columns: int) -> list[str]:
    """The lines of one frame; rates need the sample ``before``."""
    load = now.load
    rows = [
        f"{info.model} ({info.architecture}, {info.dtype}) at {target}, d2o-serve {info.server_version}",
        _state_row(load),
        "",
        *_page_rows(load, info, columns),
        f"tokens    {load.logical_tokens} of running requests in {load.physical_tokens:.0f} slots a layer"
        + (f" ({100 * load.physical_tokens / load.logical_tokens:.0f}%)" if load.logical_tokens else ""),
        _rate_row(now, before),
    ]
    if any(layer.slots for layer in load.layers):
        rows += ["", *_layer_rows(load.layers, columns)]
    if load.streams:
        rows += ["", _STREAM_HEAD, *map(_stream_row, load.streams)]
        more = load.running + load.waiting - len(load.streams)
        rows += [f"and {more} more"] if more > 0 else []
    return rows


def _state_row(load: Load) -> str:
    serving, restarts = sum(w.serving for w in load.workers), sum(w.restarts for w in load.workers)
    return (
        f"requests  {load.running} running, {load.waiting} waiting ({load.waiting_prompt_tokens} prompt tokens); "
        f"{serving} of {len(load.workers)} workers serving"
        + (f", {restarts} restarts" if restarts else "")
        + ("; draining" if load.draining else "")
    )


def _page_rows(load: Load, info: ModelInfo, columns: int) -> list[str]:
    width = max(10, min(_WIDEST_BAR, columns - 40))
    rows = [_page_row("pages", load.pages_total, load.pages_used, load.pages_reserved, width)]
    rows[0] += f" ({load.pages_total * info.page_bytes / 2**20:.0f} MiB)"
    if len(load.workers) > 1:
        for of in load.workers:
            row = _page_row(f"worker {of.index}", of.pages_total, of.pages_total - of.pages_free, 0, width)
            rows.append(f"{row}, {of.running} running" + ("" if of.serving else ", not serving"))
    return rows


def _page_row(name: str, total: int, used: int, reserved: int, width: int) -> str:
    full = round(width * used / (total or 1))
    promised = round(width * (used + reserved) / (total or 1)) - full
    bar = "#" * full + "+" * promised + "." * (width - full - promised)
    parts = f"{used} used + {reserved} reserved of {total}" if reserved else f"{used} of {total} used"
    return f"{name:<10}[{bar}] {parts}"


def _rate_row(now: Sample, before: Sample | None) -> str:
    totals = f"{now.load.generated_tokens} generated, {now.load.read_tokens} read since the start"
    if before is None or now.at <= before.at or now.load.generated_tokens < before.load.generated_tokens:
        return f"rate      {totals}"
    seconds = now.at - before.at
    new = (now.load.generated_tokens - before.load.generated_tokens) / seconds
    read = (now.load.read_tokens - before.load.read_tokens) / seconds
    return f"rate      {new:.1f} new tokens/s, {read:.1f} prompt tokens/s; {totals}"


def _layer_rows(layers: Sequence[LayerLoad], columns: int) -> list[str]:
    """Slots in use and mean budget by layer, several a row."""
    compressed = any(layer.budget for layer in layers)
    rows = ["LAYER: slots in use" + (" / mean budget of a compressed request" if compressed else "")]
    cells = [
        f"{index:>3}: {layer.slots}{f' / {layer.budget:.0f}' if compressed else ''}"
        for index, layer in enumerate(layers)
    ]
    width = max(map(len, cells)) + 2
    count = max(1, columns // width)
    lines = (cells[first : first + count] for first in range(0, len(cells), count))
    return [*rows, *("".join(f"{cell:<{width}}" for cell in line).rstrip() for line in lines)]


def _stream_row(stream: StreamLoad) -> str:
    budget = "-" if stream.state is StreamState.WAITING else str(stream.budget_per_layer or "full")
    return (
        f"{stream.generation_id:<17}{stream.state:<9}{stream.worker:>2}{stream.prompt_tokens:>8}"
        f"{stream.completion_tokens:>7}{stream.max_new_tokens:>7}{stream.reserved_pages:>7}{budget:>8}"
        f"  {stream.policy or 'unknown':<10}{stream.seconds:>7.1f}s"
    )
