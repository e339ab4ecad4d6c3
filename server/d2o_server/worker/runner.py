"""Runs one step of the model: assembles the flattened batch, runs it over pages, compresses, samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from d2o.attention import DecodeSegments, ScoreTarget
from d2o_server.engine.scheduler import PrefillSlice, StepPlan
from d2o_server.engine.sequence import Sequence
from d2o_server.engine.types import CacheFacts
from d2o_server.errors import OutOfDeviceMemory, ServerError
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

    def fail(self, sequence: Sequence, error: ServerError) -> None:
        """Fails a sequence, whose new token is void."""
        self.sampled = [sampled for sampled in self.sampled if sampled.sequence is not sequence]
        self.failed.append((sequence, error))


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

    def close(self, sequence: Sequence) -> CacheFacts:
        """Frees all that the sequence holds; returns what became of its tokens."""
        cache = self.running.pop(sequence.id).cache
        facts = self.caches.facts(cache)
        self.caches.close(cache)
        return facts

    @torch.inference_mode()
    def step(self, plan: StepPlan, scored: set[int]) -> StepOutcome:
        """Runs one step; prompts whose last chunk ran are sampled like decoding sequences and compressed.

        Args:
            plan: the step.
            scored: layers that added this step's decode scores in an attempt that ran out of memory; filled here.

        Raises:
            OutOfDeviceMemory: nothing was sampled or compressed. Prompts are as before their first chunk, decoding
                sequences as before the step but for the layers in ``scored``: run it again with them, or fewer.
        """
        before = self.caches.lengths(torch.tensor([self.running[s.id].cache.row for s in plan.decode]).long())
        try:
            outcome = self._sampled(plan, self._forward(plan, self._context(plan, scored)))
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
        else:
            self._compress(plan, outcome)
            return outcome
        # Only out here does nothing refer to the failed step's tensors any more.
        self.caches.take_back(before)
        for part in plan.prefill:
            self.caches.restart_prompt(self.running[part.sequence.id].cache)
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory("the device ran out of memory in a step in which this request was the newest")

    def _compress(self, plan: StepPlan, outcome: StepOutcome) -> None:
        failed = {sequence.id for sequence, _ in outcome.failed}
        for sequence in [part.sequence for part in plan.prefill if part.last and part.sequence.id not in failed]:
            running = self.running[sequence.id]
            try:
                outcome.settled.append((sequence, self.caches.finish_prompt(running.cache)))
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
                outcome.fail(sequence, OutOfDeviceMemory("the device ran out of memory compressing the prompt"))
            running.targets = ()
        self.caches.evict_due()

    def _context(self, plan: StepPlan, scored: set[int]) -> StepContext:
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
            scored=scored,
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

    def _sampled(self, plan: StepPlan, logits: Tensor) -> StepOutcome:
        sequences = [*plan.decode, *(part.sequence for part in plan.prefill if part.last)]
        outcome = StepOutcome()
        if not sequences:
            return outcome
        batch = self.sampler.sample(logits, [self.running[s.id].sampling for s in sequences])
        for row, sequence in enumerate(sequences):
            if row in batch.failures:
                outcome.failed.append((sequence, batch.failures[row]))
            else:
                outcome.sampled.append(Sampled(sequence, batch.token_ids[row], batch.logprobs[row]))
        return outcome


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has a class of its own for a device's memory and none for the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
