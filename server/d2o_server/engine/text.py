"""Text on its way out: tokens to text, with stop strings honoured across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from d2o_server.engine.messages import NewToken
from d2o_server.engine.stopping import StopMatcher
from d2o_server.engine.types import ChatMessage, Chunk, SamplingParams, TokenLogprob, TopLogprob


class Detokenizer(Protocol):
    """Turns one sequence's tokens into text, never half a character."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class TextCodec(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def has_chat_template(self) -> bool: ...

    end_of_text_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def render_chat(self, messages: Sequence[ChatMessage]) -> list[int]: ...

    def token_text(self, token_id: int) -> str: ...

    def detokenizer(self) -> Detokenizer: ...


@dataclass(slots=True)
class TextStream:
    """One answer's text so far. ``hidden`` tokens have none; ``matched`` is the stop string that ended it, if any."""

    codec: TextCodec
    sampling: SamplingParams
    detokenizer: Detokenizer
    matcher: StopMatcher
    hidden: frozenset[int]
    tokens: int = 0
    matched: str | None = None

    @classmethod
    def of(cls, codec: TextCodec, sampling: SamplingParams, end_ids: tuple[int, ...]) -> TextStream:
        hidden = frozenset((*sampling.stop_token_ids, *end_ids))
        return cls(codec, sampling, codec.detokenizer(), StopMatcher(sampling.stop_strings), hidden)

    def push(self, new: Sequence[NewToken]) -> Chunk:
        """Takes new tokens, up to the one that completes a stop string, which no least length holds off."""
        ids = tuple([token.token for token in new])
        if self.sampling.stop_strings:
            text, taken = self._scan(ids)
            ids = ids[:taken]
        else:
            text = self.detokenizer.push([token for token in ids if token not in self.hidden])
        self.tokens += len(ids)
        if self.sampling.logprobs is None:
            return Chunk(text, ids)
        return Chunk(text, ids, tuple(self._logprob(token) for token in new[: len(ids)]))

    def _scan(self, ids: Sequence[int]) -> tuple[str, int]:
        """Text that may be sent, and how many tokens were taken until a stop string was complete."""
        text = []
        for taken, token in enumerate(ids, start=1):
            scan = self.matcher.push("" if token in self.hidden else self.detokenizer.push((token,)))
            text.append(scan.emit)
            if scan.matched is not None:
                self.matched = scan.matched
                return "".join(text), taken
        return "".join(text), len(ids)

    def finish(self) -> str:
        """What was held back, once generation has ended without a stop string."""
        if self.matched is not None:
            return ""
        scan = self.matcher.push(self.detokenizer.finish())
        if scan.matched is not None:
            self.matched = scan.matched
            return scan.emit
        return scan.emit + self.matcher.finish()

    def _logprob(self, token: NewToken) -> TokenLogprob:
        top = tuple(TopLogprob(i, self.codec.token_text(i), value) for i, value in token.top)
        return TokenLogprob(token.token, self.codec.token_text(token.token), token.logprob or 0.0, top)
