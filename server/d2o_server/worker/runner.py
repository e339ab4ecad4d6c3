"""Runs the steps that the scheduler plans: what all runners share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from d2o.attention import ScoreTarget
from d2o_server.engine.scheduler import StepPlan
from d2o_server.engine.sequence import Sequence
from d2o_server.engine.types import CacheFacts
from d2o_server.errors import OutOfDeviceMemory, ServerError
from d2o_server.worker.cache_state import SequenceCache
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.out_of_memory import is_out_of_memory
from d2o_server.worker.sampler import RowLogprobs, SampledBatch, Sampler, SamplingState


@dataclass(slots=True)
class Running:
    """What the runner keeps of a sequence between steps."""

    cache: SequenceCache
    sampling: SamplingState


@dataclass(frozen=True, slots=True)
class Sampled:
    """A new token of a sequence; ``logprobs`` where they were asked for."""

    sequence: Sequence
    token: int
    logprobs: RowLogprobs | None


@dataclass(slots=True)
class Scored:
    """What attempts of a step that ran out of memory had added to decoding sequences' scores by then.

    ``layers`` added theirs and must not add them again; ``own`` has, for each of them, what the step's own tokens
    [decoding sequences, kv_heads] received, whose slots are taken anew by the next attempt.
    """

    layers: set[int] = field(default_factory=set)
    own: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class StepOutcome:
    """What a step did: new tokens, pages that finished prompts still need, and sequences that failed alone."""

    sampled: list[Sampled] = field(default_factory=list)
    settled: list[tuple[Sequence, int]] = field(default_factory=list)
    failed: list[tuple[Sequence, ServerError]] = field(default_factory=list)


class Launched(Protocol):
    """A step on its way."""

    def wait(self) -> StepOutcome:
        """What the step did, once it has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Ended:
    """A step that had ended when it was launched: on a CPU."""

    outcome: StepOutcome

    def wait(self) -> StepOutcome:
        return self.outcome


