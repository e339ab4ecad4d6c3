"""Chooses the next token of each row of logits, by each row's own parameters.

Order of operations: repetition, presence and frequency penalty, logit bias, end tokens masked before
``min_new_tokens``; then temperature, top_k, top_p, min_p. Log probabilities are those of the model: of the logits
before any of this.

A row's token depends on its logits, its parameters, its seed and the number of tokens generated so far, and on
nothing else: not on the other rows, their number or their order (see :mod:`d2o_server.worker.distribution`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o_server.engine.types import SamplingParams
from d2o_server.errors import EngineFailure
from d2o_server.worker.distribution import Filters, draw, draw_filtered, greedy, leading, pad_vocabulary
from d2o_server.worker.penalties import LogitEdits, apply_edits

FAILED_TOKEN = -1
"""Stands in ``SampledBatch.token_ids`` for a row that failed."""

_COLDEST = 1e-5
"""Temperatures below are greedy."""

_CPU_SLAB_ELEMENTS = 2**19
_SLAB_ELEMENTS = 2**23
_LEAST_ROW_ELEMENTS = 2**16
"""Logits that are worked on at a time: on a CPU what stays in its caches, else a bound of the memory in use. A row
counts as at least the histogram that a wide filter needs."""

_WORD = 2**64 - 1


class SamplingState:
    """One sequence's parameters, seed and history; owned by the sequence, advanced by :meth:`Sampler.sample`.

    ``output_ids`` are tokens that were generated before, where a generation is resumed. ``end_ids`` are the model's
    end-of-text ids: with the request's own stop ids they are masked until ``min_new_tokens``.
    """

    __slots__ = ("edits", "generated", "is_greedy", "lowest", "params", "seed")

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt_ids: Sequence[int],
        end_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.seed = seed
        self.generated = len(output_ids)
        self.edits = LogitEdits.of(params, prompt_ids, output_ids, end_ids)
        self.is_greedy = params.temperature < _COLDEST
        self.lowest = math.log(params.min_p) if params.min_p > 0 else -math.inf

    @property
    def needs_host(self) -> bool:
        """Whether choosing a token takes the host: it keeps the history that penalties need, and reports logprobs."""
        return self.edits is not None or self.params.logprobs is not None

    def uniform(self) -> float:
        """This step's random number in [0, 1)."""
        return uniform(self.seed, self.generated)

    def advance(self, token_id: int) -> None:
        self.generated += 1
        if self.edits is not None:
            self.edits.record(token_id)


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural logs: of the sampled token, and of the most probable (id, logprob), best first, ties by id."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class SampledBatch:
    """One entry a row. ``failures`` maps the rows that failed (``FAILED_TOKEN``) to what their request ends with."""

    token_ids: list[int]
    logprobs: list[RowLogprobs | None]
    failures: dict[int, EngineFailure] = field(default_factory=dict)


