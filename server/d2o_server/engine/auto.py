"""Compression ``auto``: the full cache where there is room for it and the sequence is short (docs/adr/0011)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from d2o.config import Policy
from d2o_server.engine.memory import CacheShape, PageLedger, Reservation, reserve
from d2o_server.engine.messages import AutoTerms, Submit
from d2o_server.engine.types import AutoOutcome

HEADROOM = 0.25
"""Share of the pool that full caches leave unreserved: those that come next must not wait for them."""


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """What a sequence in auto may get instead of its compressed cache: ``full``, within ``terms``."""

    full: Reservation
    terms: AutoTerms
    tokens: int

    @property
    def permitted(self) -> bool:
        """Whether the full cache is possible whatever else runs."""
        return self._refusal is None

    @property
    def _refusal(self) -> AutoOutcome | None:
        if self.tokens > self.terms.full_tokens:
            return AutoOutcome.LONG
        if self.terms.most_pages is not None and self.full.pages > self.terms.most_pages:
            return AutoOutcome.PAGES
        return None

    def outcome(self, compressed: Reservation, ledger: PageLedger, waiting_pages: int) -> AutoOutcome:
        """What it gets now, where ``compressed`` fits.

        The full cache must leave the headroom, and all that those behind it need at least: where they could not all be
        admitted beside it, pages are scarce. A budget that covers the whole sequence is the full cache already.
        """
        if not compressed.config.enabled:
            return AutoOutcome.FULL
        if self._refusal is not None:
            return self._refusal
        headroom = math.ceil(HEADROOM * ledger.total)
        fits = self.full.pages + waiting_pages + headroom <= ledger.unreserved
        return AutoOutcome.FULL if fits else AutoOutcome.PAGES


def choice_of(shape: CacheShape, message: Submit) -> AutoChoice | None:
    """The choice that a request's message leaves open; None where it names its policy."""
    if message.auto is None:
        return None
    full = message.config.with_changes(policy=Policy.NONE)
    prompt, new = len(message.prompt), message.max_new_tokens
    return AutoChoice(reserve(shape, full, prompt, new), message.auto, prompt + new)
