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
    """One answer's text so far. ``matched`` is the stop string that ended it, if one did."""

    codec: TextCodec
    sampling: SamplingParams
    detokenizer: Detokenizer
    matcher: StopMatcher
    end_ids: tuple[int, ...]
    tokens: int = 0
    matched: str | None = None

    @classmethod
    def of(cls, codec: TextCodec, sampling: SamplingParams, end_ids: tuple[int, ...]) -> TextStream:
        return cls(codec, sampling, codec.detokenizer(), StopMatcher(sampling.stop_strings), end_ids)

    def push(self, new: Sequence[NewToken]) -> Chunk:
        """Takes new tokens, up to the one that completes a stop string, which no least length holds off."""
        text, ids = [], []
        for token in new:
            ids.append(token.token)
            hidden = token.token in self.sampling.stop_token_ids or token.token in self.end_ids
            scan = self.matcher.push("" if hidden else self.detokenizer.push((token.token,)))
            text.append(scan.emit)
            if scan.matched is not None:
                self.matched = scan.matched
                break
        self.tokens += len(ids)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.sampling.logprobs is not None:
            logprobs = tuple(self._logprob(token) for token in new[: len(ids)])
        return Chunk("".join(text), tuple(ids), logprobs)

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
