"""Attention of one step by kernels: decoding sequences, then prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from d2o.attention import AttentionRule
from d2o.kernels.column_sums import add_column_sums
from d2o.kernels.column_sums_packed import add_column_sums_packed
from d2o.kernels.decode import DecodePlan, DecodeWorkspace, decode_attention
from d2o.kernels.paged import PagedTensors
from d2o.kernels.pending import Pending
from d2o.kernels.prefill import gather_context, packed_prefill_attention, prefill_attention
from d2o.kernels.store import store_tokens
from d2o_server.worker.gpu.prompts import Batch, PrefillPart


@dataclass(frozen=True, slots=True)
class DecodePart:
    """The step's decoding sequences; tensors of the device.

    Attributes:
        rows, positions: [batch] int32, each one's row of the pool and its new token's position.
        plan: how their slots are shared out.
        workspace: the kernels' scratch.
        pending: the newest queries of the pool's rows, if any of the sequences is compressed: then slots have biases,
            and attention goes on adding to scores.
        scored: layers whose queries of this step are pending: those of a step that runs again must not be so twice.
    """

    rows: Tensor
    positions: Tensor
    plan: DecodePlan
    workspace: DecodeWorkspace
    pending: Pending | None
    scored: set[int]

    @property
    def batch(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True, slots=True)
class KernelStep:
    """One step over pages: decoding tokens first, then the prompts' chunks."""

    paged: PagedTensors
    table: Tensor
    decode: DecodePart | None
    prefill: PrefillPart | None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, out: Tensor | None = None
    ) -> Tensor:
        """Attention of [heads, tokens, head_dim]; [tokens, heads, head_dim], in ``out`` if that is given."""
        part = self.prefill
        if part is None:
            return _into(out, self._decode(layer, q, k, v, rule))
        batches = part.batched(rule, q.dtype, q.shape[-1])
        first = 0 if self.decode is None else self.decode.batch
        new = (k[:, first:], v[:, first:])
        store_tokens(*new, self.paged, self.table, part.rows, part.slots, part.positions, layer, clear_tail=False)
        if not first and len(batches) == 1:
            return _into(out, self._prefill(layer, batches[0], q, k, v, rule))
        if out is None:
            out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
        if first:
            out[:first] = self._decode(layer, q[:, :first], k[:, :first], v[:, :first], rule)
        for batch in batches:
            tokens = batch.tokens
            out[tokens] = self._prefill(layer, batch, q[:, tokens], k[:, tokens], v[:, tokens], rule)
        return out

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        part = self.decode
        if part is None:
            raise ValueError("a step without prompts and without decoding sequences")
        fresh = layer not in part.scored
        out = decode_attention(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            self.paged,
            self.table,
            part.rows,
            part.positions,
            part.plan,
            layer,
            workspace=part.workspace,
            scale=rule.scale,
            window=rule.window,
            softcap=rule.softcap,
            bias=part.pending is not None,
            pending=part.pending if fresh and rule.window is None else None,
            reset=fresh,
        )
        part.scored.add(layer)
        return out

    def _prefill(self, layer: int, batch: Batch, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """Attention of one batch's tokens, and their scores."""
        if batch.borders is not None:
            longest = max(chunk.count for chunk in batch.chunks)
            by_token = [x.transpose(0, 1) for x in (q, k, v)]
            borders = batch.borders
            out, lse = packed_prefill_attention(
                by_token[0], by_token[1], by_token[2], borders, borders, longest, longest, rule
            )
        else:
            chunk = batch.chunks[0]
            if chunk.start:
                k, v = gather_context(self.paged, self.table, layer, chunk.row, chunk.start + chunk.count)
            out, sums = prefill_attention(q, k, v, start=chunk.start, rule=rule, return_lse=True)
            if sums is None:
                raise ValueError("prefill attention gave no logsumexp")
            lse = sums
        self._add_scores(layer, batch, q, k, lse, rule)
        return out

    @staticmethod
    def _add_scores(layer: int, batch: Batch, q: Tensor, k: Tensor, lse: Tensor, rule: AttentionRule) -> None:
        scale, softcap, window = rule.scale, rule.softcap, rule.window
        if batch.packed is not None and window is None:
            add_column_sums_packed(q, k, lse, batch.packed, layer=layer, scale=scale, softcap=softcap)
        for chunk in batch.apart:
            target = chunk.scores[layer]
            if target is not None:
                part = slice(chunk.begin - batch.tokens.start, chunk.end - batch.tokens.start)
                keys = k if batch.borders is None else k[:, part]
                add_column_sums(
                    q[:, part], keys, lse[:, part], target, start=chunk.start, scale=scale, softcap=softcap,
                    window=window,
                )  # fmt: skip


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """The result, contiguous: in ``out`` if that is given."""
    return result.contiguous() if out is None else out.copy_(result)
