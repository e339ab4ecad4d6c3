"""First requests of our own: the next one finds everything in place, and a broken model is found now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d2o.config import D2OConfig, Policy
from d2o_server.engine.messages import Failed, Submit
from d2o_server.engine.types import SamplingParams
from d2o_server.errors import StartupError
from d2o_server.worker.core import WorkerCore

PROMPT, OUTPUT = 4, 2
"""Tokens of the shortest warm-up: every pool must hold them."""

_NONE = D2OConfig(policy=Policy.NONE)


@dataclass(frozen=True, slots=True)
class Trial:
    """A request of ``prompt`` tokens that makes ``output`` more."""

    prompt: int = PROMPT
    output: int = OUTPUT
    config: D2OConfig = _NONE

    @property
    def tokens(self) -> int:
        return self.prompt + self.output


def trial_id(number: int) -> str:
    """What the trial that was submitted as so many-th is called, from 0."""
    return f"warm-up {number}"


def warm_up(core: WorkerCore, trial: Trial = Trial()) -> None:
    """Runs a first request.

    Raises:
        StartupError: the model could not.
    """
    for failure in try_together(core, [trial]):
        raise StartupError(f"the model failed its first forward pass: {failure.message}")


def try_together(core: WorkerCore, trials: Sequence[Trial]) -> list[Failed]:
    """Runs these requests at once, to their end; returns those that failed."""
    vocabulary = core.runner.vocabulary_size
    for number, trial in enumerate(trials):
        core.handle(
            Submit(
                id=trial_id(number),
                prompt=tuple(index % vocabulary for index in range(trial.prompt)),
                sampling=SamplingParams(ignore_end_of_text=True),
                seed=0,
                config=trial.config,
                end_ids=(),
                max_new_tokens=trial.output,
            )
        )
    failed: list[Failed] = []
    while core:
        failed += core.step().failed
    return failed
