"""One request's life inside a worker, as integers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from d2o.config import D2OConfig
from d2o_server.engine.auto import AutoChoice
from d2o_server.engine.memory import PageLedger, Reservation
from d2o_server.engine.types import AutoOutcome, SamplingParams


class Stage(StrEnum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of a sequence. Lengths of caches belong to the worker's pool, not to this.

    ``launched`` counts the output tokens that steps were launched for; it is ahead of ``output`` while steps run.
    From its prompt's last step to the compression of that it is ``compressing`` and decodes nothing.

    Those that wait are admitted in the order of ``due``. ``reserved_pages`` is what admission promised: the
    reservation's peak until the prompt is compressed, then its resident bound, then exactly what compression left it
    needing. With ``choice``, the reservation is its least until admission, which notes the ``outcome``.

    ``known`` are output tokens from before another worker died. With ``rereads`` they are read as if they were the end
    of the prompt, which leaves a full cache as it was; otherwise decode steps are run again that each yield the known
    token instead of a sampled one, so that scores, evictions and merges are those of the first time. ``reading`` is
    what prefill reads. ``stopping``: it ends as soon as it is where it was.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    config: D2OConfig
    end_ids: tuple[int, ...]
    max_new_tokens: int
    reservation: Reservation
    choice: AutoChoice | None = None
    outcome: AutoOutcome | None = None
    due: float = 0.0
    arrived: float = field(default_factory=time.monotonic)
    stage: Stage = Stage.WAITING
    prefilled: int = 0
    reserved_pages: int = 0
    launched: int = 0
    output: list[int] = field(default_factory=list)
    known: tuple[int, ...] = ()
    resumed: bool = False
    rereads: bool = False
    stopping: bool = False
    compressing: bool = False
    reading: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.reading = self.prompt
        if self.rereads:
            self.reading += self.known
            self.output = list(self.known)
            self.launched = len(self.known)

    def choose(self, ledger: PageLedger, waiting_pages: int) -> None:
        """Settles for good, where that is open, whether it gets the full cache."""
        if self.choice is None:
            return
        self.outcome = self.choice.outcome(self.reservation, ledger, waiting_pages)
        if self.outcome is AutoOutcome.FULL:
            self.reservation = self.choice.full

    @property
    def turn(self) -> tuple[bool, float]:
        """Sorts sequences into the order of their admission."""
        return not self.resumed, self.due

    @property
    def prompt_remaining(self) -> int:
        return len(self.reading) - self.prefilled

    @property
    def replaying(self) -> bool:
        """Whether it is not yet where it was when its worker died."""
        return len(self.output) < len(self.known)

    @property
    def forced(self) -> int | None:
        """The token that the step to be launched next yields whatever its logits are, or None."""
        return self.known[self.launched] if self.launched < len(self.known) else None

    @property
    def total_tokens(self) -> int:
        """Prompt and output at their longest."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def next_token(self) -> int:
        """The token that the next decode step feeds, once the step before it has ended."""
        return self.output[-1]

    @property
    def next_position(self) -> int:
        """Its logical position."""
        return len(self.prompt) + self.launched - 1

    @property
    def decodes(self) -> bool:
        """Whether the next step may run a token of it."""
        return self.stage is Stage.DECODE and not self.compressing and self.launched < self.max_new_tokens
