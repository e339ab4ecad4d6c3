"""Does any message break the server? Sends made and mutated protobuf messages to a live one.

Half of the messages are made by hypothesis, field by field, with values in and out of bounds; half are messages of that
kind whose bytes were then damaged. A share of the calls carries no key or a wrong one, ends early by its deadline, or
is cancelled. All are sent ``--rounds`` times: what a message leaves behind would show after every round alike, what
fills up once would not. Writes ``fuzz.json``: statuses by count, memory of the server's processes after each round,
pages, requests and restarts at the end. Exits with status 1 where a call ended in a status that a caller cannot be at
fault for, a process died, anything is still held, or memory grew in the last round.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from benchmarks import _cli
from benchmarks._memory import MEBIBYTE, SECONDS_TO_TIDY_UP
from benchmarks._server import RunningServer, server_process
from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_server.rpc.api_keys import new_key

SERVICE = "/d2o_inference.v1.InferenceService/"
# What a message, a key or a busy server may be answered with; everything else is a defect.
FINE = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
_MESSAGES = {
    "GenerateText": pb.GenerateTextRequest,
    "StreamGenerateText": pb.StreamGenerateTextRequest,
    "Tokenize": pb.TokenizeRequest,
    "GetLoad": pb.GetLoadRequest,
    "GetModelInfo": pb.GetModelInfoRequest,
}
_STREAMED = frozenset({"StreamGenerateText"})
_CONCURRENT = 16
# A message that leaves a hundred bytes behind is two of them in 20,000.
_FLAT_MEBIBYTES = 2.0
_SECONDS_TO_IDLE = 10.0
_FLAGS = ("--device", "cpu", "--check-integrity", "--num-pages", "400", "--max-model-len", "512")
_LIMITS = ("--max-new-tokens", "8", "--max-waiting", "8")

floats = st.one_of(st.floats(width=32), st.floats(0, 2, width=32))
whole = st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))
few = st.integers(0, 24)
text = st.text(max_size=60)
ids = st.lists(st.one_of(st.integers(0, 511), st.integers(0, 2**32 - 1)), max_size=40)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields, in any combination."""
    return st.fixed_dictionaries({}, optional=fields)


