"""Locust users that stream from a server over gRPC, well and badly behaved, in a closed or an open loop.

Run it from the repository's root. Events, in milliseconds: TTFT (to the first token), ITL (between messages with
tokens), QUEUE (waiting for pages, as the server counts it) and E2E (to the end; its size is the stream's output
tokens) of streams that are read as they come; E2E alone of slow readers; REFUSED by status; CANCELLED by us.
:func:`tests.load.workload.verdict` says what counts as a failure.

grpcio blocks in C, where gevent cannot switch. Its own gevent mode, which must be on before the first channel is made,
hands completions to greenlets instead: hundreds of streams then run in this one process, and Locust's timers with them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import gevent
import grpc
from gevent.pool import Group
from grpc.experimental import gevent as grpc_gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import MasterRunner
from locust.stats import CSV_STATS_INTERVAL_SEC

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.load.workload import PUSHBACK, Burst, Lengths, Manner, Manners, positive, share, verdict

grpc_gevent.init_gevent()

_CONNECT_SECONDS = 10
# A slow reader has little room: what it does not read stays with the server.
_LITTLE_ROOM = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 * 1024))
_LONGEST_PROMPT = 1_000_000


def _add_arguments(parser: LocustArgumentParser) -> None:
    """Each of these can also be set in the environment: ``--output-tokens`` by ``D2O_LOAD_OUTPUT_TOKENS``."""

    def add(flag: str, **settings: Any) -> None:
        variable = "D2O_LOAD_" + flag.removeprefix("--").upper().replace("-", "_")
        parser.add_argument(flag, env_var=variable, **settings)

    add("--target", default="127.0.0.1:50051", help="host:port of the server, without TLS")
    add("--api-key", default="", is_secret=True, help="sent as a bearer token with every call")
    add("--mode", default="closed", choices=("closed", "open"), help="a user waits for its answer; or for the clock")
    add("--rate", type=positive, default=10.0, help="open: requests a second, of all users together")
    add("--arrivals", default="even", choices=("even", "poisson"), help="open: how they are spaced")
    add("--burst", type=Burst.parse, default=None, help="open: SIZE/SECONDS, so many more at once, every so often")
    add("--prompt-tokens", type=Lengths.parse, default=Lengths.parse("16-64"), help=Lengths.FORMS)
    add("--output-tokens", type=Lengths.parse, default=Lengths.parse("16-64"), help="the same")
    add("--cancel-share", type=share, default=0.0, help="of the requests: cancelled midway")
    add("--slow-share", type=share, default=0.0, help="read with a pause of --slow-pause after each message")
    add("--too-long-share", type=share, default=0.0, help="with a prompt that is longer than the model's context")
    add("--slow-pause", type=positive, default=0.2, help="seconds")
    add("--deadline", type=positive, default=None, help="seconds that a call may take; without it any")
    add("--seed", type=int, default=0, help="of prompts, lengths and manners")


class _Load:
    """What all users share: the channels, and what to ask for."""

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self.options, self.environment = options, environment
        self.random = random.Random(options.seed)
        self.sources = count()
        self.users = options.num_users or 1
        self.metadata = [("authorization", f"Bearer {options.api_key}")] if options.api_key else []
        try:
            self.manners = Manners(
                cancel=options.cancel_share, slow=options.slow_share, too_long=options.too_long_share
            )
        except ValueError as error:
            raise SystemExit(str(error)) from None
        if options.burst and options.mode == "closed":
            raise SystemExit("--burst: got one in --mode closed, allowed is --mode open")
        self.stub = InferenceServiceStub(grpc.insecure_channel(options.target))
        self.slow_stub = InferenceServiceStub(grpc.insecure_channel(options.target, options=_LITTLE_ROOM))
        self._learn_model()

    def _learn_model(self) -> None:
        """Asks for the model's bounds.

        Raises:
            SystemExit: the server cannot be reached, or the lengths do not fit its context.
        """
        options = self.options
        request = pb.GetModelInfoRequest()
        try:
            info = self.stub.GetModelInfo(
                request, timeout=_CONNECT_SECONDS, wait_for_ready=True, metadata=self.metadata
            )
        except grpc.RpcError as error:
            raise SystemExit(f"--target: got {options.target}, which says {error.code().name}") from None
        together = options.prompt_tokens.most + options.output_tokens.most
        if together > info.max_model_len:
            raise SystemExit(
                f"--prompt-tokens, --output-tokens: got up to {together} tokens together, allowed are "
                f"{info.max_model_len}"
            )
        self.max_model_len = info.max_model_len
        self.vocabulary = sorted(set(range(info.vocabulary_size)).difference(info.end_of_text_ids))

    def request(self, manner: Manner) -> pb.StreamGenerateTextRequest:
        """A request whose answer has exactly ``stopping.max_new_tokens`` tokens."""
        tokens = self.options.prompt_tokens.draw(self.random)
        if manner is Manner.ASKS_TOO_MUCH:
            tokens = min(self.max_model_len + 1, _LONGEST_PROMPT)
        prompt = pb.TokenIds(ids=self.random.choices(self.vocabulary, k=tokens))
        output = self.options.output_tokens.draw(self.random)
        stopping = pb.StoppingParameters(max_new_tokens=output, ignore_end_of_text=True)
        return pb.StreamGenerateTextRequest(prompt=pb.Prompt(tokens=prompt), stopping=stopping)

    def fire(self, kind: str, name: str, seconds: float, *, size: int = 0, failure: str | None = None) -> None:
        """One event of Locust's."""
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=1000 * seconds,
            response_length=size,
            exception=None if failure is None else RuntimeError(failure),
            context={},
        )

    def send(self) -> float:
        """One request to its end; seconds after which the server wants to see its client again."""
        manner = self.manners.draw(self.random)
        stub = self.slow_stub if manner is Manner.READS_SLOWLY else self.stub
        request = self.request(manner)
        began = time.perf_counter()
        call = stub.StreamGenerateText(request, timeout=self.options.deadline, metadata=self.metadata)
        with _cancelled_at_the_end(call):
            try:
                _Reader(self, manner, request, began).read(call)
            except grpc.RpcError as error:
                return self._ended_by(error, manner, time.perf_counter() - began)
        return 0.0

    def _ended_by(self, error: Any, manner: Manner, seconds: float) -> float:
        pushback = dict(error.trailing_metadata() or ()).get(PUSHBACK)
        found = verdict(error.code(), error.details() or "", pushback, manner)
        name = error.code().name if found.kind == "REFUSED" else manner
        self.fire(found.kind, name, seconds, failure=found.failure)
        return int(pushback) / 1000 if pushback and found.failure is None else 0.0