class Runner(ABC):
    """The model, its caches and its sampler. Knows nothing of queues or clients."""

    def __init__(self, caches: CacheManager, vocabulary_size: int) -> None:
        self.caches = caches
        self.vocabulary_size = vocabulary_size
        self.sampler = Sampler(vocabulary_size)
        self.running: dict[str, Running] = {}
        # Sees the logits [rows, vocabulary] that tokens of these sequences are about to be chosen from (measurements).
        self.watch: Callable[[Tensor, list[Sequence]], None] | None = None

    @property
    def depth(self) -> int:
        """How many steps may be under way while the next is planned and launched."""
        return 0

    def open(self, sequence: Sequence) -> None:
        """Gives an admitted sequence a row of the pool."""
        cache = self.caches.open(sequence.reservation, sequence.reading, sequence.total_tokens)
        sampling = SamplingState(
            sequence.sampling,
            seed=sequence.seed,
            prompt_ids=sequence.prompt,
            end_ids=sequence.end_ids,
            output_ids=sequence.known,
        )
        self.running[sequence.id] = Running(cache, sampling)

    def close(self, sequence: Sequence) -> CacheFacts:
        """Frees all that the sequence holds; returns what became of its tokens."""
        facts = self.caches.facts(self.running[sequence.id].cache)
        self.discard(sequence)
        return facts

    def discard(self, sequence: Sequence) -> None:
        """Frees all that the sequence holds."""
        self.caches.close(self.running.pop(sequence.id).cache)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, scored: Scored) -> Launched:
        """Launches one step; prompts whose last chunk runs are sampled like decoding sequences.

        :meth:`compress` must follow before the next.

        Args:
            plan: the step.
            scored: what attempts that ran out of memory have added; filled here.

        Raises:
            OutOfDeviceMemory: nothing was sampled or compressed. Prompts are as before their first chunk, decoding
                sequences as before the step but for what is ``scored``: run it again with them, or the first of them.
        """
        rows = self._rows(plan.decode)
        before = self.caches.lengths(rows)
        try:
            launched = self._run(plan, scored.layers)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            for layer, own in scored.own.items():
                self.caches.set_newest_scores(layer, rows, own[: rows.numel()])
            return launched
        # Only out here does nothing refer to the failed step's tensors any more.
        self._tidy_memory()
        for layer in scored.layers - scored.own.keys():
            scored.own[layer] = self.caches.newest_scores(layer, rows)
        self.caches.take_back(before)
        for part in plan.prefill:
            self.caches.restart_prompt(self.running[part.sequence.id].cache)
        raise OutOfDeviceMemory("the device ran out of memory in a step in which this request was the newest")

    @abstractmethod
    def _run(self, plan: StepPlan, scored: set[int]) -> Launched:
        """Takes slots for the step's tokens, runs the model and samples.

        Where memory runs out, what is sampled from and what the next step reads is as before.
        """

    def _tidy_memory(self) -> None:
        """Gives back what nothing refers to any more, in whatever pieces it is."""
        torch.cuda.empty_cache()

    def compression_waits(self) -> bool:
        """Whether :meth:`compress` will wait for the step to end."""
        return self.caches.must_wait()

    @torch.inference_mode()
    def compress(self, plan: StepPlan) -> tuple[list[Sequence], StepOutcome]:
        """Evicts what is due after a step that was launched.

        Returns those whose prompts the step reads to their end and which :meth:`compress_prompts` must follow for,
        before they decode: it waits for the step, and another may be launched first. And what is settled of the others.
        """
        outcome = StepOutcome()
        read = [part.sequence for part in plan.prefill if part.last]
        try:
            self.caches.hear_prompts([self.running[sequence.id].cache for sequence in read])
        except Exception as error:
            # Then each is tried by itself.
            if not self.caches.survives(error):
                raise
        compressed = [sequence for sequence in read if self.caches.compresses(self.running[sequence.id].cache)]
        self._finish_prompts([sequence for sequence in read if sequence not in compressed], outcome)
        lost = self.caches.evict_due()
        for sequence in plan.sequences:
            if self.running[sequence.id].cache.row in lost:
                fault = OutOfDeviceMemory("the device ran out of memory compressing the request's cache")
                outcome.failed.append((sequence, fault))
        return compressed, outcome

    @torch.inference_mode()
    def compress_prompts(self, sequences: list[Sequence]) -> StepOutcome:
        """Compresses prompts that were read; returns what that settles or fails."""
        outcome = StepOutcome()
        self._finish_prompts(sequences, outcome)
        return outcome

    def _finish_prompts(self, sequences: list[Sequence], into: StepOutcome) -> None:
        for sequence in sequences:
            try:
                into.settled.append((sequence, self.caches.finish_prompt(self.running[sequence.id].cache)))
            except Exception as error:
                if not self.caches.survives(error):
                    raise
                fault = OutOfDeviceMemory("the device ran out of memory compressing the prompt")
                into.failed.append((sequence, fault))

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> SampledBatch:
        """A token for each row of ``logits``: the known one where the sequence is replayed, otherwise a sampled one."""
        if self.watch is not None:
            self.watch(logits, sequences)
        states = [self.running[sequence.id].sampling for sequence in sequences]
        free = [row for row, sequence in enumerate(sequences) if sequence.forced is None]
        if len(free) == len(sequences):
            return self.sampler.sample(logits, states)
        batch = SampledBatch([sequence.forced or 0 for sequence in sequences], [None] * len(sequences))
        if free:
            part = self.sampler.sample(logits[free], [states[row] for row in free])
            for place, row in enumerate(free):
                batch.token_ids[row], batch.logprobs[row] = part.token_ids[place], part.logprobs[place]
            batch.failures = {free[place]: failure for place, failure in part.failures.items()}
        return batch

    def _rows(self, sequences: tuple[Sequence, ...]) -> Tensor:
        return torch.tensor([self.running[s.id].cache.row for s in sequences], dtype=torch.int64)

    def _targets(self, sequence: Sequence) -> tuple[ScoreTarget | None, ...]:
        return self.caches.targets(self.running[sequence.id].cache)
