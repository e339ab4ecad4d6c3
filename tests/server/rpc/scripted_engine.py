"""An engine that plays a script: for edges of the RPC layer that a real engine reaches rarely or only by chance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from d2o.config import D2OConfig, Policy
from d2o_server.engine.types import (
    CacheFacts,
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    LayerCache,
    LayerLoad,
    Load,
    ModelInfo,
    Prompt,
    SamplingParams,
    Started,
    StreamLoad,
    TokenLogprob,
    Tokens,
    TopLogprob,
    Usage,
    WorkerLoad,
)

STARTED = Started(
    generation_id="gen-7",
    prompt_tokens=5,
    reserved_pages=12,
    compression=D2OConfig(),
    budget_per_layer=1024,
    seed=9,
    auto=True,
)
CHUNKS = (
    Chunk("Par", (11,), (TokenLogprob(11, "Par", -0.25, (TopLogprob(11, "Par", -0.25), TopLogprob(12, "Lon", -2.5))),)),
    Chunk("", (13,), (TokenLogprob(13, "\N{REPLACEMENT CHARACTER}", -0.5),)),
    Chunk("is \N{SNOWMAN}", (14, 15)),
)
FINISHED = Finished(
    reason=FinishReason.STOP,
    stop_string="\n",
    usage=Usage(
        prompt_tokens=5, completion_tokens=4, queue_seconds=0.25, first_token_seconds=0.5, total_seconds=1.5, resumed=1
    ),
    cache=CacheFacts(
        layers=(
            LayerCache(budget=6, kept=6, merged=1.5, dropped=1.5),
            LayerCache(budget=0, kept=9, merged=0, dropped=0),
        ),
        ratio_reached=0.75,
        peak_pages=10,
        compression_seconds=0.125,
    ),
)
MODEL = ModelInfo(
    model="scripted",
    architecture="ScriptedForCausalLM",
    dtype="float32",
    layers=2,
    compressible_layers=1,
    query_heads=8,
    kv_heads=4,
    head_dim=64,
    vocabulary_size=1000,
    max_model_len=2048,
    page_size=32,
    total_pages=640,
    page_bytes=2**33,
    has_chat_template=True,
    default_compression=D2OConfig(),
    auto_full_tokens=2048,
    default_sampling=SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=256),
    max_logprobs=20,
    server_version="0.0.0",
    end_of_text_ids=(0, 2),
)
LOAD = Load(
    pages_total=640,
    pages_free=500,
    pages_used=100,
    pages_reserved=40,
    running=3,
    waiting=2,
    waiting_prompt_tokens=4000,
    draining=True,
    workers=(WorkerLoad(index=1, serving=True, pages_total=640, pages_free=500, running=3, restarts=2),),
    logical_tokens=900,
    physical_tokens=412.5,
    read_tokens=10_000,
    generated_tokens=2**33,
    layers=(LayerLoad(budget=256.5, slots=800), LayerLoad(budget=0.0, slots=25)),
)

STREAMS = tuple(
    StreamLoad(
        generation_id=f"gen-{number}",
        worker=1,
        state=state,
        prompt_tokens=300,
        completion_tokens=20,
        max_new_tokens=64,
        reserved_pages=9,
        policy=Policy.H2O,
        budget_per_layer=60,
        seconds=2.5,
    )
    for number, state in enumerate(("decode", "prefill", "waiting"))
)

Step = Event | BaseException | float


class ScriptedEngine:
    """Plays ``script`` for every request: yields events, raises errors and sleeps for floats (seconds).

    ``requests`` are the requests it saw; ``ended`` counts generations that are over, however they ended.
    """

    def __init__(self, script: Sequence[Step] = (STARTED, *CHUNKS, FINISHED), info: ModelInfo = MODEL) -> None:
        self.script = script
        self.info = info
        self.requests: list[GenerationRequest] = []
        self.ended = 0

    def model_info(self) -> ModelInfo:
        return self.info

    def load(self) -> Load:
        return LOAD

    def streams(self, most: int) -> tuple[StreamLoad, ...]:
        return STREAMS[:most]

    async def tokenize(self, prompt: Prompt, with_text: bool = False) -> Tokens:
        ids = tuple(range(len(prompt)))
        return Tokens(ids, tuple(str(number) for number in ids) if with_text else ())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.ended += 1

    async def drain(self, grace: float) -> None:
        async with asyncio.timeout(grace):
            while self.ended < len(self.requests):
                await asyncio.sleep(0.005)
