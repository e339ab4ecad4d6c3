"""Sampling without the host: the same tokens as :class:`d2o_server.worker.sampler.Sampler`, chosen on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o_server.worker.distribution import Filters, draw, draw_whole, pad_vocabulary
from d2o_server.worker.gpu.device import upload
from d2o_server.worker.gpu.model import Logits
from d2o_server.worker.sampler import SamplingState

_ELEMENTS_AT_ONCE = 2**23


def draw_rows(result: Logits, states: Sequence[SamplingState]) -> Tensor:
    """One token a row, [rows] int64; rows that are not greedy are drawn with their own seed and step.

    No state may need the host: see :attr:`SamplingState.needs_host`.
    """
    drawn = [row for row, state in enumerate(states) if not state.is_greedy]
    if not drawn:
        return result.best_ids
    ids = result.best_ids.clone()
    vocabulary = result.logits.shape[-1]
    cut = [row for row in drawn if _filters(states[row], vocabulary)]
    whole = [row for row in drawn if not _filters(states[row], vocabulary)]
    at_once = max(1, _ELEMENTS_AT_ONCE // vocabulary)
    for rows, filtered in ((cut, True), (whole, False)):
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            place = upload(torch.tensor(part), ids.device)
            ids[place] = _draw(result, place, [states[row] for row in part], filtered=filtered)
    return ids


def _filters(state: SamplingState, vocabulary: int) -> bool:
    return 0 < state.params.top_k < vocabulary or state.params.top_p < 1


def _draw(result: Logits, rows: Tensor, states: Sequence[SamplingState], *, filtered: bool) -> Tensor:
    device = rows.device
    numbers = [(s.params.temperature, s.uniform(), s.params.top_p, s.lowest) for s in states]
    temperature, uniform, top_p, lowest = upload(torch.tensor(numbers, dtype=torch.float64).T.contiguous(), device)
    shifted = pad_vocabulary(result.logits[rows]).float()
    best = result.best[rows].float()
    shifted -= best[:, None]
    shifted /= temperature.float()[:, None]
    _certain(shifted, ~best.isfinite())
    if not filtered:
        return draw(shifted, uniform, lowest.float())
    vocabulary = shifted.shape[-1]
    counts = torch.tensor([s.params.top_k or vocabulary for s in states]).clamp_(max=vocabulary)
    limits = Filters(upload(counts, device), top_p, lowest.float())
    by_count = bool((counts < vocabulary).any())
    by_mass = any(s.params.top_p < 1 for s in states)
    return draw_whole(shifted, uniform, limits, by_count=by_count, by_mass=by_mass)


def _certain(shifted: Tensor, rows: Tensor) -> None:
    """Leaves token 0 alone to be drawn in ``rows`` [rows] bool, whose logits are no numbers and whose requests fail.

    The host learns that a step later; until then the token is looked up, and no device survives one that is none.
    """
    shifted.masked_fill_(rows[:, None], -torch.inf)
    shifted[:, 0].masked_fill_(rows, 0.0)
