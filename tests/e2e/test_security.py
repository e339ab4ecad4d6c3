"""A server with keys, certificates and ceilings, started as an operator starts it; and messages nobody would send."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from benchmarks import fuzz
from d2o_client import (
    NO_RETRY,
    TLS,
    AsyncClient,
    Client,
    HealthStatus,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from d2o_server.rpc.api_keys import new_key
from tests.e2e.conftest import Launch
from tests.e2e.processes import TINY, ServerProcess, spawn
from tests.e2e.test_endings import load_when

MEBIBYTE = 2**20
# Three layers' pages for 400 tokens of full cache, 39: one fits into the pool of 60, two do not.
MOST = {"max_new_tokens": 350, "ignore_end_of_text": True, "compression": "none"}
PAGES = 39


@dataclass(frozen=True)
class Guarded:
    """A server with three keys, and a pool for one large request."""

    server: ServerProcess
    keys: dict[str, str]

    def client(self, name: str) -> AsyncClient:
        return AsyncClient(self.server.target, retry=NO_RETRY, timeout=60, api_key=self.keys[name])


@pytest.fixture(scope="module")
def guarded(launch_for_module: Launch, tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    limits: dict[str, dict[str, int]] = {"plain": {}, "small": {"pages": PAGES + 6}, "low": {"priority": 2}}
    made = {name: new_key(name, **given) for name, given in limits.items()}
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("\n".join(stored.line() for _, stored in made.values()))
    flags = ("--num-pages", "60", "--prefill-tokens", "64", "--api-keys", str(path))
    return Guarded(launch_for_module(*TINY, *flags), {name: key for name, (key, _) in made.items()})


@pytest.fixture(autouse=True)
async def nothing_is_held(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """The rule of all tests here, asked with a key."""
    yield
    if "guarded" in request.fixturenames:
        async with request.getfixturevalue("guarded").client("plain") as client:
            await load_when(client, lambda load: not (load.pages_reserved or load.running or load.waiting))


@pytest.mark.parametrize("key", [None, "", "plain", "plain.wrong", "nobody.wrong"])
async def test_a_wrong_key_is_unauthenticated_and_health_needs_none(guarded: Guarded, key: str | None) -> None:
    async with AsyncClient(guarded.server.target, api_key=key) as client:
        for call in (client.generate("x"), client.stream("x").result(), client.tokenize("x"), client.load()):
            with pytest.raises(UnauthenticatedError, match=r"^a valid API key is required") as refused:
                await call
            assert refused.value.attempts == 1
        assert await client.health() is HealthStatus.SERVING


async def test_a_right_key_is_served(guarded: Guarded) -> None:
    async with guarded.client("plain") as client:
        assert (await client.generate("x", max_new_tokens=3, ignore_end_of_text=True)).usage.completion_tokens == 3
    assert 'caller="key:plain"' in guarded.server.log.read_text()
    for key in guarded.keys.values():
        assert key not in guarded.server.log.read_text()


def test_the_command_line_takes_the_key_from_its_environment(guarded: Guarded) -> None:
    run = [sys.executable, "-m", "d2o_client._cli", "load", "--json", "--target", guarded.server.target]
    done = subprocess.run(
        run, env=os.environ | {"D2O_API_KEY": guarded.keys["plain"]}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["pages_total"] == 60
    refused = subprocess.run(run, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "a valid API key is required" in refused.stderr


async def test_a_request_waits_for_pages_so_long_and_no_longer(launch_server: Launch) -> None:
    server = launch_server(*TINY, "--num-pages", "60", "--max-wait", "1")
    async with AsyncClient(server.target, retry=NO_RETRY, timeout=60) as client:
        running = client.stream("x", max_new_tokens=600, ignore_end_of_text=True, compression="none")
        await anext(running)
        # However quick the machine is, the pages do not come back meanwhile.
        os.kill(server.worker().pid, signal.SIGSTOP)
        try:
            with pytest.raises(ResourceExhaustedError, match=r"^waited 1 s for cache pages; try again in") as refused:
                await client.generate("y" * 50, **MOST)  # type: ignore[arg-type]
        finally:
            os.kill(server.worker().pid, signal.SIGCONT)
        assert 0.1 <= (refused.value.retry_after or 0) <= 30
        assert (await running.result()).usage.completion_tokens == 600


async def test_pages_of_one_key_have_a_ceiling(guarded: Guarded) -> None:
    async with guarded.client("small") as small, guarded.client("plain") as plain:
        with pytest.raises(InvalidArgumentError, match=r"allowed is requests of at most 45 pages for this caller"):
            await small.generate("x" * 50, max_new_tokens=500, ignore_end_of_text=True, compression="none")
        running = asyncio.ensure_future(small.generate("x" * 50, **MOST))  # type: ignore[arg-type]
        await load_when(plain, lambda load: load.running == 1)
        with pytest.raises(ResourceExhaustedError, match=r"^39 cache pages are reserved for this caller, 9 more would"):
            await small.generate("x" * 50, max_new_tokens=40, ignore_end_of_text=True, compression="none")
        await plain.generate("x" * 50, max_new_tokens=40, ignore_end_of_text=True, compression="none")
        assert (await running).usage.completion_tokens == 350


async def test_the_urgent_one_of_those_that_wait_goes_first(guarded: Guarded) -> None:
    order: list[str] = []

    async def ask(client: AsyncClient, name: str, priority: int | None) -> None:
        await client.generate(
            "x" * 50, max_new_tokens=150, ignore_end_of_text=True, compression="none", priority=priority
        )
        order.append(name)

    big = {"max_new_tokens": 500, "ignore_end_of_text": True, "compression": "none"}
    async with guarded.client("plain") as plain, guarded.client("low") as low:
        with pytest.raises(InvalidArgumentError, match=r"^priority: got 3, allowed is \[0, 2\] \(this caller's\)$"):
            await low.generate("x", priority=3)
        first = asyncio.ensure_future(plain.generate("x" * 100, **big))  # type: ignore[arg-type]
        await load_when(plain, lambda load: load.running == 1)
        calls = []
        # Each needs 21 pages of 60 and the last of them runs when the first has ended: two at once, by their turn.
        for number, (client, name, priority) in enumerate(
            ((low, "low", None), (plain, "usual", None), (plain, "urgent", 9), (plain, "lowest", 0)), start=1
        ):
            calls.append(asyncio.ensure_future(ask(client, name, priority)))
            await load_when(plain, lambda load, wanted=number: load.waiting == wanted)  # type: ignore[misc]
        await asyncio.gather(first, *calls)
    assert set(order[:2]) == {"urgent", "usual"}
    assert set(order[2:]) == {"low", "lowest"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--api-keys", "none"), "api_keys: got none, allowed is a readable file of keys"),
        (("--tls-certificate", "none", "--tls-key", "none"), "tls_key: got none, allowed is a readable PEM file"),
        (("--max-wait", "0"), "max_wait: got 0.0, allowed is a positive number of seconds"),
        (("--max-connections", "-1"), "max_connections: got -1, allowed is at least 0"),
    ],
)
def test_what_cannot_be_used_ends_the_start_before_a_model_is_loaded(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    log = tmp_path / "log"
    process = spawn((*TINY, "--port", "0", *flags), log)
    assert process.wait(60) == 1
    if process.stdout is not None:
        process.stdout.close()
    assert message in log.read_text()


def test_with_tls_neither_plain_text_nor_an_unknown_certificate_gets_in(launch_server: Launch, tmp_path: Path) -> None:
    authority, stranger = (trustme.CA(key_type=trustme.KeyType.ECDSA) for _ in range(2))
    issued = {
        "server": authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA),
        "good": authority.issue_cert("a@example.org", key_type=trustme.KeyType.ECDSA),
        "bad": stranger.issue_cert("a@example.org", key_type=trustme.KeyType.ECDSA),
    }
    for name, leaf in issued.items():
        leaf.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        leaf.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own = ("--tls-certificate", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server.key"))
    server = launch_server(*TINY, "--num-pages", "60", *own, "--tls-client-ca", str(tmp_path / "ca.pem"))

    def client(name: str | None) -> Client:
        certificate, key = (None if name is None else tmp_path / f"{name}.{kind}" for kind in ("pem", "key"))
        tls = TLS(ca=tmp_path / "ca.pem", certificate=certificate, key=key)
        return Client(server.target, tls=tls, retry=NO_RETRY, timeout=10)

    with client("good") as good:
        assert good.generate("x", max_new_tokens=2, ignore_end_of_text=True).usage.completion_tokens == 2
    assert 'caller="certificate:a@example.org"' in server.log.read_text()
    for wrong in (client("bad"), client(None), Client(server.target, retry=NO_RETRY, timeout=10)):
        with wrong, pytest.raises(UnavailableError):
            wrong.model_info()
    server.process.kill()
    server.process.wait()


def test_no_message_breaks_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of the messages of benchmarks/fuzz.py, twice."""
    size = ("--messages", "2000", "--rounds", "2", "--seed", "7")
    assert fuzz.main([*size, "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert sum(result["statuses"].values()) == 4000
    assert {"OK", "INVALID_ARGUMENT", "UNAUTHENTICATED"} <= set(result["statuses"])
    before, after = result["memory_mib"]
    assert all(after[name] < before[name] + 32 for name in before)
