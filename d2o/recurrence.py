"""What a prompt's end leads to expect: where it was said before, what followed then is what will be looked at next.

A text that repeats an earlier part of itself needs all of that part, which nothing has looked at yet when the prompt is
compressed. Attention can't tell; the tokens do (ours; the same look-up drafts tokens in prompt lookup decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o.config import D2OConfig

# The prompt's end must be that long where it is found again; or only so long, where it is found twice and what follows
# is the same for a while: a passage that was repeated before.
_LONG_MATCH = 8
_SHORT_MATCH = 4
_SAME_AFTER = 32
# Longer matches are all as good. Of a text that says little but the same, the last places are looked at.
_LONGEST_MATCH = 64
_MOST_CANDIDATES = 1024
_MOST_PLACES = 64
# How much attention is expected, in units of what a token receives on average. More did no better, and a slot that is
# in vain should not outlive the ones that are looked at.
_WEIGHT = 4.0


def expected_slots(tokens: Sequence[int], most: int) -> list[int]:
    """The slots of a prompt that followed on an earlier occurrence of its end, at most ``most``, ascending.

    Longer matches are served first, and of equally long ones the later.
    """
    if most < 1 or len(tokens) <= _SHORT_MATCH:
        return []
    expected: set[int] = set()
    for place in _places(torch.tensor(tokens)):
        following = (slot for slot in range(place + 1, len(tokens)) if slot not in expected)
        expected.update(slot for slot, _ in zip(following, range(most - len(expected)), strict=False))
    return sorted(expected)


def slots_to_expect(tokens: Sequence[int], budget: int, config: D2OConfig) -> list[int]:
    """:func:`expected_slots`, as many as ``config.recurrence_share`` of a layer's average ``budget`` of slots."""
    return expected_slots(tokens, int(config.recurrence_share * budget))


def expect(window: Tensor, slots: Sequence[int], group: int, config: D2OConfig) -> None:
    """Adds to a prompt's window scores, in place, the attention that expected slots have not received yet.

    Args:
        window: ``[rows, kv_heads, tokens]`` float32, attention summed over the last ``config.window_queries`` prompt
            queries and the group.
        slots: :func:`slots_to_expect` of the prompt.
        group: query heads of a KV head.
    """
    if not slots:
        return
    tokens = window.shape[-1]
    queries = min(config.window_queries, tokens)
    # Pinned, so that the host does not wait for what the device does.
    there = torch.tensor(slots, pin_memory=window.is_cuda).to(window.device, non_blocking=True)
    window[..., there] += _WEIGHT * queries * group / tokens


def _places(ids: Tensor) -> list[int]:
    """Slots at which the prompt's end ends as well, and that count: the longer the match and the later, the sooner."""
    places = (ids[:-1] == ids[-1]).nonzero()[:, 0]
    for back in range(1, _SHORT_MATCH):
        places = places[places >= back]
        places = places[ids[places - back] == ids[-1 - back]]
    places = places[-_MOST_CANDIDATES:]
    matched = torch.full_like(places, _SHORT_MATCH)
    matching = torch.ones_like(places, dtype=torch.bool)
    for back in range(_SHORT_MATCH, min(_LONGEST_MATCH, len(ids))):
        matching &= (places >= back) & (ids[(places - back).clamp_min(0)] == ids[-1 - back])
        if not matching.any():
            break
        matched += matching
    # No two places have the same key: a match is shorter than the prompt.
    best = (matched * len(ids) + places).topk(min(_MOST_PLACES, len(places))).indices
    found = list(zip(places[best].tolist(), matched[best].tolist(), strict=True))
    after = [ids[place + 1 : place + 1 + _SAME_AFTER].tolist() for place, _ in found]
    return [
        place
        for (place, length), follows in zip(found, after, strict=True)
        if length >= _LONG_MATCH or (len(follows) == _SAME_AFTER and after.count(follows) > 1)
    ]
