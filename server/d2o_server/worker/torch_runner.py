"""Steps in plain torch on a CPU: each has ended when it is launched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2o.attention import DecodeSegments
from d2o_server.engine.scheduler import PrefillSlice, StepPlan
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.hf_attention import PrefillChunk, StepContext
from d2o_server.worker.runner import Ended, Runner, Sampled, StepOutcome

_NO_WINDOW = 1 << 40


class TorchRunner(Runner):
    """Assembles the flattened batch, runs it over pages with torch's own operators, and samples."""

    def __init__(self, model: nn.Module, caches: CacheManager, vocabulary_size: int) -> None:
        super().__init__(caches, vocabulary_size)
        self.model = model
        windows = caches.shape.windows
        self._windows = None
        if any(window is not None for window in windows):
            self._windows = torch.tensor([_NO_WINDOW if window is None else window for window in windows])

    def _run(self, plan: StepPlan, scored: set[int]) -> Ended:
        return Ended(self._sampled(plan, self._forward(plan, self._context(plan, scored))))

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
            row = self.running[part.sequence.id].cache.row
            held = -(-(part.start + part.count) // pool.page_size)
            pages = pool.block_table[:, row, :held]
            tokens = slice(first, first + part.count)
            chunks.append(PrefillChunk(tokens, part.start, pages, self._targets(part.sequence)))
            first += part.count
        return tuple(chunks)

    def _forward(self, plan: StepPlan, context: StepContext) -> Tensor:
        """Logits [sampled rows, vocabulary] of decode tokens and of the last token of every finished prompt."""
        tokens = [s.next_token for s in plan.decode]
        positions = [s.next_position for s in plan.decode]
        sampled = list(range(len(tokens)))
        for part in plan.prefill:
            tokens.extend(part.sequence.reading[part.start : part.start + part.count])
            positions.extend(range(part.start, part.start + part.count))
            if part.last:
                sampled.append(len(tokens) - 1)
        out = self.model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=torch.tensor(sampled or [0]),
            step=context,
        )
        logits: Tensor = out.logits[0]
        return logits if sampled else logits[:0]

    def _sampled(self, plan: StepPlan, logits: Tensor) -> StepOutcome:
        sequences = plan.sampled
        outcome = StepOutcome()
        if not sequences:
            return outcome
        batch = self._choose(logits, sequences)
        for row, sequence in enumerate(sequences):
            if row in batch.failures:
                outcome.failed.append((sequence, batch.failures[row]))
            else:
                outcome.sampled.append(Sampled(sequence, batch.token_ids[row], batch.logprobs[row]))
        return outcome
