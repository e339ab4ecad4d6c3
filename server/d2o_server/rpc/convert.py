"""Protobuf to the engine's dataclasses and back: no message of the wire passes this file.

Requests are validated here, field by field: every refusal is an InvalidRequest that names the proto field. What a
request leaves unset takes the default that GetModelInfo reports.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from d2o_inference.v1 import inference_service_pb2 as pb
from d2o_server.engine.types import (
    DEFAULT_PRIORITY,
    MAX_PRIORITY,
    CacheFacts,
    ChatMessage,
    Chunk,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Load,
    ModelInfo,
    Prompt,
    SamplingParams,
    Started,
    StreamLoad,
    Tokens,
    WorkerLoad,
)
from d2o_server.errors import InvalidRequest
from d2o_server.rpc import bounds
from d2o_server.rpc.compression import compression_of, message_of, policy_number

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_ROLE_LENGTH = 64
MAX_CHAT_MESSAGES = 4096

FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    FinishReason.END_OF_TEXT: pb.FINISH_REASON_END_OF_TEXT,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
# Fields that the wire spells and types as the engine does.
_PLAIN_MODEL_FIELDS = tuple(
    field.name for field in fields(ModelInfo) if field.name not in ("default_compression", "default_sampling")
)
_PLAIN_LOAD_FIELDS = tuple(field.name for field in fields(Load) if field.name not in ("workers", "layers"))
_PLAIN_STREAM_FIELDS = tuple(field.name for field in fields(StreamLoad) if field.name not in ("state", "policy"))
_WORKER_FIELDS = tuple(field.name for field in fields(WorkerLoad))

# Field, lower and upper bound, and whether the lower bound itself is refused.
_SAMPLING_BOUNDS = (
    ("temperature", 0.0, 10.0, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("repetition_penalty", 0.0, 10.0, True),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
)


def generation_request(
    message: pb.GenerateTextRequest | pb.StreamGenerateTextRequest,
    info: ModelInfo,
    deadline: float | None = None,
    client_id: str | None = None,
    highest_priority: int = MAX_PRIORITY,
) -> GenerationRequest:
    """The request that ``message`` makes of a server that ``info`` describes; ``deadline`` is of time.monotonic.

    Raises:
        InvalidRequest: a field is out of bounds.
    """
    # A default length is the engine's to shorten where the context ends; a length that was asked for is not.
    default = replace(info.default_sampling, max_new_tokens=None)
    changes = _sampling_changes(message.sampling, info) | _stopping_changes(message.stopping, info)
    if message.HasField("logprobs"):
        changes["logprobs"] = bounds.whole("logprobs", message.logprobs, 0, info.max_logprobs)
    compression, max_loss = None, None
    if message.HasField("compression"):
        compression, max_loss = compression_of(message.compression, info.default_compression)
    return GenerationRequest(
        prompt=prompt(message.prompt, info),
        sampling=replace(default, **changes) if changes else default,
        compression=compression,
        max_loss=max_loss,
        deadline=deadline,
        client_id=client_id,
        priority=_priority(message, highest_priority),
    )


def _priority(message: pb.GenerateTextRequest | pb.StreamGenerateTextRequest, highest: int) -> int:
    if not message.HasField("priority"):
        return min(DEFAULT_PRIORITY, highest)
    return bounds.whole("priority", message.priority, 0, highest, "this caller's")


def prompt(message: pb.Prompt, info: ModelInfo) -> Prompt:
    """Text, token ids or chat messages; never empty.

    Raises:
        InvalidRequest: nothing is set, it is empty, or the model cannot take its kind.
    """
    match message.WhichOneof("source"):
        case "text":
            if not message.text:
                raise InvalidRequest("prompt.text", "an empty string", "at least one character")
            return message.text
        case "tokens":
            ids = message.tokens.ids
            if not ids:
                raise InvalidRequest("prompt.tokens.ids", "no ids", "at least one")
            bounds.at_most("prompt.tokens.ids", len(ids), info.max_model_len, "ids")
            return bounds.token_ids("prompt.tokens.ids", ids, info.vocabulary_size)
        case "chat":
            return _chat(message.chat.messages, info)
    raise InvalidRequest("prompt", "nothing", "one of text, tokens or chat")


def _chat(messages: Collection[pb.ChatMessage], info: ModelInfo) -> tuple[ChatMessage, ...]:
    if not info.has_chat_template:
        raise InvalidRequest("prompt.chat", "a conversation", "text or tokens: this model has no chat template")
    bounds.at_most("prompt.chat.messages", len(messages), MAX_CHAT_MESSAGES, "messages")
    conversation = tuple(ChatMessage(message.role, message.content) for message in messages)
    if not conversation:
        raise InvalidRequest("prompt.chat.messages", "no messages", "at least one")
    for index, turn in enumerate(conversation):
        if not 0 < len(turn.role) <= MAX_ROLE_LENGTH:
            field = f"prompt.chat.messages[{index}].role"
            raise InvalidRequest(field, f"{len(turn.role)} characters", f"1 to {MAX_ROLE_LENGTH}")
    return conversation


def _sampling_changes(message: pb.SamplingParameters, info: ModelInfo) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, low, high, above_low in _SAMPLING_BOUNDS:
        if message.HasField(name):
            given = getattr(message, name)
            changes[name] = bounds.number(f"sampling.{name}", given, low, high, above_low=above_low)
    if message.HasField("top_k"):
        # More than there are is all of them; no sampler then needs to look.
        changes["top_k"] = min(message.top_k, info.vocabulary_size)
    if message.HasField("seed"):
        changes["seed"] = message.seed
    if message.logit_bias:
        changes["logit_bias"] = _logit_bias(message.logit_bias, info.vocabulary_size)
    return changes


def _logit_bias(given: Mapping[int, float], vocabulary_size: int) -> tuple[tuple[int, float], ...]:
    field = "sampling.logit_bias"
    bounds.at_most(field, len(given), MAX_LOGIT_BIASES, "entries")
    return tuple(
        (
            bounds.whole(field, token, 0, vocabulary_size - 1, "the vocabulary"),
            bounds.number(f"{field}[{token}]", bias, -100, 100),
        )
        for token, bias in sorted(given.items())
    )


def _stopping_changes(message: pb.StoppingParameters, info: ModelInfo) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    most = info.default_sampling.max_new_tokens or info.max_model_len
    if message.HasField("max_new_tokens"):
        most = bounds.whole(
            "stopping.max_new_tokens", message.max_new_tokens, 1, info.max_model_len, "the model's context"
        )
        changes["max_new_tokens"] = most
        # A server's default must not refuse a request that never named it.
        changes["min_new_tokens"] = min(info.default_sampling.min_new_tokens, most)
    if message.HasField("min_new_tokens"):
        given = message.min_new_tokens
        changes["min_new_tokens"] = bounds.whole("stopping.min_new_tokens", given, 0, most, "max_new_tokens")
    if message.stop_strings:
        changes["stop_strings"] = _stop_strings(message.stop_strings)
    if message.stop_token_ids:
        field = "stopping.stop_token_ids"
        bounds.at_most(field, len(message.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
        changes["stop_token_ids"] = bounds.token_ids(field, message.stop_token_ids, info.vocabulary_size)
    if message.ignore_end_of_text:
        changes["ignore_end_of_text"] = True
    return changes


def _stop_strings(given: Iterable[str]) -> tuple[str, ...]:
    strings = tuple(given)
    bounds.at_most("stopping.stop_strings", len(strings), MAX_STOP_STRINGS, "strings")
    for index, string in enumerate(strings):
        if not 0 < len(string) <= MAX_STOP_STRING_LENGTH:
            field = f"stopping.stop_strings[{index}]"
            raise InvalidRequest(field, f"{len(string)} characters", f"1 to {MAX_STOP_STRING_LENGTH}")
    return strings


def stream_message(event: Event) -> pb.StreamGenerateTextResponse:
    """One event of a generation as one message of its stream."""
    message = pb.StreamGenerateTextResponse()
    if isinstance(event, Chunk):
        message.chunk.text = event.text
        append_tokens(message.chunk, event)
    elif isinstance(event, Started):
        message.started.CopyFrom(started_message(event))
    else:
        message.finished.CopyFrom(finished_message(event))
    return message


def append_tokens(target: pb.GenerationChunk | pb.GenerateTextResponse, chunk: Chunk) -> None:
    """Appends the chunk's tokens and log probabilities to ``target``."""
    target.token_ids.extend(chunk.token_ids)
    for logprob in chunk.logprobs:
        entry = target.logprobs.add(token_id=logprob.token_id, token=logprob.token, logprob=logprob.logprob)
        for top in logprob.top:
            entry.top.add(token_id=top.token_id, token=top.token, logprob=top.logprob)


