"""What a request must pass before a worker hears of it: tokenized, within bounds, and its pages known."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from d2o.config import D2OConfig, Scope
from d2o_server import errors
from d2o_server.engine.auto import choice_of
from d2o_server.engine.loss_table import with_max_loss
from d2o_server.engine.memory import CacheShape, Demand, reserve
from d2o_server.engine.messages import AUTO_FULL_TOKENS, AutoTerms, Submit
from d2o_server.engine.priority import check_priority, due
from d2o_server.engine.text import TextCodec
from d2o_server.engine.types import (
    ChatMessage,
    Compression,
    GenerationRequest,
    ModelInfo,
    Prompt,
    SamplingParams,
    settled,
)
from d2o_server.engine.validation import validate

_LONGEST_PROMPT_CHARACTERS_PER_TOKEN = 64
_TOKENIZER_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDefaults:
    """What applies where a request is silent, and the engine's bounds.

    With ``tensor_parallel`` above 1 no process has all of a layer's heads: they cannot share a choice or threshold.
    Requests in auto get the full cache up to ``auto_full_tokens``, where there is room.
    """

    compression: Compression = D2OConfig()
    auto_full_tokens: int = AUTO_FULL_TOKENS
    sampling: SamplingParams = SamplingParams(max_new_tokens=256)
    max_logprobs: int = 20
    tensor_parallel: int = 1


class Admission:
    """Turns requests into messages for a worker, and refuses those that can never succeed: nothing is reserved yet."""

    def __init__(self, codec: TextCodec, info: ModelInfo, shape: CacheShape, defaults: EngineDefaults) -> None:
        self._codec, self._info, self._shape, self._defaults = codec, info, shape, defaults
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Ends the tokenizer's threads."""
        self._threads.shutdown(wait=False)

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids; text is tokenized off the event loop.

        Raises:
            InvalidRequest: the prompt is empty, far too long, outside the vocabulary, or no valid conversation.
        """
        if isinstance(prompt, str):
            self._check_length("prompt.text", len(prompt))
            return _not_empty("prompt.text", await self._off_loop(partial(self._codec.encode, prompt)))
        if prompt and isinstance(prompt[0], ChatMessage):
            messages = tuple(item for item in prompt if isinstance(item, ChatMessage))
            self._check_length("prompt.chat.messages", sum(len(message.content) for message in messages))
            return _not_empty("prompt.chat", await self._off_loop(partial(self._codec.render_chat, messages)))
        ids = tuple(item for item in prompt if isinstance(item, int))
        vocabulary = self._info.vocabulary_size
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise errors.InvalidRequest("prompt.tokens.ids", wrong, f"token ids in [0, {vocabulary - 1}]")
        return _not_empty("prompt.tokens", ids)

    def _check_length(self, field: str, characters: int) -> None:
        """Refuses what would only be tokenized to learn that it is far too long."""
        most = self._info.max_model_len * _LONGEST_PROMPT_CHARACTERS_PER_TOKEN
        if characters > most:
            raise errors.InvalidRequest(field, f"{characters} characters", f"at most {most} characters")

    async def _off_loop(self, encode: Callable[[], list[int]]) -> tuple[int, ...]:
        return tuple(await asyncio.get_running_loop().run_in_executor(self._threads, encode))

    async def prepare(self, request: GenerationRequest) -> tuple[Submit, Demand]:
        """The message that submits the request, and the pages that it needs.

        Raises:
            InvalidRequest: a field is out of bounds, or the whole pool could not hold the request.
            DeadlineExceeded: its time was up when it came, or before it was tokenized.
        """
        arrived = time.monotonic()
        if request.deadline is not None and request.deadline <= arrived:
            raise errors.DeadlineExceeded("the deadline had passed when the request arrived")
        sampling = request.sampling
        default = self._defaults.sampling.max_new_tokens or 1
        validate(
            sampling,
            vocabulary_size=self._info.vocabulary_size,
            max_logprobs=self._info.max_logprobs,
            default_max_new_tokens=default,
        )
        check_priority(request.priority)
        config, auto = self._compression(request)
        self._check_heads(config)
        prompt = await self.tokenize(request.prompt)
        if request.deadline is not None and request.deadline <= time.monotonic():
            raise errors.DeadlineExceeded("the deadline passed while the prompt was tokenized")
        max_new_tokens = self._fit_length(len(prompt), sampling, default)
        message = Submit(
            id=secrets.token_hex(8),
            prompt=prompt,
            sampling=replace(sampling, max_new_tokens=max_new_tokens),
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            config=config,
            auto=auto,
            end_ids=self._info.end_of_text_ids,
            max_new_tokens=max_new_tokens,
            due=due(arrived, request.priority),
        )
        return message, self._demand(message)

    def _compression(self, request: GenerationRequest) -> tuple[D2OConfig, AutoTerms | None]:
        config, auto = settled(request.compression or self._defaults.compression)
        if request.max_loss is not None:
            config = with_max_loss(config, request.max_loss)
        return config, AutoTerms(self._defaults.auto_full_tokens) if auto else None

    def _check_heads(self, config: D2OConfig) -> None:
        if self._defaults.tensor_parallel == 1 or not config.enabled:
            return
        for name in ("heads", "threshold_scope"):
            if (given := getattr(config, name)) is not Scope.HEAD:
                allowed = f"{Scope.HEAD} where the model's heads are split over {self._defaults.tensor_parallel} ranks"
                raise errors.InvalidRequest(f"compression.{name}", given, allowed)

    def _fit_length(self, prompt_tokens: int, sampling: SamplingParams, default: int) -> int:
        most = self._info.max_model_len - prompt_tokens
        if most < 1:
            raise errors.InvalidRequest(
                "prompt", f"{prompt_tokens} tokens", f"at most {self._info.max_model_len - 1} tokens"
            )
        if sampling.max_new_tokens is None:
            return min(default, most)
        if sampling.max_new_tokens > most:
            raise errors.InvalidRequest(
                "stopping.max_new_tokens",
                sampling.max_new_tokens,
                f"at most {most} (context of {self._info.max_model_len} tokens less a prompt of {prompt_tokens})",
            )
        return sampling.max_new_tokens

    def _demand(self, message: Submit) -> Demand:
        prompt_tokens = len(message.prompt)
        pages = reserve(self._shape, message.config, prompt_tokens, message.max_new_tokens).pages
        if pages > self._info.total_pages:
            raise errors.InvalidRequest(
                "prompt",
                f"{prompt_tokens} tokens, which need {pages} cache pages",
                f"requests of at most {self._info.total_pages} pages; shorten the prompt or the output, or compress "
                "more",
            )
        choice = choice_of(self._shape, message)
        return Demand(pages, choice.full.pages if choice is not None and choice.permitted else pages)


def _not_empty(field: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    if not ids:
        raise errors.InvalidRequest(field, "an empty prompt", "at least one token")
    return ids
