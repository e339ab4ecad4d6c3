"""Keys as hashes in a file: what a line says, who is let in, how long it takes, what happens when the file changes."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2o_server import keys as command
from d2o_server.errors import SettingsError
from d2o_server.rpc.api_keys import ApiKeys, KeyFile, new_key

HASH = f"sha256${'0' * 32}${'1' * 64}"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, *lines: str) -> None:
    """Replaces a file as an editor or a Secret does, and at a later time whatever the file system's clock says."""
    new = path.with_suffix(".new")
    new.write_text("\n".join(lines))
    later = (path.stat().st_mtime if path.exists() else time.time()) + 5
    os.utime(new, (later, later))
    new.replace(path)


def test_a_new_key_is_found_by_its_line_and_by_nothing_else() -> None:
    key, stored = new_key("team-a", streams=4, priority=3)
    assert key.startswith("team-a.")
    assert len(key.removeprefix("team-a.")) == 43
    keys = ApiKeys.parse(f"# ours\n\n{stored.line()}  # since May\n")
    found = keys.find(key)
    assert found is not None
    assert (found.name, found.rate, found.streams, found.pages, found.priority) == ("team-a", None, 4, None, 3)
    for wrong in (
        "",
        "team-a",
        "team-a.",
        key[:-1],
        key + "x",
        key.swapcase(),
        "team-b." + key[7:],
        key[7:],
        " " + key,
    ):
        assert keys.find(wrong) is None
    assert key[7:] not in stored.line()


def test_two_keys_of_one_name_are_good_at_once() -> None:
    (old, first), (new, second) = new_key("a"), new_key("a", rate=2)
    keys = ApiKeys.parse(f"{first.line()}\n{second.line()}")
    assert [found and found.rate for found in (keys.find(old), keys.find(new))] == [None, 2]
    assert keys.find(old) is not None


def test_the_same_key_has_another_hash_each_time() -> None:
    assert len({new_key("a")[1].line() for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "api_keys: got no keys, allowed is at least one line NAME sha256$SALT$HASH"),
        ("# nobody\n\n", "api_keys: got no keys"),
        (f"a {HASH}\nsecret", "api_keys: got line 2 that is no key, allowed is NAME sha256$SALT$HASH [rate=N]"),
        (f"a {HASH[:-1]}", "api_keys: got line 1 that is no key"),
        (f"a {HASH} speed=3", "api_keys: got line 1 that is no key"),
        (f"a {HASH} rate=-3", "api_keys: got line 1 that is no key"),
        (f"a {HASH} rate=1 rate=2", "api_keys: got a limit twice in line 1, allowed is each once"),
        (f"a {HASH} priority=10", "api_keys: got priority 10, allowed is [0, 9]"),
        (f"ä {HASH}", "api_keys: got line 1 that is no key"),
    ],
)
def test_a_malformed_file_is_refused_by_line_and_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        ApiKeys.parse(text)
    assert str(refused.value).startswith(message)
    assert "secret" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^api_keys: got .*/none, allowed is a readable file of keys \(No such"):
        KeyFile(tmp_path / "none")
    with pytest.raises(SettingsError, match=r"^api_keys: got .*, allowed is a readable file of keys \(Is a directory"):
        KeyFile(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"^api_keys: got .*/binary, allowed is a text file in UTF-8$"):
        KeyFile(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SettingsError, match="more than 1048576 bytes"):
        KeyFile(tmp_path / "large")


def test_a_file_is_read_again_once_it_has_changed(tmp_path: Path) -> None:
    (old, first), (new, second), clock, path = new_key("a"), new_key("b"), Clock(), tmp_path / "keys"
    write(path, first.line())
    keys = KeyFile(path, clock)
    write(path, second.line())
    clock.now += 0.5
    assert keys.find(old) is not None
    clock.now += 0.6
    assert keys.find(old) is None
    assert keys.find(new) is not None


def test_a_file_that_breaks_leaves_the_keys_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (key, stored), (new, other), clock, path = new_key("a"), new_key("b"), Clock(), tmp_path / "keys"
    write(path, stored.line())
    keys = KeyFile(path, clock)
    for lines in (("half a li",), ()):
        write(path, *lines)
        for _ in range(3):
            clock.now += 2
            assert keys.find(key) is not None
    path.unlink()
    clock.now += 2
    assert keys.find(key) is not None
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    # Once for each change, and not once for each call.
    assert [bool(re.match("the API keys stay as they were: api_keys: got ", error)) for error in errors] == [True] * 3
    assert "half" not in caplog.text
    write(path, other.line())
    clock.now += 2
    assert (keys.find(key), keys.find(new) is not None) == (None, True)


def test_how_long_a_refusal_takes_says_nothing_of_the_key() -> None:
    """Medians of interleaved lookups, so that what else the machine does falls on all alike."""
    key, stored = new_key("team-a")
    keys = ApiKeys.parse("\n".join([stored.line(), *(new_key(f"other-{index}")[1].line() for index in range(200))]))
    guesses = {
        "right": key,
        "first character wrong": f"team-a.{'A' if key[7] != 'A' else 'B'}{key[8:]}",
        "last character wrong": key[:-1] + ("A" if key[-1] != "A" else "B"),
        "unknown name": "team-b" + key[6:],
    }
    times: dict[str, list[int]] = {name: [] for name in guesses}
    for _ in range(3000):
        for name, guess in guesses.items():
            began = time.perf_counter_ns()
            keys.find(guess)
            times[name].append(time.perf_counter_ns() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    assert max(medians.values()) < 1.25 * min(medians.values()), medians
    wrong = [value for name, value in medians.items() if "character" in name]
    assert max(wrong) < 1.1 * min(wrong), medians


def test_the_command_shows_a_key_once_and_prints_the_line_to_store() -> None:
    run = [sys.executable, "-m", "d2o_server.keys", "new", "team-a", "--streams", "4", "--pages", "200"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    key = next(word for word in done.stderr.split() if word.startswith("team-a."))
    found = ApiKeys.parse(done.stdout).find(key)
    assert found is not None
    assert (found.name, found.streams, found.pages) == ("team-a", 4, 200)
    assert key not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "two words"], "keys: name: got 'two words', allowed is 1 to 64 letters"),
        (["new", "a", "--priority", "10"], "keys: api_keys: got priority 10, allowed is [0, 9]"),
    ],
)
def test_the_command_refuses_what_no_file_could_hold(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)
