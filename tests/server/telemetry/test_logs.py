"""How a line of log looks."""

from __future__ import annotations

import json
import logging
import sys

from d2o_server.telemetry.logs import FIELDS, JsonFormatter, TextFormatter, pairs

IDS = {"generation": "gen-1", "request": 'forged" status=OK\nmethod=x'}


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("d2o_server.test", logging.WARNING, __file__, 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_text_ends_with_the_ids_of_the_call() -> None:
    line = TextFormatter(lambda: {"generation": "gen-1"}).format(record("it failed"))
    assert line.endswith(" WARNING it failed [generation=gen-1]")


def test_text_outside_of_a_call_and_a_line_of_fields_are_left_as_they_are() -> None:
    assert TextFormatter(dict).format(record("ready")).endswith(" WARNING ready")
    fields = {"method": "GetLoad"}
    line = TextFormatter(lambda: IDS).format(record(pairs(fields), **{FIELDS: fields}))
    assert line.endswith(" WARNING method=GetLoad")


def test_a_traceback_follows_the_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = TextFormatter(lambda: {"generation": "g"}).format(record("it failed", exc_info=sys.exc_info()))
    assert line.splitlines()[0].endswith("it failed [generation=g]")
    assert line.endswith("ValueError: broken")


def test_json_is_one_document_a_line_whatever_is_in_it() -> None:
    line = JsonFormatter(lambda: IDS).format(record('two\nlines, "quoted" \N{SNOWMAN}'))
    assert "\n" not in line
    document = json.loads(line)
    assert document["message"] == 'two\nlines, "quoted" \N{SNOWMAN}'
    assert (document["level"], document["logger"], document["request"]) == (
        "WARNING",
        "d2o_server.test",
        IDS["request"],
    )
    assert document["time"].endswith("+00:00")


def test_json_takes_fields_instead_of_the_message() -> None:
    fields = {"method": "GetLoad", "seconds": 0.25}
    document = json.loads(JsonFormatter(dict).format(record(pairs(fields), **{FIELDS: fields})))
    assert (document["method"], document["seconds"], "message" in document) == ("GetLoad", 0.25, False)


def test_pairs_cannot_be_forged() -> None:
    assert pairs(IDS) == 'generation=gen-1 request="forged\\" status=OK\\nmethod=x"'
