"""Runs one prompt under many cache policies at once and sees every step's logits.

Model, pool, caches, scheduler and runner are the worker's own. A prompt is read once: each policy's sequence is given
a copy of its keys, values and scores, reads the last token itself, and from there on is compressed, evicts and decodes
like any request. The continuation is forced, as when a stream is resumed after its worker died.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.trace import OwnWords, Trace
from d2o.config import D2OConfig, Policy
from d2o_server.engine.memory import reserve
from d2o_server.engine.messages import NewToken, Submit, WorkerSettings
from d2o_server.engine.scheduler import PrefillSlice, StepPlan
from d2o_server.engine.sequence import Sequence
from d2o_server.engine.types import CacheFacts, SamplingParams
from d2o_server.models.describe import describe
from d2o_server.models.source import resolve
from d2o_server.worker.build import build_worker
from d2o_server.worker.loader import load_config
from d2o_server.worker.prompt_scores import PromptScores
from d2o_server.worker.runner import Scored

FULL = D2OConfig(policy=Policy.NONE)
_GREEDY = SamplingParams(ignore_end_of_text=True, logprobs=0)
_DRAWN = SamplingParams(temperature=0.8, ignore_end_of_text=True, logprobs=0)
_PAGE_SIZE = 16
_CHUNK = 512
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to keep a cache. ``scrambled``: the prompt's scores change places at random, which must cost much.

    ``bits``: the prompt's keys and values are rounded to so many, by one scale a token and head.
    """

    name: str
    config: D2OConfig
    scrambled: bool = False
    bits: int | None = None


