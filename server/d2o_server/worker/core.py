"""A worker's heart: messages in, steps through scheduler and runner, one report a step out. No process, no socket."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from d2o_server.engine.auto import choice_of
from d2o_server.engine.memory import CacheShape, reserve
from d2o_server.engine.messages import (
    Admitted,
    CacheState,
    Cancel,
    Ended,
    Failed,
    NewToken,
    PoolState,
    StepReport,
    Stop,
    Submit,
)
from d2o_server.engine.scheduler import Scheduler, StepPlan
from d2o_server.engine.sequence import Sequence, Stage
from d2o_server.engine.types import FinishReason
from d2o_server.errors import EngineFailure, OutOfDeviceMemory, ServerError
from d2o_server.worker.runner import Launched, Runner, Sampled, Scored, StepOutcome

_log = logging.getLogger(__name__)
_CACHE_STATE_SECONDS = 0.5

Early = Callable[[StepReport], None]


class WorkerCore:
    """Takes messages, runs steps and reports what each changed.

    As many steps as the runner's ``depth`` are under way while the next is planned, so that a device need not wait for
    the host. A sequence whose last token turns out to end it has then run one token more, which nobody sees.
    A prompt's budgets are known once it has been read, and its first token comes before compression. Where other
    prompts are there to be read it is compressed behind the next step, in which it has no part.
    ``check_integrity`` verifies the pool after every step (tests).
    ``in_lockstep``: other ranks take part in every step, so that one which fails here cannot be survived.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, shape: CacheShape, *, check_integrity: bool = False
    ) -> None:
        self.runner, self.scheduler, self.shape = runner, scheduler, shape
        self._check_every_step = check_integrity
        self._changes = _Changes()
        self._under_way: deque[Launched] = deque()
        self._read: list[Sequence] = []
        self._cache_state_due = 0.0
        self.in_lockstep = False

    def __bool__(self) -> bool:
        """Whether there is work or something to report."""
        return bool(self.scheduler) or bool(self._changes)

    def handle(self, message: Submit | Cancel | Stop) -> None:
        """Applies one message from the front, between steps."""
        if isinstance(message, Submit):
            self._submit(message)
            return
        sequence = self.scheduler.find(message.id)
        if sequence is None:
            return
        if isinstance(message, Cancel):
            self._drop(sequence)
            self._changes.cancelled.append(sequence.id)
        elif sequence.stage is Stage.DECODE and not sequence.replaying:
            self._end(sequence, FinishReason.STOP)
        else:
            sequence.stopping = True

    def _submit(self, message: Submit) -> None:
        try:
            self.scheduler.add(self._sequence(message))
        except ServerError as error:
            self._changes.failed.append(Failed(message.id, type(error).__name__, str(error)))

    def _sequence(self, message: Submit) -> Sequence:
        reservation = reserve(self.shape, message.config, len(message.prompt), message.max_new_tokens)
        return Sequence(
            id=message.id,
            prompt=message.prompt,
            sampling=message.sampling,
            seed=message.seed,
            config=message.config,
            end_ids=message.end_ids,
            max_new_tokens=message.max_new_tokens,
            reservation=reservation,
            choice=choice_of(self.shape, message),
            due=message.due,
            known=message.output,
            resumed=message.resumed,
            # A layer with a sliding window would hold more while it reads all this than was reserved for the prompt.
            rereads=not reservation.config.enabled and self.shape.full_layers == len(self.shape.windows),
        )

    def admit(self) -> StepReport | None:
        """Admits what fits; reports it before the step, which may take long and which somebody waits through."""
        self._admit()
        return self._report() if self._changes.admitted else None

    def _admit(self) -> None:
        for sequence in self.scheduler.admit():
            self.runner.open(sequence)
            reservation = sequence.reservation
            self._changes.admitted.append(
                Admitted(
                    id=sequence.id,
                    reserved_pages=reservation.pages,
                    budget=reservation.budget,
                    config=reservation.config,
                    auto=sequence.outcome,
                )
            )

    def step(self, early: Early | None = None) -> StepReport:
        """Admits, launches one step and reports what has ended; with nothing to run it waits for what is under way.

        ``early`` is told what ended before the step where the step is launched only after a wait, or waited for: a
        prompt of thousands of tokens may be read in it.
        """
        self._admit()
        if not self.runner.depth:
            self._finish(0)
        plan = self.scheduler.plan()
        if self._read and not plan.prefill:
            # A step that only decodes is too short to wait behind, and what is given back may admit the next prompt.
            self._compress_read(early)
            self._admit()
            if self._changes.admitted:
                self._tell(early)
            plan = self.scheduler.plan()
        if plan:
            self._launch(plan, early)
        self._finish(self.runner.depth if plan else 0)
        if self._check_every_step:
            self.check_integrity()
        return self._report()

    def _finish(self, leave: int) -> None:
        """Takes in the oldest steps until ``leave`` are under way."""
        while len(self._under_way) > leave:
            self._apply(self._under_way.popleft().wait())

    def _tell(self, early: Early | None) -> None:
        if early is not None:
            early(self._report())

    def _report(self) -> StepReport:
        changes, self._changes = self._changes, _Changes()
        return changes.report(self.pool_state(), self._cache_state())

    def _cache_state(self) -> CacheState | None:
        """Seldom, because it looks at every row of every layer; always when nothing runs, for nothing follows then."""
        now = time.monotonic()
        if self.scheduler and now < self._cache_state_due:
            return None
        self._cache_state_due = now + _CACHE_STATE_SECONDS
        return self.runner.caches.state()

    def _launch(self, plan: StepPlan, early: Early | None) -> None:
        scored = Scored()
        while plan:
            try:
                self._launch_and_compress(plan, scored, early)
            except OutOfDeviceMemory as error:
                if self.in_lockstep:
                    raise
                plan = self._without_newest(plan, error)
            except Exception as error:  # whatever a step raises, the worker goes on without its requests
                if self.in_lockstep:
                    raise
                self._fail_step(plan, error)
                return
            else:
                return

    def _launch_and_compress(self, plan: StepPlan, scored: Scored, early: Early | None) -> None:
        """Tokens that are there are told before compression waits for this step, and this step's once it has ended."""
        launched = self.runner.launch(plan, scored)
        self.scheduler.launched(plan)
        self._compress_read(early)
        waits = self.runner.depth > 0 and self.runner.compression_waits()
        if waits and self._under_way:
            self._finish(0)
            self._tell(early)
        self._read, settled = self.runner.compress(plan)
        self._apply(settled)
        for sequence in self._read:
            sequence.compressing = True
        self._under_way.append(launched)
        if waits:
            self._finish(0)
        # One that ends with its first token reports what compression left, which behind the next step would come late.
        if not self.runner.depth or any(each.launched == each.max_new_tokens for each in self._read):
            self._compress_read(early)

    def _compress_read(self, early: Early | None) -> None:
        """Tells the first tokens of the prompts that were read to their end, then compresses those."""
        if not self._read:
            return
        self._finish(0)
        self._tell(early)
        self._compress()

    def _compress(self) -> None:
        read, self._read = [each for each in self._read if each.stage is not Stage.FINISHED], []
        for sequence in read:
            sequence.compressing = False
        try:
            self._apply(self.runner.compress_prompts(read))
        except Exception as error:
            if self.in_lockstep:
                raise
            self._fail_all(read, error)

    def _apply(self, outcome: StepOutcome) -> None:
        """Takes in what a step did; sequences that have gone since it was launched have no part in it."""
        for sequence, pages in outcome.settled:
            if sequence.stage is not Stage.FINISHED:
                self.scheduler.settle(sequence, sequence.reservation.resident if pages < 0 else pages)
        for sequence, failure in outcome.failed:
            if sequence.stage is not Stage.FINISHED:
                self._fail(sequence, failure)
        for sampled in outcome.sampled:
            if sampled.sequence.stage is not Stage.FINISHED:
                self._accept(sampled)

    def _accept(self, sampled: Sampled) -> None:
        sequence, token = sampled.sequence, sampled.token
        replayed = sequence.replaying
        sequence.output.append(token)
        if sequence.stopping and not sequence.replaying:
            self._end(sequence, FinishReason.STOP)
            return
        if replayed:
            return
        logprobs = sampled.logprobs
        if logprobs is None:
            self._changes.tokens.append(NewToken(sequence.id, token))
        else:
            self._changes.tokens.append(NewToken(sequence.id, token, logprobs.logprob, logprobs.top))
        enough = len(sequence.output) > sequence.sampling.min_new_tokens
        if enough and token in sequence.sampling.stop_token_ids:
            self._end(sequence, FinishReason.STOP, token)
        elif enough and token in sequence.end_ids and not sequence.sampling.ignore_end_of_text:
            self._end(sequence, FinishReason.END_OF_TEXT)
        elif len(sequence.output) >= sequence.max_new_tokens:
            self._end(sequence, FinishReason.LENGTH)

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        """A defect of ours costs the requests of the step in which it showed, and no token of the steps before."""
        self._finish(0)
        self._fail_all(list(plan.sequences), error)

    def _fail_all(self, sequences: list[Sequence], error: Exception) -> None:
        _log.error("a step of %d sequences failed", len(sequences), exc_info=error)
        for sequence in sequences:
            # The step before may have ended it meanwhile.
            if sequence.stage is not Stage.FINISHED:
                self._fail(sequence, EngineFailure(f"the step that ran the request failed: {type(error).__name__}"))

    def _without_newest(self, plan: StepPlan, error: OutOfDeviceMemory) -> StepPlan:
        """Fails the newest request of a step that ran out of memory; returns what can run at once without it.

        The step's other prompts are read again from their start, in steps of their own.
        """
        *others, newest = plan.sequences
        _log.warning("a step of %d sequences ran out of memory; the newest, %s, fails", len(others) + 1, newest.id)
        self._fail(newest, error)
        for part in plan.prefill[:-1]:
            self.scheduler.restart(part.sequence)
        return StepPlan(tuple(others[: len(plan.decode)]), ())

    def _fail(self, sequence: Sequence, error: ServerError) -> None:
        self._drop(sequence)
        self._changes.failed.append(Failed(sequence.id, type(error).__name__, str(error)))

    def _drop(self, sequence: Sequence) -> None:
        if sequence.id in self.runner.running:
            self.runner.discard(sequence)
        self.scheduler.remove(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason, stop_token: int | None = None) -> None:
        if sequence.compressing:
            # What became of its tokens does not depend on when it ends.
            self._compress()
            if sequence.stage is Stage.FINISHED:
                return
        facts = self.runner.close(sequence)
        self.scheduler.remove(sequence)
        self._changes.ended.append(Ended(id=sequence.id, reason=reason, facts=facts, stop_token_id=stop_token))

    def pool_state(self) -> PoolState:
        pool, scheduler = self.runner.caches.pool, self.scheduler
        return PoolState(
            total=pool.num_pages,
            used=pool.used_pages,
            reserved=scheduler.ledger.reserved,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError unless pages, promises and rows agree."""
        pool, scheduler = self.runner.caches.pool, self.scheduler
        pool.check_integrity()
        promised = sum(s.reserved_pages for s in scheduler.running.values())
        if promised != scheduler.ledger.reserved:
            raise AssertionError(f"{scheduler.ledger.reserved} pages reserved and {promised} promised")
        for sequence in scheduler.running.values():
            held = pool.row_pages(self.runner.running[sequence.id].cache.row)
            if held > sequence.reserved_pages:
                raise AssertionError(f"{sequence.id} holds {held} pages of {sequence.reserved_pages} reserved")


class _Changes:
    """What has happened since the last report."""

    def __init__(self) -> None:
        self.admitted: list[Admitted] = []
        self.tokens: list[NewToken] = []
        self.ended: list[Ended] = []
        self.failed: list[Failed] = []
        self.cancelled: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.admitted or self.tokens or self.ended or self.failed or self.cancelled)

    def report(self, pool: PoolState, cache: CacheState | None) -> StepReport:
        return StepReport(
            pool=pool,
            cache=cache,
            admitted=tuple(self.admitted),
            tokens=tuple(self.tokens),
            ended=tuple(self.ended),
            failed=tuple(self.failed),
            cancelled=tuple(self.cancelled),
        )
