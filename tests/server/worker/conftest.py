"""A worker driven in process: messages in, steps until it is idle, everything it said collected."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from d2o.config import D2OConfig, Policy
from d2o.pages import PagePool
from d2o_server.engine.memory import CacheShape
from d2o_server.engine.messages import Failed, StepReport, Submit
from d2o_server.engine.scheduler import Scheduler
from d2o_server.engine.types import CacheFacts, SamplingParams
from d2o_server.models.describe import describe
from d2o_server.models.presets import Preset
from d2o_server.models.source import ModelSource, resolve
from d2o_server.worker import hf_attention
from d2o_server.worker.cache_ops import TorchCacheOps
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.core import WorkerCore
from d2o_server.worker.loader import load_model
from d2o_server.worker.sampler import SampledBatch, Sampler, SamplingState
from d2o_server.worker.torch_runner import TorchRunner

NONE = D2OConfig(policy=Policy.NONE)
VOCABULARY = 512
PAGE = 16

_GEMMA2 = Preset(
    "gemma2",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "sliding_window": 64,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    sharp=True,
)


def load(name: str, attention: str) -> PreTrainedModel:
    """A tiny random model in float32; the same weights every time."""
    hf_attention.register()
    source = ModelSource(name, preset=_GEMMA2) if name == "tiny-gemma2" else resolve(f"random:{name}")
    return load_model(source, dtype=torch.float32, device="cpu", attn_implementation=attention)


@functools.cache
def served_model(name: str) -> PreTrainedModel:
    """The model as the worker runs it; shared, so leave it as it is."""
    return load(name, hf_attention.ATTENTION_NAME)


@functools.cache
def eager_model(name: str) -> PreTrainedModel:
    """The same weights with transformers' own attention."""
    return load(name, "eager")


def random_prompts(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


@dataclass
class Answer:
    """All that came back for one request. ``logits`` has one row a token."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    reason: str | None = None
    stop_token_id: int | None = None
    facts: CacheFacts | None = None
    failure: Failed | None = None
    cancelled: bool = False
    reserved: int = 0
    config: D2OConfig | None = None

    @property
    def over(self) -> bool:
        return self.reason is not None or self.failure is not None or self.cancelled


class _Recorder(Sampler):
    """Samples as ever and keeps the logits that it was given."""

    def __init__(self, harness: Harness) -> None:
        super().__init__(VOCABULARY)
        self._harness = harness

    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> SampledBatch:
        owners = {running.sampling: name for name, running in self._harness.core.runner.running.items()}
        batch = super().sample(logits, states)
        for row, state in enumerate(states):
            self._harness.answers[owners[state]].logits.append(logits[row].clone())
        return batch


class Harness:
    """A worker core over a tiny model, its integrity checked after every step."""

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        *,
        pages: int = 4000,
        chunk: int = 64,
        page_size: int = PAGE,
        sequences: int = 64,
    ) -> None:
        self.model = model or served_model("tiny-llama")
        shape = describe(self.model.config)
        cache_shape = CacheShape(windows=shape.windows, page_size=page_size)
        pool = PagePool(
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            page_size=page_size,
            num_pages=pages,
            rows=sequences,
            max_slots=2048,
            dtype=torch.float32,
        )
        runner = TorchRunner(self.model, CacheManager(TorchCacheOps(pool), cache_shape, shape.query_heads), VOCABULARY)
        runner.sampler = _Recorder(self)
        scheduler = Scheduler(pages=pages, max_sequences=sequences, prefill_tokens=chunk)
        self.core = WorkerCore(runner, scheduler, cache_shape, check_integrity=True)
        self.pool = pool
        self.answers: dict[str, Answer] = {}

    def submit(
        self,
        prompt: Sequence[int],
        config: D2OConfig = NONE,
        *,
        name: str | None = None,
        new: int = 20,
        seed: int = 7,
        end_ids: tuple[int, ...] = (),
        sampling: SamplingParams | None = None,
        output: Sequence[int] | None = None,
    ) -> str:
        """Submits a request; ``output`` are tokens of a worker that had it before, None where none had."""
        name = name or str(len(self.answers))
        self.answers[name] = Answer()
        self.core.handle(
            Submit(
                id=name,
                prompt=tuple(prompt),
                sampling=sampling or SamplingParams(),
                seed=seed,
                config=config,
                end_ids=end_ids,
                max_new_tokens=new,
                output=tuple(output or ()),
                resumed=output is not None,
            )
        )
        return name

    def step(self) -> StepReport:
        report = self.core.step(self.take)
        self.take(report)
        return report

    def take(self, report: StepReport) -> None:
        """Notes what a report says."""
        for admitted in report.admitted:
            self.answers[admitted.id].reserved = admitted.reserved_pages
            self.answers[admitted.id].config = admitted.config
        for token in report.tokens:
            assert not self.answers[token.id].over
            self.answers[token.id].tokens.append(token.token)
        for ended in report.ended:
            answer = self.answers[ended.id]
            answer.reason, answer.facts, answer.stop_token_id = ended.reason, ended.facts, ended.stop_token_id
        for failed in report.failed:
            self.answers[failed.id].failure = failed
        for name in report.cancelled:
            self.answers[name].cancelled = True

    def run(self) -> dict[str, Answer]:
        """Steps until idle; everything is given back by then."""
        while self.core:
            self.step()
        assert all(answer.over for answer in self.answers.values())
        assert self.holds_nothing()
        return self.answers

    def holds_nothing(self) -> bool:
        state = self.core.pool_state()
        caches = self.core.runner.caches
        return (
            (state.used, state.reserved, state.running, state.waiting) == (0, 0, 0, 0)
            and not caches.by_row
            and self.pool.free_rows == self.pool.used.shape[1]
            and not self.core.runner.running
        )


def generate(
    prompts: Sequence[Sequence[int]],
    config: D2OConfig = NONE,
    *,
    model: PreTrainedModel | None = None,
    chunk: int = 64,
    new: int = 20,
    sampling: Mapping[int, SamplingParams] | None = None,
) -> list[Answer]:
    """Answers to prompts that run together, none of which may fail."""
    harness = Harness(model, chunk=chunk)
    for index, prompt in enumerate(prompts):
        harness.submit(prompt, config, new=new, seed=index, sampling=(sampling or {}).get(index))
    answers = list(harness.run().values())
    assert not any(answer.failure for answer in answers)
    return answers


@pytest.fixture
def harness() -> Harness:
    return Harness()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are fastest, and the same everywhere, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
