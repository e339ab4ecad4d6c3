"""API keys as salted hashes in a file: how a line reads, how a key is checked, how the file is followed.

A line a key, ``#`` begins a comment::

    NAME sha256$SALT$HASH [rate=N] [streams=N] [pages=N] [priority=N]

A key is ``NAME.SECRET`` with a secret of 256 random bits, which nobody can try out however fast the hash is: a slow one
(scrypt) guards guessable passwords, and here would only let strangers spend the server's time. A name may have several
lines, so that an old and a new key are good at once while they are exchanged.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from d2o_server.engine.types import MAX_PRIORITY
from d2o_server.errors import SettingsError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256\$([0-9a-f]{32})\$([0-9a-f]{64})")
_LIMIT = re.compile(r"(rate|streams|pages|priority)=([0-9]{1,9})")
_FORM = "NAME sha256$SALT$HASH [rate=N] [streams=N] [pages=N] [priority=N]"
_SECRET_BYTES = 32
_SALT_BYTES = 16
_LONGEST_KEY = 256
_MOST_BYTES = 2**20
_SECONDS_BETWEEN_LOOKS = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One line. Limits that are None are the server's; 0 is any number, but for ``priority``, the highest allowed."""

    name: str
    salt: bytes
    digest: bytes
    rate: int | None = None
    streams: int | None = None
    pages: int | None = None
    priority: int | None = None

    def line(self) -> str:
        """The line that stands for it."""
        limits = {name: getattr(self, name) for name in ("rate", "streams", "pages", "priority")}
        words = [self.name, f"sha256${self.salt.hex()}${self.digest.hex()}"]
        return " ".join(words + [f"{name}={limit}" for name, limit in limits.items() if limit is not None])

    def matches(self, presented: bytes) -> bool:
        """Whether ``presented`` is this key, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(_digest(self.salt, presented), self.digest)


# Stands in for a name that is not there, so that it takes as long to be refused as a wrong secret.
_NOBODY = (ApiKey(name="", salt=bytes(_SALT_BYTES), digest=bytes(32)),)


def new_key(name: str, **limits: int | None) -> tuple[str, ApiKey]:
    """A fresh key and what is stored of it: the key itself is nowhere else.

    Raises:
        SettingsError: the name or a limit cannot stand in a file of keys.
    """
    _check_name(name)
    _check_priority(limits.get("priority"))
    key, salt = f"{name}.{secrets.token_urlsafe(_SECRET_BYTES)}", secrets.token_bytes(_SALT_BYTES)
    return key, ApiKey(name=name, salt=salt, digest=_digest(salt, key.encode()), **limits)


class ApiKeys:
    """The keys of one reading of a file."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys: dict[str, tuple[ApiKey, ...]] = {}
        for key in keys:
            self._keys[key.name] = (*self._keys.get(key.name, ()), key)
        self.count = len(keys)

    @classmethod
    def parse(cls, text: str) -> ApiKeys:
        """The keys of a file's text.

        Raises:
            SettingsError: a line is malformed, or there is none; says which, and never what it held.
        """
        keys = []
        for number, line in enumerate(text.splitlines(), start=1):
            if words := line.partition("#")[0].split():
                keys.append(_parsed(number, words))
        if not keys:
            raise SettingsError(f"api_keys: got no keys, allowed is at least one line {_FORM}")
        return cls(tuple(keys))

    def find(self, presented: str) -> ApiKey | None:
        """The key that ``presented`` is; None where it is none of them."""
        given = presented[:_LONGEST_KEY].encode(errors="replace")
        candidates = self._keys.get(presented.rpartition(".")[0], _NOBODY)
        # All of them, whichever matches: the time says nothing.
        right = [key for key in candidates if key.matches(given)]
        return right[0] if right and len(presented) <= _LONGEST_KEY else None


class KeyFile:
    """The keys of a file that is read again once it has changed, at most once a second, when a call asks.

    A file that has become unreadable or malformed leaves the keys as they were, and the log says why.

    Raises:
        SettingsError: it cannot be used at the start.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._seen = _signature(path)
        self._keys = _read(path)
        self._looked = clock()

    def find(self, presented: str) -> ApiKey | None:
        """The key that ``presented`` is, by the file as it stands."""
        now = self._clock()
        if now - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._follow()
        return self._keys.find(presented)

    def _follow(self) -> None:
        seen = _signature(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = _read(self._path)
        except SettingsError as error:
            _log.error("the API keys stay as they were: %s", error)
        else:
            _log.info("read %d API keys anew", self._keys.count)


def _signature(path: Path) -> tuple[int, int, int] | None:
    """What changes with the file; a Secret's file is a link that is put elsewhere."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> ApiKeys:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"api_keys: got {path}, allowed is a readable file of keys ({error.strerror})") from error
    if len(content) > _MOST_BYTES:
        raise SettingsError(f"api_keys: got {path} of more than {_MOST_BYTES} bytes, allowed is at most that")
    try:
        return ApiKeys.parse(content.decode())
    except UnicodeDecodeError:
        raise SettingsError(f"api_keys: got {path}, allowed is a text file in UTF-8") from None


def _parsed(number: int, words: list[str]) -> ApiKey:
    name, given, *rest = words if len(words) > 1 else (*words, "")
    hashed, limits = _HASH.fullmatch(given), [_LIMIT.fullmatch(word) for word in rest]
    if not _NAME.fullmatch(name) or hashed is None or not all(limits):
        # Not what it holds: somebody may have put the key itself there.
        raise SettingsError(f"api_keys: got line {number} that is no key, allowed is {_FORM}")
    values = {match[1]: int(match[2]) for match in limits if match is not None}
    if len(values) < len(limits):
        raise SettingsError(f"api_keys: got a limit twice in line {number}, allowed is each once")
    _check_priority(values.get("priority"))
    return ApiKey(name=name, salt=bytes.fromhex(hashed[1]), digest=bytes.fromhex(hashed[2]), **values)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        allowed = "1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit"
        raise SettingsError(f"name: got {name!r}, allowed is {allowed}")


def _check_priority(priority: int | None) -> None:
    if priority is not None and not 0 <= priority <= MAX_PRIORITY:
        raise SettingsError(f"api_keys: got priority {priority}, allowed is [0, {MAX_PRIORITY}]")


def _digest(salt: bytes, presented: bytes) -> bytes:
    return hashlib.sha256(salt + presented).digest()
