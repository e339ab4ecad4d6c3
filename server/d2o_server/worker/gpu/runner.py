"""Steps on a GPU: launched without waiting, so that the next is prepared while one runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.kernels.decode import DecodeGrid, plan_decode
from d2o.ragged import ragged_indices
from d2o_server.engine.scheduler import PrefillSlice, StepPlan
from d2o_server.engine.sequence import Sequence
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.gpu.batch_sizes import BatchSize, largest
from d2o_server.worker.gpu.body_graphs import BodyGraphs
from d2o_server.worker.gpu.cache_ops import KernelCacheOps
from d2o_server.worker.gpu.decode_graphs import DecodeGraphs, workspace_for
from d2o_server.worker.gpu.device import Download, hold_ready, upload
from d2o_server.worker.gpu.draws import draw_rows
from d2o_server.worker.gpu.model import Logits, ModelForward
from d2o_server.worker.gpu.operator import AttentionOperator
from d2o_server.worker.gpu.prompts import Chunk, PrefillPart
from d2o_server.worker.gpu.step import DecodePart, KernelStep
from d2o_server.worker.runner import Launched, Runner, Sampled, StepOutcome
from d2o_server.worker.sampler import SampledBatch, no_numbers


@dataclass(slots=True)
class UnderWay:
    """A step that the device is working on. ``tokens`` bring each sampled row's token and best logit."""

    sequences: list[Sequence]
    tokens: Download | None

    def wait(self) -> StepOutcome:
        outcome = StepOutcome()
        if self.tokens is not None:
            ids, best = self.tokens.wait()
            numbers = zip(self.sequences, ids.tolist(), best.float().tolist(), strict=True)
            for row, (sequence, token, logit) in enumerate(numbers):
                if math.isfinite(logit):
                    outcome.sampled.append(Sampled(sequence, token, None))
                else:
                    outcome.failed.append((sequence, no_numbers(row, logit)))
        return outcome


@dataclass(slots=True)
class Known:
    """A step whose tokens the host has chosen itself."""

    sequences: list[Sequence]
    batch: SampledBatch

    def wait(self) -> StepOutcome:
        outcome = StepOutcome()
        for row, sequence in enumerate(self.sequences):
            if row in self.batch.failures:
                outcome.failed.append((sequence, self.batch.failures[row]))
            else:
                outcome.sampled.append(Sampled(sequence, self.batch.token_ids[row], self.batch.logprobs[row]))
        return outcome


