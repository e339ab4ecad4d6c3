"""From protobuf responses to this package's values. Nothing here does input or output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from enum import StrEnum
from typing import Any, TypeVar

from d2o_client._errors import InternalError
from d2o_client._options import Compression, LayerBudgets, MaxLoss, Merge, Policy
from d2o_client._requests import SAMPLING_NUMBERS
from d2o_client._types import (
    CacheFacts,
    Chunk,
    Finished,
    FinishReason,
    Generation,
    LayerCache,
    LayerLoad,
    Load,
    ModelInfo,
    Sampling,
    Started,
    StreamLoad,
    StreamState,
    TokenLogprob,
    Tokens,
    TopLogprob,
    Usage,
    WorkerLoad,
)
from d2o_inference.v1 import inference_service_pb2 as pb

EnumT = TypeVar("EnumT", bound=StrEnum)


def _enum_value(wrapper: Any, prefix: str, kind: type[EnumT], number: int) -> EnumT | None:
    """The member that a wire number stands for; None where it is unset or newer than this client."""
    try:
        return kind[wrapper.Name(number).removeprefix(prefix)]
    except (ValueError, KeyError):
        return None


def _present(message: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: _shorten(getattr(message, name)) for name in names if message.HasField(name)}


def _shorten(given: Any) -> Any:
    """A float32 of the wire as the decimal that was meant: 0.4, not 0.4000000059604645."""
    return float(f"{given:.7g}") if isinstance(given, float) else given


def compression_value(message: pb.Compression) -> Compression:
    """A Compression message as a value; what is unset is None."""
    plain = _present(message, ("ratio", "min_budget", "recent_share", "window_quota"))
    return Compression(
        policy=_enum_value(pb.CompressionPolicy, "COMPRESSION_POLICY_", Policy, message.policy),
        merge=_enum_value(pb.MergeRule, "MERGE_RULE_", Merge, message.merge),
        layer_budgets=_enum_value(pb.LayerBudgetRule, "LAYER_BUDGET_RULE_", LayerBudgets, message.layer_budgets),
        max_loss=_enum_value(pb.MaxLoss, "MAX_LOSS_", MaxLoss, message.max_loss),
        # The server sets every field: 0 says that no absolute budget is in force, and could not be sent back.
        budget_tokens=message.budget_tokens or None,
        **plain,
    )


def started_value(message: pb.GenerationStarted) -> Started:
    """The facts known at admission."""
    return Started(
        generation_id=message.generation_id,
        prompt_tokens=message.prompt_tokens,
        reserved_pages=message.reserved_pages,
        compression=compression_value(message.compression),
        budget_per_layer=message.budget_per_layer,
        seed=message.seed,
        auto=message.auto,
    )


def chunk_value(message: pb.GenerationChunk) -> Chunk:
    """A piece of the answer."""
    return Chunk(message.text, tuple(message.token_ids), _logprobs(message.logprobs))


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=message.token_id,
            token=message.token,
            logprob=message.logprob,
            top=tuple(TopLogprob(top.token_id, top.token, top.logprob) for top in message.top),
        )
        for message in messages
    )


def finished_value(message: pb.GenerationFinished) -> Finished:
    """How generation ended."""
    stopped_by = message.WhichOneof("stopped_by")
    reason = _enum_value(pb.FinishReason, "FINISH_REASON_", FinishReason, message.finish_reason)
    return Finished(
        reason=reason or FinishReason.UNKNOWN,
        stop_string=message.stop_string if stopped_by == "stop_string" else None,
        stop_token_id=message.stop_token_id if stopped_by == "stop_token_id" else None,
        usage=Usage(
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            queue_seconds=message.usage.queue_seconds,
            first_token_seconds=message.usage.first_token_seconds,
            total_seconds=message.usage.total_seconds,
            resumed=message.usage.resumed,
        ),
        cache=CacheFacts(
            layers=tuple(
                LayerCache(budget=layer.budget, kept=layer.kept, merged=layer.merged, dropped=layer.dropped)
                for layer in message.cache.layers
            ),
            ratio_reached=message.cache.ratio_reached,
            peak_pages=message.cache.peak_pages,
            compression_seconds=message.cache.compression_seconds,
        ),
    )


def generation_value(message: pb.GenerateTextResponse) -> Generation:
    """A whole answer.

    Raises:
        InternalError: the response lacks the facts of its start or its end.
    """
    for name in ("started", "finished"):
        if not message.HasField(name):
            raise InternalError(f"the server's response lacks its field `{name}`")
    return Generation(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        started=started_value(message.started),
        finished=finished_value(message.finished),
    )


def tokens_value(message: pb.TokenizeResponse) -> Tokens:
    """A tokenized prompt."""
    return Tokens(tuple(message.token_ids), tuple(message.tokens))


_MODEL_COMPOSED = ("default_compression", "default_sampling", "end_of_text_ids")
_MODEL_PLAIN = tuple(field.name for field in fields(ModelInfo) if field.name not in _MODEL_COMPOSED)
_LOAD_PLAIN = tuple(field.name for field in fields(Load) if field.name not in ("workers", "streams", "layers"))
_STREAM_PLAIN = tuple(field.name for field in fields(StreamLoad) if field.name not in ("state", "policy"))


def model_info_value(message: pb.GetModelInfoResponse) -> ModelInfo:
    """The model, its limits and the server's defaults."""
    sampling = _present(message.default_sampling, (*SAMPLING_NUMBERS, "top_k"))
    return ModelInfo(
        default_compression=compression_value(message.default_compression),
        default_sampling=Sampling(**sampling),
        end_of_text_ids=tuple(message.end_of_text_ids),
        **{name: getattr(message, name) for name in _MODEL_PLAIN},
    )


def load_value(message: pb.GetLoadResponse) -> Load:
    """Pages and requests at one moment."""
    workers = tuple(
        WorkerLoad(
            index=worker.index,
            serving=worker.serving,
            pages_total=worker.pages_total,
            pages_free=worker.pages_free,
            running=worker.running,
            restarts=worker.restarts,
        )
        for worker in message.workers
    )
    return Load(
        workers=workers,
        streams=tuple(map(_stream_load_value, message.streams)),
        layers=tuple(LayerLoad(budget=layer.budget, slots=layer.slots) for layer in message.layers),
        **{name: getattr(message, name) for name in _LOAD_PLAIN},
    )


def _stream_load_value(message: pb.StreamLoad) -> StreamLoad:
    return StreamLoad(
        state=_enum_value(pb.StreamState, "STREAM_STATE_", StreamState, message.state) or StreamState.UNKNOWN,
        policy=_enum_value(pb.CompressionPolicy, "COMPRESSION_POLICY_", Policy, message.policy),
        **{name: getattr(message, name) for name in _STREAM_PLAIN},
    )