class Probe:
    """A model with room for a prompt and ``contenders`` continuations of it, ``tokens`` tokens at most together.

    On a GPU it is the worker's kernels that read, compress, evict and decode.
    """

    def __init__(
        self, model: str, *, dtype: str, threads: int, tokens: int, contenders: int, device: str = "cpu"
    ) -> None:
        _keep_large_blocks()
        layers = describe(load_config(resolve(model))).layers
        settings = WorkerSettings(
            model=model,
            dtype=dtype,
            device=device,
            index=0,
            tensor_parallel=1,
            threads=threads,
            page_size=_PAGE_SIZE,
            num_pages=layers * (contenders + 2) * -(-tokens // _PAGE_SIZE),
            memory_fraction=0.5,
            gpu_memory_utilization=0.9,
            max_model_len=tokens,
            max_sequences=contenders + 2,
            prefill_tokens=_CHUNK,
            graphs=device != "cpu",
            compile=False,
            compile_cache=None,
            check_integrity=False,
        )
        self.core = build_worker(settings, lambda _: None).core
        self.runner, self.caches = self.core.runner, self.core.runner.caches
        self.contenders = contenders

    @torch.inference_mode()
    def run(self, prompt: Several[int], continuation: Several[int], contenders: Several[Contender]) -> list[Trace]:
        """The traces of ``contenders`` on one continuation, in their order.

        Raises:
            ValueError: the prompt is shorter than two tokens or the continuation is empty.
        """
        if len(prompt) < 2 or not continuation:
            raise ValueError(
                f"prompt, continuation: got {len(prompt)} and {len(continuation)} tokens, allowed are at least 2 and 1"
            )
        watched = _Watch(tuple(continuation))
        self.runner.watch = watched
        full = Contender(name="full", config=FULL)
        others = sorted((each for each in contenders if each.name != full.name), key=_reading)
        traces: dict[str, Trace] = {}
        try:
            for together in self._groups(full, others):
                traces |= self._run_together(tuple(prompt), tuple(continuation), together, watched)
        finally:
            self.runner.watch = None
        return [traces[contender.name] for contender in contenders]

    @torch.inference_mode()
    def greedy(self, prompt: Several[int], tokens: int) -> tuple[int, ...]:
        """The ``tokens`` tokens that the full cache says after a prompt, past any end of text."""
        asked = Submit(
            id="greedy",
            prompt=tuple(prompt),
            sampling=SamplingParams(temperature=0.0, ignore_end_of_text=True),
            seed=0,
            config=FULL,
            end_ids=(),
            max_new_tokens=tokens,
        )
        self.core.handle(asked)
        said: list[int] = []
        while self.core:
            report = self.core.step()
            if report.failed:
                raise RuntimeError(f"greedy: {report.failed[0].message}")
            said += [each.token for each in report.tokens]
        return tuple(said)

    @torch.inference_mode()
    def own_words(
        self, prompt: Several[int], tokens: int, contenders: Several[Contender], samples: int
    ) -> list[list[OwnWords]]:
        """What each contender says after a prompt, ``samples`` times, drawn at temperature 0.8 past any end of text."""
        drawn = [(each, f"{each.name} {sample}", sample) for each in contenders for sample in range(samples)]
        for contender, name, sample in drawn:
            asked = Submit(
                id=name,
                prompt=tuple(prompt),
                sampling=_DRAWN,
                seed=sample,
                config=contender.config,
                end_ids=(),
                max_new_tokens=tokens,
            )
            self.core.handle(asked)
        said: dict[str, list[NewToken]] = {name: [] for _, name, _ in drawn}
        slots: dict[str, float] = {}
        while self.core:
            report = self.core.step()
            if report.failed:
                raise RuntimeError(f"{report.failed[0].id}: {report.failed[0].message}")
            for token in report.tokens:
                said[token.id].append(token)
            slots |= {each.id: self._held(each.facts) for each in report.ended}
        words = [
            OwnWords(
                tokens=tuple(each.token for each in said[name]),
                loss=-torch.tensor([each.logprob for each in said[name]]),
                slots=slots[name],
            )
            for _, name, _ in drawn
        ]
        return [words[first : first + samples] for first in range(0, len(words), samples)]

    def _held(self, facts: CacheFacts) -> float:
        """Slots that a layer of the whole context held at the end, on average."""
        layers = zip(facts.layers, self.caches.shape.windows, strict=True)
        held = [layer.kept for layer, window in layers if not window]
        return sum(held) / len(held)

    def _groups(self, full: Contender, others: list[Contender]) -> Iterator[list[Contender]]:
        """What runs together: contenders that one reading serves, as many as have room; the full cache first."""
        together = [full]
        for each in others:
            unlike = together != [full] and _reading(together[-1]) != _reading(each)
            if unlike or len(together) == self.contenders:
                yield together
                together = []
            together.append(each)
        yield together

    def _run_together(
        self, prompt: tuple[int, ...], known: tuple[int, ...], contenders: Several[Contender], watched: _Watch
    ) -> dict[str, Trace]:
        """One reading of the prompt and its copies, of which a first full one is what divergence is measured from."""
        parent = self._sequence("parent", prompt, known, _reader(contenders))
        self.runner.open(parent)
        self._read(parent)
        copies = [self._sequence(each.name, prompt, known, each.config) for each in contenders]
        for copy in copies:
            self.core.scheduler.add(copy)
        self.core.admit()
        for copy, contender in zip(copies, contenders, strict=True):
            self._fork(parent, copy, contender)
        self.runner.discard(parent)
        while any(copy.launched < len(known) for copy in copies):
            report = self.core.step()
            if report.failed:
                raise RuntimeError(f"{report.failed[0].id}: {report.failed[0].message}")
        traces = {}
        for copy in copies:
            facts = self.runner.close(copy)
            self.core.scheduler.remove(copy)
            traces[copy.id] = watched.trace(copy.id, self._held(facts))
        return traces

    def _read(self, parent: Sequence) -> None:
        """Reads all of the prompt but its last token, which each copy reads itself."""
        tokens = len(parent.prompt) - 1
        for start in range(0, tokens, _CHUNK):
            plan = StepPlan((), (PrefillSlice(parent, start, min(_CHUNK, tokens - start)),))
            self.runner.launch(plan, Scored())
            self.runner.compress(plan)

    def _sequence(self, name: str, prompt: tuple[int, ...], known: tuple[int, ...], config: D2OConfig) -> Sequence:
        reservation = reserve(self.core.shape, config, len(prompt), len(known))
        return Sequence(
            id=name,
            prompt=prompt,
            sampling=_GREEDY,
            seed=0,
            config=config,
            end_ids=(),
            max_new_tokens=len(known),
            reservation=reservation,
            known=known,
        )

    def _fork(self, parent: Sequence, copy: Sequence, contender: Contender) -> None:
        """Gives ``copy`` all of the prompt but its last token, as if it had read it itself."""
        source, target = self.runner.running[parent.id].cache, self.runner.running[copy.id].cache
        pool, read = self.caches.pool, len(parent.prompt) - 1
        self.caches.append(torch.tensor([target.row]), torch.tensor([read]))
        layers, slots = torch.arange(pool.layers)[:, None], torch.arange(read)
        old = pool.slot_rows(layers, torch.tensor(source.row), slots).flatten().to(pool.device)
        new = pool.slot_rows(layers, torch.tensor(target.row), slots).flatten().to(pool.device)
        for store in (pool.k, pool.v):
            flat = store.view(-1, pool.head_dim)
            flat[new] = flat[old] if contender.bits is None else rounded(flat[old], contender.bits)
        # What kernels write beside each key.
        pool.position.view(-1)[new] = pool.position.view(-1)[old]
        pool.score.view(-1)[new] = 0.0
        pool.bias.view(-1)[new] = 0.0
        self.caches.targets(target)
        if target.scores is not None and source.scores is not None:
            _copy_scores(source.scores, target.scores, contender.scrambled)
        copy.prefilled = read


def _keep_large_blocks() -> None:
    """What the server does for its workers with variables of the environment (docs/adr/0006): glibc's mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def rounded(values: Tensor, bits: int) -> Tensor:
    """``values`` [n, head_dim] as whole multiples of each row's own scale, of ``bits`` bits with the sign."""
    most = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) / most
    near: Tensor = (values / scale).round() * scale
    return near


