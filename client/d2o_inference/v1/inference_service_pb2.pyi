from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CompressionPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_POLICY_UNSPECIFIED: _ClassVar[CompressionPolicy]
    COMPRESSION_POLICY_NONE: _ClassVar[CompressionPolicy]
    COMPRESSION_POLICY_D2O: _ClassVar[CompressionPolicy]
    COMPRESSION_POLICY_H2O: _ClassVar[CompressionPolicy]
    COMPRESSION_POLICY_STREAMING: _ClassVar[CompressionPolicy]
    COMPRESSION_POLICY_SNAPKV: _ClassVar[CompressionPolicy]
    COMPRESSION_POLICY_AUTO: _ClassVar[CompressionPolicy]

class MaxLoss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAX_LOSS_UNSPECIFIED: _ClassVar[MaxLoss]
    MAX_LOSS_LOW: _ClassVar[MaxLoss]
    MAX_LOSS_MEDIUM: _ClassVar[MaxLoss]
    MAX_LOSS_HIGH: _ClassVar[MaxLoss]

class MergeRule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MERGE_RULE_UNSPECIFIED: _ClassVar[MergeRule]
    MERGE_RULE_NONE: _ClassVar[MergeRule]
    MERGE_RULE_PAPER: _ClassVar[MergeRule]
    MERGE_RULE_AUTHORS: _ClassVar[MergeRule]
    MERGE_RULE_CONSERVE: _ClassVar[MergeRule]

class LayerBudgetRule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_BUDGET_RULE_UNSPECIFIED: _ClassVar[LayerBudgetRule]
    LAYER_BUDGET_RULE_UNIFORM: _ClassVar[LayerBudgetRule]
    LAYER_BUDGET_RULE_PAPER: _ClassVar[LayerBudgetRule]
    LAYER_BUDGET_RULE_VARIANCE: _ClassVar[LayerBudgetRule]
    LAYER_BUDGET_RULE_COVERAGE: _ClassVar[LayerBudgetRule]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_END_OF_TEXT: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class StreamState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STREAM_STATE_UNSPECIFIED: _ClassVar[StreamState]
    STREAM_STATE_WAITING: _ClassVar[StreamState]
    STREAM_STATE_PREFILL: _ClassVar[StreamState]
    STREAM_STATE_DECODE: _ClassVar[StreamState]
COMPRESSION_POLICY_UNSPECIFIED: CompressionPolicy
COMPRESSION_POLICY_NONE: CompressionPolicy
COMPRESSION_POLICY_D2O: CompressionPolicy
COMPRESSION_POLICY_H2O: CompressionPolicy
COMPRESSION_POLICY_STREAMING: CompressionPolicy
COMPRESSION_POLICY_SNAPKV: CompressionPolicy
COMPRESSION_POLICY_AUTO: CompressionPolicy
MAX_LOSS_UNSPECIFIED: MaxLoss
MAX_LOSS_LOW: MaxLoss
MAX_LOSS_MEDIUM: MaxLoss
MAX_LOSS_HIGH: MaxLoss
MERGE_RULE_UNSPECIFIED: MergeRule
MERGE_RULE_NONE: MergeRule
MERGE_RULE_PAPER: MergeRule
MERGE_RULE_AUTHORS: MergeRule
MERGE_RULE_CONSERVE: MergeRule
LAYER_BUDGET_RULE_UNSPECIFIED: LayerBudgetRule
LAYER_BUDGET_RULE_UNIFORM: LayerBudgetRule
LAYER_BUDGET_RULE_PAPER: LayerBudgetRule
LAYER_BUDGET_RULE_VARIANCE: LayerBudgetRule
LAYER_BUDGET_RULE_COVERAGE: LayerBudgetRule
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_END_OF_TEXT: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
STREAM_STATE_UNSPECIFIED: StreamState
STREAM_STATE_WAITING: StreamState
STREAM_STATE_PREFILL: StreamState
STREAM_STATE_DECODE: StreamState

