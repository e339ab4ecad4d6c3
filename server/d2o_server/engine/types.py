"""The engine's vocabulary: what a request asks for and what comes back. No tensors, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from d2o.config import D2OConfig, Policy


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when they end. Bounds are checked in ``engine/validation.py``.

    ``logprobs`` is None for none, or how many of the most probable tokens are reported beside the sampled one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_end_of_text: bool = False
    logprobs: int | None = None


# The highest priority, and that of requests which say nothing; the lowest is 0.
MAX_PRIORITY = 9
DEFAULT_PRIORITY = 5

Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class AutoCompression:
    """The full cache or ``config``, as room and length allow when the request is admitted."""

    config: D2OConfig


Compression = D2OConfig | AutoCompression


def settled(compression: Compression) -> tuple[D2OConfig, bool]:
    """The configuration that compresses, and whether auto may choose the full cache instead."""
    return (compression.config, True) if isinstance(compression, AutoCompression) else (compression, False)


def policy_name(compression: Compression) -> str:
    """What users call it: a policy's name, or auto."""
    return "auto" if isinstance(compression, AutoCompression) else str(compression.policy)


class MaxLoss(StrEnum):
    """How much quality a request may lose; :mod:`.loss_table` has the ratio of each."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class AutoOutcome(StrEnum):
    """What became of a request in auto: the full cache, or compressed for its length or because pages are scarce."""

    FULL = "full"
    LONG = "long"
    PAGES = "pages"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation. ``prompt`` is text, token ids or chat messages.

    ``compression`` None takes the server's default; ``max_loss`` replaces its ratio and absolute budget. ``deadline``
    is a reading of ``time.monotonic``; ``client_id`` is the caller's own request id and is only logged. ``owner`` is
    whose pages it counts among, which must not be more than ``max_pages`` at once; 0 is any number.
    """

    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    compression: Compression | None = None
    max_loss: MaxLoss | None = None
    deadline: float | None = None
    client_id: str | None = None
    priority: int = DEFAULT_PRIORITY
    owner: str | None = None
    max_pages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request is admitted. ``budget_per_layer`` is 0 with the full cache; ``auto``: that policy chose another."""

    generation_id: str
    prompt_tokens: int
    reserved_pages: int
    compression: D2OConfig
    budget_per_layer: int
    seed: int
    auto: bool = False


@dataclass(frozen=True, slots=True)
class TopLogprob:
    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text and the tokens it came from; text lags while a character or a stop string is incomplete."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class FinishReason(StrEnum):
    END_OF_TEXT = "end_of_text"
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, seconds since the request arrived, and how often another worker went on where one had died."""

    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    resumed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """One layer's share: counts a KV head, kept + merged + dropped = tokens seen. ``budget`` 0: never compressed."""

    budget: int
    kept: int
    merged: float
    dropped: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFacts:
    """What became of a sequence's tokens. ``compression_seconds`` has those of the prompt and of decoding."""

    layers: tuple[LayerCache, ...]
    ratio_reached: float
    peak_pages: int
    compression_seconds: float
    prompt_compression_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    reason: FinishReason
    usage: Usage
    cache: CacheFacts
    stop_string: str | None = None
    stop_token_id: int | None = None


Event = Started | Chunk | Finished


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt. ``texts`` is empty unless it was asked for."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The model, its limits and the server's defaults. ``default_sampling`` has every default filled in.

    With auto, requests of more than ``auto_full_tokens`` tokens are always compressed.
    """

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
    auto_full_tokens: int
    default_sampling: SamplingParams
    max_logprobs: int
    server_version: str
    end_of_text_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    index: int
    serving: bool
    pages_total: int
    pages_free: int
    running: int
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One layer over all running sequences: ``slots`` in use, and the mean ``budget`` of those compressed, 0: none."""

    budget: float
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLoad:
    """One request that has not ended. ``state``: waiting, prefill or decode; ``seconds`` since it was submitted.

    ``policy`` and ``budget_per_layer`` are those in force once it is admitted; a budget of 0 is the full cache. The
    policy is None for auto, which has not chosen yet.
    """

    generation_id: str
    worker: int
    state: str
    prompt_tokens: int
    completion_tokens: int
    max_new_tokens: int
    reserved_pages: int
    policy: Policy | None
    budget_per_layer: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Pages: used + reserved + free = total, where reserved pages are promised but not filled yet.

    ``logical_tokens`` is what running sequences have read and written, ``physical_tokens`` the slots that an average
    layer holds of it; these and ``layers`` are up to half a second old. ``read_tokens`` and ``generated_tokens`` count
    since the start: prompt tokens of admitted requests, and new tokens.
    """

    pages_total: int
    pages_free: int
    pages_used: int
    pages_reserved: int
    running: int
    waiting: int
    waiting_prompt_tokens: int
    draining: bool
    workers: tuple[WorkerLoad, ...] = field(default=())
    logical_tokens: int = 0
    physical_tokens: float = 0.0
    read_tokens: int = 0
    generated_tokens: int = 0
    layers: tuple[LayerLoad, ...] = ()
