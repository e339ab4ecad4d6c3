"""The flags of every command, and what they make: a client, generation options, a compression."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from typing import Any

from d2o_client._channel import DEFAULT_TARGET, TLS, version
from d2o_client._core import DEFAULT_TIMEOUT, RetryPolicy
from d2o_client._options import Compression, GenerationOptions, LayerBudgets, MaxLoss, Merge, Policy
from d2o_client._sync import Client

TARGET_VARIABLE = "D2O_TARGET"
API_KEY_VARIABLE = "D2O_API_KEY"
MOST_STREAMS = 1024
# A person waits: give up sooner than a program would.
RETRY = RetryPolicy(max_attempts=3)

_SAMPLING_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("max_new_tokens", int, "at most this many new tokens"),
    ("min_new_tokens", int, "no end before this many new tokens"),
    ("temperature", float, "0 is greedy"),
    ("top_k", int, "keep the k most probable tokens; 0 keeps all"),
    ("top_p", float, "keep the smallest set whose probability reaches this, in (0, 1]"),
    ("min_p", float, "keep tokens at least this probable, relative to the most probable one"),
    ("repetition_penalty", float, "divides the logits of tokens seen; 1 is off"),
    ("presence_penalty", float, "subtracted once from the logits of tokens in the answer"),
    ("frequency_penalty", float, "subtracted as often as a token is in the answer"),
    ("seed", int, "the same seed gives the same answer"),
    ("priority", int, "from 0 to 9: who waits for cache pages goes by it, the higher first"),
    ("logprobs", int, "report log probabilities of this many top tokens (with --json)"),
)
_COMPRESSION_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("ratio", float, "a layer's average budget as a share of the prompt, in (0, 1]"),
    ("min_budget", int, "but at least this many slots"),
    ("budget_tokens", int, "an absolute budget in slots instead"),
    ("recent_share", float, "share of the budget for the most recent tokens"),
    ("window_quota", float, "share of the budget for the best tokens by the last queries"),
)


def build_parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """The whole command line. ``environment`` gives the target and the API key where flags do not."""
    common = _common_flags(environment)
    generation = _generation_flags()
    parser = argparse.ArgumentParser(prog="d2o", description="Talk to a running d2o-serve.")
    parser.add_argument("--version", action="version", version=f"d2o {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", parents=[common, generation], help="answer one prompt")
    generate.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    generate.add_argument("--raw", action="store_true", help="send plain text, without the model's chat template")
    commands.add_parser("chat", parents=[common, generation], help="hold a conversation")
    commands.add_parser("info", parents=[common], help="describe the model and the server's defaults")
    load = commands.add_parser("load", parents=[common], help="show cache pages and requests")
    load.add_argument(
        "--watch", nargs="?", type=_positive, const=1.0, metavar="SECONDS", help="again every second, or every SECONDS"
    )
    top = commands.add_parser("top", parents=[common], help="watch load, pages, requests and layers, live")
    top.add_argument("--once", action="store_true", help="print one frame and end")
    top.add_argument(
        "--interval", type=_positive, default=1.0, metavar="SECONDS", help="between frames (default: 1 second)"
    )
    top.add_argument(
        "--streams", type=_streams, default=None, metavar="N", help="show N requests at most (default: what fits)"
    )
    return parser


def _streams(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 <= (value := int(text)) <= MOST_STREAMS:
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, allowed is 0 to {MOST_STREAMS}")


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if (value := float(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a positive number")


def _common_flags(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.set_defaults(api_key=environment.get(API_KEY_VARIABLE))
    group = flags.add_argument_group("connection")
    target = environment.get(TARGET_VARIABLE) or DEFAULT_TARGET
    group.add_argument(
        "--target", default=target, metavar="HOST:PORT", help=f"default: ${TARGET_VARIABLE}, else {DEFAULT_TARGET}"
    )
    group.add_argument(
        "--timeout", type=_positive, default=DEFAULT_TIMEOUT, metavar="SECONDS", help="of each call, with its retries"
    )
    group.add_argument("--tls", action="store_true", help="use TLS with the usual roots")
    group.add_argument("--tls-ca", metavar="FILE", help="certificates that the server's must lead to")
    group.add_argument("--tls-cert", metavar="FILE", help="this client's certificate")
    group.add_argument("--tls-key", metavar="FILE", help="its private key")
    group.add_argument("--tls-server-name", metavar="NAME", help="the name to expect in the server's certificate")
    group.add_argument("--json", action="store_true", help="print one JSON document a line")
    return flags


def _generation_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    flags.add_argument(
        "--stats", action=argparse.BooleanOptionalAction, help="a summary on standard error (default: without --json)"
    )
    sampling = flags.add_argument_group("sampling and stopping (default: the server's)")
    _add_flags(sampling, _SAMPLING_FLAGS)
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    sampling.add_argument("--stop-token-id", action="append", type=int, metavar="ID", help="end after this token")
    sampling.add_argument("--logit-bias", action="append", type=_bias, metavar="ID=VALUE", help="may be repeated")
    sampling.add_argument("--ignore-end-of-text", action="store_true", help="go on past the end of text")
    compression = flags.add_argument_group("compression (default: the server's)")
    compression.add_argument("--compression", choices=list(map(str, Policy)), help="the policy; none: the full cache")
    compression.add_argument("--max-loss", choices=list(map(str, MaxLoss)), help="may be lost, instead of a ratio")
    _add_flags(compression, _COMPRESSION_FLAGS)
    compression.add_argument("--merge", choices=list(map(str, Merge)), help="how evicted tokens are merged")
    compression.add_argument(
        "--layer-budgets", choices=list(map(str, LayerBudgets)), help="how the budget is divided over layers"
    )
    return flags


def _add_flags(group: Any, flags: tuple[tuple[str, type, str], ...]) -> None:
    for name, kind, text in flags:
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X", help=text)


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is ID=VALUE such as 42=-1.5") from None


def connect(arguments: argparse.Namespace) -> Client:
    """The client that the connection flags describe."""
    tls = TLS(
        ca=arguments.tls_ca,
        certificate=arguments.tls_cert,
        key=arguments.tls_key,
        server_name=arguments.tls_server_name,
    )
    return Client(
        arguments.target,
        tls=tls if arguments.tls or tls != TLS() else None,
        timeout=arguments.timeout,
        retry=RETRY,
        api_key=arguments.api_key,
    )


def generation_options(arguments: argparse.Namespace) -> GenerationOptions:
    """The options that the sampling and compression flags describe; flags that were not given are left out."""
    options = GenerationOptions(
        stop=arguments.stop,
        stop_token_ids=arguments.stop_token_id,
        logit_bias=dict(arguments.logit_bias or ()),
        ignore_end_of_text=arguments.ignore_end_of_text,
        compression=_compression(arguments),
    )
    given: Any = {name: getattr(arguments, name) for name, _, _ in _SAMPLING_FLAGS}
    options.update(given)
    return options


def _compression(arguments: argparse.Namespace) -> Compression | None:
    compression = Compression(
        policy=arguments.compression,
        merge=arguments.merge,
        layer_budgets=arguments.layer_budgets,
        max_loss=arguments.max_loss,
        **{name: getattr(arguments, name) for name, _, _ in _COMPRESSION_FLAGS},
    )
    return compression if compression != Compression() else None