class Prompt(_message.Message):
    __slots__ = ("text", "tokens", "chat")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    text: str
    tokens: TokenIds
    chat: ChatMessages
    def __init__(self, text: _Optional[str] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[ChatMessages, _Mapping]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class SamplingParameters(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ...) -> None: ...

class StoppingParameters(_message.Message):
    __slots__ = ("max_new_tokens", "min_new_tokens", "stop_strings", "stop_token_ids", "ignore_end_of_text")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_END_OF_TEXT_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    min_new_tokens: int
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_end_of_text: bool
    def __init__(self, max_new_tokens: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., stop_strings: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_end_of_text: _Optional[bool] = ...) -> None: ...

class Compression(_message.Message):
    __slots__ = ("policy", "ratio", "min_budget", "budget_tokens", "recent_share", "window_quota", "merge", "layer_budgets", "max_loss")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    MIN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECENT_SHARE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_QUOTA_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    LAYER_BUDGETS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOSS_FIELD_NUMBER: _ClassVar[int]
    policy: CompressionPolicy
    ratio: float
    min_budget: int
    budget_tokens: int
    recent_share: float
    window_quota: float
    merge: MergeRule
    layer_budgets: LayerBudgetRule
    max_loss: MaxLoss
    def __init__(self, policy: _Optional[_Union[CompressionPolicy, str]] = ..., ratio: _Optional[float] = ..., min_budget: _Optional[int] = ..., budget_tokens: _Optional[int] = ..., recent_share: _Optional[float] = ..., window_quota: _Optional[float] = ..., merge: _Optional[_Union[MergeRule, str]] = ..., layer_budgets: _Optional[_Union[LayerBudgetRule, str]] = ..., max_loss: _Optional[_Union[MaxLoss, str]] = ...) -> None: ...

class GenerateTextRequest(_message.Message):
    __slots__ = ("prompt", "sampling", "stopping", "compression", "logprobs", "priority")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    sampling: SamplingParameters
    stopping: StoppingParameters
    compression: Compression
    logprobs: int
    priority: int
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., stopping: _Optional[_Union[StoppingParameters, _Mapping]] = ..., compression: _Optional[_Union[Compression, _Mapping]] = ..., logprobs: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class GenerateTextResponse(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "started", "finished")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    started: GenerationStarted
    finished: GenerationFinished
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., started: _Optional[_Union[GenerationStarted, _Mapping]] = ..., finished: _Optional[_Union[GenerationFinished, _Mapping]] = ...) -> None: ...

class StreamGenerateTextRequest(_message.Message):
    __slots__ = ("prompt", "sampling", "stopping", "compression", "logprobs", "priority")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    sampling: SamplingParameters
    stopping: StoppingParameters
    compression: Compression
    logprobs: int
    priority: int
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., stopping: _Optional[_Union[StoppingParameters, _Mapping]] = ..., compression: _Optional[_Union[Compression, _Mapping]] = ..., logprobs: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class StreamGenerateTextResponse(_message.Message):
    __slots__ = ("started", "chunk", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: GenerationStarted
    chunk: GenerationChunk
    finished: GenerationFinished
    def __init__(self, started: _Optional[_Union[GenerationStarted, _Mapping]] = ..., chunk: _Optional[_Union[GenerationChunk, _Mapping]] = ..., finished: _Optional[_Union[GenerationFinished, _Mapping]] = ...) -> None: ...

class GenerationStarted(_message.Message):
    __slots__ = ("generation_id", "prompt_tokens", "reserved_pages", "compression", "budget_per_layer", "seed", "auto")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_PAGES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    BUDGET_PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    generation_id: str
    prompt_tokens: int
    reserved_pages: int
    compression: Compression
    budget_per_layer: int
    seed: int
    auto: bool
    def __init__(self, generation_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., reserved_pages: _Optional[int] = ..., compression: _Optional[_Union[Compression, _Mapping]] = ..., budget_per_layer: _Optional[int] = ..., seed: _Optional[int] = ..., auto: _Optional[bool] = ...) -> None: ...

class GenerationChunk(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_id", "token", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: str
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[str] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "token", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: str
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class GenerationFinished(_message.Message):
    __slots__ = ("finish_reason", "stop_string", "stop_token_id", "usage", "cache")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    stop_string: str
    stop_token_id: int
    usage: Usage
    cache: CacheFacts
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., cache: _Optional[_Union[CacheFacts, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "queue_seconds", "first_token_seconds", "total_seconds", "resumed")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    resumed: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., first_token_seconds: _Optional[float] = ..., total_seconds: _Optional[float] = ..., resumed: _Optional[int] = ...) -> None: ...

class CacheFacts(_message.Message):
    __slots__ = ("layers", "ratio_reached", "peak_pages", "compression_seconds")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    RATIO_REACHED_FIELD_NUMBER: _ClassVar[int]
    PEAK_PAGES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerCacheFacts]
    ratio_reached: float
    peak_pages: int
    compression_seconds: float
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerCacheFacts, _Mapping]]] = ..., ratio_reached: _Optional[float] = ..., peak_pages: _Optional[int] = ..., compression_seconds: _Optional[float] = ...) -> None: ...

