"""Runs one step of the model: assembles the flattened batch, runs it over pages, compresses, samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from d2o.attention import DecodeSegments, ScoreTarget
from d2o_server.engine.scheduler import PrefillSlice, StepPlan
from d2o_server.engine.sequence import Sequence
from d2o_server.engine.types import CacheFacts
from d2o_server.errors import ServerError
from d2o_server.worker.caches import CacheManager, SequenceCache
from d2o_server.worker.hf_attention import PrefillChunk, StepContext
from d2o_server.worker.sampler import RowLogprobs, Sampler, SamplingState

_NO_WINDOW = 1 << 40


@dataclass(slots=True)
class Running:
    """What the runner keeps of a sequence between steps."""

    cache: SequenceCache
    sampling: SamplingState
    targets: tuple[ScoreTarget | None, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A new token of a sequence; ``logprobs`` where they were asked for."""

    sequence: Sequence
    token: int
    logprobs: RowLogprobs | None


@dataclass(slots=True)
class StepOutcome:
    """What a step did: new tokens, pages that finished prompts still need, and sequences that failed alone."""

    sampled: list[Sampled] = field(default_factory=list)
    settled: list[tuple[Sequence, int]] = field(default_factory=list)
    failed: list[tuple[Sequence, ServerError]] = field(default_factory=list)


class ModelRunner:
    """The model, its caches and its sampler. Knows nothing of queues or clients."""

    def __init__(self, model: nn.Module, caches: CacheManager, vocabulary_size: int) -> None:
        self.model, self.caches = model, caches
        self.sampler = Sampler(vocabulary_size)
        self.running: dict[str, Running] = {}
        windows = caches.shape.windows
        self._windows = None
        if any(window is not None for window in windows):
            self._windows = torch.tensor([_NO_WINDOW if window is None else window for window in windows])

    def open(self, sequence: Sequence) -> None:
        """Gives an admitted sequence a row of the pool."""
        cache = self.caches.open(sequence.reservation, len(sequence.prompt), sequence.total_tokens)
        sampling = SamplingState(
            sequence.sampling, seed=sequence.seed, prompt_ids=sequence.prompt, end_ids=sequence.end_ids
        )
        self.running[sequence.id] = Running(cache, sampling, self.caches.targets(cache))

    def close(self, sequence: Sequence, *, poisoned: bool = False) -> CacheFacts:
        """Frees all that the sequence holds; returns what became of its tokens."""
        cache = self.running.pop(sequence.id).cache
        facts = self.caches.facts(cache)
        self.caches.close(cache, poisoned=poisoned)
        return facts

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepOutcome:
        """Runs one step; prompts whose last chunk ran are compressed and sampled like decoding sequences."""
        context = self._context(plan)
        logits = self._forward(plan, context)
        outcome = StepOutcome()
        finished = [part.sequence for part in plan.prefill if part.last]
        for sequence in finished:
            running = self.running[sequence.id]
            outcome.settled.append((sequence, self.caches.finish_prompt(running.cache)))
            running.targets = ()
        self.caches.evict_due()
        self._sample(logits, [*plan.decode, *finished], outcome)
        return outcome

    def _context(self, plan: StepPlan) -> StepContext:
        """Takes slots for the step's tokens and plans their attention."""
        parts = [(self.running[s.id], 1) for s in plan.decode]
        parts += [(self.running[p.sequence.id], p.count) for p in plan.prefill]
        rows = torch.tensor([running.cache.row for running, _ in parts])
        slot_rows = self.caches.append(rows, torch.tensor([count for _, count in parts]))
        pool, decoding = self.caches.pool, len(plan.decode)
        configs = [running.cache.config for running, _ in parts[:decoding]]
        segments = None
        if decoding:
            current = self.caches.seen[rows[:decoding]] - 1
            segments = DecodeSegments.plan(pool, rows[:decoding], current, self._windows)
        return StepContext(
            pool=pool,
            slot_rows=slot_rows,
            decode_tokens=decoding,
            segments=segments,
            prefills=self._chunks(plan.prefill, decoding),
            bias=any(config.enabled for config in configs),
            score=any(config.enabled and config.evicts_in_decode for config in configs),
        )

    def _chunks(self, parts: tuple[PrefillSlice, ...], first: int) -> tuple[PrefillChunk, ...]:
        chunks = []
        pool = self.caches.pool
        for part in parts:
            running = self.running[part.sequence.id]
            held = -(-(part.start + part.count) // pool.page_size)
            pages = pool.block_table[:, running.cache.row, :held]
            chunks.append(PrefillChunk(slice(first, first + part.count), part.start, pages, running.targets))
            first += part.count
        return tuple(chunks)

    def _forward(self, plan: StepPlan, context: StepContext) -> Tensor:
        """Logits [sampled rows, vocabulary] of decode tokens and of the last token of every finished prompt."""
        tokens = [s.next_token for s in plan.decode]
        positions = [s.next_position for s in plan.decode]
        sampled = list(range(len(tokens)))
        for part in plan.prefill:
            tokens.extend(part.sequence.prompt[part.start : part.start + part.count])
            positions.extend(range(part.start, part.start + part.count))
            if part.last:
                sampled.append(len(tokens) - 1)
        device = self.caches.pool.device
        out = self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(sampled or [0], device=device),
            step=context,
        )
        logits: Tensor = out.logits[0]
        return logits if sampled else logits[:0]

    def _sample(self, logits: Tensor, sequences: list[Sequence], outcome: StepOutcome) -> None:
        if not sequences:
            return
        batch = self.sampler.sample(logits, [self.running[s.id].sampling for s in sequences])
        for row, sequence in enumerate(sequences):
            if row in batch.failures:
                outcome.failed.append((sequence, batch.failures[row]))
            else:
                outcome.sampled.append(Sampled(sequence, batch.token_ids[row], batch.logprobs[row]))