def _copy_scores(source: PromptScores, target: PromptScores, scrambled: bool) -> None:
    tokens = source.received.shape[-1]
    order = torch.arange(tokens)
    if scrambled:
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))
    order = order.to(source.received.device)
    target.received.copy_(source.received[..., order])
    if target.window is not None and source.window is not None:
        target.window.copy_(source.window[..., order])


def _reading(contender: Contender) -> tuple[str, int]:
    """What the prompt must be read with: contenders that agree can share one reading."""
    config = contender.config
    return (str(config.score_queries), config.window_queries or 32)


def _reader(contenders: Several[Contender]) -> D2OConfig:
    """A policy whose reading counts all the scores that any of the contenders wants."""
    config = contenders[-1].config
    return D2OConfig(budget_tokens=1, score_queries=config.score_queries, window_queries=config.window_queries or 32)


class _Watch:
    """Turns the logits of every step into losses, hits and divergences, row by row."""

    def __init__(self, known: tuple[int, ...]) -> None:
        self._known = known
        self._reference: list[Tensor] = []
        self._loss: dict[str, list[float]] = {}
        self._hit: dict[str, list[bool]] = {}
        self._divergence: dict[str, list[float]] = {}

    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> None:
        found = torch.log_softmax(logits.float(), -1)
        for row, sequence in enumerate(sequences):
            if sequence.id == "full" and sequence.launched == len(self._reference):
                self._reference.append(found[row].clone())
        steps = [sequence.launched for sequence in sequences]
        known = torch.tensor([self._known[step] for step in steps], device=found.device)
        full = torch.stack([self._reference[step] for step in steps])
        loss = -found.gather(-1, known[:, None])[:, 0]
        divergence = (full.exp() * (full - found)).sum(-1)
        numbers = zip(loss.tolist(), (found.argmax(-1) == known).tolist(), divergence.tolist(), strict=True)
        for sequence, (lost, hit, diverged) in zip(sequences, numbers, strict=True):
            self._loss.setdefault(sequence.id, []).append(lost)
            self._hit.setdefault(sequence.id, []).append(hit)
            self._divergence.setdefault(sequence.id, []).append(diverged)

    def trace(self, name: str, slots: float) -> Trace:
        return Trace(
            loss=torch.tensor(self._loss[name]),
            hit=torch.tensor(self._hit[name]),
            divergence=torch.tensor(self._divergence[name]),
            slots=slots,
        )
