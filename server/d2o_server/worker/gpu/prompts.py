"""A step's prompts, put together so that few launches serve them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o.attention import AttentionRule, ScoreTarget
from d2o.kernels.column_sums_packed import PackedTargets, pack_targets
from d2o.kernels.prefill import choose_backend
from d2o_server.worker.gpu.device import upload

# Up to here the kernel for prompts side by side is as quick for one alone, and is launched in less of the host's time.
_PACKED_ALONE = 2048
# Up to here several prompts stand side by side although cuDNN is a little quicker for each: launched one by one they
# fill the device's queue, and the host is held there while the step before has tokens to tell.
_PACKED_TOGETHER = 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prompt's next tokens at ``begin`` to ``end`` of the step's; the first of them stands at position ``start``."""

    begin: int
    end: int
    start: int
    row: int
    scores: tuple[ScoreTarget | None, ...]

    @property
    def count(self) -> int:
        return self.end - self.begin

    @property
    def scored(self) -> int | None:
        """The first layer that adds to scores."""
        return next((layer for layer, target in enumerate(self.scores) if target is not None), None)

    @property
    def whole(self) -> bool:
        """Whether this is all of a prompt, and scores are wanted."""
        target = None if self.scored is None else self.scores[self.scored]
        return target is not None and self.count == target.prompt_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring chunks that one launch attends for: whole short prompts or their first tokens, or any one chunk.

    Attributes:
        tokens: where they stand among the step's.
        borders: [chunks + 1] int32 on the device, where each begins among them; None of one chunk.
        packed: where the scores of the whole prompts among them go, or None.
        apart: chunks whose scores are added one by one.
    """

    chunks: tuple[Chunk, ...]
    tokens: slice
    borders: Tensor | None
    packed: PackedTargets | None
    apart: tuple[Chunk, ...]

    @classmethod
    def of(cls, chunks: list[Chunk], device: torch.device) -> Batch:
        begin = chunks[0].begin
        whole = [chunk for chunk in chunks if chunk.whole]
        few = len(chunks) > 1 or chunks[0].count <= _PACKED_ALONE
        packs = few and len({chunk.scored for chunk in whole}) == 1
        packed = None
        if packs:
            layer = whole[0].scored or 0
            targets = [target for chunk in whole if (target := chunk.scores[layer]) is not None]
            packed = pack_targets(targets, [chunk.begin - begin for chunk in whole], layer=layer)
        borders = torch.tensor([0, *(chunk.end - begin for chunk in chunks)], dtype=torch.int32)
        return cls(
            tuple(chunks),
            slice(begin, chunks[-1].end),
            upload(borders, device) if len(chunks) > 1 else None,
            packed,
            tuple(chunk for chunk in chunks if chunk.scored is not None and not (packs and chunk.whole)),
        )


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """The step's prompts. ``rows``, ``slots``, ``positions``: [prompt tokens] int32, on the device.

    ``batches`` is filled once a step for each kind of layer.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    chunks: tuple[Chunk, ...]
    batches: dict[AttentionRule, list[Batch]] = field(default_factory=dict)

    def batched(self, rule: AttentionRule, dtype: torch.dtype, head_dim: int) -> list[Batch]:
        """The chunks as they are attended for under a rule."""
        found = self.batches.get(rule)
        if found is None:
            groups = _neighbours(self.chunks, dtype, head_dim, rule)
            found = self.batches[rule] = [Batch.of(group, self.rows.device) for group in groups]
        return found


def _neighbours(
    chunks: tuple[Chunk, ...], dtype: torch.dtype, head_dim: int, rule: AttentionRule
) -> Iterator[list[Chunk]]:
    """Chunks that torch's flash kernel takes side by side; every other chunk alone."""
    held: list[Chunk] = []
    for chunk in chunks:
        backend = choose_backend(dtype, head_dim, rule, chunk.count, 0)
        short = chunk.count <= _PACKED_TOGETHER
        packs = not chunk.start and (backend == "flash" or (backend == "cudnn" and short))
        if held and not packs:
            yield held
            held = []
        if packs:
            held.append(chunk)
        else:
            yield [chunk]
    if held:
        yield held
