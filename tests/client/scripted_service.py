"""A real gRPC server whose answers a test writes down beforehand."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_inference.v1 import inference_service_pb2_grpc as pb_grpc

PATIENCE = 10.0


@dataclass(frozen=True)
class Abort:
    """Ends the call with an error."""

    code: grpc.StatusCode
    details: str = ""
    trailers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Wait:
    """Pauses the call, or ends it early when the client goes."""

    seconds: float = PATIENCE


Step = Any
HANG = Wait()
PAUSE = 15
LATER = Abort(grpc.StatusCode.UNAVAILABLE, "gone", (("grpc-retry-pushback-ms", str(PAUSE * 1000)),))


@dataclass
class Recorded:
    """One call as the server saw it."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    time_remaining: float | None
    answered: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)


STARTED = pb.StreamGenerateTextResponse(
    started=pb.GenerationStarted(
        generation_id="g-1",
        prompt_tokens=100,
        reserved_pages=8,
        compression=pb.Compression(policy=pb.COMPRESSION_POLICY_D2O, ratio=0.4, merge=pb.MERGE_RULE_CONSERVE),
        budget_per_layer=40,
        seed=7,
    )
)
FINISHED = pb.StreamGenerateTextResponse(
    finished=pb.GenerationFinished(
        finish_reason=pb.FINISH_REASON_STOP,
        stop_string="END",
        usage=pb.Usage(
            prompt_tokens=100, completion_tokens=2, queue_seconds=0.1, first_token_seconds=0.2, total_seconds=0.5
        ),
        cache=pb.CacheFacts(
            layers=[
                pb.LayerCacheFacts(budget=50, kept=50, merged=30, dropped=22),
                pb.LayerCacheFacts(budget=30, kept=30, merged=10, dropped=62),
            ],
            ratio_reached=0.4,
            peak_pages=6,
            compression_seconds=0.01,
        ),
    )
)


def chunk(text: str, *token_ids: int) -> pb.StreamGenerateTextResponse:
    """A message with a piece of the answer."""
    return pb.StreamGenerateTextResponse(chunk=pb.GenerationChunk(text=text, token_ids=token_ids))


HELLO = (STARTED, chunk("Hello", 1), chunk(" world", 2), FINISHED)
DEFAULT_STEPS: dict[str, tuple[Step, ...]] = {
    "GenerateText": (
        pb.GenerateTextResponse(
            text="Hello world", token_ids=[1, 2], started=STARTED.started, finished=FINISHED.finished
        ),
    ),
    "StreamGenerateText": HELLO,
    "Tokenize": (pb.TokenizeResponse(token_ids=[5, 6], tokens=["a", "b"]),),
    "GetModelInfo": (
        pb.GetModelInfoResponse(
            model="tiny",
            layers=2,
            compressible_layers=2,
            max_model_len=512,
            page_size=32,
            total_pages=100,
            page_bytes=2**20,
            has_chat_template=True,
            default_compression=pb.Compression(
                policy=pb.COMPRESSION_POLICY_D2O, ratio=0.4, min_budget=1024, budget_tokens=0
            ),
            default_sampling=pb.SamplingParameters(temperature=0.7, top_k=0),
            default_max_new_tokens=256,
            end_of_text_ids=[0, 2],
        ),
    ),
    "GetLoad": (
        pb.GetLoadResponse(
            pages_total=100,
            pages_free=60,
            pages_used=30,
            pages_reserved=10,
            running=3,
            waiting=1,
            workers=[pb.WorkerLoad(index=0, serving=True, pages_total=100, pages_free=60, running=3)],
        ),
    ),
}


class ScriptedService(pb_grpc.InferenceServiceServicer):
    """Answers each call of a method by its next script, or by the method's default; records every call."""

    def __init__(self) -> None:
        self.calls: list[Recorded] = []
        self._scripts: defaultdict[str, deque[tuple[Step, ...]]] = defaultdict(deque)
        self._lock = threading.Lock()

    def script(self, method: str, *steps: Step) -> None:
        """What the next unscripted call of ``method`` does: messages to send, ``Wait`` and ``Abort``."""
        self._scripts[method].append(steps)

    def GenerateText(self, request: Any, context: Any) -> Any:
        return self._unary("GenerateText", request, context)

    def Tokenize(self, request: Any, context: Any) -> Any:
        return self._unary("Tokenize", request, context)

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        return self._unary("GetModelInfo", request, context)

    def GetLoad(self, request: Any, context: Any) -> Any:
        return self._unary("GetLoad", request, context)

    def StreamGenerateText(self, request: Any, context: Any) -> Iterator[Any]:
        yield from self._play("StreamGenerateText", request, context)

    def _unary(self, method: str, request: Any, context: Any) -> Any:
        return next(self._play(method, request, context), pb.GenerateTextResponse())

    def _play(self, method: str, request: Any, context: Any) -> Iterator[Any]:
        call = Recorded(method, request, dict(context.invocation_metadata()), context.time_remaining())
        with self._lock:
            self.calls.append(call)
            steps = self._scripts[method].popleft() if self._scripts[method] else DEFAULT_STEPS[method]
        context.add_callback(lambda: self._note_end(call))
        for step in steps:
            if isinstance(step, Abort):
                call.answered = True
                context.set_trailing_metadata(step.trailers)
                context.abort(step.code, step.details)
            elif isinstance(step, Wait):
                if call.ended.wait(step.seconds):
                    return
            else:
                yield step
        call.answered = True

    @staticmethod
    def _note_end(call: Recorded) -> None:
        if not call.answered:
            call.cancelled.set()
        call.ended.set()


class ScriptedServer:
    """The service and grpc.health.v1 on a free port of the loopback interface."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.service = ScriptedService()
        self.health = HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16))
        pb_grpc.add_InferenceServiceServicer_to_server(self.service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def calls(self) -> list[Recorded]:
        return self.service.calls

    def script(self, method: str, *steps: Step) -> None:
        self.service.script(method, *steps)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.stop(grace=None).wait(PATIENCE)
