"""Bounds of a request's sampling parameters. The engine checks them too, for callers that do not come over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sized

from d2o_server.engine.types import SamplingParams
from d2o_server.errors import InvalidRequest

MAX_LOGIT_BIASES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 1024


def validate(sampling: SamplingParams, *, vocabulary_size: int, max_logprobs: int, default_max_new_tokens: int) -> None:
    """Checks every field of ``sampling``. Fields are named by their path in the proto's requests.

    Args:
        vocabulary_size: token ids are below it.
        max_logprobs: most top log probabilities that a request may ask for.
        default_max_new_tokens: what applies where ``max_new_tokens`` is None.

    Raises:
        InvalidRequest: a field is out of bounds.
    """
    _check_numbers(sampling)
    _check_whole("sampling.top_k", sampling.top_k, 0)
    if sampling.seed is not None:
        _check_whole("sampling.seed", sampling.seed, 0, 2**64 - 1)
    _check_logit_bias(sampling.logit_bias, vocabulary_size)
    _check_lengths(sampling, default_max_new_tokens)
    _check_stops(sampling, vocabulary_size)
    if sampling.logprobs is not None:
        _check_whole("logprobs", sampling.logprobs, 0, max_logprobs)


def _check_numbers(sampling: SamplingParams) -> None:
    _check_number("sampling.temperature", sampling.temperature, "[0, 10]", lambda given: 0 <= given <= 10)
    _check_number("sampling.top_p", sampling.top_p, "(0, 1]", lambda given: 0 < given <= 1)
    _check_number("sampling.min_p", sampling.min_p, "[0, 1]", lambda given: 0 <= given <= 1)
    _check_number("sampling.repetition_penalty", sampling.repetition_penalty, "(0, 10]", lambda given: 0 < given <= 10)
    for name in ("presence_penalty", "frequency_penalty"):
        _check_number(f"sampling.{name}", getattr(sampling, name), "[-2, 2]", lambda given: -2 <= given <= 2)


def _check_logit_bias(logit_bias: tuple[tuple[int, float], ...], vocabulary_size: int) -> None:
    field = "sampling.logit_bias"
    _check_count(field, logit_bias, MAX_LOGIT_BIASES)
    seen = set()
    for token_id, bias in logit_bias:
        _check_whole(field, token_id, 0, vocabulary_size - 1)
        _check_number(f"{field}[{token_id}]", bias, "[-100, 100]", lambda given: -100 <= given <= 100)
        if token_id in seen:
            raise InvalidRequest(field, f"token id {token_id} twice", "one bias a token id")
        seen.add(token_id)


def _check_lengths(sampling: SamplingParams, default_max_new_tokens: int) -> None:
    allowed = sampling.max_new_tokens
    if allowed is None:
        allowed = default_max_new_tokens
    else:
        _check_whole("stopping.max_new_tokens", allowed, 1)
    _check_whole("stopping.min_new_tokens", sampling.min_new_tokens, 0)
    if sampling.min_new_tokens > allowed:
        raise InvalidRequest("stopping.min_new_tokens", sampling.min_new_tokens, f"at most max_new_tokens = {allowed}")


def _check_stops(sampling: SamplingParams, vocabulary_size: int) -> None:
    _check_count("stopping.stop_strings", sampling.stop_strings, MAX_STOP_STRINGS)
    for place, text in enumerate(sampling.stop_strings):
        _check_text(f"stopping.stop_strings[{place}]", text, MAX_STOP_STRING_CHARACTERS)
    _check_count("stopping.stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKEN_IDS)
    for token_id in sampling.stop_token_ids:
        _check_whole("stopping.stop_token_ids", token_id, 0, vocabulary_size - 1)


def _check_number(field: str, given: object, allowed: str, fits: Callable[[float], bool]) -> None:
    """``fits`` compares with finite bounds, so that NaN and infinities never fit."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not fits(given):
        raise InvalidRequest(field, repr(given), f"a number in {allowed}")


def _check_whole(field: str, given: object, low: int, high: int | None = None) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < low or (high is not None and given > high):
        allowed = f"a whole number of at least {low}" if high is None else f"a whole number in [{low}, {high}]"
        raise InvalidRequest(field, repr(given), allowed)


def _check_text(field: str, given: object, longest: int) -> None:
    if not isinstance(given, str) or not 1 <= len(given) <= longest:
        shown = f"{len(given)} characters" if isinstance(given, str) else repr(given)
        raise InvalidRequest(field, shown, f"a string of 1 to {longest} characters")


def _check_count(field: str, given: Sized, most: int) -> None:
    if len(given) > most:
        raise InvalidRequest(field, f"{len(given)} entries", f"at most {most} entries")