class LayerCacheFacts(_message.Message):
    __slots__ = ("budget", "kept", "merged", "dropped")
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    budget: int
    kept: int
    merged: float
    dropped: float
    def __init__(self, budget: _Optional[int] = ..., kept: _Optional[int] = ..., merged: _Optional[float] = ..., dropped: _Optional[float] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("prompt", "with_text")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    WITH_TEXT_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    with_text: bool
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., with_text: _Optional[bool] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids", "tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[str]] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "architecture", "dtype", "layers", "compressible_layers", "query_heads", "kv_heads", "head_dim", "vocabulary_size", "max_model_len", "page_size", "total_pages", "page_bytes", "has_chat_template", "default_compression", "default_sampling", "default_max_new_tokens", "max_logprobs", "server_version", "end_of_text_ids", "auto_full_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSIBLE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    END_OF_TEXT_IDS_FIELD_NUMBER: _ClassVar[int]
    AUTO_FULL_TOKENS_FIELD_NUMBER: _ClassVar[int]
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
    default_sampling: SamplingParameters
    default_max_new_tokens: int
    max_logprobs: int
    server_version: str
    end_of_text_ids: _containers.RepeatedScalarFieldContainer[int]
    auto_full_tokens: int
    def __init__(self, model: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., layers: _Optional[int] = ..., compressible_layers: _Optional[int] = ..., query_heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., page_size: _Optional[int] = ..., total_pages: _Optional[int] = ..., page_bytes: _Optional[int] = ..., has_chat_template: _Optional[bool] = ..., default_compression: _Optional[_Union[Compression, _Mapping]] = ..., default_sampling: _Optional[_Union[SamplingParameters, _Mapping]] = ..., default_max_new_tokens: _Optional[int] = ..., max_logprobs: _Optional[int] = ..., server_version: _Optional[str] = ..., end_of_text_ids: _Optional[_Iterable[int]] = ..., auto_full_tokens: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ("max_streams", "with_layers")
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    WITH_LAYERS_FIELD_NUMBER: _ClassVar[int]
    max_streams: int
    with_layers: bool
    def __init__(self, max_streams: _Optional[int] = ..., with_layers: _Optional[bool] = ...) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("pages_total", "pages_free", "pages_used", "pages_reserved", "running", "waiting", "waiting_prompt_tokens", "draining", "workers", "logical_tokens", "physical_tokens", "read_tokens", "generated_tokens", "streams", "layers")
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    PAGES_RESERVED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    READ_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    pages_total: int
    pages_free: int
    pages_used: int
    pages_reserved: int
    running: int
    waiting: int
    waiting_prompt_tokens: int
    draining: bool
    workers: _containers.RepeatedCompositeFieldContainer[WorkerLoad]
    logical_tokens: int
    physical_tokens: float
    read_tokens: int
    generated_tokens: int
    streams: _containers.RepeatedCompositeFieldContainer[StreamLoad]
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    def __init__(self, pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_used: _Optional[int] = ..., pages_reserved: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_prompt_tokens: _Optional[int] = ..., draining: _Optional[bool] = ..., workers: _Optional[_Iterable[_Union[WorkerLoad, _Mapping]]] = ..., logical_tokens: _Optional[int] = ..., physical_tokens: _Optional[float] = ..., read_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., streams: _Optional[_Iterable[_Union[StreamLoad, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("index", "serving", "pages_total", "pages_free", "running", "restarts")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    index: int
    serving: bool
    pages_total: int
    pages_free: int
    running: int
    restarts: int
    def __init__(self, index: _Optional[int] = ..., serving: _Optional[bool] = ..., pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., running: _Optional[int] = ..., restarts: _Optional[int] = ...) -> None: ...

class StreamLoad(_message.Message):
    __slots__ = ("generation_id", "worker", "state", "prompt_tokens", "completion_tokens", "max_new_tokens", "reserved_pages", "budget_per_layer", "policy", "seconds")
    GENERATION_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_PAGES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    generation_id: str
    worker: int
    state: StreamState
    prompt_tokens: int
    completion_tokens: int
    max_new_tokens: int
    reserved_pages: int
    budget_per_layer: int
    policy: CompressionPolicy
    seconds: float
    def __init__(self, generation_id: _Optional[str] = ..., worker: _Optional[int] = ..., state: _Optional[_Union[StreamState, str]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., reserved_pages: _Optional[int] = ..., budget_per_layer: _Optional[int] = ..., policy: _Optional[_Union[CompressionPolicy, str]] = ..., seconds: _Optional[float] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("budget", "slots")
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    budget: float
    slots: int
    def __init__(self, budget: _Optional[float] = ..., slots: _Optional[int] = ...) -> None: ...