prompts = st.one_of(
    text.map(lambda given: {"text": given}),
    st.lists(st.integers(0, 511), min_size=1, max_size=40).map(lambda given: {"tokens": {"ids": given}}),
    ids.map(lambda given: {"tokens": {"ids": given}}),
    st.lists(optional(role=st.one_of(st.sampled_from(["user", "system"]), text), content=text), max_size=5).map(
        lambda given: {"chat": {"messages": given}}
    ),
    st.just({}),
)
sampling = optional(
    temperature=floats,
    top_k=whole,
    top_p=floats,
    min_p=floats,
    repetition_penalty=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    logit_bias=st.dictionaries(whole, floats, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
stopping = optional(
    max_new_tokens=st.one_of(few, whole),
    min_new_tokens=few,
    stop_strings=st.lists(text, max_size=18),
    stop_token_ids=ids,
    ignore_end_of_text=st.booleans(),
)
compression = optional(
    policy=st.integers(-1, 7),
    ratio=floats,
    min_budget=whole,
    budget_tokens=whole,
    recent_share=floats,
    window_quota=floats,
    merge=st.integers(-1, 6),
    layer_budgets=st.integers(-1, 5),
)
generations = optional(
    prompt=prompts, sampling=sampling, stopping=stopping, compression=compression, logprobs=few, priority=few
)
# Mostly good ones too, or no message would come as far as the model.
answerable = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=60).map(lambda given: {"text": given})},
    optional={
        "sampling": optional(temperature=st.floats(0, 2, width=32), top_k=few, seed=st.integers(0, 2**64 - 1)),
        "stopping": optional(max_new_tokens=st.integers(1, 24), ignore_end_of_text=st.booleans()),
        "compression": optional(policy=st.integers(1, 5), budget_tokens=st.integers(8, 64)),
        "logprobs": st.integers(0, 20),
    },
)
requests = st.one_of(
    st.tuples(st.sampled_from(["GenerateText", "StreamGenerateText"]), st.one_of(generations, answerable)),
    st.tuples(st.just("Tokenize"), optional(prompt=prompts, with_text=st.booleans())),
    st.tuples(st.just("GetLoad"), optional(max_streams=whole, with_layers=st.booleans())),
    st.tuples(st.just("GetModelInfo"), st.just({})),
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: raw bytes to a method, the key it carries, and how it ends early, if it does."""

    method: str
    payload: bytes
    key: str | None
    timeout: float
    cancelled_after: float | None


def made(count: int, number: int) -> list[tuple[str, bytes]]:
    """As many methods and messages, the same ones for the same number."""
    found: list[tuple[str, bytes]] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(requests)
    def collect(request: tuple[str, dict[str, Any]]) -> None:
        method, fields = request
        found.append((method, _MESSAGES[method](**fields).SerializeToString()))

    collect()
    # Hypothesis stops where it has no more that differ.
    return [found[index % len(found)] for index in range(count)]


def mutated(payload: bytes, chance: random.Random) -> bytes:
    """The bytes, damaged at one to four places."""
    data = bytearray(payload)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
            case 2:
                del data[at : at + chance.randint(1, 8)]
            case 3:
                data[at:at] = data[: chance.randint(0, 64)]
            case 4:
                # A length or a number of ten bytes, which says more than there is.
                data[at:at] = b"\xff" * 9 + b"\x01"
            case _:
                data = data[:at]
    return bytes(data)


def calls_of(messages: Sequence[tuple[str, bytes]], key: str, chance: random.Random) -> list[Call]:
    """Every message as it was made, and once more with its bytes damaged, in a random order."""
    calls = []
    for method, payload in messages:
        for sent in (payload, mutated(payload, chance)):
            kind = chance.random()
            calls.append(
                Call(
                    method,
                    sent,
                    key=None if kind < 0.02 else mutated(key.encode(), chance).hex() if kind < 0.04 else key,
                    timeout=chance.uniform(0, 0.05) if kind > 0.96 else 60.0,
                    cancelled_after=chance.uniform(0, 0.05) if 0.92 < kind < 0.96 else None,
                )
            )
    chance.shuffle(calls)
    return calls


async def send(channel: grpc.aio.Channel, call: Call) -> grpc.StatusCode:
    """The status of one call; its answer is read to the end and thrown away."""
    metadata = () if call.key is None else (("authorization", f"Bearer {call.key}"),)
    make: Any = channel.unary_stream if call.method in _STREAMED else channel.unary_unary
    running: Any = make(SERVICE + call.method)(call.payload, timeout=call.timeout, metadata=metadata)
    if call.cancelled_after is not None:
        asyncio.get_running_loop().call_later(call.cancelled_after, running.cancel)
    try:
        if call.method in _STREAMED:
            async for _ in running:
                pass
        else:
            await running
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.OK


async def send_all(target: str, calls: Sequence[Call]) -> Counter[grpc.StatusCode]:
    """Sends the calls, several at once, and counts how they ended."""
    statuses: Counter[grpc.StatusCode] = Counter()
    left = iter(calls)

    async def sender(channel: grpc.aio.Channel) -> None:
        for call in left:
            statuses[await send(channel, call)] += 1

    async with grpc.aio.insecure_channel(target) as channel:
        await asyncio.gather(*(sender(channel) for _ in range(_CONCURRENT)))
    return statuses


async def load_when_idle(target: str, key: str) -> pb.GetLoadResponse:
    """The server's load once nothing is held any more, or when it should long have been so."""
    give_up = time.monotonic() + _SECONDS_TO_IDLE
    metadata = (("authorization", f"Bearer {key}"),)
    async with grpc.aio.insecure_channel(target) as channel:
        ask: Any = channel.unary_unary(SERVICE + "GetLoad", response_deserializer=pb.GetLoadResponse.FromString)
        while True:
            load: pb.GetLoadResponse = await ask(b"", metadata=metadata, timeout=10)
            held = load.pages_used or load.pages_reserved or load.running or load.waiting
            if not held or time.monotonic() > give_up:
                return load
            await asyncio.sleep(0.05)


def memory(server: RunningServer) -> dict[str, float]:
    """MiB that the front and its workers have in memory."""
    front = psutil.Process(server.pid)
    workers = front.children(recursive=True)
    return {
        "front": front.memory_info().rss / MEBIBYTE,
        "workers": sum(worker.memory_info().rss for worker in workers) / MEBIBYTE,
    }


def fuzz(server: RunningServer, calls: Sequence[Call], key: str, rounds: int) -> dict[str, Any]:
    """Sends all calls so often and says what became of them and of the server."""
    statuses: Counter[grpc.StatusCode] = Counter()
    began, used = time.monotonic(), []
    for _ in range(rounds):
        statuses += asyncio.run(send_all(server.target, calls))
        load = asyncio.run(load_when_idle(server.target, key))
        time.sleep(SECONDS_TO_TIDY_UP)
        used.append(memory(server))
    return {
        "messages": len(calls) * rounds,
        "seconds": time.monotonic() - began,
        "statuses": {code.name: count for code, count in statuses.most_common()},
        "memory_mib": used,
        "at_the_end": {
            name: getattr(load, name)
            for name in ("pages_total", "pages_free", "pages_used", "pages_reserved", "running", "waiting")
        },
        "worker_restarts": sum(worker.restarts for worker in load.workers),
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What must not be, in words; none where all is well."""
    found = [f"{count} calls ended {name}" for name, count in result["statuses"].items()]
    found = [text for text in found if text.rpartition(" ")[2] not in {code.name for code in FINE}]
    held = {name: count for name, count in result["at_the_end"].items() if name not in ("pages_total", "pages_free")}
    found += [f"{name}: {count} at the end" for name, count in held.items() if count]
    if result["worker_restarts"]:
        found.append(f"workers died {result['worker_restarts']} times")
    if sum(result["statuses"].values()) != result["messages"]:
        found.append("a call has no status")
    if len(used := result["memory_mib"]) > 2:
        growth = {name: used[-1][name] - used[-2][name] for name in used[-1]}
        found += [f"{name}: {mib:.1f} MiB more" for name, mib in growth.items() if mib > _FLAT_MEBIBYTES]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the fuzz; returns 1 where it found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000, help="different ones, half of them damaged")
    parser.add_argument("--rounds", type=int, default=5, help="in which all of them are sent")
    parser.add_argument("--model", default="random:tiny-llama", help="as d2o-serve takes it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--seed", type=int, default=1, help="of the messages and of what is done to them")
    parser.add_argument("--out", type=Path, default=_cli.RESULTS, help="folder of the results")
    parsed = parser.parse_args(arguments)
    key, stored = new_key("fuzz", streams=_CONCURRENT, pages=300)
    calls = calls_of(made(parsed.messages // 2, parsed.seed), key, random.Random(parsed.seed))
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(stored.line() + "\n")
        model = ("--model", parsed.model, "--dtype", "float32", "--threads", str(parsed.threads))
        with server_process(*model, *_FLAGS, *_LIMITS, "--api-keys", str(keys)) as server:
            result = fuzz(server, calls, key, parsed.rounds)
    found = faults(result)
    result |= {"seed": parsed.seed, "model": parsed.model, "faults": found}
    path = _cli.write_json(parsed.out, "fuzz", result)
    _cli.print_table(("status", "calls"), list(result["statuses"].items()))
    rounds = result["memory_mib"]
    _cli.print_table(
        ("memory, MiB", *(f"round {number}" for number in range(1, 1 + len(rounds)))),
        [(name, *(each[name] for each in rounds)) for name in rounds[0]],
    )
    print(f"{result['messages']} messages in {result['seconds']:.0f} s; at the end {result['at_the_end']}; {path}")
    print("\n".join(["faults:", *found]) if found else "no faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
