"""What comes back: frozen values, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from d2o_client._options import Compression, Policy


class FinishReason(StrEnum):
    """Why generation ended. ``UNKNOWN``: a newer server's reason that this client has no name for."""

    END_OF_TEXT = "end_of_text"
    STOP = "stop"
    LENGTH = "length"
    UNKNOWN = "unknown"


class HealthStatus(StrEnum):
    """The states of grpc.health.v1."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most probable tokens at a place."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The sampled token's log probability, and those of the most probable ones."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Facts known once the request is admitted. ``compression`` is the policy in force.

    ``reserved_pages`` are cache pages, for the whole life of the request; ``budget_per_layer`` is a layer's
    average budget in slots, 0 with the full cache; ``seed`` makes the answer again; ``auto``: it chose the policy.
    """

    generation_id: str
    prompt_tokens: int
    reserved_pages: int
    compression: Compression
    budget_per_layer: int
    seed: int
    auto: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text and the tokens it came from; text lags while a character or a stop string is incomplete."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, and seconds since the request arrived at the server.

    ``resumed``: how often a worker of the server died while it ran the request and another went on with it.
    """

    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    resumed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """One layer's share, counted per KV head: kept + merged + dropped = tokens seen. ``budget`` 0: no compression."""

    budget: int
    kept: int
    merged: float
    dropped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFacts:
    """What became of the sequence's tokens in the cache.

    ``ratio_reached``: slots held at the end over slots that the full cache would hold; ``peak_pages``: most pages
    held at once; ``compression_seconds``: time spent compressing.
    """

    layers: tuple[LayerCache, ...]
    ratio_reached: float
    peak_pages: int
    compression_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How generation ended. ``stop_string`` or ``stop_token_id`` is set where one of them ended it."""

    reason: FinishReason
    usage: Usage
    cache: CacheFacts
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer, with what was known at its start and at its end."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    started: Started
    finished: Finished

    @property
    def finish_reason(self) -> FinishReason:
        """Why generation ended."""
        return self.finished.reason

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended generation, if one did."""
        return self.finished.stop_string

    @property
    def stop_token_id(self) -> int | None:
        """The stop token that ended generation, if one did."""
        return self.finished.stop_token_id

    @property
    def usage(self) -> Usage:
        """Token counts and the server's timings."""
        return self.finished.usage

    @property
    def cache(self) -> CacheFacts:
        """What became of the tokens in the cache."""
        return self.finished.cache


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt. ``texts`` is empty unless it was asked for."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """A server's sampling defaults; None where it has none."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The model, its limits and the server's defaults. ``max_model_len`` counts prompt and output together."""

    model: str
    architecture: str
    dtype: str
    layers: int
    compressible_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    max_model_len: int
    page_size: int
    total_pages: int
    page_bytes: int
    has_chat_template: bool
    default_compression: Compression
    default_sampling: Sampling
    default_max_new_tokens: int
    max_logprobs: int
    server_version: str
    end_of_text_ids: tuple[int, ...]
    auto_full_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """One worker's cache pages and running requests."""

    index: int
    serving: bool
    pages_total: int
    pages_free: int
    running: int
    restarts: int = 0


class StreamState(StrEnum):
    """Where a request stands. ``UNKNOWN``: a newer server's state that this client has no name for."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLoad:
    """One request that has not ended; ``seconds`` since it was submitted.

    ``reserved_pages`` and ``budget_per_layer`` are 0 until it is admitted; a budget of 0 is the full cache. The
    ``policy`` auto has not chosen yet.
    """

    generation_id: str
    worker: int
    state: StreamState
    prompt_tokens: int
    completion_tokens: int
    max_new_tokens: int
    reserved_pages: int
    budget_per_layer: int
    policy: Policy | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One layer over all running requests: slots in use, and the mean budget of compressed ones; 0: none is."""

    budget: float
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Pages and requests at one moment: used + reserved + free = total; reserved ones are promised, not filled.

    ``logical_tokens`` is what running requests have read and written, ``physical_tokens`` the slots that an average
    layer holds of it. ``read_tokens`` (of admitted prompts) and ``generated_tokens`` count since the server's start.
    ``streams`` and ``layers`` are empty unless they were asked for.
    """

    pages_total: int
    pages_free: int
    pages_used: int
    pages_reserved: int
    running: int
    waiting: int
    waiting_prompt_tokens: int
    draining: bool
    workers: tuple[WorkerLoad, ...] = ()
    logical_tokens: int = 0
    physical_tokens: float = 0.0
    read_tokens: int = 0
    generated_tokens: int = 0
    streams: tuple[StreamLoad, ...] = ()
    layers: tuple[LayerLoad, ...] = ()