def started_message(started: Started) -> pb.GenerationStarted:
    """What was admitted, with every field of the compression in force."""
    return pb.GenerationStarted(
        generation_id=started.generation_id,
        prompt_tokens=started.prompt_tokens,
        reserved_pages=started.reserved_pages,
        compression=message_of(started.compression),
        budget_per_layer=started.budget_per_layer,
        seed=started.seed,
        auto=started.auto,
    )


def finished_message(finished: Finished) -> pb.GenerationFinished:
    """How the generation ended, what it used and what became of its cache."""
    usage = finished.usage
    return pb.GenerationFinished(
        finish_reason=FINISH_REASONS[finished.reason],
        stop_string=finished.stop_string,
        stop_token_id=finished.stop_token_id,
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            queue_seconds=usage.queue_seconds,
            first_token_seconds=usage.first_token_seconds,
            total_seconds=usage.total_seconds,
            resumed=usage.resumed,
        ),
        cache=_cache_message(finished.cache),
    )


def _cache_message(cache: CacheFacts) -> pb.CacheFacts:
    layers = (
        pb.LayerCacheFacts(budget=layer.budget, kept=layer.kept, merged=layer.merged, dropped=layer.dropped)
        for layer in cache.layers
    )
    return pb.CacheFacts(
        layers=layers,
        ratio_reached=cache.ratio_reached,
        peak_pages=cache.peak_pages,
        compression_seconds=cache.compression_seconds,
    )