class KernelRunner(Runner):
    """Runs steps by kernels over a mirrored pool."""

    def __init__(
        self,
        forward: ModelForward,
        operator: AttentionOperator,
        caches: CacheManager,
        ops: KernelCacheOps,
        *,
        vocabulary_size: int,
        max_sequences: int,
    ) -> None:
        super().__init__(caches, vocabulary_size)
        self._forward, self._operator, self._ops = forward, operator, ops
        most = largest(max_sequences)
        self._workspace = workspace_for(ops, caches.query_heads, most)
        self._last_token = torch.zeros(caches.pool.used.shape[1], dtype=torch.int64, device=caches.pool.device)
        self._graphs = DecodeGraphs(forward, operator, ops, self._workspace, self._last_token, most)
        self._bodies = BodyGraphs(forward, operator, caches.pool.device)
        self._ready = 0

    @torch.inference_mode()
    def capture(self, sizes: list[BatchSize], tokens: list[BatchSize], progress: Callable[[str], None]) -> None:
        """Captures decode steps of these batch sizes in CUDA graphs, and what steps of so many tokens share."""
        self._bodies.capture(tokens, self._graphs.capture(sizes, progress), progress)

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Runs the decode step of the largest batch as it is captured, over padding."""
        self._graphs.rehearse()

    @torch.inference_mode()
    def rehearse_body(self, tokens: int) -> None:
        """Runs what is captured of a step of so many tokens."""
        self._bodies.rehearse(tokens)

    def hold_ready(self, size: int) -> None:
        """Has so many bytes kept in one piece for all that comes and goes, from now on."""
        self._ready = size
        hold_ready(size, self.caches.pool.device)

    def _tidy_memory(self) -> None:
        super()._tidy_memory()
        if self._ready:
            with suppress(torch.OutOfMemoryError):
                self.hold_ready(self._ready)

    @property
    def depth(self) -> int:
        """One step ahead, unless a sequence's next token depends on those before in a way that only the host knows."""
        return 0 if any(running.sampling.needs_host for running in self.running.values()) else 1

    def _run(self, plan: StepPlan, scored: set[int]) -> Launched:
        rows = self._rows(plan.decode)
        prompt_rows = self._rows(tuple(part.sequence for part in plan.prefill))
        starts = self.caches.seen[prompt_rows]
        counts = torch.tensor([1] * len(plan.decode) + [part.count for part in plan.prefill])
        self.caches.append(torch.cat([rows, prompt_rows]), counts)
        self._ops.sync_table()
        result = None
        if not plan.prefill and not scored:
            result = self._graphs.run(
                rows, self.caches.seen[rows] - 1, self.caches.pool.used[:, rows], scored=self._keeps_scores(plan)
            )
            if result is not None:
                scored.update(range(self.caches.pool.layers))
        if result is None:
            result = self._eager(plan, rows, prompt_rows, starts, scored)
        return self._sample(plan.sampled, result)

    def _keeps_scores(self, plan: StepPlan) -> bool:
        return any(self.running[sequence.id].cache.config.enabled for sequence in plan.decode)

    def _eager(self, plan: StepPlan, rows: Tensor, prompt_rows: Tensor, starts: Tensor, scored: set[int]) -> Logits:
        """The step without a graph of its own. Its first tokens are the decoding sequences' newest."""
        device = self.caches.pool.device
        # A step of one token would be compiled for itself: a padding sequence makes it two.
        padding = int(rows.numel() + sum(part.count for part in plan.prefill) == 1)
        decoding = rows.numel() + padding
        decode = self._decode_part(plan, rows, padding, scored) if decoding else None
        prefill = self._prefill_part(plan.prefill, prompt_rows, starts, decoding) if plan.prefill else None
        ids, positions = [], []
        keep = list(range(rows.numel()))
        if decode is not None:
            ids.append(self._last_token[decode.rows.long()])
            positions.append(decode.positions)
        if prefill is not None:
            prompts = [part.sequence.reading[part.start : part.start + part.count] for part in plan.prefill]
            ids.append(upload(torch.tensor([token for prompt in prompts for token in prompt]), device))
            positions.append(prefill.positions)
            keep += [c.end - 1 for c, part in zip(prefill.chunks, plan.prefill, strict=True) if part.last]
        step = KernelStep(self._ops.paged, self._ops.table, decode, prefill)
        # For the same reason two rows of logits are always asked for.
        asked = upload(torch.tensor(keep + [0] * (2 - len(keep))), device)
        all_ids, all_positions = torch.cat(ids), torch.cat(positions).long()
        result = self._bodies.run(all_ids, all_positions, asked, step)
        if result is None:
            with self._operator.running(step):
                result = self._forward(all_ids[None], all_positions[None], asked, self._operator.step)
        return result.first(len(keep))

    def _decode_part(self, plan: StepPlan, rows: Tensor, padding: int, scored: set[int]) -> DecodePart:
        pool = self.caches.pool
        # Lengths first: kernels are compiled for where those begin.
        packed = torch.cat([pool.used[:, rows], torch.stack([rows, self.caches.seen[rows] - 1])])
        unused = torch.ones(packed.shape[0], padding, dtype=torch.int64)
        unused[-2], unused[-1] = self._ops.padding_row, 0
        on_device = upload(torch.cat([packed, unused], 1).int(), pool.device)
        pending = self._ops.pending if self._keeps_scores(plan) else None
        at_once = self._workspace.at_once.get(pending is not None, 0)
        grid = DecodeGrid.of(rows.numel() + padding, pool.kv_heads, pool.device, at_once)
        plans = plan_decode(on_device[:-2], grid)
        if pending is not None:
            pending.tick()
        return DecodePart(on_device[-2], on_device[-1], plans, self._workspace, pending, scored)

    def _prefill_part(self, parts: tuple[PrefillSlice, ...], rows: Tensor, starts: Tensor, first: int) -> PrefillPart:
        counts = torch.tensor([part.count for part in parts])
        owner, nth = ragged_indices(counts)
        packed = upload(torch.stack([rows[owner], starts[owner] + nth]).int(), self.caches.pool.device)
        ends = (first + counts.cumsum(0)).tolist()
        chunks = tuple(
            Chunk(end - part.count, end, part.start, row, self._targets(part.sequence))
            for part, end, row in zip(parts, ends, rows.tolist(), strict=True)
        )
        return PrefillPart(packed[0], packed[1], packed[1], chunks)

    def _sample(self, sequences: list[Sequence], result: Logits) -> Launched:
        """Chooses the tokens and leaves them where the next step reads them."""
        if not sequences:
            return UnderWay([], None)
        device = self.caches.pool.device
        running = [self.running[sequence.id] for sequence in sequences]
        rows = upload(torch.tensor([each.cache.row for each in running]), device)
        states = [each.sampling for each in running]
        if any(state.needs_host for state in states):
            batch = self._choose(result.logits, sequences)
            self._last_token[rows] = upload(torch.tensor(batch.token_ids).clamp_(min=0), device)
            return Known(sequences, batch)
        ids = draw_rows(result, states)
        replayed = [row for row, sequence in enumerate(sequences) if sequence.forced is not None]
        if replayed:
            ids = ids.clone()
            known = torch.tensor([sequences[row].forced for row in replayed])
            ids[upload(torch.tensor(replayed), device)] = upload(known, device)
        under_way = UnderWay(sequences, Download.start(ids, result.best))
        # Last of all: a step that has run out of memory before is run again.
        self._last_token[rows] = ids
        for sequence, state in zip(sequences, states, strict=True):
            state.generated += sequence.forced is None
        return under_way