class Sampler:
    """Samples batches of rows over one vocabulary. Holds no state: that lives in each sequence's SamplingState."""

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size

    @torch.inference_mode()
    def sample(self, logits: Tensor, states: Sequence[SamplingState]) -> SampledBatch:
        """Chooses one token a row and advances the states of the rows that did not fail.

        A row fails where its logits hold NaN or +inf, or leave no token to choose.

        Args:
            logits: [rows, vocabulary_size] of any float dtype; left unchanged. Arithmetic is in float32.
            states: one a row.

        Raises:
            ValueError: the shape of ``logits`` does not fit.
        """
        if logits.shape != (len(states), self._vocabulary_size):
            raise ValueError(f"logits: got {tuple(logits.shape)}, allowed is {(len(states), self._vocabulary_size)}")
        batch = SampledBatch([FAILED_TOKEN] * len(states), [None] * len(states))
        elements = _CPU_SLAB_ELEMENTS if logits.device.type == "cpu" else _SLAB_ELEMENTS
        rows = max(1, elements // max(self._vocabulary_size, _LEAST_ROW_ELEMENTS))
        for start in range(0, len(states), rows):
            _sample_slab(logits[start : start + rows], states[start : start + rows], start, batch)
        for token_id, state in zip(batch.token_ids, states, strict=True):
            if token_id != FAILED_TOKEN:
                state.advance(token_id)
        return batch


def uniform(seed: int, step: int) -> float:
    """A random number in [0, 1) that is a pure function of seed and step, in 53 bits.

    SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014): the stream of a
    seed starts at the seed's own finalised value, so that neighbouring seeds give unrelated streams, and is read at
    ``step`` directly.
    """
    origin = _mix(seed + 0x9E3779B97F4A7C15)
    return (_mix(origin + (step + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _sample_slab(logits: Tensor, states: Sequence[SamplingState], start: int, batch: SampledBatch) -> None:
    """Fills the entries of ``batch`` from ``start`` on."""
    logits = pad_vocabulary(logits)
    best_ids, best = greedy(logits)
    tokens: list[int] = best_ids.tolist()
    broken = {row: value for row, value in enumerate(best.tolist()) if not math.isfinite(value)}
    changed = [row for row, state in enumerate(states) if row not in broken and (state.edits or not state.is_greedy)]
    if changed:
        chosen = _choose(_rows(logits, changed), [states[row] for row in changed])
        for row, token_id in zip(changed, chosen, strict=True):
            tokens[row] = token_id
            if token_id == FAILED_TOKEN:
                broken[row] = -math.inf
    for row, value in broken.items():
        tokens[row] = FAILED_TOKEN
        batch.failures[start + row] = no_numbers(start + row, value)
    batch.token_ids[start : start + len(states)] = tokens
    asked = [row for row, state in enumerate(states) if state.params.logprobs is not None and row not in broken]
    if asked:
        counts = [states[row].params.logprobs or 0 for row in asked]
        batch_entries = _log_probabilities(_rows(logits, asked), [tokens[row] for row in asked], counts)
        for row, entry in zip(asked, batch_entries, strict=True):
            batch.logprobs[start + row] = entry


def _choose(logits: Tensor, states: Sequence[SamplingState]) -> list[int]:
    """One token a row of ``logits`` (float32, ours to change); FAILED_TOKEN where every token is ruled out."""
    edits = [(row, state.edits) for row, state in enumerate(states) if state.edits is not None]
    apply_edits(logits, edits, [states[row].generated for row, _ in edits])
    best_ids, best = greedy(logits)
    tokens: list[int] = best_ids.tolist()
    for row, value in enumerate(best.tolist()):
        if value == -math.inf:
            tokens[row] = FAILED_TOKEN
    vocabulary = logits.shape[-1]
    direct: list[int] = []
    filtered: list[int] = []
    for row, state in enumerate(states):
        if state.is_greedy or tokens[row] == FAILED_TOKEN:
            continue
        cut = 0 < state.params.top_k < vocabulary or state.params.top_p < 1
        (filtered if cut else direct).append(row)
    for rows, drawn_by in ((direct, _draw_direct), (filtered, _draw_filtered)):
        if rows:
            _draw_rows(logits, best, states, rows, drawn_by, tokens)
    return tokens


def _draw_rows(
    logits: Tensor,
    best: Tensor,
    states: Sequence[SamplingState],
    rows: list[int],
    drawn_by: Callable[[Tensor, Tensor, Sequence[SamplingState]], Tensor],
    tokens: list[int],
) -> None:
    chosen = [states[row] for row in rows]
    device = logits.device
    temperatures = torch.tensor([state.params.temperature for state in chosen], device=device)
    uniforms = torch.tensor([state.uniform() for state in chosen], dtype=torch.float64, device=device)
    shifted = _rows(logits, rows)
    shifted -= best[rows, None]
    shifted /= temperatures[:, None]
    for row, token_id in zip(rows, drawn_by(shifted, uniforms, chosen).tolist(), strict=True):
        tokens[row] = token_id


def _draw_direct(shifted: Tensor, uniforms: Tensor, states: Sequence[SamplingState]) -> Tensor:
    lowest = [state.lowest for state in states]
    used = any(math.isfinite(value) for value in lowest)
    return draw(shifted, uniforms, torch.tensor(lowest, device=shifted.device) if used else None)


def _draw_filtered(shifted: Tensor, uniforms: Tensor, states: Sequence[SamplingState]) -> Tensor:
    device = shifted.device
    vocabulary = shifted.shape[-1]
    filters = Filters(
        top_k=torch.tensor([min(state.params.top_k or vocabulary, vocabulary) for state in states], device=device),
        top_p=torch.tensor([state.params.top_p for state in states], dtype=torch.float64, device=device),
        lowest=torch.tensor([state.lowest for state in states], device=device),
    )
    return draw_filtered(shifted, uniforms, filters)


def _log_probabilities(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[RowLogprobs]:
    logprobs = logits.log_softmax(-1)
    sampled = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    if not max(counts):
        return [RowLogprobs(value, ()) for value in sampled]
    width = min(max(counts), logits.shape[-1])
    ids = leading(logits - logits.amax(-1, keepdim=True), width)
    found = zip(ids.tolist(), logprobs.gather(-1, ids).tolist(), sampled, counts, strict=True)
    return [RowLogprobs(value, _possible(top[:count], values)) for top, values, value, count in found]


def _possible(ids: list[int], logprobs: list[float]) -> tuple[tuple[int, float], ...]:
    """Pairs up to the shorter list, without tokens of probability 0."""
    return tuple((token, value) for token, value in zip(ids, logprobs, strict=False) if value > -math.inf)


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """A float32 copy of some rows."""
    if len(rows) == len(logits):
        return logits.to(torch.float32, copy=True)
    return logits[rows].float()


def no_numbers(row: int, best: float) -> EngineFailure:
    """What a request ends with whose best logit is no finite number."""
    if best == -math.inf:
        return EngineFailure(f"row {row} of the step: every token's logit is -inf, so there is none to choose")
    return EngineFailure(f"row {row} of the step: the model's logits hold {best}, allowed are finite numbers and -inf")