def tokens_message(tokens: Tokens) -> pb.TokenizeResponse:
    """A tokenized prompt; ``tokens`` is empty unless the texts were asked for."""
    return pb.TokenizeResponse(token_ids=tokens.ids, tokens=tokens.texts)


def model_info_message(info: ModelInfo) -> pb.GetModelInfoResponse:
    """The model, its limits and the defaults that unset fields take."""
    return pb.GetModelInfoResponse(
        **{name: getattr(info, name) for name in _PLAIN_MODEL_FIELDS},
        default_compression=message_of(info.default_compression),
        default_sampling=_sampling_message(info.default_sampling),
        default_max_new_tokens=info.default_sampling.max_new_tokens or info.max_model_len,
    )


def _sampling_message(sampling: SamplingParams) -> pb.SamplingParameters:
    numbers = {name: getattr(sampling, name) for name, *_ in _SAMPLING_BOUNDS}
    return pb.SamplingParameters(
        **numbers, top_k=sampling.top_k, seed=sampling.seed, logit_bias=dict(sampling.logit_bias)
    )


def load_message(load: Load, streams: Iterable[StreamLoad] = (), *, with_layers: bool = False) -> pb.GetLoadResponse:
    """Pages and requests, in all and by worker; each request of ``streams``, and each layer where asked for."""
    workers = [pb.WorkerLoad(**{name: getattr(worker, name) for name in _WORKER_FIELDS}) for worker in load.workers]
    layers = [pb.LayerLoad(budget=layer.budget, slots=layer.slots) for layer in load.layers] if with_layers else []
    return pb.GetLoadResponse(
        **{name: getattr(load, name) for name in _PLAIN_LOAD_FIELDS},
        workers=workers,
        streams=map(_stream_load_message, streams),
        layers=layers,
    )


def _stream_load_message(stream: StreamLoad) -> pb.StreamLoad:
    return pb.StreamLoad(
        **{name: getattr(stream, name) for name in _PLAIN_STREAM_FIELDS},
        state=f"STREAM_STATE_{stream.state.upper()}",
        policy=policy_number(stream.policy),
    )
