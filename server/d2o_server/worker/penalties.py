"""Changes to single logits before anything is chosen: penalties, then bias, then tokens that may not come yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2o_server.engine.types import SamplingParams

_LARGEST = torch.finfo(torch.float32).max


class LogitEdits:
    """What one sequence changes in its logits. Build with :meth:`of`; :meth:`record` each sampled token."""

    __slots__ = ("bias_ids", "bias_values", "ends", "history", "min_new_tokens", "params")

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], ends: Sequence[int]
    ) -> None:
        self.params = params
        self.bias_ids = np.array([token for token, _ in params.logit_bias], dtype=np.int64)
        self.bias_values = np.array([value for _, value in params.logit_bias], dtype=np.float32)
        self.ends = np.array(sorted({*ends, *params.stop_token_ids}), dtype=np.int64)
        self.min_new_tokens = params.min_new_tokens
        self.history = TokenHistory(prompt_ids, output_ids) if _penalised(params) else None

    @classmethod
    def of(
        cls, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], ends: Sequence[int]
    ) -> LogitEdits | None:
        """None where the parameters change no logit."""
        if not (_penalised(params) or params.logit_bias or params.min_new_tokens):
            return None
        return cls(params, prompt_ids, output_ids, ends)

    def record(self, token_id: int) -> None:
        if self.history is not None:
            self.history.record(token_id)


class TokenHistory:
    """The different tokens of a sequence and how often each one is in its output."""

    __slots__ = ("_counts", "_ids", "_places", "_used")

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        prompt = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self._used = len(prompt)
        self._ids = np.concatenate([prompt, np.zeros(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._places = {token: place for place, token in enumerate(prompt.tolist())}
        for token in output_ids:
            self.record(token)

    def record(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self._used)
        if place == self._used:
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
            self._used += 1
        self._counts[place] += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """[different tokens]"""
        return self._ids[: self._used]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[different tokens] times in the output; 0 for a token of the prompt alone."""
        return self._counts[: self._used]


def apply_edits(logits: Tensor, edits: Sequence[tuple[int, LogitEdits]], generated: Sequence[int]) -> None:
    """Changes ``logits`` [rows, vocabulary] float32 in place.

    Args:
        edits: pairs of a row and what changes in it.
        generated: tokens generated so far, one count a pair.
    """
    _penalise(logits, [(row, edit.params, edit.history) for row, edit in edits if edit.history is not None])
    _add_bias(logits, [(row, edit) for row, edit in edits if len(edit.bias_ids)])
    early = [
        (row, edit.ends) for (row, edit), count in zip(edits, generated, strict=True) if count < edit.min_new_tokens
    ]
    if early:
        rows, ids = _ragged(logits, early)
        logits[rows, ids] = -torch.inf


def _penalise(logits: Tensor, penalised: list[tuple[int, SamplingParams, TokenHistory]]) -> None:
    if not penalised:
        return
    rows, ids = _ragged(logits, [(row, history.ids) for row, _, history in penalised])
    counts = _to(logits, np.concatenate([history.counts for _, _, history in penalised]))
    lengths = [len(history.ids) for _, _, history in penalised]
    factors = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for _, p, _ in penalised]
    repetition, presence, frequency = _to(logits, np.repeat(np.array(factors), lengths, axis=0).T)
    values = logits[rows, ids].double()
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= presence * (counts > 0) + frequency * counts
    logits[rows, ids] = values.clamp_(max=_LARGEST).float()


def _add_bias(logits: Tensor, biased: list[tuple[int, LogitEdits]]) -> None:
    if not biased:
        return
    rows, ids = _ragged(logits, [(row, edit.bias_ids) for row, edit in biased])
    logits[rows, ids] += _to(logits, np.concatenate([edit.bias_values for _, edit in biased]))


def _ragged(logits: Tensor, tokens: list[tuple[int, npt.NDArray[np.int64]]]) -> tuple[Tensor, Tensor]:
    """Row numbers and token ids of all the pairs, flat."""
    rows = np.repeat(np.array([row for row, _ in tokens], dtype=np.int64), [len(ids) for _, ids in tokens])
    return _to(logits, rows), _to(logits, np.concatenate([ids for _, ids in tokens]))


def _to(logits: Tensor, values: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(values).to(logits.device)


def _penalised(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