@contextmanager
def _cancelled_at_the_end(call: grpc.Call) -> Iterator[None]:
    """A user that is stopped takes its stream with it."""
    try:
        yield
    finally:
        call.cancel()


class _Reader:
    """Reads one stream in the manner of its client."""

    def __init__(self, load: _Load, manner: Manner, request: pb.StreamGenerateTextRequest, began: float) -> None:
        self._load, self._manner, self._began = load, manner, began
        self._expected = request.stopping.max_new_tokens
        # A cancellation comes after the first token at the earliest.
        cancels = manner is Manner.CANCELS
        self._cancel_at = load.random.randint(1, self._expected) if cancels else self._expected + 1
        self._tokens = 0
        self._last: float | None = None

    def read(self, call: Iterator[pb.StreamGenerateTextResponse]) -> None:
        """To the end, or until its client has had enough.

        Raises:
            grpc.RpcError: the call ended with an error.
        """
        finished: pb.GenerationFinished | None = None
        for message in call:
            event = message.WhichOneof("event")
            if event == "chunk" and message.chunk.token_ids:
                self._took(len(message.chunk.token_ids))
                if self._tokens >= self._cancel_at:
                    return self._load.fire("CANCELLED", self._manner, time.perf_counter() - self._began)
            elif event == "finished":
                finished = message.finished
            if self._manner is Manner.READS_SLOWLY:
                gevent.sleep(self._load.options.slow_pause)
        return self._complete(finished)

    def _took(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._manner is Manner.READS:
            first = self._last is None
            self._load.fire("TTFT" if first else "ITL", self._manner, now - (self._last or self._began), size=tokens)
        self._last = now
        self._tokens += tokens

    def _complete(self, finished: pb.GenerationFinished | None) -> None:
        failure = None
        if self._manner is Manner.ASKS_TOO_MUCH:
            failure = "was answered, expected is INVALID_ARGUMENT"
        elif finished is None or self._tokens != self._expected:
            end = "no" if finished is None else "a"
            failure = f"{self._tokens} tokens and {end} finished event, expected are {self._expected} and one"
        elif self._manner is Manner.READS:
            self._load.fire("QUEUE", self._manner, finished.usage.queue_seconds)
        self._load.fire("E2E", self._manner, time.perf_counter() - self._began, size=self._tokens, failure=failure)


class _StreamUser(User):
    abstract = True
    load: _Load


class ClosedUser(_StreamUser):
    """Sends its next request when it has its answer or, where it was refused, when the server asks for it."""

    @task
    def stream(self) -> None:
        """One request."""
        gevent.sleep(self.load.send())


class OpenUser(_StreamUser):
    """A source: its share of the arrivals comes by the clock, whatever became of those before."""

    def on_start(self) -> None:
        """Where its arrivals lie between those of the other sources."""
        load = self.load
        index, users = next(load.sources) % load.users, load.users
        self._group, self._gap = Group(), users / load.options.rate
        self._next = time.perf_counter() + self._gap * index / users
        if burst := load.options.burst:
            self._burst = burst.size * (index + 1) // users - burst.size * index // users
            self._next_burst = time.perf_counter() + burst.seconds

    @task
    def arrive(self) -> None:
        """The next request, and a burst where it is time for one."""
        options = self.load.options
        if options.burst and self._next_burst <= self._next:
            gevent.sleep(max(0.0, self._next_burst - time.perf_counter()))
            self._next_burst += options.burst.seconds
            for _ in range(self._burst):
                self._group.spawn(self.load.send)
            return
        gevent.sleep(max(0.0, self._next - time.perf_counter()))
        self._group.spawn(self.load.send)
        poisson = options.arrivals == "poisson"
        self._next += self.load.random.expovariate(1 / self._gap) if poisson else self._gap

    def on_stop(self) -> None:
        """Waits for what is under way, as long as Locust's --stop-timeout allows."""
        self._group.join(timeout=self.environment.stop_timeout or 0)
        self._group.kill()


def _prepare(environment: Environment, **_: Any) -> None:
    """Chooses the users of the mode and makes what they share."""
    options: Any = environment.parsed_options
    environment.user_classes = [ClosedUser if options.mode == "closed" else OpenUser]
    if not isinstance(environment.runner, MasterRunner):
        _StreamUser.load = _Load(environment)


def _let_the_csvs_catch_up(**_: Any) -> None:
    """Locust writes them once a second, and not at its end."""
    gevent.sleep(CSV_STATS_INTERVAL_SEC + 0.5)


events.init_command_line_parser.add_listener(_add_arguments)
events.init.add_listener(_prepare)
events.quitting.add_listener(_let_the_csvs_catch_up)
