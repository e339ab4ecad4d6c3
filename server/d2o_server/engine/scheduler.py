"""Continuous batching over reserved pages: who is admitted, and what the next step runs. Integers only."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from d2o_server.engine.memory import PageLedger
from d2o_server.engine.sequence import Sequence, Stage


@dataclass(frozen=True, slots=True)
class PrefillSlice:
    """``count`` prompt tokens of ``sequence`` from ``start`` on; ``last`` completes the prompt."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        return self.start + self.count == len(self.sequence.reading)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: a token of every decoding sequence, then chunks of prompts."""

    decode: tuple[Sequence, ...]
    prefill: tuple[PrefillSlice, ...]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)

    @property
    def sequences(self) -> Iterator[Sequence]:
        yield from self.decode
        yield from (part.sequence for part in self.prefill)

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences that get a token, in the order of their rows of logits."""
        return [*self.decode, *(part.sequence for part in self.prefill if part.last)]


class Scheduler:
    """First due, first served; a sequence is admitted when all the pages it can ever need are unreserved.

    So nothing that runs is ever preempted. ``waiting_pages`` is what all that wait need at least. ``prefill_tokens``
    bounds the prompt tokens of one step, so that running streams keep their pace while prompts are read. With
    ``whole_chunks`` a prompt that does not end in a step is read by exactly that many tokens: its chunks then begin at
    multiples of them, for which attention has plans.
    """

    def __init__(self, *, pages: int, max_sequences: int, prefill_tokens: int, whole_chunks: bool = False) -> None:
        self.ledger = PageLedger(pages)
        self.max_sequences = max_sequences
        self.prefill_tokens = prefill_tokens
        self.whole_chunks = whole_chunks
        self.waiting: deque[Sequence] = deque()
        self.waiting_pages = 0
        self.running: OrderedDict[str, Sequence] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence by its turn, behind those that wait already with the same; resumed ones come first."""
        self.waiting_pages += sequence.reservation.pages
        if not self.waiting or self.waiting[-1].turn <= sequence.turn:
            self.waiting.append(sequence)
        else:
            self.waiting.insert(bisect_right(self.waiting, sequence.turn, key=lambda other: other.turn), sequence)

    def admit(self) -> list[Sequence]:
        """Moves from the front of the queue all that fit; a request that does not fit holds back those behind it."""
        admitted = []
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self.ledger.fits(sequence.reservation.pages):
                break
            self._leave_queue(sequence)
            sequence.choose(self.ledger, self.waiting_pages)
            self.ledger.take(sequence.reservation.pages)
            sequence.reserved_pages = sequence.reservation.pages
            sequence.stage = Stage.PREFILL
            self.running[sequence.id] = sequence
            admitted.append(sequence)
        return admitted

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.waiting_pages -= sequence.reservation.pages

    def plan(self) -> StepPlan:
        """The next step for what runs: every decoding sequence, and prompts in order of admission."""
        decode = tuple(s for s in self.running.values() if s.decodes)
        left = self.prefill_tokens
        prefill = []
        for sequence in self.running.values():
            if left == 0:
                break
            if sequence.stage is Stage.PREFILL:
                count = min(left, sequence.prompt_remaining)
                if self.whole_chunks and count < min(self.prefill_tokens, sequence.prompt_remaining):
                    break
                prefill.append(PrefillSlice(sequence, sequence.prefilled, count))
                left -= count
        return StepPlan(decode, tuple(prefill))

    def launched(self, plan: StepPlan) -> None:
        """Notes that a step was launched: what it computes can be counted on from now on."""
        for part in plan.prefill:
            part.sequence.prefilled += part.count
        for sequence in plan.sampled:
            sequence.stage = Stage.DECODE
            sequence.launched += 1

    def restart(self, sequence: Sequence) -> None:
        """Notes that nothing of the prompt is in the cache any more."""
        sequence.prefilled = 0

    def settle(self, sequence: Sequence, pages: int) -> None:
        """Lowers a sequence's promise to ``pages``, once compression has fixed what it can still need."""
        if pages > sequence.reserved_pages:
            raise AssertionError(f"{sequence.id}: needs {pages} pages and reserved {sequence.reserved_pages}")
        self.ledger.give_back(sequence.reserved_pages - pages)
        sequence.reserved_pages = pages

    def find(self, sequence_id: str) -> Sequence | None:
        """The queued or running sequence of this id."""
        running = self.running.get(sequence_id)
        return running or next((s for s in self.waiting if s.id == sequence_id), None)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out in whatever state it is and frees its promise."""
        if self.running.pop(sequence.id, None) is not None:
            self.ledger.give_back(sequence.reserved_pages)
            sequence.reserved_pages = 0
        else:
            self._leave_queue(sequence)
        sequence.stage = Stage.FINISHED
