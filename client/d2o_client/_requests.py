"""From a caller's arguments to protobuf requests. Nothing here does input or output."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from d2o_client._errors import InvalidArgumentError, invalid
from d2o_client._options import ChatMessage, Compression, GenerationOptions, Prompt, check_number, check_whole
from d2o_inference.v1 import inference_service_pb2 as pb

SAMPLING_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_PROMPT_ALLOWED = "text, token ids, or chat messages as ChatMessage, {'role', 'content'} or (role, content)"


def generation_fields(prompt: Prompt, options: GenerationOptions) -> dict[str, Any]:
    """The fields that a unary and a streaming request share.

    Raises:
        InvalidArgumentError: an argument has the wrong type, or a value that the wire cannot carry.
        TypeError: an option has no such name.
    """
    _check_names(options)
    for name in ("logprobs", "priority"):
        check_whole(name, options.get(name), bits=32)
    return {
        "prompt": prompt_message(prompt),
        "sampling": _sampling_message(options),
        "stopping": _stopping_message(options),
        "compression": _compression_message(options.get("compression")),
        "logprobs": options.get("logprobs"),
        "priority": options.get("priority"),
    }


def _check_names(options: GenerationOptions) -> None:
    for name in options:
        if name not in GenerationOptions.__optional_keys__:
            near = difflib.get_close_matches(name, GenerationOptions.__optional_keys__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")


def prompt_message(prompt: Prompt) -> pb.Prompt:
    """A prompt of any accepted form as its message."""
    return _prompt_message(prompt)


def _prompt_message(prompt: object) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=_text("prompt", prompt))
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise invalid("prompt", prompt, _PROMPT_ALLOWED)
    if not prompt:
        raise invalid("prompt", prompt, "at least one token id or message")
    if isinstance(prompt[0], numbers.Integral):
        return pb.Prompt(tokens=pb.TokenIds(ids=_token_ids("prompt", prompt)))
    messages = [_chat_message(f"prompt[{index}]", turn) for index, turn in enumerate(prompt)]
    return pb.Prompt(chat=pb.ChatMessages(messages=messages))


def _chat_message(field: str, turn: object) -> pb.ChatMessage:
    match turn:
        case ChatMessage(role=role, content=content):
            pass
        case {"role": role, "content": content, **rest} if not rest:
            pass
        case (role, content):
            pass
        case _:
            raise invalid(field, turn, "a ChatMessage, {'role', 'content'} or (role, content)")
    return pb.ChatMessage(role=_text(f"{field}.role", role), content=_text(f"{field}.content", content))


def _text(field: str, given: object) -> str:
    if not isinstance(given, str):
        raise invalid(field, given, "a string")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{field}: character {error.start} is half of a surrogate pair, not text") from None
    return given


def _token_ids(field: str, given: object) -> list[int]:
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise invalid(field, given, "a sequence of token ids")
    for index, token_id in enumerate(given):
        _require_whole(f"{field}[{index}]", token_id)
    return [int(token_id) for token_id in given]


def _require_whole(field: str, given: object) -> None:
    if given is None:
        raise invalid(field, given, "a whole number")
    check_whole(field, given, bits=32)


def _sampling_message(options: GenerationOptions) -> pb.SamplingParameters:
    given: Mapping[str, Any] = options
    for name in SAMPLING_NUMBERS:
        check_number(name, given.get(name))
    check_whole("top_k", given.get("top_k"), bits=32)
    check_whole("seed", given.get("seed"), bits=64)
    fields = {name: given.get(name) for name in (*SAMPLING_NUMBERS, "top_k", "seed")}
    return pb.SamplingParameters(**fields, logit_bias=_logit_bias(options.get("logit_bias")))


def _logit_bias(given: object) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise invalid("logit_bias", given, "a mapping of token ids to numbers")
    for token_id, bias in given.items():
        _require_whole("logit_bias: key", token_id)
        if bias is None:
            raise invalid(f"logit_bias[{token_id}]", bias, "a finite number")
        check_number(f"logit_bias[{token_id}]", bias)
    return {int(token_id): float(bias) for token_id, bias in given.items()}


def _stopping_message(options: GenerationOptions) -> pb.StoppingParameters:
    for name in ("max_new_tokens", "min_new_tokens"):
        check_whole(name, options.get(name), bits=32)
    ignore = options.get("ignore_end_of_text")
    if ignore is not None and not isinstance(ignore, bool):
        raise invalid("ignore_end_of_text", ignore, "True or False")
    return pb.StoppingParameters(
        max_new_tokens=options.get("max_new_tokens"),
        min_new_tokens=options.get("min_new_tokens"),
        stop_strings=_stop_strings(options.get("stop")),
        stop_token_ids=_token_ids("stop_token_ids", options.get("stop_token_ids") or ()),
        ignore_end_of_text=bool(ignore),
    )


def _stop_strings(given: object) -> list[str]:
    if given is None:
        return []
    if isinstance(given, str):
        return [_text("stop", given)]
    if not isinstance(given, Iterable) or isinstance(given, (bytes, bytearray)):
        raise invalid("stop", given, "a string or a sequence of strings")
    return [_text(f"stop[{index}]", string) for index, string in enumerate(given)]


def _compression_message(given: object) -> pb.Compression | None:
    if given is None:
        return None
    if isinstance(given, str):
        given = Compression(policy=given)
    if not isinstance(given, Compression):
        raise invalid("compression", given, "a policy's name or a Compression")
    return pb.Compression(
        policy=_enum_number(pb.CompressionPolicy, "COMPRESSION_POLICY_", given.policy),
        ratio=given.ratio,
        min_budget=given.min_budget,
        budget_tokens=given.budget_tokens,
        recent_share=given.recent_share,
        window_quota=given.window_quota,
        merge=_enum_number(pb.MergeRule, "MERGE_RULE_", given.merge),
        layer_budgets=_enum_number(pb.LayerBudgetRule, "LAYER_BUDGET_RULE_", given.layer_budgets),
        max_loss=_enum_number(pb.MaxLoss, "MAX_LOSS_", given.max_loss),
    )


def _enum_number(wrapper: Any, prefix: str, member: str | None) -> Any:
    return wrapper.Value(prefix + member.upper()) if member is not None else 0
